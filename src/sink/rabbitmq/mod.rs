//! RabbitMQ over AMQP 0-9-1, with publisher confirms and `mandatory` always.
//!
//! - `link`: the connection of all workers: kept up, watched, announced.
//! - `way`: that connection, or one of a worker's own.
//! - `connector`: one connection, to one of the addresses.
//! - `connection`: a connection that ends in order, with its channels.
//! - `tls`: certificates for it.
//! - `publisher`: one channel per worker; a batch out, all confirms in, then the verdicts.
//! - `exchanges`: which exchanges may be published to, asked on a channel of its own.
//! - `breaks`: exchanges that break the connection when they are asked for.
//! - `confirms`: the answers of the broker, gathered.
//! - `rounds`: in which order the messages of a batch are sent.
//! - `message`: a row as an AMQP message.
//! - `classify`: what the broker's errors mean.
//! - `preflight`: what `check` looks at.

mod breaks;
pub mod classify;
mod confirms;
mod connection;
mod connector;
mod exchanges;
mod link;
pub mod message;
pub mod preflight;
mod publisher;
mod rounds;
mod tls;
mod way;

pub use publisher::RabbitPublisher;

use super::{Sink, SinkState};
use crate::config::Broker;
use crate::telemetry::Metrics;
use breaks::Breaks;
use connection::BrokerConnection;
use link::Link;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use way::{Apart, Way};

/// A RabbitMQ broker, or a cluster of several addresses.
#[derive(Debug)]
pub struct RabbitMq {
    confirm_timeout: Duration,
    state: watch::Receiver<SinkState>,
    connection: watch::Receiver<Option<Arc<BrokerConnection>>>,
    apart: Apart,
    breaks: Breaks,
    stop: CancellationToken,
    link: Mutex<Option<JoinHandle<()>>>,
}

impl RabbitMq {
    /// Begins to connect in the background, and goes on for as long as it takes.
    pub fn connect(broker: impl Into<Broker>, confirm_timeout: Duration, metrics: Arc<Metrics>) -> Self {
        let (broker, stop) = (broker.into(), CancellationToken::new());
        let apart = Apart::new(broker.clone(), stop.clone());
        let (link, state, connection) = Link::new(broker, metrics, stop.clone());
        let link = Mutex::new(Some(tokio::spawn(link.run())));
        Self { confirm_timeout, state, connection, apart, breaks: Breaks::default(), stop, link }
    }

    fn publisher_by(&self, way: Way) -> RabbitPublisher {
        RabbitPublisher::new(way, self.state.clone(), self.confirm_timeout, self.breaks.clone())
    }
}

impl Sink for RabbitMq {
    type Publisher = RabbitPublisher;

    fn publisher(&self) -> RabbitPublisher {
        self.publisher_by(Way::Shared(self.connection.clone()))
    }

    fn publisher_apart(&self) -> RabbitPublisher {
        self.publisher_by(self.apart.way())
    }

    fn state(&self) -> watch::Receiver<SinkState> {
        self.state.clone()
    }

    async fn close(&self) {
        self.stop.cancel();
        let link = self.link.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(link) = link
            && let Err(error) = link.await
        {
            tracing::error!(%error, "the keeper of the broker's connection failed");
        }
        self.apart.close().await;
    }
}

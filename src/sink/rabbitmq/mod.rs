//! RabbitMQ over AMQP 0-9-1, with publisher confirms and `mandatory` always.
//!
//! - `link`: the connection: kept up, watched, announced.
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
mod exchanges;
mod link;
pub mod message;
pub mod preflight;
mod publisher;
mod rounds;
mod tls;

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

/// A RabbitMQ broker, or a cluster of several addresses.
#[derive(Debug)]
pub struct RabbitMq {
    confirm_timeout: Duration,
    state: watch::Receiver<SinkState>,
    connection: watch::Receiver<Option<Arc<BrokerConnection>>>,
    breaks: Breaks,
    stop: CancellationToken,
    link: Mutex<Option<JoinHandle<()>>>,
}

impl RabbitMq {
    /// Begins to connect in the background, and goes on for as long as it takes.
    pub fn connect(broker: impl Into<Broker>, confirm_timeout: Duration, metrics: Arc<Metrics>) -> Self {
        let stop = CancellationToken::new();
        let (link, state, connection) = Link::new(broker.into(), metrics, stop.clone());
        let link = Mutex::new(Some(tokio::spawn(link.run())));
        Self { confirm_timeout, state, connection, breaks: Breaks::default(), stop, link }
    }
}

impl Sink for RabbitMq {
    type Publisher = RabbitPublisher;

    fn publisher(&self) -> RabbitPublisher {
        let (connection, state) = (self.connection.clone(), self.state.clone());
        RabbitPublisher::new(connection, state, self.confirm_timeout, self.breaks.clone())
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
    }
}

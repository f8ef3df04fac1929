//! The connection to the broker: kept up for as long as the relay runs, watched, announced.
//!
//! lapin's own recovery stays off: whatever was in flight is unknown after a loss anyway, and a
//! fresh connection is simpler to reason about.

use super::classify::sentence;
use super::connection::BrokerConnection;
use super::connector::Connector;
use crate::config::Broker;
use crate::retry::{CONFIGURATION_BACKOFF, OUTAGE_BACKOFF};
use crate::sink::{Away, SinkState};
use crate::telemetry::{Metrics, Peer};
use futures_util::StreamExt;
use lapin::{Connection, Event};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How often the connection is looked at besides its events.
const LOOK: Duration = Duration::from_millis(100);

type Connected = Option<Arc<BrokerConnection>>;

/// The task that owns the connection.
pub(super) struct Link {
    connector: Connector,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
    state: watch::Sender<SinkState>,
    connection: watch::Sender<Connected>,
}

impl Link {
    pub(super) fn new(
        broker: Broker,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> (Self, watch::Receiver<SinkState>, watch::Receiver<Connected>) {
        let (state, state_seen) = watch::channel(SinkState::Away(Away::outage("not connected yet")));
        let (connection, connection_seen) = watch::channel(None);
        let connector = Connector::new(broker);
        (Self { connector, metrics, stop, state, connection }, state_seen, connection_seen)
    }

    /// Connects, watches, connects again, until it is stopped.
    pub(super) async fn run(mut self) {
        let stop = self.stop.clone();
        let _ = stop.run_until_cancelled(self.keep_up()).await;
        let connection = self.connection.send_replace(None);
        if let Some(connection) = connection {
            connection.close("stopping").await;
        }
    }

    async fn keep_up(&mut self) {
        let mut was_up = false;
        loop {
            let connection = self.connect_until_up().await;
            if std::mem::replace(&mut was_up, true) {
                self.metrics.reconnected(Peer::Broker);
            }
            tracing::info!(server = %self.connector.describe(), "connected to the broker");
            self.connection.send_replace(Some(Arc::clone(&connection)));
            self.state.send_replace(SinkState::Ready);
            let reason = self.watch(&connection).await;
            tracing::warn!(reason, "lost the broker");
            self.state.send_replace(SinkState::Away(Away::outage(reason)));
            self.connection.send_replace(None);
            // The one that was lost may be going down.
            self.connector.turn();
        }
    }

    async fn connect_until_up(&mut self) -> Arc<BrokerConnection> {
        let (mut outages, mut refusals) = (0_u32, 0_u32);
        loop {
            let away = match self.connector.connect().await {
                Ok(connection) => return Arc::new(connection),
                Err(away) => away,
            };
            let (backoff, tries) = match away.configuration {
                true => (CONFIGURATION_BACKOFF, &mut refusals),
                false => (OUTAGE_BACKOFF, &mut outages),
            };
            self.announce_away(away);
            tokio::time::sleep(backoff.delay(*tries)).await;
            *tries = tries.saturating_add(1);
        }
    }

    /// Tells a reason once, not at each try.
    fn announce_away(&self, away: Away) {
        let Away { reason, configuration } = &away;
        if !matches!(&*self.state.borrow(), SinkState::Away(told) if *told == away) {
            tracing::warn!(reason, configuration, "cannot reach the broker; retrying");
        }
        self.state.send_replace(SinkState::Away(away));
    }

    /// Returns when the connection is lost, with the reason.
    async fn watch(&self, connection: &Connection) -> String {
        let mut events = connection.events_listener();
        let mut look = tokio::time::interval(LOOK);
        let mut last_look = Instant::now();
        let mut blocked_because = String::new();
        let mut last_error = "the connection was closed".to_owned();
        loop {
            tokio::select! {
                biased;
                // 1. What the broker says; the reason of a block comes only this way.
                event = events.next() => match event {
                    // Errors of single channels come this way too; only the status tells them apart.
                    Some(Event::Error(error)) => last_error = sentence(&error),
                    Some(Event::ConnectionBlocked(reason)) => blocked_because = reason,
                    Some(_) => {}
                    None => return "the connection ended".to_owned(),
                },
                // 2. What the connection is, should an event be missed.
                _ = look.tick() => {}
            }
            let status = connection.status();
            if !status.connected() {
                return last_error;
            }
            self.announce_block(status.blocked(), &blocked_because, last_look.elapsed());
            last_look = Instant::now();
        }
    }

    fn announce_block(&self, blocked: bool, reason: &str, since_last_look: Duration) {
        let was_blocked = !self.state.borrow().is_ready();
        if was_blocked && blocked {
            self.metrics.broker_blocked_seconds.inc_by(since_last_look.as_secs_f64());
        }
        match (was_blocked, blocked) {
            (false, true) => {
                tracing::warn!(reason, "the broker asks publishers to stop; waiting");
                self.state.send_replace(SinkState::Blocked { reason: reason.to_owned() });
            }
            (true, false) => {
                tracing::info!("the broker accepts messages again");
                self.state.send_replace(SinkState::Ready);
            }
            _ => {}
        }
    }
}

/// However the link ends, nobody may believe it up: workers then end, and supervision notices.
impl Drop for Link {
    fn drop(&mut self) {
        let reason = "the connection's keeper has ended";
        self.state.send_replace(SinkState::Away(Away::outage(reason)));
        self.connection.send_replace(None);
    }
}

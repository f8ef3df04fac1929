//! How a publisher comes by its connection: by that of all workers, or by one of its own, for messages that may break it.
//!
//! One of its own is opened when a message is to be sent and closed when none has been for a while. What breaks it was
//! alone on it.

use super::connection::BrokerConnection;
use super::connector::Connector;
use crate::config::Broker;
use crate::retry::{CONFIGURATION_BACKOFF, OUTAGE_BACKOFF, Rest};
use crate::sink::Away;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long one that is not used is kept.
const KEPT: Duration = Duration::from_secs(20);
/// After a connect that failed: all rows of a worker have waited for it.
const CONNECT_REST: Rest = Rest { times: 10, at_most: Duration::from_secs(60) };

/// To the broker.
#[derive(Debug)]
pub(super) enum Way {
    /// That of all workers.
    Shared(watch::Receiver<Option<Arc<BrokerConnection>>>),
    /// One of its own.
    Own(Box<Own>),
}

impl Way {
    pub(super) fn is_own(&self) -> bool {
        matches!(self, Self::Own(_))
    }

    /// A connection, or why there is none.
    pub(super) async fn connection(&mut self) -> Result<Arc<BrokerConnection>, String> {
        match self {
            Self::Shared(connection) => connection.borrow().clone().ok_or_else(|| "not connected".to_owned()),
            Self::Own(own) => own.connection().await.map_err(|away| away.reason),
        }
    }

    /// Nothing is on its way any more.
    pub(super) fn rest(&self) {
        if let Self::Own(own) = self {
            own.busy.send_replace(false);
        }
    }
}

/// What opens connections of workers' own.
#[derive(Debug, Clone)]
pub(super) struct Apart {
    broker: Broker,
    /// Closes them.
    stop: CancellationToken,
    /// Waited for at the end.
    keepers: TaskTracker,
}

/// The one of a worker.
#[derive(Debug)]
pub(super) struct Own {
    connector: Connector,
    stop: CancellationToken,
    keepers: TaskTracker,
    connection: Weak<BrokerConnection>,
    /// Whether its keeper has closed it.
    closed: Option<Arc<AtomicBool>>,
    failed: Option<Failed>,
    /// Tells its keeper whether it is used; dropped, it ends the connection.
    busy: watch::Sender<bool>,
}

/// Why there is none.
#[derive(Debug)]
struct Failed {
    away: Away,
    tries: u32,
    try_again: Instant,
}

impl Apart {
    pub(super) fn new(broker: Broker, stop: CancellationToken) -> Self {
        Self { broker, stop, keepers: TaskTracker::new() }
    }

    pub(super) fn way(&self) -> Way {
        Way::Own(Box::new(Own {
            connector: Connector::new(self.broker.clone()),
            stop: self.stop.clone(),
            keepers: self.keepers.clone(),
            connection: Weak::new(),
            closed: None,
            failed: None,
            busy: watch::Sender::new(false),
        }))
    }

    /// Waits until all are closed.
    pub(super) async fn close(&self) {
        self.stop.cancel();
        self.keepers.close();
        self.keepers.wait().await;
    }
}

impl Own {
    /// The connection, opened anew after a loss. Where that fails, the next try is put off: whoever asks has more to do.
    async fn connection(&mut self) -> Result<Arc<BrokerConnection>, Away> {
        self.busy.send_replace(true);
        let connection = self.connection.upgrade();
        if let Some(connection) = connection.filter(|connection| connection.status().connected()) {
            return Ok(connection);
        }
        if self.closed.take().is_some_and(|closed| !closed.load(Relaxed)) {
            // It broke, and that may have been the server.
            self.connector.turn();
        }
        if let Some(failed) = self.failed.as_ref().filter(|failed| Instant::now() < failed.try_again) {
            return Err(failed.away.clone());
        }
        let begun = Instant::now();
        match self.connector.connect().await {
            Ok(connection) => Ok(self.opened(Arc::new(connection))),
            Err(away) => Err(self.failed(away, begun.elapsed())),
        }
    }

    fn opened(&mut self, connection: Arc<BrokerConnection>) -> Arc<BrokerConnection> {
        let closed = Arc::new(AtomicBool::new(false));
        (self.connection, self.failed) = (Arc::downgrade(&connection), None);
        self.closed = Some(Arc::clone(&closed));
        let keeper = keep(Arc::clone(&connection), self.busy.subscribe(), closed, self.stop.clone());
        self.keepers.spawn(keeper);
        connection
    }

    fn failed(&mut self, away: Away, took: Duration) -> Away {
        let tries = self.failed.take().map_or(0, |failed| failed.tries.saturating_add(1));
        // One of several addresses is no news.
        if tries == 1 {
            let reason = &away.reason;
            tracing::warn!(reason, "cannot open a connection for messages that may break it; retrying");
        }
        let backoff = if away.configuration { CONFIGURATION_BACKOFF } else { OUTAGE_BACKOFF };
        let more_addresses = !(tries as usize + 1).is_multiple_of(self.connector.addresses());
        let rest = match more_addresses {
            true => OUTAGE_BACKOFF.min,
            false => backoff.delay(tries).max(CONNECT_REST.after(took)),
        };
        self.failed = Some(Failed { away: away.clone(), tries, try_again: Instant::now() + rest });
        away
    }
}

/// Closes it when it is used no more.
async fn keep(
    connection: Arc<BrokerConnection>,
    mut busy: watch::Receiver<bool>,
    closed: Arc<AtomicBool>,
    stop: CancellationToken,
) {
    let until_unused = async {
        while connection.status().connected() {
            let is_busy = *busy.borrow_and_update();
            let limit = if is_busy { Duration::MAX } else { KEPT };
            if !matches!(tokio::time::timeout(limit, busy.changed()).await, Ok(Ok(()))) {
                return;
            }
        }
    };
    let _ = stop.run_until_cancelled(until_unused).await;
    closed.store(connection.status().connected(), Relaxed);
    connection.close("no longer needed").await;
}

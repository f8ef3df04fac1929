//! What `/health` says: the state of both servers and of the table, and one reason if all is not well.

use crate::ownership::Holdings;
use crate::sink::SinkState;
use crate::store::Census;
use crate::telemetry::{Database, Peer, Telemetry};
use serde::{Deserialize, Serialize};
use std::time::Instant;
use tokio::sync::watch;
use uuid::Uuid;

/// Everything the endpoints look at.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "the types say it")]
pub struct View {
    pub telemetry: Telemetry,
    pub sink: watch::Receiver<SinkState>,
    pub holdings: watch::Receiver<Holdings>,
}

/// The body of `/health`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Health {
    /// `ok` or `unavailable`.
    pub status: String,
    /// Why not ok, in one sentence.
    pub reason: Option<String>,
    /// `up` or `down`.
    pub database: Part,
    /// `up`, `down` or `blocked`.
    pub broker: Part,
    /// Who publishes what.
    pub ownership: Ownership,
    /// Why some rows cannot be marked although the database is up; absent if all can.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub unmarked: Option<String>,
    /// Rows committed and neither delivered nor dead. Null, as the other counts, until they were counted.
    pub pending: Option<u64>,
    /// Age of the oldest pending row that is due.
    pub oldest_pending_seconds: Option<f64>,
    /// Rows that are dead.
    pub dead: Option<u64>,
    /// Rows refused and waiting.
    pub waiting: Option<u64>,
    /// Keys held back by a waiting row.
    pub blocked_keys: Option<u64>,
    /// Routes that refuse everything.
    pub parked_routes: u64,
    /// Rows read and not settled.
    pub in_flight: u64,
    /// Their bytes.
    pub in_flight_bytes: u64,
    /// A stop is under way.
    pub stopping: bool,
    /// Version of the binary.
    pub version: String,
}

/// One server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Part {
    /// In one word.
    pub state: String,
    /// In one sentence, unless up.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
}

/// Shards and their owner.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ownership {
    /// `owner`: this replica publishes. `standby`: others own every shard. `waiting`: the lease table has not been
    /// reached, or not lately enough. `refused`: other replicas run with another number of shards.
    pub state: String,
    /// Why not `owner` or `standby`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
    /// This process.
    pub replica: Uuid,
    /// Replicas that live.
    pub replicas: u32,
    /// Shards in all.
    pub shards: u32,
    /// Shards this replica publishes.
    pub owned: u32,
    /// Highest epoch of its leases.
    pub epoch: i64,
    /// Which shards.
    pub owned_shards: Vec<u32>,
}

impl Ownership {
    /// Why this replica cannot own anything.
    fn problem(&self) -> Option<String> {
        self.reason.as_ref().map(|reason| format!("ownership: {reason}"))
    }
}

impl Part {
    fn new(state: &str, reason: Option<String>) -> Self {
        Self { state: state.to_owned(), reason }
    }
}

impl Health {
    /// Why the relay is not ready: a server that cannot be used, or does not take what is written to it. A broker that blocks
    /// is reachable.
    pub fn not_ready(&self) -> Option<String> {
        if self.stopping {
            return Some("stopping".to_owned());
        }
        let down = |name: &str, part: &Part| {
            let reason = part.reason.clone().unwrap_or_default();
            (part.state == "down").then(|| format!("{name}: {reason}"))
        };
        let ownership = || self.ownership.problem();
        down("database", &self.database)
            .or_else(|| down("broker", &self.broker))
            .or_else(ownership)
            .or_else(|| self.unmarked.clone())
    }
}

impl View {
    fn ownership(&self) -> Ownership {
        let holdings = self.holdings.borrow();
        let leases = holdings.leases();
        let (state, reason) = if holdings.refused.is_some() {
            ("refused", holdings.refused.clone())
        } else if !holdings.is_trusted(Instant::now()) {
            ("waiting", Some("no lease has been renewed lately".to_owned()))
        } else if leases.is_empty() {
            ("standby", None)
        } else {
            ("owner", None)
        };
        Ownership {
            state: state.to_owned(),
            reason,
            replica: holdings.replica,
            replicas: holdings.replicas,
            shards: holdings.shards(),
            owned: leases.len() as u32,
            epoch: holdings.highest_epoch(),
            owned_shards: leases.iter().map(|lease| lease.shard).collect(),
        }
    }

    /// The text Prometheus scrapes. What is a state, and nobody's count, is taken now: it may have changed by the clock alone.
    pub fn metrics(&self) -> String {
        let Health { database, broker, ownership, .. } = self.health();
        self.telemetry.metrics.peer_up(Peer::Database, database.state == "up");
        self.telemetry.metrics.peer_up(Peer::Broker, broker.state != "down");
        let owned = if ownership.state == "owner" { ownership.owned } else { 0 };
        self.telemetry.metrics.owned_shards.set(owned.into());
        self.telemetry.metrics.replicas.set(ownership.replicas.into());
        self.telemetry.metrics.lease_epoch.set(ownership.epoch);
        self.telemetry.metrics.encode()
    }

    /// The state now. Counts of the table are at most a second old while counting is quick.
    pub fn health(&self) -> Health {
        let database = match self.telemetry.board.database() {
            Database::Up => Part::new("up", None),
            Database::Unknown => Part::new("down", Some("not connected yet".to_owned())),
            Database::Down(reason) => Part::new("down", Some(reason)),
        };
        let broker = match &*self.sink.borrow() {
            SinkState::Ready => Part::new("up", None),
            SinkState::Away(away) => Part::new("down", Some(away.reason.clone())),
            SinkState::Blocked { reason } => {
                Part::new("blocked", Some(format!("the broker asks publishers to stop: {reason}")))
            }
        };
        let census = self.telemetry.board.census();
        let oldest = |census: Census| (census.oldest_seconds * 1000.0).round() / 1000.0;
        let named = |name: &str, part: &Part| part.reason.as_ref().map(|reason| format!("{name}: {reason}"));
        let reason = named("database", &database).or_else(|| named("broker", &broker));
        let ownership = self.ownership();
        let unmarked = self.telemetry.board.unmarked();
        let reason = reason.or_else(|| ownership.problem()).or_else(|| unmarked.clone());
        let gauge = |value: i64| u64::try_from(value).unwrap_or(0);
        Health {
            status: if reason.is_none() { "ok" } else { "unavailable" }.to_owned(),
            reason,
            database,
            broker,
            ownership,
            unmarked,
            pending: census.map(|census| census.pending),
            oldest_pending_seconds: census.map(oldest),
            dead: census.map(|census| census.dead),
            waiting: census.map(|census| census.waiting),
            blocked_keys: census.map(|census| census.blocked_keys),
            parked_routes: gauge(self.telemetry.metrics.parked_routes.get()),
            in_flight: gauge(self.telemetry.metrics.in_flight.get()),
            in_flight_bytes: gauge(self.telemetry.metrics.in_flight_bytes.get()),
            stopping: self.telemetry.board.stopping(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

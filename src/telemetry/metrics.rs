//! Metrics in Prometheus' text format. Names follow its conventions: base units, `_total` for
//! counters, and never an id or a key as a label.

use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use std::sync::atomic::AtomicU64;

/// A server the relay is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// RabbitMQ.
    Broker,
    /// Postgres.
    Database,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabel {
    peer: &'static str,
}

impl From<Peer> for PeerLabel {
    fn from(peer: Peer) -> Self {
        let peer = match peer {
            Peer::Broker => "broker",
            Peer::Database => "database",
        };
        Self { peer }
    }
}

/// What became of a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseChange {
    /// Taken.
    Gained,
    /// Given back, drained or because the broker cannot be reached.
    HandedOver,
    /// Found in another's hands, or run out and taken anew.
    Lost,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ChangeLabel {
    change: &'static str,
}

/// Everything that is counted.
#[derive(Debug)]
#[allow(missing_docs, reason = "each field is described by the help text it is registered with")]
pub struct Metrics {
    registry: Registry,
    reconnects: Family<PeerLabel, Counter>,
    peers_up: Family<PeerLabel, Gauge>,
    lease_changes: Family<ChangeLabel, Counter>,
    pub delivered: Counter,
    pub returned: Counter,
    pub refused: Counter,
    pub dead: Counter,
    pub possible_duplicates: Counter,
    pub broker_blocked_seconds: Counter<f64, AtomicU64>,
    pub log_lines_dropped: Counter,
    pub purged: Counter,
    pub pending: Gauge,
    pub oldest_pending_seconds: Gauge<f64, AtomicU64>,
    pub dead_rows: Gauge,
    pub waiting: Gauge,
    pub blocked_keys: Gauge,
    pub parked_routes: Gauge,
    pub in_flight: Gauge,
    pub in_flight_bytes: Gauge,
    pub unmarked: Gauge,
    pub owned_shards: Gauge,
    pub replicas: Gauge,
    pub lease_epoch: Gauge,
    pub fenced: Counter,
    pub confirm_seconds: Histogram,
    pub end_to_end_seconds: Histogram,
    pub poll_seconds: Histogram,
    pub settle_seconds: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        // 0.5 ms to 16 s for what happens on a connection, 1 ms to twelve hours for a message's whole way.
        let calls = || Histogram::new(exponential_buckets(0.0005, 2.0, 16));
        let journeys = || Histogram::new(exponential_buckets(0.001, 3.0, 17));
        let messages = Family::<ResultLabel, Counter>::default();
        let result = |result| messages.get_or_create(&ResultLabel { result }).clone();
        let mut metrics = Self {
            registry: Registry::with_prefix("outbox_relay"),
            reconnects: Family::default(),
            peers_up: Family::default(),
            lease_changes: Family::default(),
            delivered: result("delivered"),
            returned: result("returned"),
            refused: result("refused"),
            dead: result("dead"),
            possible_duplicates: Counter::default(),
            broker_blocked_seconds: Counter::default(),
            log_lines_dropped: Counter::default(),
            purged: Counter::default(),
            pending: Gauge::default(),
            oldest_pending_seconds: Gauge::default(),
            dead_rows: Gauge::default(),
            waiting: Gauge::default(),
            blocked_keys: Gauge::default(),
            parked_routes: Gauge::default(),
            in_flight: Gauge::default(),
            in_flight_bytes: Gauge::default(),
            unmarked: Gauge::default(),
            owned_shards: Gauge::default(),
            replicas: Gauge::default(),
            lease_epoch: Gauge::default(),
            fenced: Counter::default(),
            confirm_seconds: calls(),
            end_to_end_seconds: journeys(),
            poll_seconds: calls(),
            settle_seconds: calls(),
        };
        metrics.register(messages);
        metrics
    }
}

impl Metrics {
    /// A connection was made again after a loss.
    pub fn reconnected(&self, peer: Peer) {
        self.reconnects.get_or_create(&peer.into()).inc();
    }

    /// Whether this server can be used.
    pub fn peer_up(&self, peer: Peer, up: bool) {
        self.peers_up.get_or_create(&peer.into()).set(up.into());
    }

    /// Leases have changed hands.
    pub fn lease_changes(&self, change: LeaseChange, count: usize) {
        self.lease_change(change).inc_by(count as u64);
    }

    /// The text Prometheus scrapes.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        // Writing to a String does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    fn lease_change(&self, change: LeaseChange) -> Counter {
        let change = match change {
            LeaseChange::Gained => "gained",
            LeaseChange::HandedOver => "handed_over",
            LeaseChange::Lost => "lost",
        };
        self.lease_changes.get_or_create(&ChangeLabel { change }).clone()
    }

    fn register(&mut self, messages: Family<ResultLabel, Counter>) {
        // All series exist from the start, so that a rate over them does.
        for peer in [Peer::Broker, Peer::Database] {
            drop(self.reconnects.get_or_create(&peer.into()));
            self.peer_up(peer, false);
        }
        for change in [LeaseChange::Gained, LeaseChange::HandedOver, LeaseChange::Lost] {
            self.lease_changes(change, 0);
        }
        let registry = &mut self.registry;
        registry.register(
            "messages",
            "Messages by result: delivered, returned (no queue took it), refused (nack, missing exchange, content), dead",
            messages,
        );
        registry.register(
            "possible_duplicates",
            "Messages sent whose confirm was never seen or whose mark was not written, so they are sent again",
            self.possible_duplicates.clone(),
        );
        registry.register("reconnects", "Connections made again after a loss", self.reconnects.clone());
        registry.register("peer_up", "Whether this server can be used: 1 or 0", self.peers_up.clone());
        registry.register(
            "broker_blocked_seconds",
            "Time the broker asked publishers to stop",
            self.broker_blocked_seconds.clone(),
        );
        registry.register(
            "log_lines_dropped",
            "Log lines the file was too slow for",
            self.log_lines_dropped.clone(),
        );
        registry.register(
            "purged_messages",
            "Delivered rows deleted after the retention",
            self.purged.clone(),
        );
        registry.register(
            "pending_messages",
            "Rows committed and neither delivered nor dead",
            self.pending.clone(),
        );
        registry.register(
            "oldest_pending_seconds",
            "Age of the oldest pending row that is due",
            self.oldest_pending_seconds.clone(),
        );
        registry.register("dead_messages", "Rows that are dead", self.dead_rows.clone());
        registry.register("waiting_messages", "Rows refused and waiting", self.waiting.clone());
        registry.register(
            "blocked_keys",
            "Ordering keys held back by a waiting row",
            self.blocked_keys.clone(),
        );
        registry.register(
            "parked_routes",
            "Routes that refuse every message and are probed",
            self.parked_routes.clone(),
        );
        registry.register("in_flight_messages", "Rows read and not settled", self.in_flight.clone());
        registry.register(
            "in_flight_bytes",
            "Bytes of rows read and not settled",
            self.in_flight_bytes.clone(),
        );
        registry.register(
            "unmarked_messages",
            "Rows in flight whose end cannot be written for now",
            self.unmarked.clone(),
        );
        registry.register("owned_shards", "Shards this replica publishes", self.owned_shards.clone());
        registry.register("replicas", "Replicas that live, this one included", self.replicas.clone());
        registry.register("lease_epoch", "Highest epoch of the leases held", self.lease_epoch.clone());
        registry.register(
            "lease_changes",
            "Leases of shards gained, handed over and lost",
            self.lease_changes.clone(),
        );
        registry.register(
            "fenced_messages",
            "Rows held back at the last moment because their lease was lost or no longer trusted",
            self.fenced.clone(),
        );
        registry.register(
            "confirm_duration_seconds",
            "From sending a batch to the last confirm of it",
            self.confirm_seconds.clone(),
        );
        registry.register(
            "end_to_end_seconds",
            "From created_at of a row to its commit as delivered",
            self.end_to_end_seconds.clone(),
        );
        registry.register(
            "poll_duration_seconds",
            "Time of a read of pending rows",
            self.poll_seconds.clone(),
        );
        registry.register(
            "settle_duration_seconds",
            "Time of a commit of outcomes",
            self.settle_seconds.clone(),
        );
        registry.register("build", "The running binary", Info::new([("version", env!("CARGO_PKG_VERSION"))]));
    }
}

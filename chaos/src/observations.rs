//! What was seen of a run from outside, beside the two ledgers. Plain data, saved with the report.

use serde::{Deserialize, Serialize};

/// The settings that bounds are computed from.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named after the relay's settings")]
pub struct Setting {
    pub replicas: u64,
    pub max_in_flight: u64,
    pub ordering: String,
    pub grace_ms: u64,
    /// Most messages the consumer may hold unacknowledged.
    pub prefetch: usize,
    /// Bounds of I10, each for one replica.
    pub max_rss_mib: u64,
    pub max_descriptors: u64,
    pub max_connections: u64,
}

/// A fault that happened.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Span {
    /// Its id in the fault matrix.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it began, in milliseconds of the run.
    pub began: u64,
    /// When everything was mended.
    pub ended: u64,
    /// Windows of rows in flight that may have been sent again by it: relays hit, times they were hit.
    pub windows: u64,
    /// The broker refused messages.
    pub refuses: bool,
    /// It disturbed the database.
    pub database: bool,
    /// It disturbed the broker.
    pub broker: bool,
    /// Messages that were confirmed and may be lost all the same (a queue that was deleted).
    pub counted_loss: u64,
}

/// A SIGTERM and what followed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Stop {
    /// Which replica.
    pub replica: usize,
    /// When the signal was sent.
    pub at: u64,
    /// Milliseconds until the end.
    pub took: u64,
    /// Exit code; none: killed by a signal, ours after a long wait.
    pub code: Option<i32>,
    /// A fault was on.
    pub disturbed: bool,
}

/// A relay that ended and nobody had asked it to.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Exit {
    /// Which replica.
    pub replica: usize,
    /// When it was noticed.
    pub at: u64,
    /// Exit code.
    pub code: Option<i32>,
}

/// A look at the replicas, once a second.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Sample {
    /// When.
    pub at: u64,
    /// Replicas at rest, that is running and not being started or stopped.
    pub replicas: u64,
    /// Their processes, with those that are frozen, starting or ending.
    pub processes: u64,
    /// Highest resident memory of one.
    pub rss_mib: u64,
    /// Most open descriptors of one.
    pub descriptors: u64,
    /// Shards that the replicas say they own, together; none if one did not answer.
    pub owned: Option<u64>,
    /// Shards there are.
    pub shards: Option<u64>,
    /// Database connections of all relays; none if the database was not asked.
    pub connections: Option<u64>,
    /// Age of the oldest open transaction of a relay, in milliseconds.
    pub transaction_ms: Option<u64>,
}

/// What a replica says when all is calm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named after the fields of /health and of the metrics")]
pub struct Says {
    pub replica: usize,
    pub status: String,
    pub pending: Option<u64>,
    pub dead: Option<u64>,
    pub in_flight: Option<u64>,
    pub metric_pending: Option<u64>,
    pub metric_dead: Option<u64>,
    pub metric_in_flight: Option<u64>,
}

/// Everything seen.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Observations {
    /// The settings of this run.
    pub setting: Setting,
    /// The faults, in order of their beginning.
    pub faults: Vec<Span>,
    /// Stops in order.
    pub stops: Vec<Stop>,
    /// Ends that nobody asked for.
    pub exits: Vec<Exit>,
    /// Looks at the replicas.
    pub samples: Vec<Sample>,
    /// When writers and faults had ended.
    pub calm_from: u64,
    /// When nothing was pending any more; none: not within the limit.
    pub drained_at: Option<u64>,
    /// What the replicas said after that.
    pub says: Vec<Says>,
}

/// A row of the outbox at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "columns of the table")]
pub struct TableRow {
    pub id: i64,
    pub message_id: String,
    pub delivered: bool,
    pub dead: bool,
    pub attempts: i32,
    pub last_error: Option<String>,
}

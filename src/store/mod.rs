//! The store seam: where outbox rows are read from and their ends are written to.
//!
//! Obligations of every implementation, checked by `tests/relay/contract_store.rs`:
//!
//! 1. [`Store::poll`] returns pending, due rows in id order, all out of one snapshot, never one
//!    that is listed as in flight, never more than asked for. Of [`Others`] it tells the ids.
//! 2. With `keep_order`, a row is not returned while an earlier row of its key was refused and is
//!    still pending.
//! 3. [`Store::settle`] is all or nothing and may be run again with the same input. It writes to the very message that
//!    was sent, not to whatever has its id.
//! 4. No transaction outlives a call.
//! 5. A row carries the lease it was read under; only rows of the leases in the question are returned. Refusals
//!    are written only while that lease is in force, deliveries always.
//! 6. An error says what to do next ([`Trouble`]); it never loses a row.

pub mod leases;
pub mod memory;
pub mod postgres;

pub use leases::{Lease, LeaseTable};
pub use postgres::PostgresStore;

use bytes::Bytes;
use std::collections::HashSet;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// One pending outbox row.
#[derive(Clone)]
pub struct Row {
    /// Order within a key.
    pub id: i64,
    /// AMQP `message_id`.
    pub message_id: Uuid,
    /// Where to; the exchange is the configured default where the row names none.
    pub route: Arc<Route>,
    /// Rows that share it are delivered in id order.
    pub ordering_key: Option<Arc<str>>,
    /// The message body as stored.
    pub payload: Bytes,
    /// AMQP `content_type`.
    pub content_type: Arc<str>,
    /// JSON text of the headers.
    pub headers: Arc<str>,
    /// Microseconds since 1970; what Postgres calls infinity is clamped.
    pub created_at_micros: i64,
    /// Times the broker refused it.
    pub attempts: u32,
    /// Its shard, and the epoch under which it was read.
    pub lease: Lease,
    /// Why the row cannot be read as a message at all; it goes straight to the dead.
    pub defect: Option<String>,
}

/// Where a message goes: an exchange and a routing key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Route {
    /// Exchange; empty is the broker's default exchange.
    pub exchange: String,
    /// Routing key.
    pub routing_key: String,
}

/// Without payload and headers: those never reach a log.
impl fmt::Debug for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Row")
            .field("id", &self.id)
            .field("message_id", &self.message_id)
            .field("route", &self.route)
            .field("attempts", &self.attempts)
            .finish_non_exhaustive()
    }
}

/// Memory a row takes besides its texts: the struct, its place in queues and maps. An estimate.
const ROW_OVERHEAD_BYTES: usize = 512;

impl Row {
    /// Bytes this row counts against the budget.
    pub fn bytes(&self) -> usize {
        let key = self.ordering_key.as_ref().map_or(0, |key| key.len());
        let names = self.route.exchange.len() + self.route.routing_key.len() + self.content_type.len();
        self.payload.len() + self.headers.len() + key + names + ROW_OVERHEAD_BYTES
    }
}

/// What a poll asks for.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// Id ranges that are not settled, first and last inclusive, ascending and disjoint.
    pub ranges: &'a [(i64, i64)],
    /// Rows at most.
    pub rows: usize,
    /// Bytes at most. The first row is returned even if it is larger, when `room_for_any` says so.
    pub bytes: usize,
    /// Nothing else is in flight: a row larger than the whole budget may pass.
    pub room_for_any: bool,
    /// Ids that must not be returned: in flight, or to come after others that are.
    pub in_flight: &'a [i64],
    /// Rows of a key wait for a refused one before them.
    pub keep_order: bool,
    /// Routes whose refused rows are not tried now.
    pub parked: &'a [Arc<Route>],
    /// Whose rows.
    pub share: Share<'a>,
    /// Rows that are told by their ids.
    pub others: Others<'a>,
}

/// Rows of others that are told by their ids, due or not, and count as rows: who knows them need not pass them again.
#[derive(Debug, Clone, Copy, Default)]
pub struct Others<'a> {
    /// Their shards, ascending.
    pub shards: &'a [u32],
    /// Only ids above this one are told. Up to there ids that are known may be asked for again, when there are more gaps
    /// between them than ranges.
    pub after: i64,
}

impl Others<'_> {
    /// It is told.
    pub fn include(&self, id: i64, shard: u32) -> bool {
        id > self.after && self.shards.binary_search(&shard).is_ok()
    }
}

/// The part of all rows that a replica reads.
#[derive(Debug, Clone, Copy)]
pub struct Share<'a> {
    /// Shards in all.
    pub shards: u32,
    /// Those that are read, with their epochs; by shard, ascending.
    pub leases: &'a [Lease],
}

impl Share<'_> {
    /// Every shard is in it.
    pub fn is_everything(&self) -> bool {
        self.leases.len() == self.shards as usize
    }

    /// The lease of a shard; `None` if it is not in the share.
    pub fn lease(&self, shard: u32) -> Option<Lease> {
        Lease::find(self.leases, shard)
    }
}

/// What is waited for, between two polls.
#[derive(Debug, Clone, Copy)]
pub struct Watch<'a> {
    /// Highest id that was noticed so far: one above it ends the wait at once.
    pub noticed: i64,
    /// Id ranges that are not settled.
    pub ranges: &'a [(i64, i64)],
    /// Ids in them that are in flight.
    pub in_flight: &'a [i64],
    /// When due rows of the ranges are looked for first.
    pub first_poll: Duration,
    /// How often from then on.
    pub poll_interval: Duration,
    /// Longest wait.
    pub lasts: Duration,
}

/// What a poll returns.
#[derive(Debug, Default)]
pub struct Read {
    /// The rows, in id order.
    pub rows: Vec<Row>,
    /// Ids of rows of others among them.
    pub passed: Vec<i64>,
    /// There may be more that did not fit.
    pub more: bool,
}

/// The view of one snapshot on ids that were passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Horizon {
    /// Oldest transaction that still runs.
    pub xmin: u64,
    /// First transaction id not yet given out.
    pub next_xid: u64,
    /// Pending ids in the ranges asked about, ascending.
    pub pending: Vec<i64>,
}

/// Outcomes that are written together.
#[derive(Debug, Default, Clone)]
pub struct Settlement {
    /// Confirmed and routed.
    pub delivered: Vec<Delivered>,
    /// Refused, to be tried again.
    pub waiting: Vec<Waiting>,
    /// Can never be delivered.
    pub dead: Vec<Dead>,
}

/// A row that was confirmed and routed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivered {
    /// Row id.
    pub id: i64,
    /// Its message, which is what was sent: after a failover the id may belong to another one.
    pub message_id: Uuid,
}

/// A refused row that waits.
#[derive(Debug, Clone)]
pub struct Waiting {
    /// Row id.
    pub id: i64,
    /// Its message.
    pub message_id: Uuid,
    /// The lease it was read under.
    pub lease: Lease,
    /// Attempts including this one.
    pub attempts: u32,
    /// Until it is due again.
    pub wait: Duration,
    /// Why, for a person.
    pub reason: String,
}

/// A row that is dead from now on.
#[derive(Debug, Clone)]
pub struct Dead {
    /// Row id.
    pub id: i64,
    /// Its message.
    pub message_id: Uuid,
    /// The lease it was read under.
    pub lease: Lease,
    /// Attempts including the last.
    pub attempts: u32,
    /// Why, for a person.
    pub reason: String,
}

impl Settlement {
    /// Nothing to write.
    pub fn is_empty(&self) -> bool {
        self.delivered.is_empty() && self.waiting.is_empty() && self.dead.is_empty()
    }

    /// Rows that are never to be read again.
    pub fn marks(&self) -> u64 {
        (self.delivered.len() + self.dead.len()) as u64
    }

    /// Each of its marks was written, or its row is locked.
    pub fn is_marked_by(&self, written: &Written) -> bool {
        let locked = match &written.locked[..] {
            [] => 0,
            locked => self.marks() - self.without(locked).marks(),
        };
        written.marked + locked == self.marks()
    }

    /// The ids of all rows.
    pub fn ids(&self) -> impl Iterator<Item = i64> {
        let delivered = self.delivered.iter().map(|row| row.id);
        delivered.chain(self.waiting.iter().map(|row| row.id)).chain(self.dead.iter().map(|row| row.id))
    }

    /// What is left of it without these rows.
    pub fn without(&self, ids: &[i64]) -> Self {
        let ids: HashSet<i64> = ids.iter().copied().collect();
        let mut rest = self.clone();
        rest.delivered.retain(|row| !ids.contains(&row.id));
        rest.waiting.retain(|row| !ids.contains(&row.id));
        rest.dead.retain(|row| !ids.contains(&row.id));
        rest
    }
}

/// What has become of a settlement.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Written {
    /// So many of the delivered and dead rows were marked. Fewer than there are: some were marked before, or are locked, or
    /// their ids belong to other messages now.
    pub marked: u64,
    /// Ids of rows that were passed over because somebody has them locked.
    pub locked: Vec<i64>,
}

/// What one bite of retention did.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Purged {
    /// Delivered rows looked at.
    pub looked_at: u64,
    /// Rows deleted.
    pub deleted: u64,
    /// Where the next bite goes on.
    pub last_id: i64,
}

/// Counts of the table, for health and metrics.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub struct Census {
    /// Committed and neither delivered nor dead.
    pub pending: u64,
    /// Age of the oldest pending row that could have been sent, in seconds.
    pub oldest_seconds: f64,
    /// Never to be sent.
    pub dead: u64,
    /// Refused and waiting.
    pub waiting: u64,
    /// Keys that a waiting row holds back.
    pub blocked_keys: u64,
    /// How long the store took to count, in seconds, without the way there and back.
    pub took_seconds: f64,
}

/// What a failed call to the store means for its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The database cannot be used now: wait, reconnect, go on.
    Outage,
    /// This statement lost a race (deadlock, lock or statement time-out): run it again.
    Contention,
    /// Login, schema or grants: not ready, say so, retry slowly.
    Configuration,
    /// The database does not take what this statement writes (a constraint, a trigger, a limit of an index): other rows may
    /// pass.
    Rejected,
}

/// A failed call to the store.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{sentence}")]
pub struct StoreError {
    /// What to do next.
    pub trouble: Trouble,
    /// One sentence for a person, without secrets.
    pub sentence: String,
}

/// Where outbox rows live. See the module text for the obligations.
pub trait Store: Send + Sync + 'static {
    /// Reads pending rows.
    fn poll(&self, ask: Ask<'_>) -> impl Future<Output = Result<Read, StoreError>> + Send;

    /// Waits until a pending row is there that a poll might return: its id, or `None` if none came in time. A hint: the row
    /// may be held back, not due or another replica's.
    fn watch(&self, watch: Watch<'_>) -> impl Future<Output = Result<Option<i64>, StoreError>> + Send;

    /// The waiting row of a parked route that is or will be due first.
    fn probe(
        &self,
        route: &Route,
        in_flight: &[i64],
        keep_order: bool,
        share: Share<'_>,
    ) -> impl Future<Output = Result<Option<Row>, StoreError>> + Send;

    /// Makes at most `rows` waiting rows of a route due; returns how many.
    fn release(&self, route: &Route, rows: usize) -> impl Future<Output = Result<u64, StoreError>> + Send;

    /// Which ids up to `last` within `ranges` are pending, and which transactions run.
    fn horizon(
        &self,
        last: i64,
        ranges: &[(i64, i64)],
        in_flight: &[i64],
        ids: usize,
    ) -> impl Future<Output = Result<Horizon, StoreError>> + Send;

    /// An id below this one so that all ids up to it had been given out that long ago, if a row nearby tells of one. True of ids
    /// from a sequence, and by the clock that wrote when rows were delivered; others are for the sweep to find.
    fn long_passed(
        &self,
        below: i64,
        age: Duration,
    ) -> impl Future<Output = Result<Option<i64>, StoreError>> + Send;

    /// Writes outcomes, all or none of them. With `passes_locks`, without those of rows that somebody has locked, which are
    /// waited for otherwise.
    fn settle(
        &self,
        settlement: &Settlement,
        passes_locks: bool,
    ) -> impl Future<Output = Result<Written, StoreError>> + Send;

    /// Deletes expired rows among the next `rows` delivered ones after `after`.
    fn purge(
        &self,
        after: i64,
        rows: usize,
        retention: Duration,
    ) -> impl Future<Output = Result<Purged, StoreError>> + Send;

    /// Counts.
    fn census(&self) -> impl Future<Output = Result<Census, StoreError>> + Send;
}

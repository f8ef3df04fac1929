//! The pipeline: three stages joined by bounded channels, nothing shared.
//!
//! ```text
//!             Work                  Outcome
//!   poll ───────────────▶ publish ───────────▶ settle
//!    ▲   a channel each   N workers  one channel  │  commits delivered ids,
//!    │                                            │  waits and dead rows in batches
//!    └────────────────── Settled ◀────────────────┘
//!               a settled row frees its place
//! ```
//!
//! Rows change hands by the batch: one message of a channel holds all that came together.
//!
//! | channel | written by | read by | bound |
//! |---|---|---|---|
//! | `Work` | poll | one worker each | a place for every row in flight and every resumed key |
//! | `Vec<Outcome>` | all workers | settle | the same |
//! | `Vec<Settled>` | settle | poll | the same |
//!
//! Invariants:
//!
//! 1. **One place per row.** A row that was read is in exactly one of: a `Work` channel, a worker,
//!    the `Outcome` channel, settle, the `Settled` channel. `poll` counts places and never reads
//!    more than are free; so every channel has room for every row, no send ever waits, and the
//!    stages cannot deadlock although they form a ring.
//! 2. **Only confirmed and routed rows become [`Fate::Delivered`]** (or those that
//!    `OUTBOX_UNROUTABLE=accept` says to count).
//! 3. **A refused row holds its key.** From the refusal on, its worker gives back every row of that
//!    key unsent, until `poll` says [`Work::Resume`] after the wait was committed and no row of the key
//!    is in flight any more ([`keys`]). From then on the table holds the key back. There is no moment at which neither does.
//! 4. **A row without a lease is not sent.** It goes back, its key is held as above, and its shard is not read until all
//!    of it that was in flight is settled, or stands aside because its end cannot be written ([`shards`]).
//! 5. **Stopping is the end of input.** `poll` reads no more from the signal on and drops its ends to the workers;
//!    workers end when they have nothing left, settle when the workers have, `poll` when settle has. Settle's last write
//!    is never cancelled.

// The stages, in the order of a row's way.
pub mod poll;
pub mod publish;
pub mod settle;

// What poll keeps in mind of ids, keys, shards and routes.
pub mod gaps;
pub mod keys;
pub mod known;
pub mod releases;
pub mod routes;
pub mod shards;

// What a worker keeps in mind.
pub mod queue;
pub mod troubled;

pub use poll::Poll;
pub use publish::Worker;
pub use settle::Settle;

use crate::sink::Fault;
use crate::store::{Lease, Route, Row};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use uuid::Uuid;

/// So many rows are worth a statement. The reading waits until as many places are free, and the marking for no more
/// outcomes than that, so neither waits for the other in vain.
fn worth_a_statement(max_in_flight: usize) -> usize {
    max_in_flight.div_ceil(4)
}

/// From poll to a worker.
#[derive(Debug)]
pub enum Work {
    /// Publish these; of each key in order.
    Publish(Vec<Row>),
    /// Publish each of these on a connection of its own: others of its route have broken theirs.
    TryApart(Vec<Row>),
    /// This key may go on: its refused row is in the table and holds it back there, or all of its rows are back there.
    Resume(Arc<str>),
}

/// From a worker to settle: where a row's way ended.
#[derive(Debug)]
pub struct Outcome {
    /// Row id.
    pub id: i64,
    /// Its message.
    pub message_id: Uuid,
    /// The lease it was read under.
    pub lease: Lease,
    /// Its end.
    pub end: End,
}

/// How a row left the pipeline.
#[derive(Debug)]
pub enum End {
    /// Confirmed and routed.
    Delivered {
        /// When the row was written, for the end-to-end time.
        created_at_micros: i64,
    },
    /// Refused, to be tried again.
    Wait {
        /// Its key, which stays held until the wait is committed.
        key: Option<Arc<str>>,
        /// Where it was going.
        route: Arc<Route>,
        /// Whose fault it was.
        fault: Fault,
        /// Attempts including this one.
        attempts: u32,
        /// Until it is due.
        wait: Duration,
        /// Why, for a person.
        reason: String,
    },
    /// Can never be delivered.
    Dead {
        /// Attempts including this one.
        attempts: u32,
        /// Why, for a person.
        reason: String,
    },
    /// Not sent; goes back to the table untouched.
    Released {
        /// Its key.
        key: Option<Arc<str>>,
    },
    /// Not sent, because its lease was not in force; goes back to the table untouched. Its key stays held until all rows
    /// of the shard are back.
    Fenced,
}

/// From settle to poll.
#[derive(Debug)]
pub enum Settled {
    /// The row's end is committed, or there is nothing to write: its place is free.
    Ended {
        /// Row id.
        id: i64,
        /// What became of it.
        fate: Fate,
    },
    /// Its end is not written yet, while those of others are, and is tried again. It keeps its place, and little else waits
    /// for it.
    Aside {
        /// Row id.
        id: i64,
        /// What is to be written.
        ending: Ending,
    },
}

/// What poll has to know about a settled row.
#[derive(Debug)]
pub enum Fate {
    /// Never to be read again.
    Delivered {
        /// Every mark of its batch fell on the row it was meant for. If not, the id is to be asked for again: it may
        /// belong to another message.
        certain: bool,
    },
    /// Not to be read again, unless an operator sends it again.
    Dead {
        /// As for delivered rows.
        certain: bool,
    },
    /// In the table, refused; its key may be read again because the table holds it back.
    Waiting {
        /// The route that refused.
        route: Arc<Route>,
        /// Why, for the log of a parked route.
        reason: String,
        /// Whose fault it was.
        fault: Fault,
    },
    /// In the table as it was.
    Released,
    /// The same, and its key is held by its worker.
    Fenced,
}

/// The end of a row that is not written yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// Confirmed and routed.
    Delivered,
    /// Never to be sent.
    Dead,
    /// To be sent again: as long as its wait is not in the table, only this relay holds back its key.
    Unsent,
}

/// Hands over without waiting: the channels have a place for everything that can be under way, and never an empty batch. A
/// wait could be cut short by a stop, between the note of a row and its way to the next stage. Fails only when the receiver
/// has ended, which supervision has noticed.
async fn hand_over<T>(to: &mpsc::Sender<T>, what: T) {
    if let Err(TrySendError::Full(what)) = to.try_send(what) {
        let _ = to.send(what).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    /// A wait, be it only the scheduler's wish that others have their turn, is where a stop cuts.
    #[tokio::test]
    async fn handing_over_does_not_wait_while_there_is_room() {
        let (to, mut from) = mpsc::channel(1000);
        for number in 0..1000 {
            assert!(hand_over(&to, number).now_or_never().is_some(), "after {number}");
        }
        assert!(hand_over(&to, 1000).now_or_never().is_none(), "full");
        from.close();
        assert!(hand_over(&to, 1001).now_or_never().is_some(), "the receiver has ended");
    }
}

//! Which ids that were passed over will never appear, so that they need not be asked for again.
//!
//! An id is given out before its row is committed. It can still appear as long as a transaction runs that ran when the
//! id was passed, or that has taken it and written nothing yet.

use super::known::Known;
use crate::mutants::mutant;
use crate::store::Horizon;
use std::time::{Duration, Instant};

/// How often gaps between ids are looked at.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long an id must have been passed over, besides the end of every transaction that ran then. Covers the
/// moment between `nextval` and the first write of a transaction, in which it has no id yet.
const AGE: Duration = Duration::from_secs(5);
/// Pending ids looked at per horizon.
pub const HORIZON_IDS: usize = 1000;

/// What is known of the ids between those that were read.
#[derive(Debug)]
pub struct Gaps {
    note: Option<Note>,
    looked_at: Instant,
}

/// What had been passed over when, and which transactions might still fill it.
#[derive(Debug, Clone, Copy)]
struct Note {
    last: i64,
    xmax: u64,
    at: Instant,
}

impl Default for Gaps {
    fn default() -> Self {
        Self { note: None, looked_at: Instant::now() }
    }
}

impl Gaps {
    /// It is time for a look, and this is it.
    pub fn is_due(&mut self) -> bool {
        let due = self.looked_at.elapsed() >= INTERVAL;
        if due {
            self.looked_at = Instant::now();
        }
        due
    }

    /// The horizon is asked for up to this id.
    pub fn last(&self) -> i64 {
        self.note.map_or(i64::MIN, |note| note.last)
    }

    /// Takes in a horizon: what it does not list up to [`Gaps::last`] is known from now on, if it can no longer appear.
    pub fn take(&mut self, horizon: &Horizon, last_read: i64, known: &mut Known) {
        let fresh = Note { last: last_read, xmax: horizon.xmax, at: Instant::now() };
        let Some(note) = self.note else {
            self.note = Some(fresh);
            return;
        };
        let nothing_can_appear = horizon.xmin >= note.xmax && note.at.elapsed() >= AGE;
        if nothing_can_appear || mutant!("close-gaps-at-once") {
            let complete = horizon.pending.len() < HORIZON_IDS;
            let last =
                if complete { note.last } else { horizon.pending.last().copied().unwrap_or(note.last) };
            known.close_gaps(last, &horizon.pending);
            self.note = Some(fresh);
        }
    }
}

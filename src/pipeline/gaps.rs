//! Which ids that were passed over will never appear, so that they need not be asked for again.
//!
//! An id is given out before its row is committed, and can appear as long as the transaction runs that has taken it. A
//! transaction that has written has a number, and every snapshot tells that it runs; before its first write nothing tells of
//! it. [`AGE`] is longer than it takes from the one to the other. So who has taken an id that has been missing for that long
//! has a number by now: when all have ended that have one now, the id will never appear.

use super::known::Known;
use crate::mutants::mutant;
use crate::store::Horizon;
use std::time::{Duration, Instant};

/// How often gaps between ids are looked at.
const INTERVAL: Duration = Duration::from_secs(1);
/// Longest time between `nextval` and the first write of its transaction.
pub const AGE: Duration = Duration::from_secs(5);
/// Pending ids looked at per horizon.
pub const HORIZON_IDS: usize = 1000;

/// What is known of the ids between those that were read.
#[derive(Debug, Default)]
pub struct Gaps {
    note: Option<Note>,
    looked_at: Option<Instant>,
}

/// What has been passed over, and since when.
#[derive(Debug, Clone, Copy)]
struct Note {
    last: i64,
    /// `None`: for longer than [`AGE`].
    since: Option<Instant>,
    /// The next number to be given out when it had been missing for [`AGE`].
    next_xid: Option<u64>,
}

impl Gaps {
    /// It is time for a look, and this is it.
    pub fn is_due(&mut self) -> bool {
        let due = self.looked_at.is_none_or(|at| at.elapsed() >= INTERVAL);
        if due {
            self.looked_at = Some(Instant::now());
        }
        due
    }

    /// Nothing is noted yet: see [`Gaps::begin`].
    pub fn is_new(&self) -> bool {
        self.note.is_none()
    }

    /// What has been passed over up to now: up to `long_passed` by others, [`AGE`] ago and more; or just now up to `last_read`.
    pub fn begin(&mut self, long_passed: Option<i64>, last_read: i64) {
        self.note = Some(match long_passed {
            Some(last) => Note { last, since: None, next_xid: None },
            None => Note::of_now(last_read),
        });
    }

    /// The horizon is asked for up to this id, if that may tell anything now.
    pub fn ripe(&self) -> Option<i64> {
        let ripe = |note: &Note| note.since.is_none_or(|since| since.elapsed() >= AGE);
        self.note.filter(|note| ripe(note) || mutant!("close-gaps-at-once")).map(|note| note.last)
    }

    /// Takes in a horizon: what it does not list up to [`Gaps::ripe`] is known from now on, if it can no longer appear.
    pub fn take(&mut self, horizon: &Horizon, last_read: i64, known: &mut Known) {
        let Some(note) = &mut self.note else { return };
        let next_xid = *note.next_xid.get_or_insert(horizon.next_xid);
        if horizon.xmin < next_xid && !mutant!("close-gaps-at-once") {
            return;
        }
        let complete = horizon.pending.len() < HORIZON_IDS;
        let last = if complete { note.last } else { horizon.pending.last().copied().unwrap_or(note.last) };
        known.close_gaps(last, &horizon.pending);
        self.note = Some(Note::of_now(last_read));
    }
}

impl Note {
    fn of_now(last: i64) -> Self {
        Self { last, since: Some(Instant::now()), next_xid: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn horizon(xmin: u64, next_xid: u64, pending: &[i64]) -> Horizon {
        Horizon { xmin, next_xid, pending: pending.to_vec() }
    }

    #[test]
    fn what_is_missed_just_now_is_left_open() {
        let mut gaps = Gaps::default();
        assert!(gaps.is_due() && !gaps.is_due() && gaps.is_new());
        gaps.begin(None, 10);
        assert_eq!(gaps.ripe(), None);
    }

    #[test]
    fn gaps_are_closed_when_all_have_ended_that_had_a_number_when_they_were_ripe() {
        let (mut gaps, mut known) = (Gaps::default(), Known::default());
        known.add(10);
        gaps.begin(Some(9), 10);
        assert_eq!(gaps.ripe(), Some(9));
        gaps.take(&horizon(5, 8, &[3]), 20, &mut known);
        assert!(!known.contains(4), "5 to 7 may still run");
        gaps.take(&horizon(7, 30, &[3]), 20, &mut known);
        assert!(!known.contains(4), "7 still runs");
        gaps.take(&horizon(8, 40, &[3, 5]), 20, &mut known);
        assert_eq!([2, 3, 4, 5, 6, 9].map(|id| known.contains(id)), [true, false, true, false, true, true]);
        assert_eq!(gaps.ripe(), None, "what was passed since is missed as of now");
    }
}

//! Which ids that were passed over will never appear, so that they need not be asked for again.
//!
//! An id is given out before its row is committed, and can appear as long as the transaction runs that has taken it. A
//! transaction that has written has a number, and every snapshot tells that it runs; before its first write nothing tells of
//! it. [`AGE`] is longer than it takes from the one to the other. So who has taken an id that has been missing for that long
//! has a number by now: when all have ended that have one now, the id will never appear.

use super::known::Known;
use crate::mutants::mutant;
use crate::retry::WALK_REST;
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
    /// Up to here they are closed since the note was made: more ids were pending than a horizon lists.
    closed: Option<i64>,
    next_look: Option<Instant>,
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
        let due = self.next_look.is_none_or(|at| Instant::now() >= at);
        if due {
            self.next_look = Some(Instant::now() + INTERVAL);
        }
        due
    }

    /// A look took so long and failed: there is more to walk over than can be in time.
    pub fn failed(&mut self, took: Duration) {
        self.next_look = Some(Instant::now() + INTERVAL.max(WALK_REST.after(took)));
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

    /// The horizon is asked for from the first id to the second, if that may tell anything now.
    pub fn ripe(&self) -> Option<(i64, i64)> {
        let ripe = |note: &Note| note.since.is_none_or(|since| since.elapsed() >= AGE);
        let note = self.note.filter(|note| ripe(note) || mutant!("close-gaps-at-once"))?;
        Some((self.first(), note.last))
    }

    fn first(&self) -> i64 {
        self.closed.map_or(i64::MIN, |id| id.saturating_add(1))
    }

    /// Takes in a horizon: what it does not list of the ids from the one to the other of [`Gaps::ripe`] is known from now on, if
    /// it can no longer appear.
    pub fn take(&mut self, horizon: &Horizon, last_read: i64, known: &mut Known) {
        let first = self.first();
        let Some(note) = &mut self.note else { return };
        let next_xid = *note.next_xid.get_or_insert(horizon.next_xid);
        if horizon.xmin < next_xid && !mutant!("close-gaps-at-once") {
            return;
        }
        // When it is full there may be more behind its last id: these are for the next look.
        self.closed = horizon.pending.get(HORIZON_IDS - 1).copied();
        known.close_gaps(first, self.closed.unwrap_or(note.last), &horizon.pending);
        if self.closed.is_none() {
            self.note = Some(Note::of_now(last_read));
        }
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
        assert_eq!(gaps.ripe(), Some((i64::MIN, 9)));
        gaps.take(&horizon(5, 8, &[3]), 20, &mut known);
        assert!(!known.contains(4), "5 to 7 may still run");
        gaps.take(&horizon(7, 30, &[3]), 20, &mut known);
        assert!(!known.contains(4), "7 still runs");
        gaps.take(&horizon(8, 40, &[3, 5]), 20, &mut known);
        assert_eq!([2, 3, 4, 5, 6, 9].map(|id| known.contains(id)), [true, false, true, false, true, true]);
        assert_eq!(gaps.ripe(), None, "what was passed since is missed as of now");
    }

    #[test]
    fn gaps_behind_more_pending_ids_than_a_horizon_lists_are_closed_by_the_next() {
        let (mut gaps, mut known) = (Gaps::default(), Known::default());
        gaps.begin(Some(5_000), 6_000);
        let pending: Vec<i64> = (1..=HORIZON_IDS as i64).map(|n| 2 * n).collect();
        gaps.take(&horizon(8, 8, &pending), 6_000, &mut known);
        assert_eq!(
            [1, 2, 1_999, 2_000, 2_001].map(|id| known.contains(id)),
            [true, false, true, false, false]
        );
        assert_eq!(gaps.ripe(), Some((2_001, 5_000)));
        assert_eq!(known.unknown(2).since(2_001).ranges, [(2_001, i64::MAX)]);
        gaps.take(&horizon(8, 8, &[2_002, 4_000]), 6_000, &mut known);
        assert_eq!(
            [2_000, 2_001, 2_002, 3_999, 4_000, 5_000].map(|id| known.contains(id)),
            [false, true, false, true, false, true]
        );
        assert_eq!(gaps.ripe(), None, "all are looked at anew, later");
    }

    #[test]
    fn a_look_that_failed_is_followed_by_a_longer_rest() {
        let mut gaps = Gaps::default();
        assert!(gaps.is_due());
        let before = Instant::now();
        gaps.failed(Duration::from_secs(1));
        let rest = gaps.next_look.expect("a rest").saturating_duration_since(before);
        assert!(rest >= Duration::from_secs(20), "{rest:?}");
    }
}

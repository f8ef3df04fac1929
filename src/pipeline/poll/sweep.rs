//! When everything up to the largest id read is asked for again, whatever is known of it.
//!
//! A sweep walks over what a transaction of somebody keeps in the index, which may be millions of entries. So its rest
//! grows with what it took, and one that meets the time limit of a statement is left: what is new goes first.

use crate::retry::WALK_REST;
use std::time::{Duration, Instant};

/// The next sweep, or the one under way.
#[derive(Debug)]
pub(super) struct Sweep {
    interval: Duration,
    due: Instant,
    /// What its reads took; `None` between sweeps.
    took: Option<Duration>,
    /// Nothing was left out so far.
    whole: bool,
}

/// From a sweep that had to leave out something to the next.
const PARTIAL_PAUSE: Duration = Duration::from_secs(5);

impl Sweep {
    /// Between sweeps.
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, due: Instant::now() + interval, took: None, whole: true }
    }

    /// The next read is one of a sweep.
    pub(super) fn is_due(&self) -> bool {
        self.took.is_some() || Instant::now() >= self.due
    }

    /// When the next read of one is due.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// A read of it took so long, and may have been the last: there is no more, or it cannot be read to its end now. It was not
    /// `whole` if something could not be read at that moment, which the next one has to look for soon.
    pub(super) fn read(&mut self, took: Duration, last: bool, whole: bool) {
        let so_far = self.took.unwrap_or_default() + took;
        self.took = (!last).then_some(so_far);
        self.whole &= whole;
        if last {
            let pause = if self.whole { self.interval } else { self.interval.min(PARTIAL_PAUSE) };
            self.due = Instant::now() + pause.max(WALK_REST.after(so_far));
            self.whole = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The last read of a sweep took so long: the next one is due exactly so much later, however slow the machine is.
    fn last_read_is_followed_by(rest: Duration, sweep: &mut Sweep, took: Duration) {
        let before = Instant::now();
        sweep.read(took, true, true);
        let due = before + rest..=Instant::now() + rest;
        assert!(due.contains(&sweep.due), "{:?}", sweep.due - before);
    }

    #[test]
    fn a_sweep_rests_twenty_times_as_long_as_all_its_reads_took() {
        let mut sweep = Sweep::new(Duration::ZERO);
        assert!(sweep.is_due());
        sweep.read(Duration::from_secs(1), false, true);
        assert!(sweep.is_due(), "it goes on");
        last_read_is_followed_by(Duration::from_secs(60), &mut sweep, Duration::from_secs(2));
        assert!(!sweep.is_due());
        last_read_is_followed_by(Duration::from_secs(300), &mut sweep, Duration::from_secs(15));
        last_read_is_followed_by(Duration::from_secs(600), &mut sweep, Duration::from_secs(15_000));
    }

    #[test]
    fn sweeps_come_no_more_often_than_they_are_wanted() {
        let mut sweep = Sweep::new(Duration::from_secs(3600));
        last_read_is_followed_by(Duration::from_secs(3600), &mut sweep, Duration::from_millis(1));
    }

    #[test]
    fn a_sweep_that_left_out_something_is_followed_by_another_soon() {
        let mut sweep = Sweep::new(Duration::from_secs(3600));
        sweep.read(Duration::from_millis(1), false, false);
        last_read_is_followed_by(PARTIAL_PAUSE, &mut sweep, Duration::from_millis(1));
        last_read_is_followed_by(Duration::from_secs(3600), &mut sweep, Duration::from_millis(1));
    }
}

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
}

impl Sweep {
    /// Between sweeps.
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, due: Instant::now() + interval, took: None }
    }

    /// The next read is one of a sweep.
    pub(super) fn is_due(&self) -> bool {
        self.took.is_some() || Instant::now() >= self.due
    }

    /// A read of it took so long, and may have been the last: there is no more, or it cannot be read to its end now.
    pub(super) fn read(&mut self, took: Duration, last: bool) {
        let so_far = self.took.unwrap_or_default() + took;
        self.took = (!last).then_some(so_far);
        if last {
            self.due = Instant::now() + self.interval.max(WALK_REST.after(so_far));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn until_due(sweep: &Sweep) -> Duration {
        sweep.due.saturating_duration_since(Instant::now())
    }

    #[test]
    fn a_sweep_rests_twenty_times_as_long_as_all_its_reads_took() {
        let mut sweep = Sweep::new(Duration::ZERO);
        assert!(sweep.is_due());
        sweep.read(Duration::from_secs(1), false);
        assert!(sweep.is_due(), "it goes on");
        sweep.read(Duration::from_secs(2), true);
        assert!(!sweep.is_due());
        assert!((59..=60).contains(&until_due(&sweep).as_secs()), "{:?}", until_due(&sweep));
        sweep.read(Duration::from_secs(15), true);
        assert!((299..=300).contains(&until_due(&sweep).as_secs()), "{:?}", until_due(&sweep));
        sweep.read(Duration::from_secs(15_000), true);
        assert!(until_due(&sweep) <= Duration::from_secs(600));
    }

    #[test]
    fn sweeps_come_no_more_often_than_they_are_wanted() {
        let mut sweep = Sweep::new(Duration::from_secs(3600));
        sweep.read(Duration::from_millis(1), true);
        assert!(until_due(&sweep) > Duration::from_secs(3599));
    }
}

//! When the database is asked to wait for rows (long polling), instead of being asked for rows again and again.
//!
//! A watch is a hint: it may end for a row that cannot be read yet, or that another replica reads. So reads decide, and all
//! works without it: where it fails it is left alone for a while, and what the database can do is told by reads.

use super::{PAUSE_MIN, Poll, RANGES_MAX};
use crate::mutants::mutant;
use crate::pipeline::known::Unknown;
use crate::retry::WATCH_BACKOFF;
use crate::store::{Store, StoreError, Trouble, Watch};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest single watch. Bounds how late the pipeline's own work between reads is.
const LASTS: Duration = Duration::from_secs(1);
/// Longest pause before the next watch when reads find nothing although there was news: others are busy.
pub(super) const VAIN_PAUSE_MAX: Duration = Duration::from_millis(100);
/// Failures in a row that are told: a first one may be a restart, of which reads will tell.
const FAILURES_TOLD: u32 = 2;

/// What is known of rows that were noticed, read or not, and of watches that failed.
#[derive(Debug)]
pub(super) struct Watching {
    enabled: bool,
    noticed: i64,
    failures: u32,
    closed_until: Option<Instant>,
}

impl Watching {
    /// By the setting.
    pub(super) fn new(enabled: bool) -> Self {
        Self { enabled, noticed: i64::MIN, failures: 0, closed_until: None }
    }

    /// It may be tried.
    pub(super) fn is_open(&self) -> bool {
        self.enabled && self.closed_until.is_none_or(|until| Instant::now() >= until)
    }

    /// The highest id that is no news.
    pub(super) fn noticed(&self) -> i64 {
        self.noticed
    }

    /// This id is no news from now on; true if it was.
    pub(super) fn note(&mut self, id: i64) -> bool {
        let news = id > self.noticed;
        self.noticed = self.noticed.max(id);
        news
    }

    /// It works.
    pub(super) fn answered(&mut self) {
        if self.is_told() {
            tracing::info!("long polling works");
        }
        (self.failures, self.closed_until) = (0, None);
    }

    /// It does not, and reading goes on without it.
    pub(super) fn failed(&mut self, error: &StoreError) {
        let was_told = self.is_told();
        self.failures = match error.trouble {
            // Nothing passes by itself here.
            Trouble::Configuration | Trouble::Rejected => self.failures.max(FAILURES_TOLD - 1) + 1,
            Trouble::Outage | Trouble::Contention => self.failures.saturating_add(1),
        };
        self.closed_until = Some(Instant::now() + WATCH_BACKOFF.delay(self.failures));
        if self.is_told() && !was_told {
            let reason = &error.sentence;
            tracing::warn!(
                reason,
                "no long polling, rows are polled: run `outbox-relay migrate`, or set OUTBOX_LONG_POLL=false"
            );
        }
    }

    fn is_told(&self) -> bool {
        self.failures >= FAILURES_TOLD
    }

    /// Ids may have been given anew.
    pub(super) fn forget(&mut self) {
        self.noticed = i64::MIN;
    }
}

/// How a watch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watched {
    /// For a row that was not there before.
    News,
    /// For another row that is due, or for shards that have come.
    Due,
    /// For nothing.
    Silence,
}

impl<S: Store> Poll<S> {
    /// Watches until there may be something to read; answers with how long to pause should it be in vain.
    pub(super) async fn watch_on(&mut self, last_read_at: Instant, pause: Duration) -> Duration {
        loop {
            match self.watch(last_read_at).await {
                // Reads that follow news in vain, since others write, come ever later.
                Ok(Watched::News) => return pause,
                Ok(Watched::Silence) if self.may_read() && !self.must_read(last_read_at) => {}
                Ok(Watched::Due | Watched::Silence) => return PAUSE_MIN,
                Err(error) => {
                    self.watching.failed(&error);
                    if error.trouble == Trouble::Outage {
                        // As in `recover`. The next connection may lead to another server, and at the first try.
                        self.forget_what_is_settled();
                    }
                    return pause;
                }
            }
            if let Err(error) = self.close_gaps().await {
                self.recover(&error).await;
                return PAUSE_MIN;
            }
        }
    }

    /// Whatever a watch has seen.
    pub(super) fn must_read(&self, last_read_at: Instant) -> bool {
        self.next_duty() <= Instant::now()
            || last_read_at.elapsed() >= self.limits.poll_interval
            || self.shards.is_news(&self.leases())
    }

    /// Lets the database wait for rows to read, as long as nothing else is to be done.
    async fn watch(&mut self, last_read_at: Instant) -> Result<Watched, StoreError> {
        let poll_interval = self.limits.poll_interval;
        // What is in flight may have to be followed by a probe, or by rows that are released.
        let lasts = if self.in_flight.is_empty() { LASTS } else { poll_interval.min(LASTS) };
        let until_duty = self.next_duty().saturating_duration_since(Instant::now());
        self.watching.note(self.last_read);
        let Unknown { ranges, exact } = self.known.unknown(RANGES_MAX);
        let in_flight = self.not_wanted(exact);
        let store = Arc::clone(&self.store);
        let watch = Watch {
            noticed: self.watching.noticed(),
            ranges: &ranges,
            in_flight: &in_flight,
            first_poll: poll_interval.saturating_sub(last_read_at.elapsed()),
            poll_interval,
            lasts: lasts.min(until_duty),
        };
        let Some(seen) = self.attend_during(store.watch(watch)).await else { return Ok(Watched::Due) };
        let id = seen?.filter(|_| !mutant!("watch-sees-nothing"));
        self.watching.answered();
        Ok(match id.map(|id| self.watching.note(id)) {
            Some(true) => Watched::News,
            Some(false) => Watched::Due,
            None => Watched::Silence,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_that_fails_is_left_alone_until_it_may_work() {
        let error = |trouble| StoreError { trouble, sentence: "no".to_owned() };
        let mut watching = Watching::new(true);
        assert!(watching.is_open());
        watching.failed(&error(Trouble::Outage));
        assert!(!watching.is_open() && !watching.is_told(), "perhaps a restart");
        watching.failed(&error(Trouble::Outage));
        assert!(watching.is_told());
        watching.answered();
        assert!(watching.is_open() && !watching.is_told());
        watching.failed(&error(Trouble::Configuration));
        assert!(!watching.is_open() && watching.is_told());
        assert!(!Watching::new(false).is_open());
    }

    #[test]
    fn a_row_is_news_once() {
        let mut watching = Watching::new(true);
        assert!(watching.note(7) && !watching.note(7) && !watching.note(3) && watching.note(8));
        assert_eq!(watching.noticed(), 8);
        watching.forget();
        assert!(watching.note(3), "ids began anew");
    }
}

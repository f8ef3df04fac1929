//! When the database is asked to wait for rows (long polling), instead of being asked for rows again and again.
//!
//! A watch is a hint: it may end for a row that cannot be read yet, or that another replica reads. So reads decide, and all
//! works without it: where it fails it is left alone for a while, and what the database can do is told by reads.

use crate::retry::WATCH_BACKOFF;
use crate::store::{StoreError, Trouble};
use std::time::{Duration, Instant};

/// Longest single watch. Bounds how late the pipeline's own work between reads is.
pub const WATCH_LASTS: Duration = Duration::from_secs(1);
/// Longest pause before the next watch when reads find nothing although there was news: others are busy.
pub const VAIN_PAUSE_MAX: Duration = Duration::from_millis(100);
/// Failures in a row that are told: a first one may be a restart, of which reads will tell.
const FAILURES_TOLD: u32 = 2;

/// What is known of rows that were noticed, read or not, and of watches that failed.
#[derive(Debug)]
pub struct Watching {
    enabled: bool,
    noticed: i64,
    failures: u32,
    closed_until: Option<Instant>,
}

impl Watching {
    /// By the setting.
    pub fn new(enabled: bool) -> Self {
        Self { enabled, noticed: i64::MIN, failures: 0, closed_until: None }
    }

    /// It may be tried.
    pub fn is_open(&self) -> bool {
        self.enabled && self.closed_until.is_none_or(|until| Instant::now() >= until)
    }

    /// The highest id that is no news.
    pub fn noticed(&self) -> i64 {
        self.noticed
    }

    /// This id is no news from now on; true if it was.
    pub fn note(&mut self, id: i64) -> bool {
        let news = id > self.noticed;
        self.noticed = self.noticed.max(id);
        news
    }

    /// It works.
    pub fn answered(&mut self) {
        if self.is_told() {
            tracing::info!("long polling works");
        }
        (self.failures, self.closed_until) = (0, None);
    }

    /// It does not, and reading goes on without it.
    pub fn failed(&mut self, error: &StoreError) {
        let was_told = self.is_told();
        self.failures = match error.trouble {
            // Nothing passes by itself here.
            Trouble::Configuration => self.failures.max(FAILURES_TOLD - 1) + 1,
            Trouble::Outage | Trouble::Contention => self.failures.saturating_add(1),
        };
        let pause = WATCH_BACKOFF.delays().nth(self.failures.min(32) as usize).unwrap_or(WATCH_BACKOFF.max);
        self.closed_until = Some(Instant::now() + pause);
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
    pub fn forget(&mut self) {
        self.noticed = i64::MIN;
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

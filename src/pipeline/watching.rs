//! When the database is asked to wait for rows (long polling), instead of being asked for rows again and again.
//!
//! A watch is a hint: it may end for a row that cannot be read yet, or that another replica reads. So reads decide,
//! and all works without it: where it is refused it is left alone for a while.

use crate::store::StoreError;
use std::time::{Duration, Instant};

/// Longest single watch. Bounds how late the pipeline's own work between reads is.
pub const WATCH_LASTS: Duration = Duration::from_secs(1);
/// After a refusal.
const AGAIN_AFTER: Duration = Duration::from_secs(60);

/// What is known of rows that were noticed, read or not.
#[derive(Debug)]
pub struct Watching {
    enabled: bool,
    noticed: i64,
    refused_at: Option<Instant>,
}

impl Watching {
    /// By the setting.
    pub fn new(enabled: bool) -> Self {
        Self { enabled, noticed: i64::MIN, refused_at: None }
    }

    /// It may be tried.
    pub fn is_open(&self) -> bool {
        self.enabled && self.refused_at.is_none_or(|at| at.elapsed() >= AGAIN_AFTER)
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
        if self.refused_at.take().is_some() {
            tracing::info!("long polling works");
        }
    }

    /// It does not, and reading goes on without it.
    pub fn refused(&mut self, error: &StoreError) {
        if self.refused_at.replace(Instant::now()).is_none() {
            let reason = &error.sentence;
            tracing::warn!(
                reason,
                "no long polling, rows are polled: run `outbox-relay migrate`, or set OUTBOX_LONG_POLL=false"
            );
        }
    }

    /// Ids may have been given anew.
    pub fn forget(&mut self) {
        self.noticed = i64::MIN;
    }
}

//! Counters and switches that the tasks of a run share; what the line of progress shows.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

/// Counters and switches.
#[derive(Debug, Default)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Board {
    pub committed: AtomicU64,
    pub unknown: AtomicU64,
    pub delivered: AtomicU64,
    pub duplicates: AtomicU64,
    pub faults: AtomicU64,
    /// Writers mix in rows that can never be delivered.
    pub poison: AtomicBool,
    /// The consumer takes nothing.
    pub paused: AtomicBool,
    now: Mutex<BTreeMap<u64, &'static str>>,
}

impl Board {
    /// A fault begins.
    pub fn begins(&self, at: u64, name: &'static str) {
        self.faults.fetch_add(1, Relaxed);
        self.now.lock().unwrap_or_else(PoisonError::into_inner).insert(at, name);
    }

    /// The fault that began then is over.
    pub fn ends(&self, at: u64) {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).remove(&at);
    }

    /// How many faults are on.
    pub fn on(&self) -> usize {
        self.now.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// The line of progress, without a time.
    pub fn line(&self, otherwise: &str) -> String {
        let now: Vec<&str> =
            self.now.lock().unwrap_or_else(PoisonError::into_inner).values().copied().collect();
        let now = if now.is_empty() { otherwise.to_owned() } else { now.join(" + ") };
        let [written, delivered, duplicates, faults] =
            [&self.committed, &self.delivered, &self.duplicates, &self.faults]
                .map(|count| count.load(Relaxed));
        format!(
            "written {written}  delivered {delivered}  duplicates {duplicates}  faults {faults}  now: {now}"
        )
    }
}

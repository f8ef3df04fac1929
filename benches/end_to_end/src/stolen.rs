//! What the host of this machine gave to others meanwhile: figures taken beside much of it say little.

use crate::run::Sample;
use outbox_relay_chaos::usage::MachineCpu;

/// From a moment on.
#[derive(Debug, Clone, Copy)]
pub struct Stolen(Option<MachineCpu>);

impl Stolen {
    /// From now on.
    pub fn from_now() -> Self {
        Self(MachineCpu::now())
    }

    /// Up to now, in percent of the processor time that somebody here wanted; `None` without `/proc`.
    pub fn percent(self) -> Option<f64> {
        let MachineCpu { busy, stolen, .. } = MachineCpu::now()?.since(self.0?);
        Some(stolen / (busy + stolen).max(f64::MIN_POSITIVE) * 100.0)
    }
}

/// A figure of it.
pub fn figure(name: &'static str, percent: Option<f64>) -> Sample {
    percent.map(|percent| (name, "% of what was wanted", percent)).into_iter().collect()
}

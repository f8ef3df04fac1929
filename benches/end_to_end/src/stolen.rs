//! What the host of this machine gave to others meanwhile: figures taken beside much of it say little.

use crate::run::Sample;
use outbox_relay_chaos::usage::MachineCpu;

/// More than this, in percent of what was wanted here, and a figure says more of the neighbours than of what is measured.
const TOO_MUCH: f64 = 10.0;
/// Names of figures of it begin so.
const NAME: &str = "stolen by the host";

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

/// A figure of it, whose name begins with "stolen by the host".
pub fn figure(name: &'static str, percent: Option<f64>) -> Sample {
    debug_assert!(name.starts_with(NAME));
    percent.map(|percent| (name, "% of what was wanted", percent)).into_iter().collect()
}

/// A part of a round was disturbed so much that it is to be taken again.
pub fn disturbed(sample: &Sample) -> bool {
    sample.iter().any(|(name, _, percent)| name.starts_with(NAME) && is_too_much(Some(*percent)))
}

/// The same of one figure.
pub fn is_too_much(percent: Option<f64>) -> bool {
    percent.is_some_and(|percent| percent > TOO_MUCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_disturbed_part_is_enough() {
        let sample = |relay, raw| {
            vec![("rate", "rows/s", 99.0), (NAME, "%", relay), ("stolen by the host, raw", "%", raw)]
        };
        assert!(!disturbed(&sample(3.0, TOO_MUCH)));
        assert!(disturbed(&sample(11.0, 0.0)) && disturbed(&sample(0.0, 11.0)));
        assert!(!disturbed(&vec![("rate", "rows/s", 99.0)]) && !is_too_much(None));
    }
}

//! What the host of this machine gave to others meanwhile: figures taken beside much of it say little.

use crate::run::Sample;
use outbox_relay_chaos::usage::MachineCpu;
use std::time::{Duration, Instant};
use tokio::task::spawn_blocking;

/// More than this, in percent of what was wanted here, and a figure says more of the neighbours than of what is measured.
const TOO_MUCH: f64 = 10.0;
/// Names of figures of it begin so.
const NAME: &str = "stolen by the host";
/// What is not wanted cannot be stolen, so all cores are kept busy for so long to see how much is.
const LOOK: Duration = Duration::from_millis(500);
/// Between two looks.
const PAUSE: Duration = Duration::from_secs(2);

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

/// Waits until the host steals little, but no longer than this.
pub async fn until_little(at_most: Duration) {
    let begun = Instant::now();
    while is_too_much(of_busy_cores().await) && begun.elapsed() < at_most {
        tokio::time::sleep(PAUSE).await;
    }
}

async fn of_busy_cores() -> Option<f64> {
    let stolen = Stolen::from_now();
    let until = Instant::now() + LOOK;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let spin = move || {
        while Instant::now() < until {
            std::hint::spin_loop();
        }
    };
    let spinning: Vec<_> = (0..cores).map(|_| spawn_blocking(spin)).collect();
    for core in spinning {
        let _ = core.await;
    }
    stolen.percent()
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

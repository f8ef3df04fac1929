//! Liveness: every loop beats while it runs, also while it waits for a server.
//!
//! A beat says only that the loop is scheduled and has not died. Whether servers can be reached is
//! readiness; an outage must never make an orchestrator restart the process.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// A waiting loop beats this often.
const BEAT: Duration = Duration::from_secs(1);
/// A loop that has not beaten for this long is stuck. Ten beats, so that a machine that stalls for
/// some seconds does not cost a restart.
const STUCK_AFTER: Duration = Duration::from_secs(10);

/// The pulse of one loop.
#[derive(Debug, Clone)]
pub struct Pulse {
    name: &'static str,
    origin: Instant,
    last_millis: Arc<AtomicU64>,
}

impl Pulse {
    fn beat(&self) {
        self.last_millis.store(self.origin.elapsed().as_millis() as u64, Relaxed);
    }

    /// Awaits, beating meanwhile.
    pub async fn beat_during<F: Future>(&self, work: F) -> F::Output {
        tokio::pin!(work);
        loop {
            self.beat();
            tokio::select! {
                biased;
                output = &mut work => return output,
                () = tokio::time::sleep(BEAT) => {}
            }
        }
    }

    fn silent_for(&self) -> Duration {
        self.origin.elapsed().saturating_sub(Duration::from_millis(self.last_millis.load(Relaxed)))
    }
}

/// The pulses of all loops that ought to be running.
#[derive(Debug, Clone, Default)]
pub struct Pulses {
    all: Arc<Mutex<Vec<Pulse>>>,
}

impl Pulses {
    /// A pulse for a new loop.
    pub fn start(&self, name: &'static str) -> Pulse {
        let pulse = Pulse { name, origin: Instant::now(), last_millis: Arc::default() };
        self.all.lock().unwrap_or_else(PoisonError::into_inner).push(pulse.clone());
        pulse
    }

    /// A loop that is stuck, if there is one. A loop that has ended has dropped its pulse.
    pub fn stuck(&self) -> Option<&'static str> {
        let all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let running = |pulse: &&Pulse| Arc::strong_count(&pulse.last_millis) > 1;
        all.iter().filter(running).find(|pulse| pulse.silent_for() > STUCK_AFTER).map(|pulse| pulse.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_neither_beats_nor_ends_is_stuck() {
        let pulses = Pulses::default();
        let (waiting, silent) = (pulses.start("waiting"), pulses.start("silent"));
        let long = tokio::time::sleep(Duration::from_secs(60));
        waiting.beat_during(long).await;
        assert_eq!(pulses.stuck(), Some("silent"), "one that waits beats");
        drop(silent);
        assert_eq!(pulses.stuck(), None, "it has ended");
    }
}

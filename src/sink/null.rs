//! A sink that takes everything and keeps nothing: for benchmarks of all that is not the broker.

use super::{Publisher, Refusal, Sink, SinkState, Verdict};
use crate::ownership::Permit;
use crate::store::Row;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Takes every message at once. Clones share the count.
#[derive(Debug, Clone)]
pub struct NullSink {
    taken: Arc<AtomicU64>,
    state: watch::Sender<SinkState>,
}

impl Default for NullSink {
    fn default() -> Self {
        Self { taken: Arc::default(), state: watch::Sender::new(SinkState::Ready) }
    }
}

impl NullSink {
    /// Messages taken so far.
    pub fn taken(&self) -> u64 {
        self.taken.load(Relaxed)
    }
}

impl Sink for NullSink {
    type Publisher = Self;

    fn publisher(&self) -> Self {
        self.clone()
    }

    fn publisher_apart(&self) -> Self {
        self.clone()
    }

    fn state(&self) -> watch::Receiver<SinkState> {
        self.state.subscribe()
    }

    async fn close(&self) {}
}

impl Publisher for NullSink {
    async fn publish(&mut self, batch: &[Row], permit: &Permit, _: &CancellationToken) -> Vec<Verdict> {
        let permit = permit.for_batch();
        let verdict = |row| if permit.allows(row) { Ok(()) } else { Err(Refusal::without_lease()) };
        let verdicts: Vec<Verdict> = batch.iter().map(verdict).collect();
        self.taken.fetch_add(verdicts.iter().flatten().count() as u64, Relaxed);
        verdicts
    }
}

//! A sink that does what a script says: for failures that no real broker can be made to play on cue.

use outbox_relay::ownership::Permit;
use outbox_relay::sink::{Publisher, Refusal, Sink, SinkState, Verdict};
use outbox_relay::store::Row;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

type Script = Box<dyn FnMut(&Row) -> Verdict + Send>;

/// Asks its script about every row. Clones share it.
#[derive(Clone)]
pub struct ScriptedSink {
    script: Arc<Mutex<Script>>,
    taken: Arc<Mutex<Vec<Row>>>,
    state: watch::Sender<SinkState>,
    slowness: Duration,
}

impl ScriptedSink {
    pub fn new(script: impl FnMut(&Row) -> Verdict + Send + 'static) -> Self {
        let state = watch::Sender::new(SinkState::Ready);
        let script: Script = Box::new(script);
        Self { script: Arc::new(Mutex::new(script)), taken: Arc::default(), state, slowness: Duration::ZERO }
    }

    /// A quarter of its batches take this long.
    pub fn slow(self, slowness: Duration) -> Self {
        Self { slowness, ..self }
    }

    /// Rows it took, in order; a row may be there twice.
    pub fn taken(&self) -> Vec<Row> {
        self.taken.lock().unwrap().clone()
    }

    /// Panics unless the first sendings of each key are in id order; how many rows were sent again.
    pub fn in_order_but_for_repeats(&self) -> usize {
        let (mut seen, mut last, mut repeats) = (HashSet::new(), HashMap::new(), 0);
        for row in self.taken() {
            if !seen.insert(row.id) {
                repeats += 1;
            } else if let Some(key) = row.ordering_key {
                let before = last.insert(Arc::clone(&key), row.id).unwrap_or(i64::MIN);
                assert!(before < row.id, "key {key}: {} after {before}", row.id);
            }
        }
        repeats
    }

    pub fn set_state(&self, state: SinkState) {
        self.state.send_replace(state);
    }
}

impl Sink for ScriptedSink {
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

impl Publisher for ScriptedSink {
    async fn publish(&mut self, batch: &[Row], permit: &Permit, _: &CancellationToken) -> Vec<Verdict> {
        // Some batches are slow, so that what happens meanwhile elsewhere happens before.
        match fastrand::u8(0..4) {
            0 => tokio::time::sleep(self.slowness).await,
            _ => tokio::task::yield_now().await,
        }
        let mut script = self.script.lock().unwrap();
        let mut verdicts = Vec::with_capacity(batch.len());
        let permit = permit.for_batch();
        for row in batch {
            let verdict = if permit.allows(row) { script(row) } else { Err(Refusal::without_lease()) };
            if verdict.is_ok() {
                self.taken.lock().unwrap().push(row.clone());
            }
            verdicts.push(verdict);
        }
        verdicts
    }
}

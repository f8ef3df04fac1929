//! A reading stage that tests take through its steps, with everything it is connected to.

use super::{Ends, Poll};
use crate::config::Settings;
use crate::ownership::Holdings;
use crate::pipeline::{Settled, Work};
use crate::sink::SinkState;
use crate::store::Lease;
use crate::store::memory::MemoryStore;
use crate::telemetry::Instruments;
use std::sync::Arc;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// With one worker and its prober.
pub(super) struct Stage {
    pub poll: Poll<MemoryStore>,
    pub store: MemoryStore,
    pub holdings: watch::Sender<Holdings>,
    pub workers: Vec<mpsc::Receiver<Work>>,
    _settled: mpsc::Sender<Vec<Settled>>,
    _sink: watch::Sender<SinkState>,
    _drained: mpsc::Receiver<Lease>,
}

pub(super) fn stage() -> Stage {
    stage_with(&Settings::plain())
}

pub(super) fn stage_with(settings: &Settings) -> Stage {
    let store = MemoryStore::default();
    let (workers, received): (Vec<_>, Vec<_>) = (0..2).map(|_| mpsc::channel(10)).unzip();
    let (settled, settled_in) = mpsc::channel(10);
    let (sink, sink_in) = watch::channel(SinkState::Ready);
    let (holdings, holdings_in) = watch::channel(Holdings::none(uuid::Uuid::nil(), 4));
    let (drained, drained_in) = mpsc::channel(10);
    let ends = Ends {
        store: Arc::new(store.clone()),
        workers,
        settled: settled_in,
        sink: sink_in,
        holdings: holdings_in,
        drained,
    };
    let poll = Poll::new(ends, settings, CancellationToken::new(), Instruments::unseen());
    let (_settled, _sink, _drained) = (settled, sink, drained_in);
    Stage { poll, store, holdings, workers: received, _settled, _sink, _drained }
}

impl Stage {
    /// The ids that were handed to a worker since the last time.
    pub fn handed_to(&mut self, worker: usize) -> Vec<i64> {
        let work = std::iter::from_fn(|| self.workers[worker].try_recv().ok());
        let ids = work.filter_map(|work| match work {
            Work::Publish(rows) | Work::TryApart(rows) => Some(rows),
            Work::Resume(_) => None,
        });
        ids.flatten().map(|row| row.id).collect()
    }
}

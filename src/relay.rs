//! The assembly: opens channels, spawns stages, watches over them, stops them in order.
//!
//! Stopping has two steps. The signal ends the reading alone; workers end because their input ends, settle
//! because theirs does, `poll` because `settle` has. When the grace period is over, waiting for
//! the broker or the database is cut short; what was confirmed by then is still written if the database can be
//! reached.

use crate::config::Settings;
use crate::housekeeping;
use crate::http;
use crate::ownership::{self, Holdings, Keeper, Permit};
use crate::pipeline::{Poll, Settle, Worker, poll, publish, settle, settle::Unwritten};
use crate::sink::Sink;
use crate::store::{Lease, LeaseTable, Store};
use crate::telemetry::{Metrics, Telemetry};
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Why a relay ended other than by a clean stop.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// A part of the relay ended by itself, which is a defect.
    #[error("the {0} part of the relay ended by itself")]
    Ended(&'static str),
    /// A part of the relay panicked, which is a defect.
    #[error("a part of the relay failed: {0}")]
    Panicked(JoinError),
    /// The stop came to its end with confirmed rows unmarked.
    #[error(transparent)]
    Unwritten(#[from] Unwritten),
}

/// A relay between a store and a sink.
#[derive(Debug)]
pub struct Relay<S, K> {
    settings: Settings,
    store: Arc<S>,
    sink: K,
    telemetry: Telemetry,
    holdings: Arc<watch::Sender<Holdings>>,
}

/// What a task answers with: its part, and how that ended.
type Ended = (&'static str, Result<(), Unwritten>);

impl<S: Store + LeaseTable, K: Sink> Relay<S, K> {
    /// Puts a relay together; nothing runs yet.
    pub fn new(settings: Settings, store: S, sink: K, metrics: Arc<Metrics>) -> Self {
        let holdings = Holdings::none(Uuid::new_v4(), settings.shards as u32);
        Self {
            settings,
            store: Arc::new(store),
            sink,
            telemetry: Telemetry::new(metrics),
            holdings: Arc::new(watch::Sender::new(holdings)),
        }
    }

    /// Runs until `stop` is cancelled and everything in flight is settled.
    pub async fn run(self, listener: TcpListener, stop: CancellationToken) -> Result<(), RelayError> {
        let (stopping, cut, end) = (stop.child_token(), CancellationToken::new(), CancellationToken::new());
        // Each leaving shard is told once, so there is room for all.
        let (drained, drained_in) = mpsc::channel(self.settings.shards * 2);
        let mut beside = self.start_beside(listener, drained_in, &stopping, &end);
        let mut stages = self.start_pipeline(drained, &stopping, &cut);

        let failure = tokio::select! {
            biased;
            // 1. The stop; first, because stages may have ended because of it.
            () = stopping.cancelled() => None,
            // 2. A stage that ends before the stop has failed.
            ended = stages.join_next() => ended.and_then(|ended| failure_of(ended, true)),
            // 3. The same for what runs beside.
            ended = beside.join_next() => ended.and_then(|ended| failure_of(ended, true)),
        };
        self.telemetry.board.set_stopping();
        stopping.cancel();
        let failure = self.drain(&mut stages, failure, &cut).await;

        if cut.is_cancelled() {
            // Messages without an answer may still be in the connection's buffers; others must not have their shards yet.
            self.sink.close().await;
        }
        end.cancel();
        self.sink.close().await;
        while beside.join_next().await.is_some() {}
        match failure {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    /// Waits for the stages to end one after the other, at most for the grace period and then a moment.
    async fn drain(
        &self,
        stages: &mut JoinSet<Ended>,
        mut failure: Option<RelayError>,
        cut: &CancellationToken,
    ) -> Option<RelayError> {
        let in_flight = self.telemetry.metrics.in_flight.get();
        tracing::info!(in_flight, grace_seconds = self.settings.shutdown_grace.as_secs_f64(), "stopping");
        let grace = tokio::time::sleep(self.settings.shutdown_grace);
        tokio::pin!(grace);
        loop {
            tokio::select! {
                biased;
                // 1. Stages that end.
                ended = stages.join_next() => match ended {
                    Some(ended) => failure = failure.or(failure_of(ended, false)),
                    None => break,
                },
                // 2. No more patience.
                () = &mut grace, if !cut.is_cancelled() => cut.cancel(),
            }
        }
        if failure.is_none() {
            tracing::info!("stopped; everything confirmed is marked");
        }
        failure
    }

    fn start_pipeline(
        &self,
        drained: mpsc::Sender<Lease>,
        stopping: &CancellationToken,
        cut: &CancellationToken,
    ) -> JoinSet<Ended> {
        // Room for every row in flight, and for every key that is resumed: no send ever waits.
        let places = self.settings.max_in_flight * 2;
        let (outcomes, outcomes_in) = mpsc::channel(places);
        let (settled, settled_in) = mpsc::channel(places);
        let mut stages = JoinSet::new();
        let mut workers = Vec::new();
        // One more than the settings say: the last takes probes of parked routes.
        for _ in 0..=self.settings.workers {
            let (work, work_in) = mpsc::channel(places);
            workers.push(work);
            let ends = publish::Ends {
                input: work_in,
                output: outcomes.clone(),
                publisher: self.sink.publisher(),
                apart: self.sink.publisher_apart(),
                sink: self.sink.state(),
                permit: Permit::new(self.holdings.subscribe()),
            };
            let instruments = self.telemetry.of("publish");
            let worker = Worker::new(ends, &self.settings, stopping.clone(), cut.clone(), instruments);
            stages.spawn(part("publish", worker.run()));
        }
        drop(outcomes);
        let ends = settle::Ends { input: outcomes_in, output: settled, store: Arc::clone(&self.store) };
        let settle = Settle::new(ends, &self.settings, cut.clone(), self.telemetry.of("settle"));
        stages.spawn(async { ("settle", settle.run().await) });
        let ends = poll::Ends {
            store: Arc::clone(&self.store),
            workers,
            settled: settled_in,
            sink: self.sink.state(),
            holdings: self.holdings.subscribe(),
            drained,
        };
        let poll = Poll::new(ends, &self.settings, stopping.clone(), self.telemetry.of("poll"));
        stages.spawn(part("poll", poll.run()));
        stages
    }

    /// Leases, counting, retention and HTTP go on while the pipeline drains.
    fn start_beside(
        &self,
        listener: TcpListener,
        drained: mpsc::Receiver<Lease>,
        stopping: &CancellationToken,
        stop: &CancellationToken,
    ) -> JoinSet<Ended> {
        let mut beside = JoinSet::new();
        let ends = ownership::Ends {
            store: Arc::clone(&self.store),
            holdings: Arc::clone(&self.holdings),
            drained,
            sink: self.sink.state(),
            stopping: stopping.clone(),
        };
        let keeper = Keeper::new(ends, &self.settings, self.telemetry.of("ownership"));
        beside.spawn(part("ownership", keeper.run(stop.clone())));
        let store = || Arc::clone(&self.store);
        let census = housekeeping::census(store(), self.telemetry.of("census"), stop.clone());
        beside.spawn(part("counting", census));
        let purge = housekeeping::purge(
            store(),
            self.holdings.subscribe(),
            self.settings.retention,
            self.telemetry.of("purge"),
            stop.clone(),
        );
        beside.spawn(part("retention", purge));
        let view = http::View {
            telemetry: self.telemetry.clone(),
            sink: self.sink.state(),
            holdings: self.holdings.subscribe(),
        };
        beside.spawn(part("HTTP", http::serve(listener, view, stop.clone())));
        beside
    }
}

/// A part that has nothing to say when it ends.
async fn part(name: &'static str, run: impl Future<Output = ()>) -> Ended {
    run.await;
    (name, Ok(()))
}

/// What the end of a part means. Before the stop, any end is a failure.
fn failure_of(ended: Result<Ended, JoinError>, unexpected: bool) -> Option<RelayError> {
    match ended {
        Ok((_, Err(unwritten))) => Some(unwritten.into()),
        Ok((part, Ok(()))) if unexpected => Some(RelayError::Ended(part)),
        Ok(_) => None,
        Err(panic) => Some(RelayError::Panicked(panic)),
    }
}

//! The publish stage: a worker with one channel to the broker.
//!
//! Takes rows, sends them in batches, awaits *all* answers of a batch, and hands every row over with
//! its end. Rows whose fate is not known stay here and are sent again in order. Knows nothing of SQL.
//!
//! A crash here costs the rows in flight a second delivery, and nothing else: nothing is written
//! before settle has the verdict.

mod ends;

use super::queue::{Queue, Queued, Room, Suspension, Suspicion};
use super::troubled::{Sending, Troubled};
use super::{End, Outcome, Work};
use crate::config::Settings;
use crate::mutants::mutant;
use crate::ownership::Permit;
use crate::retry::{BREAK_BACKOFF, BREAKS_BLAME, OUTAGE_BACKOFF, Policy};
use crate::sink::{Fault, Publisher, Refusal, SinkState, Verdict};
use crate::store::Row;
use crate::telemetry::{Instruments, Metrics, Pulse};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::time::error::Elapsed;
use tokio_util::sync::CancellationToken;

/// After a message sent apart that came to nothing: a server that breaks all connections is not to be stormed.
const APART_REST: Duration = Duration::from_millis(50);
/// The part of all places that may be taken by what is suspended, and by what is behind it.
const SUSPENDED_PART: usize = 2;

/// How long a worker has, after the grace period, to hand over the answers it has.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// For a row of which is known what it does to connections: one more and it waits.
fn one_try(now: Instant) -> Suspicion {
    Suspicion::apart(now, BREAKS_BLAME - 1)
}

/// It says something of the connection that a row had for itself.
fn is_for_its_connection(fault: Fault) -> bool {
    matches!(fault, Fault::Break | Fault::Risk | Fault::Outage)
}

/// One publishing worker.
pub struct Worker<P> {
    input: mpsc::Receiver<Work>,
    output: mpsc::Sender<Vec<Outcome>>,
    /// Rows that have come to their end and were not handed over yet.
    ended: Vec<Outcome>,
    publisher: P,
    apart: P,
    sink: watch::Receiver<SinkState>,
    permit: Permit,
    queue: Queue,
    /// This worker's part of the places for what is suspended.
    suspended: Room,
    policy: Policy,
    batch_rows: usize,
    batch_bytes: usize,
    /// Routes that give no answers or break connections.
    troubled: Troubled,
    /// Rows that were blamed for broken connections: they break no more than one when they are tried again.
    blamed: HashSet<i64>,
    /// The relay is stopping: do not wait for a broker that is away.
    stopping: CancellationToken,
    /// The grace period is over: leave everything that has no answer.
    cut: CancellationToken,
    pulse: Pulse,
    metrics: Arc<Metrics>,
}

/// What a worker is connected to.
pub struct Ends<P> {
    /// Rows from poll.
    pub input: mpsc::Receiver<Work>,
    /// Outcomes to settle.
    pub output: mpsc::Sender<Vec<Outcome>>,
    /// The worker's own channel to the broker.
    pub publisher: P,
    /// The same on a connection that nobody else uses, for what may break it.
    pub apart: P,
    /// Whether the broker can be used.
    pub sink: watch::Receiver<SinkState>,
    /// The right to send a row.
    pub permit: Permit,
}

impl<P: Publisher> Worker<P> {
    /// A worker that stops when its input ends.
    pub fn new(
        ends: Ends<P>,
        settings: &Settings,
        stopping: CancellationToken,
        cut: CancellationToken,
        instruments: Instruments,
    ) -> Self {
        Self {
            input: ends.input,
            output: ends.output,
            ended: Vec::new(),
            publisher: ends.publisher,
            sink: ends.sink,
            apart: ends.apart,
            permit: ends.permit,
            queue: Queue::new(settings.ordering),
            suspended: Room {
                rows: (settings.max_in_flight / settings.workers / SUSPENDED_PART).max(1),
                bytes: settings.max_in_flight_bytes / settings.workers / SUSPENDED_PART,
            },
            policy: Policy::new(settings),
            batch_rows: settings.batch_size,
            batch_bytes: settings.max_in_flight_bytes / settings.workers,
            troubled: Troubled::default(),
            blamed: HashSet::new(),
            stopping,
            cut,
            pulse: instruments.pulse,
            metrics: instruments.metrics,
        }
    }

    /// Publishes until the input has ended and every row has an end, or until no answer can be
    /// waited for any longer.
    pub async fn run(mut self) {
        let cut = self.cut.clone();
        let too_late = async {
            cut.cancelled().await;
            tokio::time::sleep(LAST_ANSWERS).await;
        };
        tokio::select! {
            biased;
            // 1. The work is done, or given up in order, with every answer that came.
            () = self.work() => {}
            // 2. A sink that does not give up when it is told to.
            () = too_late => {}
        }
        if cut.is_cancelled() {
            tracing::warn!("grace period over: messages without an answer are left for the next start");
        }
    }

    async fn work(&mut self) {
        // Batches in a row of which nothing came to an end.
        let mut stuck_batches = 0_u32;
        while self.fill().await {
            if !self.sink_is_ready().await {
                return;
            }
            let batch = self.queue.next_batch(self.batch_rows, self.batch_bytes);
            let Some(batch) = self.unless_in_vain(batch) else { continue };
            let apart = matches!(batch.as_slice(), [queued] if queued.suspicion.is_apart());
            let stuck = self.publish(batch, apart).await;
            if self.cut.is_cancelled() {
                return;
            }
            match stuck {
                // It says nothing of the connection of all, and has pauses of its own.
                _ if apart => {}
                None => stuck_batches = 0,
                // The sink calls itself ready and nothing goes through: do not spin.
                Some(reason) => {
                    if stuck_batches == 0 {
                        tracing::warn!(reason, "a batch came back unsent or unanswered; sending it again");
                    }
                    self.pause_after(stuck_batches).await;
                    stuck_batches = stuck_batches.saturating_add(1);
                }
            }
        }
    }

    /// The longer the more batches were stuck, but a stop is not slept through: it may be that nobody waits for the broker then.
    async fn pause_after(&mut self, stuck_batches: u32) {
        let (signal, is_stopping) = (self.stopping.clone(), self.stopping.is_cancelled());
        let pause = tokio::time::sleep(OUTAGE_BACKOFF.delay(if is_stopping { 0 } else { stuck_batches }));
        let pause = async {
            match is_stopping {
                true => pause.await,
                false => _ = signal.run_until_cancelled(pause).await,
            }
        };
        self.pulse.beat_during(pause).await;
    }

    /// Takes in what has come; waits if there is nothing to do. False when the input has ended and
    /// nothing is left.
    async fn fill(&mut self) -> bool {
        loop {
            while let Ok(work) = self.input.try_recv() {
                self.accept(work);
            }
            self.end_crowding();
            self.hand_over_ended().await;
            if !self.stopping.is_cancelled() {
                self.queue.wake(Instant::now());
            }
            if !self.queue.is_empty() {
                return true;
            }
            match self.receive().await {
                Ok(Some(work)) => self.accept(work),
                // What is suspended stays pending.
                Ok(None) => return false,
                Err(_) => {}
            }
        }
    }

    /// What comes next, unless something that was suspended may go on before.
    async fn receive(&mut self) -> Result<Option<Work>, Elapsed> {
        let work = self.input.recv();
        match self.queue.next_wake().filter(|_| !self.stopping.is_cancelled()) {
            None => Ok(self.pulse.beat_during(work).await),
            Some(at) => self.pulse.beat_during(tokio::time::timeout_at(at.into(), work)).await,
        }
    }

    fn accept(&mut self, work: Work) {
        match work {
            Work::Resume(key) => self.queue.resume(&key),
            Work::Publish(rows) => {
                let now = Instant::now();
                rows.into_iter().for_each(|row| self.accept_row(row, now));
            }
            Work::TryApart(rows) => {
                for row in rows {
                    // The log has its route.
                    self.remember_blamed(row.id);
                    self.push(row, one_try(Instant::now()));
                }
            }
        }
    }

    fn accept_row(&mut self, row: Row, now: Instant) {
        let sending = match !self.blamed.is_empty() && self.blamed.contains(&row.id) {
            true => Sending::Alone(one_try(now)),
            false => self.troubled.sending(&row, now),
        };
        match sending {
            Sending::Together => self.push(row, Suspicion::default()),
            Sending::Alone(suspicion) => self.push(row, suspicion),
            Sending::NotNow(refusal) if self.is_behind_others(&row) => {
                let lethal = refusal.fault == Fault::Break;
                let silent = Suspicion { alone: Some(now), ..Suspicion::default() };
                self.push(row, if lethal { one_try(now) } else { silent });
            }
            Sending::NotNow(refusal) => self.wait(&row, refusal),
        }
    }

    /// Only the first row of a key may be refused: one that had waited would be tried before those before it.
    fn is_behind_others(&self, row: &Row) -> bool {
        row.ordering_key.as_ref().is_some_and(|key| self.queue.is_busy_with(key))
    }

    fn push(&mut self, row: Row, suspicion: Suspicion) {
        if let Some(row) = self.queue.push(Queued { suspicion, ..row.into() }) {
            self.give_back_unsent(&row);
        }
    }

    /// What is suspended waits in memory as long as that is no burden to others, and then in the table.
    fn end_crowding(&mut self) {
        while let Some((row, refusal)) = self.queue.take_crowding(self.suspended) {
            self.put_off(&row, refusal);
        }
    }

    /// Waits until messages can be sent. False: the relay is stopping and the broker is away, so the
    /// rows stay pending.
    async fn sink_is_ready(&mut self) -> bool {
        let ready = async {
            let seen = self.sink.wait_for(SinkState::is_ready).await;
            seen.is_ok()
        };
        let stop_while_away = self.stopping.cancelled();
        self.pulse
            .beat_during(async {
                tokio::select! {
                    biased;
                    // 1. Ready wins, so that a stop still sends what is queued.
                    ready = ready => ready,
                    // 2. Nobody waits for a broker that is away in order to stop.
                    () = stop_while_away => false,
                }
            })
            .await
    }

    /// A row that was to be sent alone waits if its route has shown meanwhile that this is in vain: many may have come together.
    fn unless_in_vain(&mut self, batch: Vec<Queued>) -> Option<Vec<Queued>> {
        if let [Queued { row, suspicion: Suspicion { alone: Some(since), .. } }] = batch.as_slice()
            && let Some(refusal) = self.troubled.is_in_vain(&row.route, *since)
        {
            if refusal.fault == Fault::Break && batch[0].suspicion.own_breaks() > 0 {
                self.remember_blamed(row.id);
            }
            self.wait(row, refusal);
            return None;
        }
        Some(batch)
    }

    /// Sends one batch. If no row at all has come to an end, says why.
    async fn publish(&mut self, batch: Vec<Queued>, apart: bool) -> Option<String> {
        let (rows, suspicions): (Vec<Row>, Vec<Suspicion>) =
            batch.into_iter().map(|queued| (*queued.row, queued.suspicion)).unzip();
        if mutant!("mark-before-confirm") {
            for row in &rows {
                self.end(row, End::Delivered { created_at_micros: row.created_at_micros });
            }
            self.hand_over_ended().await;
        }
        let verdicts = self.send(&rows, apart).await;
        self.count_silences(&rows, &verdicts);
        let first_reason =
            verdicts.iter().find_map(|verdict| verdict.as_ref().err()).map(|refusal| refusal.reason.clone());
        let (count, mut again) = (rows.len(), Vec::new());
        let nothing_delivered = verdicts.iter().all(Result::is_err);
        for ((row, verdict), suspicion) in rows.into_iter().zip(verdicts).zip(suspicions) {
            match verdict {
                Ok(()) => {
                    if apart {
                        self.queue.trust(&row.route);
                    }
                    self.delivered(&row);
                }
                Err(refusal) => again.extend(self.refused(Queued { suspicion, ..row.into() }, refusal)),
            }
        }
        // What is at risk goes another way the next time.
        let stuck = again.len() == count && again.iter().all(|(_, refusal)| refusal.fault != Fault::Risk);
        if apart {
            let came_to_nothing = |fault| fault == Fault::Unknown || is_for_its_connection(fault);
            let suspended = again.extract_if(.., |(_, refusal)| came_to_nothing(refusal.fault));
            let suspended: Vec<_> = suspended.collect();
            suspended.into_iter().for_each(|(queued, refusal)| self.suspend(queued, refusal));
        }
        let given_back = self.queue.put_back(again.into_iter().map(|(queued, _)| queued).collect());
        self.release(given_back);
        self.hand_over_ended().await;
        if apart && nothing_delivered {
            self.pulse.beat_during(tokio::time::sleep(APART_REST)).await;
        }
        first_reason.filter(|_| stuck)
    }

    async fn send(&mut self, rows: &[Row], apart: bool) -> Vec<Verdict> {
        let own = apart && !mutant!("share-what-breaks");
        let publisher = if own { &mut self.apart } else { &mut self.publisher };
        let sent_at = Instant::now();
        let verdicts = self.pulse.beat_during(publisher.publish(rows, &self.permit, &self.cut)).await;
        // A connection of its own may have been opened first.
        if !apart {
            self.metrics.confirm_seconds.observe(sent_at.elapsed().as_secs_f64());
        }
        verdicts
    }

    /// The others go on meanwhile. Without its lease it goes back, since nobody else gets the shard before.
    fn suspend(&mut self, queued: Queued, refusal: Refusal) {
        if !self.permit.for_batch().allows(&queued.row) {
            return self.give_back(&queued.row);
        }
        let pause = BREAK_BACKOFF.delay(queued.suspicion.own_breaks().saturating_sub(1));
        let suspension = Suspension { until: Instant::now() + pause, refusal };
        if let Some(row) = self.queue.suspend(queued, suspension) {
            self.give_back_unsent(&row);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::Holdings;
    use crate::sink::{Away, Refusal};
    use crate::store::memory::plain_row;

    /// Nothing gets through, and it counts.
    struct Unreachable(watch::Sender<usize>);

    impl Publisher for Unreachable {
        async fn publish(&mut self, batch: &[Row], _: &Permit, _: &CancellationToken) -> Vec<Verdict> {
            self.0.send_modify(|tries| *tries += 1);
            batch.iter().map(|_| Err(Refusal::new(Fault::Outage, "not connected"))).collect()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stop_does_not_sleep_through_a_long_pause() {
        let (work, input) = mpsc::channel(1);
        let (output, _outcomes) = mpsc::channel(1);
        let (sink, sink_in) = watch::channel(SinkState::Ready);
        let (tries, mut tried) = watch::channel(0);
        let (_holdings, holdings) = watch::channel(Holdings::everything(4));
        let stopping = CancellationToken::new();
        let ends = Ends {
            input,
            output,
            publisher: Unreachable(tries.clone()),
            apart: Unreachable(tries),
            sink: sink_in,
            permit: Permit::new(holdings),
        };
        let (settings, cut) = (Settings::plain(), CancellationToken::new());
        let worker = Worker::new(ends, &settings, stopping.clone(), cut, Instruments::unseen());
        let worker = tokio::spawn(worker.run());
        work.send(Work::Publish(vec![plain_row(1)])).await.expect("a worker");
        tried.wait_for(|tries| *tries == 20).await.expect("a worker");
        let begun = tokio::time::Instant::now();
        sink.send_replace(SinkState::Away(Away::outage("gone")));
        stopping.cancel();
        worker.await.expect("no panic");
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    }
}

//! The publish stage: a worker with one channel to the broker.
//!
//! Takes rows, sends them in batches, awaits *all* answers of a batch, and hands every row over with
//! its end. Rows whose fate is not known stay here and are sent again in order. Knows nothing of SQL.
//!
//! A crash here costs the rows in flight a second delivery, and nothing else: nothing is written
//! before settle has the verdict.

use super::gate::Gate;
use super::queue::{Queue, Queued, Suspicion};
use super::silences::Silences;
use super::{End, Outcome, Work, hand_over};
use crate::config::Settings;
use crate::mutants::mutant;
use crate::ownership::Permit;
use crate::retry::{
    BREAK_BACKOFF, BREAKS_BLAME_MESSAGE, BREAKS_SUSPECT, Decision, History, OUTAGE_BACKOFF, Policy,
};
use crate::sink::{Fault, Publisher, Refusal, SinkState, Verdict};
use crate::store::{Route, Row};
use crate::telemetry::{Instruments, Metrics, Pulse};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::time::error::Elapsed;
use tokio_util::sync::CancellationToken;

/// Rows at most that are remembered for what they did to connections.
const CONVICTED_MAX: usize = 1024;
/// They are tried no more often.
const CONVICTED_REST: Duration = Duration::from_secs(30);
/// What is known of such a row when it comes again: one more and it waits.
const CONVICTED: Suspicion =
    Suspicion { alone: true, strikes: BREAKS_BLAME_MESSAGE - 1, breaks: BREAKS_SUSPECT };

/// How long a worker has, after the grace period, to hand over the answers it has.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// One publishing worker.
pub struct Worker<P> {
    input: mpsc::Receiver<Work>,
    output: mpsc::Sender<Vec<Outcome>>,
    /// Rows that have come to their end and were not handed over yet.
    ended: Vec<Outcome>,
    publisher: P,
    sink: watch::Receiver<SinkState>,
    permit: Permit,
    gate: Gate,
    queue: Queue,
    policy: Policy,
    batch_rows: usize,
    batch_bytes: usize,
    /// Confirm time-outs in a row, by route.
    silences: Silences,
    /// Rows that were blamed for broken connections: they are sent alone, and break no more than one when they are tried again.
    convicted: HashSet<i64>,
    next_convicted: Instant,
    /// The relay is stopping: do not wait for a broker that is away.
    stopping: CancellationToken,
    /// The grace period is over: leave everything that has no answer.
    cut: CancellationToken,
    pulse: Pulse,
    metrics: Arc<Metrics>,
}

/// What a row had beside it.
#[derive(Debug, Clone, Copy)]
struct Company {
    /// Its batch had no other.
    one_row: bool,
    /// Nor had other workers any on their way.
    was_alone: bool,
}

impl Company {
    /// A channel is the worker's own, a connection is shared.
    fn is_proof_of(self, fault: Fault) -> bool {
        if fault == Fault::Break { self.was_alone } else { self.one_row }
    }
}

/// What a worker is connected to.
pub struct Ends<P> {
    /// Rows from poll.
    pub input: mpsc::Receiver<Work>,
    /// Outcomes to settle.
    pub output: mpsc::Sender<Vec<Outcome>>,
    /// The worker's own way to the broker.
    pub publisher: P,
    /// Whether the broker can be used.
    pub sink: watch::Receiver<SinkState>,
    /// The right to send a row.
    pub permit: Permit,
    /// Whether others send beside it.
    pub gate: Gate,
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
            permit: ends.permit,
            gate: ends.gate,
            queue: Queue::new(settings.ordering),
            policy: Policy::new(settings),
            batch_rows: settings.batch_size,
            batch_bytes: settings.max_in_flight_bytes / settings.workers,
            silences: Silences::default(),
            convicted: HashSet::new(),
            next_convicted: Instant::now(),
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
            let stuck = self.publish(batch).await;
            if self.cut.is_cancelled() {
                return;
            }
            match stuck {
                None => stuck_batches = 0,
                // The sink calls itself ready and nothing goes through: do not spin.
                Some(reason) => {
                    if stuck_batches == 0 {
                        tracing::warn!(reason, "a batch came back unsent or unanswered; sending it again");
                    }
                    let pause = OUTAGE_BACKOFF.delay(stuck_batches);
                    stuck_batches = stuck_batches.saturating_add(1);
                    self.pulse.beat_during(tokio::time::sleep(pause)).await;
                }
            }
        }
    }

    /// Takes in what has come; waits if there is nothing to do. False when the input has ended and
    /// nothing is left.
    async fn fill(&mut self) -> bool {
        loop {
            while let Ok(work) = self.input.try_recv() {
                self.accept(work);
            }
            self.hand_over_ended().await;
            self.queue.wake(Instant::now());
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
        match self.queue.next_wake() {
            None => Ok(self.pulse.beat_during(work).await),
            Some(at) => self.pulse.beat_during(tokio::time::timeout_at(at.into(), work)).await,
        }
    }

    fn accept(&mut self, work: Work) {
        match work {
            Work::Resume(key) => self.queue.resume(&key),
            Work::Publish(rows) => rows.into_iter().for_each(|row| self.accept_row(row)),
        }
    }

    fn accept_row(&mut self, row: Row) {
        if self.silences.is_silent(&row.route) {
            return self.accept_for_silent_route(row);
        }
        if !self.convicted.is_empty() && self.convicted.contains(&row.id) {
            return self.accept_convicted(row);
        }
        self.push_suspect(row, Suspicion::default());
    }

    /// A route that gives no answers costs a whole confirm time-out each time. New rows wait without being sent;
    /// one that has waited is a probe, and goes alone.
    fn accept_for_silent_route(&mut self, row: Row) {
        if row.attempts == 0 && !self.is_behind_others(&row) {
            let reason = "not sent: this route has given no confirms lately";
            return self.wait(&row, Refusal::new(Fault::Silence, reason));
        }
        self.push_suspect(row, Suspicion { alone: true, ..Suspicion::default() });
    }

    /// However many such rows there are, they break a connection now and then only.
    fn accept_convicted(&mut self, row: Row) {
        let now = Instant::now();
        if now < self.next_convicted && !self.is_behind_others(&row) {
            let reason = "not sent: connections have broken each time it was on its way";
            return self.wait(&row, Refusal::new(Fault::Break, reason));
        }
        self.next_convicted = now + CONVICTED_REST;
        self.push_suspect(row, CONVICTED);
    }

    /// Only the first row of a key may be refused: one that had waited would be tried before those before it.
    fn is_behind_others(&self, row: &Row) -> bool {
        row.ordering_key.as_ref().is_some_and(|key| self.queue.is_busy_with(key))
    }

    fn push_suspect(&mut self, row: Row, suspicion: Suspicion) {
        if let Some(row) = self.queue.push(Queued { suspicion, ..row.into() }) {
            self.give_back_unsent(&row);
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

    /// Sends one batch. If no row at all has come to an end, says why.
    async fn publish(&mut self, batch: Vec<Queued>) -> Option<String> {
        let (rows, suspicions): (Vec<Row>, Vec<Suspicion>) =
            batch.into_iter().map(|queued| (*queued.row, queued.suspicion)).unzip();
        if mutant!("mark-before-confirm") {
            for row in &rows {
                self.end(row, End::Delivered { created_at_micros: row.created_at_micros });
            }
            self.hand_over_ended().await;
        }
        let sent_at = Instant::now();
        let (verdicts, was_alone) = self.send(&rows, &suspicions).await;
        self.metrics.confirm_seconds.observe(sent_at.elapsed().as_secs_f64());
        self.count_silences(&rows, &verdicts);
        let company = Company { one_row: rows.len() == 1, was_alone };
        let first_reason =
            verdicts.iter().find_map(|verdict| verdict.as_ref().err()).map(|refusal| refusal.reason.clone());
        let (count, mut again) = (rows.len(), Vec::new());
        for ((row, verdict), suspicion) in rows.into_iter().zip(verdicts).zip(suspicions) {
            match verdict {
                Ok(()) => self.delivered(&row),
                Err(refusal) => {
                    let queued = Queued { suspicion, ..row.into() };
                    let broke_alone = company.was_alone && refusal.fault == Fault::Break;
                    match self.refused(queued, refusal, company) {
                        Some(queued) if broke_alone => self.suspend(queued),
                        queued => again.extend(queued),
                    }
                }
            }
        }
        let stuck = again.len() == count;
        let given_back = self.queue.put_back(again);
        self.release(given_back);
        self.hand_over_ended().await;
        first_reason.filter(|_| stuck)
    }

    /// The others go on meanwhile.
    fn suspend(&mut self, queued: Queued) {
        let pause = BREAK_BACKOFF.delay(queued.suspicion.strikes.saturating_sub(1));
        if let Some(row) = self.queue.suspend(queued, Instant::now() + pause) {
            self.give_back_unsent(&row);
        }
    }

    /// Sends a batch; the verdicts, and whether nobody else had anything on its way. That is asked for only where a row is
    /// suspected to break connections.
    async fn send(&mut self, rows: &[Row], suspicions: &[Suspicion]) -> (Vec<Verdict>, bool) {
        let publishing = self.publisher.publish(rows, &self.permit, &self.cut);
        match suspicions {
            [Suspicion { breaks: BREAKS_SUSPECT.., .. }] => {
                self.pulse.beat_during(self.gate.alone(publishing)).await
            }
            _ => (self.pulse.beat_during(self.gate.beside_others(publishing)).await, false),
        }
    }

    /// Acts on a refusal. Returns the row if it is to be sent again.
    fn refused(&mut self, mut queued: Queued, refusal: Refusal, company: Company) -> Option<Queued> {
        self.count(refusal.fault);
        if matches!(refusal.fault, Fault::Unroutable | Fault::Destination | Fault::Message) {
            // A refusal is an answer too.
            self.silences.answered(&queued.row.route);
        }
        let history = History {
            attempts: queued.row.attempts,
            silences: self.silences.of(&queued.row.route),
            strikes: queued.suspicion.strikes + u32::from(company.is_proof_of(refusal.fault)),
            breaks: queued.suspicion.breaks + u32::from(refusal.fault == Fault::Break),
        };
        queued.suspicion.breaks = history.breaks;
        match self.policy.decide(refusal.fault, history) {
            Decision::Resend => return Some(queued),
            Decision::ResendAlone => {
                queued.suspicion.alone = true;
                queued.suspicion.strikes = history.strikes;
                return Some(queued);
            }
            Decision::Accept => self.delivered(&queued.row),
            Decision::Wait => {
                if refusal.fault == Fault::Break {
                    self.convict(&queued.row, &refusal);
                }
                self.wait(&queued.row, refusal);
            }
            Decision::Dead => self.dead(&queued.row, refusal),
            Decision::GiveBack => self.give_back(&queued.row),
        }
        None
    }

    fn delivered(&mut self, row: &Row) {
        self.silences.answered(&row.route);
        if !self.convicted.is_empty() {
            self.convicted.remove(&row.id);
        }
        self.end(row, End::Delivered { created_at_micros: row.created_at_micros });
    }

    fn convict(&mut self, row: &Row, refusal: &Refusal) {
        if self.convicted.len() >= CONVICTED_MAX {
            self.convicted.clear();
        }
        if self.convicted.insert(row.id) {
            let (id, message_id, reason) = (row.id, row.message_id, &refusal.reason);
            tracing::warn!(id, %message_id, reason, "connections break whenever this row is on its way; trying it seldom");
        }
    }

    fn wait(&mut self, row: &Row, refusal: Refusal) {
        let attempts = row.attempts.saturating_add(1);
        let followers = self.queue.hold_key_of(row);
        let end = End::Wait {
            key: row.ordering_key.clone(),
            route: Arc::clone(&row.route),
            fault: refusal.fault,
            attempts,
            wait: self.policy.wait(attempts),
            reason: refusal.reason,
        };
        self.end(row, end);
        self.release(followers);
    }

    /// The lease was not in force. The key is held, so that no later row of it goes before this one when the lease is
    /// in force again.
    fn give_back(&mut self, row: &Row) {
        self.metrics.fenced.inc();
        let followers = if mutant!("no-hold-after-fence") { Vec::new() } else { self.queue.hold_key_of(row) };
        self.end(row, End::Fenced);
        self.release(followers);
    }

    fn dead(&mut self, row: &Row, refusal: Refusal) {
        let attempts = row.attempts.saturating_add(1);
        tracing::warn!(
            id = row.id,
            message_id = %row.message_id,
            attempts,
            reason = refusal.reason,
            "row is dead: it can not be delivered"
        );
        self.end(row, End::Dead { attempts, reason: refusal.reason });
    }

    fn release(&mut self, rows: Vec<Row>) {
        for row in rows {
            self.give_back_unsent(&row);
        }
    }

    fn give_back_unsent(&mut self, row: &Row) {
        self.end(row, End::Released { key: row.ordering_key.clone() });
    }

    /// Notes a row's end, to be handed over before anything is waited for.
    fn end(&mut self, row: &Row, end: End) {
        let Row { id, message_id, lease, .. } = *row;
        self.ended.push(Outcome { id, message_id, lease, end });
    }

    async fn hand_over_ended(&mut self) {
        if !self.ended.is_empty() {
            hand_over(&self.output, std::mem::take(&mut self.ended)).await;
        }
    }

    /// Counts confirm time-outs, once per batch and route.
    fn count_silences(&mut self, rows: &[Row], verdicts: &[Verdict]) {
        let silent = |verdict: &Verdict| matches!(verdict, Err(refusal) if refusal.fault == Fault::Silence);
        let silent = rows.iter().zip(verdicts).filter(|(_, verdict)| silent(verdict));
        let (routes, now): (HashSet<&Arc<Route>>, _) =
            (silent.map(|(row, _)| &row.route).collect(), Instant::now());
        routes.into_iter().for_each(|route| self.silences.count(route, now));
    }

    fn count(&self, fault: Fault) {
        match fault {
            Fault::Unknown | Fault::Break | Fault::Silence | Fault::Suspect => {
                self.metrics.possible_duplicates.inc()
            }
            Fault::Unroutable => self.metrics.returned.inc(),
            Fault::Destination | Fault::Message | Fault::Hopeless => self.metrics.refused.inc(),
            Fault::Outage | Fault::Fenced => return,
        };
    }
}

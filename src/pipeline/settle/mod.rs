//! The marking stage: gathers outcomes and commits them, many with one statement.
//!
//! Never cancelled: it ends when its input has ended and the last outcome is written. While the
//! database is away it keeps what it has and tries on; its input fills up, places stay taken, and the
//! stages before it wait. That is the back-pressure. Rows that cannot be written while others can wait apart (`left.rs`).
//!
//! A crash here costs the outcomes not yet committed: those rows are delivered once more.

mod left;

use self::left::{Left, Part, REJECTIONS_MAX};
use super::{End, Fate, Outcome, Settled, hand_over, worth_a_statement};
use crate::config::Settings;
use crate::mutants::mutant;
use crate::retry::Delays;
use crate::store::{Dead, Delivered, Settlement, Store, StoreError, Trouble, Waiting, Written};
use crate::telemetry::{Board, DatabaseUser, Instruments, Metrics, Pulse};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Outcomes written together at most: enough to make a round trip cheap, little enough
/// to keep the transaction within milliseconds.
const BITE_ROWS: usize = 2000;
/// How long the first outcome waits for company. Marks follow confirms within this time, which bounds
/// the duplicates of a crash; longer gathers save commits.
const GATHER_TIME: Duration = Duration::from_millis(10);

/// Neighbours are written with so many statements, where there are enough rows for each to be worth its round trip.
const NEIGHBOURS_IN: i64 = 2;
const NEIGHBOURS_IN_FROM: usize = 200;
/// How long the last write may take after the end of the grace period.
const LAST_WRITE: Duration = Duration::from_secs(1);

/// The stage.
pub struct Settle<S> {
    input: mpsc::Receiver<Vec<Outcome>>,
    output: mpsc::Sender<Vec<Settled>>,
    store: Arc<S>,
    /// So many outcomes wait for no company: their places are missed by the reading.
    enough: usize,
    /// Delivered rows stay in the table, so marking them makes new versions of them.
    keeps_delivered: bool,
    left: Left,
    /// The grace period is over: a database that is away is waited for no longer.
    cut: CancellationToken,
    cut_seen: Option<Instant>,
    board: Arc<Board>,
    pulse: Pulse,
    metrics: Arc<Metrics>,
}

/// What settle is connected to.
pub struct Ends<S> {
    /// Outcomes of all workers.
    pub input: mpsc::Receiver<Vec<Outcome>>,
    /// Settled rows, for poll.
    pub output: mpsc::Sender<Vec<Settled>>,
    /// Where ends are written to.
    pub store: Arc<S>,
}

/// What settle could not write before it had to go.
#[derive(Debug, thiserror::Error)]
#[error(
    "{rows} confirmed rows could not be marked before the end of the grace period and will be sent again ({reason})"
)]
pub struct Unwritten {
    /// Rows confirmed by the broker and not marked.
    pub rows: usize,
    /// Why.
    pub reason: String,
}

impl<S: Store> Settle<S> {
    /// A stage that ends when its input ends.
    pub fn new(ends: Ends<S>, settings: &Settings, cut: CancellationToken, instruments: Instruments) -> Self {
        let Instruments { metrics, board, pulse } = instruments;
        let Ends { input, output, store } = ends;
        let enough = worth_a_statement(settings.max_in_flight).min(BITE_ROWS);
        let keeps_delivered = settings.keeps_delivered();
        let left = Left::default();
        let cut_seen = None;
        Self { input, output, store, enough, keeps_delivered, left, cut, cut_seen, board, pulse, metrics }
    }

    /// Writes outcomes until there are no more.
    pub async fn run(mut self) -> Result<(), Unwritten> {
        while let Some(outcomes) = self.gather().await {
            let mut bites = self.in_turn(outcomes).into_iter();
            let mut answered = false;
            while let Some(bite) = bites.next() {
                match self.write(bite).await {
                    Ok(some) => answered |= some,
                    Err((outcomes, error)) => {
                        let unwritten = outcomes.into_iter().chain(bites.flatten()).collect();
                        return self.give_up(unwritten, error).await;
                    }
                }
            }
            let aside = self.left.take_news();
            if !aside.is_empty() {
                let settled = aside.into_iter().map(|(id, ending)| Settled::Aside { id, ending });
                hand_over(&self.output, settled.collect()).await;
            }
            if answered {
                self.board.database_up(DatabaseUser::Settle);
            }
            self.board.set_unmarked(self.left.rest().map(|error| error.sentence));
        }
        match self.left.reason() {
            Some(error) => self.give_up(Vec::new(), error).await,
            None => Ok(()),
        }
    }

    /// Waits for outcomes, then a little longer for more, as long as there are few. `None` when the input has ended.
    async fn gather(&mut self) -> Option<Vec<Outcome>> {
        let mut outcomes = self.first().await?;
        let deadline = tokio::time::Instant::now() + GATHER_TIME;
        while outcomes.len() < self.enough {
            match tokio::time::timeout_at(deadline, self.input.recv()).await {
                Ok(Some(more)) => outcomes.extend(more),
                Ok(None) | Err(_) => break,
            }
        }
        Some(outcomes)
    }

    /// What is written one after the other: what has come, what was left before, which must not spoil it, and last that of which
    /// nothing is written: only then it is known which refused rows cannot be written, and what has to stay behind them.
    fn in_turn(&mut self, outcomes: Vec<Outcome>) -> Vec<Vec<Outcome>> {
        let is_written = |outcome: &Outcome| !matches!(outcome.end, End::Released { .. } | End::Fenced);
        let (written, as_they_were): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(is_written);
        let mut all = bites(written, self.keeps_delivered);
        all.extend(self.left.take_due().into_iter().flat_map(|group| bites(group, false)));
        all.push(as_they_were);
        all.retain(|bite| !bite.is_empty());
        all
    }

    /// The first that come; none when it is time for those that were left. After the input has ended these have until the
    /// end of the grace period.
    async fn first(&mut self) -> Option<Vec<Outcome>> {
        let Some(due) = self.left.due() else { return self.pulse.beat_during(self.input.recv()).await };
        let come = self.pulse.beat_during(tokio::time::timeout_at(due, self.input.recv())).await;
        match come {
            Ok(Some(outcomes)) => Some(outcomes),
            Ok(None) => {
                let until_due = self.pulse.beat_during(tokio::time::sleep_until(due));
                self.cut.run_until_cancelled(until_due).await.map(|()| Vec::new())
            }
            Err(_) => Some(Vec::new()),
        }
    }

    /// Tells how many confirmed rows stay unmarked; none is no failure.
    async fn give_up(mut self, unwritten: Vec<Outcome>, error: StoreError) -> Result<(), Unwritten> {
        let delivered = |outcomes: &[Outcome]| {
            outcomes.iter().filter(|outcome| matches!(outcome.end, End::Delivered { .. })).count()
        };
        let mut rows = delivered(&unwritten) + delivered(&self.left.take());
        // Workers hand over the last answers, and end.
        while let Some(outcomes) = self.input.recv().await {
            rows += delivered(&outcomes);
        }
        if rows == 0 { Ok(()) } else { Err(Unwritten { rows, reason: error.sentence }) }
    }

    /// Writes, for as long as it takes; answers with whether the database had a part in it. Gives up only when the grace
    /// period is over, with what was not written.
    async fn write(&mut self, outcomes: Vec<Outcome>) -> Result<bool, (Vec<Outcome>, StoreError)> {
        let mut answered = false;
        let (mut parts, mut rejections, mut delays) = (vec![Part::new(outcomes)], 0, Delays::default());
        while let Some(part) = parts.pop() {
            if part.settlement.is_empty() {
                self.report(part, &Written::default()).await;
                continue;
            }
            let started = Instant::now();
            match self.pulse.beat_during(self.try_to_write(&part.settlement)).await {
                Ok(written) => {
                    self.metrics.settle_seconds.observe(started.elapsed().as_secs_f64());
                    answered = true;
                    self.report(part, &written).await;
                }
                Err(_) if mutant!("forget-marks-on-error") => {
                    let marked = part.settlement.marks();
                    self.report(part, &Written { marked, locked: Vec::new() }).await;
                }
                Err(error) if error.trouble == Trouble::Rejected && !mutant!("reject-together") => {
                    answered = true;
                    rejections = if self.is_out_of_time() { REJECTIONS_MAX + 1 } else { rejections + 1 };
                    self.left.reject(part, &error, rejections, &mut parts);
                }
                Err(error) => {
                    parts.push(part);
                    if !self.wait_to_try_on(&error, &mut delays).await {
                        return Err((parts.into_iter().flat_map(|part| part.outcomes).collect(), error));
                    }
                }
            }
        }
        Ok(answered)
    }

    /// Waits for the next try at what may be written yet: an outage ends, and locks can be passed over. False if the grace
    /// period is over.
    async fn wait_to_try_on(&mut self, error: &StoreError, delays: &mut Delays) -> bool {
        self.board.database_down(DatabaseUser::Settle, error);
        let passed_locks = self.left.passes_locks;
        let may_be_a_lock = error.trouble == Trouble::Contention || self.cut.is_cancelled();
        self.left.passes_locks |= may_be_a_lock && !mutant!("wait-for-locks");
        if self.cut.is_cancelled() && self.left.passes_locks && !passed_locks {
            // One more, so that a locked row does not cost the others their marks.
            return true;
        }
        let pause = self.pulse.beat_during(tokio::time::sleep(delays.next(error)));
        self.cut.run_until_cancelled(pause).await.is_some()
    }

    /// The grace period was over at an earlier look, and a moment has passed since.
    fn is_out_of_time(&mut self) -> bool {
        self.cut.is_cancelled() && self.cut_seen.get_or_insert_with(Instant::now).elapsed() >= LAST_WRITE
    }

    /// One try. After the grace period it has a moment left, so that a database that answers still gets
    /// what was confirmed; abandoned, its outcome is unknown, which is safe: marks may be written twice.
    async fn try_to_write(&self, settlement: &Settlement) -> Result<Written, StoreError> {
        let out_of_time = async {
            self.cut.cancelled().await;
            tokio::time::sleep(LAST_WRITE).await;
        };
        tokio::select! {
            biased;
            // 1. The answer.
            result = self.store.settle(settlement, self.left.passes_locks) => result,
            // 2. No time left to wait for it.
            () = out_of_time => Err(StoreError {
                trouble: Trouble::Outage,
                sentence: "no answer from the database in time".to_owned(),
            }),
        }
    }

    /// Counts what was committed and frees the places.
    async fn report(&mut self, part: Part, written: &Written) {
        let certain = part.settlement.is_marked_by(written);
        let is_written = certain && written.locked.is_empty();
        if let Some(Dead { id, message_id, attempts, reason, .. }) = part.became_dead().filter(|_| is_written)
        {
            tracing::warn!(id, %message_id, attempts, reason, "row is dead: it can not be delivered");
            self.metrics.dead.inc();
        }
        let outcomes = self.left.keep_locked(part.outcomes, &written.locked);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let settled = |Outcome { id, end, .. }| Settled::Ended { id, fate: self.count(end, certain, now) };
        let settled: Vec<Settled> = outcomes.into_iter().map(settled).collect();
        if !settled.is_empty() {
            // Nobody takes it when poll has ended, which on a stop is as it should be.
            hand_over(&self.output, settled).await;
        }
    }

    fn count(&self, end: End, certain: bool, now: Duration) -> Fate {
        match end {
            End::Delivered { created_at_micros } => {
                self.metrics.delivered.inc();
                let age = now.as_secs_f64() - created_at_micros as f64 / 1e6;
                self.metrics.end_to_end_seconds.observe(age.max(0.0));
                Fate::Delivered { certain }
            }
            End::Dead { .. } => {
                self.metrics.dead.inc();
                Fate::Dead { certain }
            }
            End::Wait { route, fault, reason, .. } => Fate::Waiting { route, fault, reason },
            End::Released { .. } => Fate::Released,
            End::Fenced => Fate::Fenced,
        }
    }
}

/// What is written together. With `keeps_delivered`, rows that are neighbours in the table come apart: a page has room for the
/// new versions of some of its rows, and when these are committed what was before them makes room for the others. Updates
/// within a page take half the write-ahead log.
pub fn bites(outcomes: Vec<Outcome>, keeps_delivered: bool) -> Vec<Vec<Outcome>> {
    let kinds = if keeps_delivered && outcomes.len() >= NEIGHBOURS_IN_FROM { NEIGHBOURS_IN } else { 1 };
    let mut bites: Vec<Vec<Outcome>> = Vec::new();
    // The one of each kind that is not full.
    let mut open: Vec<Vec<Outcome>> = (0..kinds).map(|_| Vec::new()).collect();
    for outcome in outcomes {
        let bite = &mut open[outcome.id.rem_euclid(kinds) as usize];
        bite.push(outcome);
        if bite.len() == BITE_ROWS {
            bites.push(std::mem::take(bite));
        }
    }
    bites.extend(open.into_iter().filter(|bite| !bite.is_empty()));
    bites
}

/// What is to be written of outcomes.
pub fn settlement(outcomes: &[Outcome]) -> Settlement {
    let mut settlement = Settlement::default();
    for Outcome { id, message_id, lease, end } in outcomes {
        match end {
            End::Delivered { .. } => {
                settlement.delivered.push(Delivered { id: *id, message_id: *message_id });
            }
            End::Dead { attempts, reason } => {
                settlement.dead.push(Dead {
                    id: *id,
                    message_id: *message_id,
                    lease: *lease,
                    attempts: *attempts,
                    reason: reason.clone(),
                });
            }
            End::Wait { attempts, wait, reason, .. } => settlement.waiting.push(Waiting {
                id: *id,
                message_id: *message_id,
                lease: *lease,
                attempts: *attempts,
                wait: *wait,
                reason: reason.clone(),
            }),
            End::Released { .. } | End::Fenced => {}
        }
    }
    settlement
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::Ending;
    use crate::sink::Fault;
    use crate::store::memory::{MemoryStore, plain_row};
    use tokio::task::JoinHandle;

    fn outcome(id: i64, end: End) -> Outcome {
        let row = plain_row(id);
        Outcome { id, message_id: row.message_id, lease: row.lease, end }
    }

    pub(super) fn delivered(id: i64) -> Outcome {
        outcome(id, End::Delivered { created_at_micros: 0 })
    }

    pub(super) fn wait(id: i64, key: &str) -> Outcome {
        let (key, route, reason) = (Some(key.into()), plain_row(id).route, "refused".to_owned());
        let (fault, wait) = (Fault::Unroutable, Duration::ZERO);
        outcome(id, End::Wait { key, route, fault, attempts: 1, wait, reason })
    }

    pub(super) fn released(id: i64, key: &str) -> Outcome {
        outcome(id, End::Released { key: Some(key.into()) })
    }

    fn outcomes(ids: impl Iterator<Item = i64>) -> Vec<Outcome> {
        ids.map(delivered).collect()
    }

    /// A stage that runs, and what it is connected to.
    struct Stage {
        input: mpsc::Sender<Vec<Outcome>>,
        output: mpsc::Receiver<Vec<Settled>>,
        cut: CancellationToken,
        ended: JoinHandle<Result<(), Unwritten>>,
    }

    impl Stage {
        fn start(store: &MemoryStore) -> Self {
            let (input, outcomes) = mpsc::channel(10);
            let (settled, output) = mpsc::channel(1000);
            let ends = Ends { input: outcomes, output: settled, store: Arc::new(store.clone()) };
            let cut = CancellationToken::new();
            let settle = Settle::new(ends, &Settings::plain(), cut.clone(), Instruments::unseen());
            Self { input, output, cut, ended: tokio::spawn(settle.run()) }
        }

        async fn settled(&mut self) -> Vec<Settled> {
            self.output.recv().await.expect("it runs")
        }

        /// The end of its input, and of the grace period.
        async fn end(self) -> Result<(), Unwritten> {
            drop(self.input);
            self.cut.cancel();
            self.ended.await.expect("no panic")
        }
    }

    fn stored(rows: i64) -> MemoryStore {
        let store = MemoryStore::default();
        (1..=rows).for_each(|id| store.insert(plain_row(id)));
        store
    }

    /// What is known of a row that was marked must not suffer from one that is locked: it would be walked over again.
    #[tokio::test(start_paused = true)]
    async fn marks_are_certain_beside_a_row_that_is_locked() {
        let store = stored(3);
        store.lock_rows([2]);
        let mut stage = Stage::start(&store);
        stage.input.send(outcomes(1..4)).await.unwrap();
        let settled = stage.settled().await;
        let certain = |settled: &Settled| {
            matches!(settled, Settled::Ended { fate: Fate::Delivered { certain: true }, .. })
        };
        assert!(
            matches!(settled[..], [Settled::Ended { id: 1, .. }, Settled::Ended { id: 3, .. }]),
            "{settled:?}"
        );
        assert!(settled.iter().all(certain), "{settled:?}");
        let aside = stage.settled().await;
        assert!(matches!(aside[..], [Settled::Aside { id: 2, ending: Ending::Delivered }]), "{aside:?}");
        assert_eq!(stage.end().await.expect_err("one is locked").rows, 1);
    }

    /// They would be read again at once, only to come back, as long as nothing in the table holds them back.
    #[tokio::test(start_paused = true)]
    async fn rows_behind_one_that_is_locked_stay_with_it_however_many() {
        let store = stored(1);
        store.lock_rows([1]);
        let mut stage = Stage::start(&store);
        let behind = (2..NEIGHBOURS_IN_FROM as i64 + 2).map(|id| released(id, "k"));
        stage.input.send([wait(1, "k")].into_iter().chain(behind).collect()).await.unwrap();
        let aside = stage.settled().await;
        assert_eq!(aside.len(), 1 + NEIGHBOURS_IN_FROM);
        assert!(
            aside.iter().all(|settled| matches!(settled, Settled::Aside { ending: Ending::Unsent, .. })),
            "{aside:?}"
        );
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert!(stage.output.try_recv().is_err(), "tried again, and told once");
        store.lock_rows([]);
        let settled = stage.settled().await;
        assert!(
            matches!(settled[0], Settled::Ended { id: 1, fate: Fate::Waiting { .. } }),
            "{:?}",
            settled[0]
        );
        assert!(
            settled[1..].iter().all(|settled| matches!(settled, Settled::Ended { fate: Fate::Released, .. }))
        );
        assert_eq!(settled.len(), 1 + NEIGHBOURS_IN_FROM);
        stage.end().await.expect("all is written");
    }

    #[tokio::test(start_paused = true)]
    async fn a_row_that_is_rejected_costs_no_others_their_marks_at_the_end() {
        let store = stored(9);
        store.reject_rows([5]);
        let stage = Stage::start(&store);
        stage.cut.cancel();
        stage.input.send(outcomes(1..10)).await.unwrap();
        assert_eq!(stage.end().await.expect_err("one is rejected").rows, 1);
        assert_eq!(store.rows().iter().filter(|row| row.delivered_at.is_some()).count(), 8);
    }

    fn ids(bites: &[Vec<Outcome>]) -> Vec<Vec<i64>> {
        bites.iter().map(|bite| bite.iter().map(|outcome| outcome.id).collect()).collect()
    }

    #[test]
    fn neighbours_are_written_apart_and_none_is_left_out() {
        let many = NEIGHBOURS_IN_FROM as i64;
        let bites = ids(&bites(outcomes(-3..many), true));
        assert_eq!(bites.len(), NEIGHBOURS_IN as usize);
        let together = |bite: &Vec<i64>| bite.windows(2).any(|pair| pair[1] - pair[0] < NEIGHBOURS_IN);
        assert!(!bites.iter().any(together), "{bites:?}");
        let mut all = bites.concat();
        all.sort_unstable();
        assert_eq!(all, (-3..many).collect::<Vec<_>>());
    }

    #[test]
    fn few_rows_and_ids_with_gaps_are_written_at_once() {
        assert_eq!(ids(&bites(outcomes(1..4), true)), [[1, 2, 3]]);
        assert_eq!(bites(outcomes(0..NEIGHBOURS_IN_FROM as i64), false).len(), 1, "nothing is kept");
        let even = (1..=NEIGHBOURS_IN_FROM as i64).map(|id| id * NEIGHBOURS_IN);
        assert_eq!(bites(outcomes(even), true).len(), 1, "no empty statement");
    }

    #[test]
    fn a_statement_is_bounded_however_many_come_at_once() {
        for keeps_delivered in [true, false] {
            let bites = ids(&bites(outcomes(0..5 * BITE_ROWS as i64 + 1), keeps_delivered));
            assert!(bites.iter().all(|bite| (1..=BITE_ROWS).contains(&bite.len())));
            assert_eq!(bites.concat().len(), 5 * BITE_ROWS + 1);
        }
    }
}

//! The keeper: renews this replica's leases, takes what is its part, gives back what is not, and tells the
//! pipeline what it holds.
//!
//! It goes on while the pipeline drains, and gives everything back as its last deed. A crash here costs nothing but
//! the time until the leases run out.

use super::{Holdings, Terms};
use crate::config::Settings;
use crate::mutants::mutant;
use crate::retry::Delays;
use crate::sink::SinkState;
use crate::store::StoreError;
use crate::store::leases::{Lease, LeaseTable, Member, Standing};
use crate::telemetry::{Board, DatabaseUser, Instruments, LeaseChange, Metrics, Pulse};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

/// Longest the giving back may take when the relay stops.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);

/// The stage.
#[derive(Debug)]
pub struct Keeper<S> {
    store: Arc<S>,
    terms: Terms,
    member: Member,
    holdings: Arc<watch::Sender<Holdings>>,
    drained: mpsc::Receiver<Lease>,
    sink: watch::Receiver<SinkState>,
    /// The relay reads no more: it takes nothing more either.
    stopping: CancellationToken,
    /// The broker has been reached at least once.
    reached: bool,
    /// Since when the broker has been out of reach.
    away_since: Option<Instant>,
    /// Drained and not given back yet.
    empty: HashSet<Lease>,
    renewed: Option<Instant>,
    /// A renewal was sent, whether it was answered or not.
    asked: bool,
    board: Arc<Board>,
    pulse: Pulse,
    metrics: Arc<Metrics>,
}

/// What the keeper is connected to.
#[derive(Debug)]
pub struct Ends<S> {
    /// Where leases are kept.
    pub store: Arc<S>,
    /// Where it tells what is held.
    pub holdings: Arc<watch::Sender<Holdings>>,
    /// Leaving shards that have nothing in flight.
    pub drained: mpsc::Receiver<Lease>,
    /// Whether the broker can be reached.
    pub sink: watch::Receiver<SinkState>,
    /// The relay has begun to stop.
    pub stopping: CancellationToken,
}

impl<S: LeaseTable> Keeper<S> {
    /// A keeper for the replica that `holdings` names.
    pub fn new(ends: Ends<S>, settings: &Settings, instruments: Instruments) -> Self {
        let Instruments { metrics, board, pulse } = instruments;
        let terms = Terms::new(settings.lease_ttl);
        let (replica, shards) = {
            let holdings = ends.holdings.borrow();
            (holdings.replica, holdings.shards())
        };
        Self {
            store: ends.store,
            terms,
            member: Member { replica, shards, ready: false, lease_time: terms.lease_time },
            holdings: ends.holdings,
            drained: ends.drained,
            sink: ends.sink,
            stopping: ends.stopping,
            reached: false,
            away_since: None,
            empty: HashSet::new(),
            renewed: None,
            asked: false,
            board,
            pulse,
            metrics,
        }
    }

    /// Keeps the leases until `stop`, which comes after the pipeline has ended; then gives them back.
    pub async fn run(mut self, stop: CancellationToken) {
        self.keep(&stop).await;
        if self.asked {
            self.leave().await;
        }
    }

    /// A turn is not cut short by the stop: a renewal that the server still carries out must not come after the
    /// giving back. Only a server that says nothing is not waited for.
    async fn keep(&mut self, stop: &CancellationToken) {
        let mut delays = Delays::default();
        while !stop.is_cancelled() {
            self.note_broker();
            let too_late = async {
                stop.cancelled().await;
                tokio::time::sleep(LEAVE_LIMIT).await;
            };
            let turn = tokio::select! {
                biased;
                // 1. The answer.
                turn = self.turn() => turn,
                // 2. No time left to wait for it.
                () = too_late => return,
            };
            let pause = match turn {
                Ok(()) => {
                    delays = Delays::default();
                    self.terms.look_every
                }
                Err(error) => {
                    // What the table was not told, it is told as soon as it can be.
                    self.renewed = None;
                    self.board.database_down(DatabaseUser::Leases, &error);
                    delays.next(&error).min(self.terms.renew_every)
                }
            };
            let _ = stop.run_until_cancelled(self.rest(pause)).await;
        }
    }

    /// Renews when it is time to, or when a look shows that something is to be taken or given back.
    async fn turn(&mut self) -> Result<(), StoreError> {
        let due = self.renewed.is_none_or(|renewed| renewed.elapsed() >= self.terms.renew_every);
        if due || !self.empty.is_empty() || self.is_ready() != self.member.ready {
            return self.renew().await;
        }
        let standing = self.pulse.beat_during(self.store.look(self.member)).await?;
        self.board.database_up(DatabaseUser::Leases);
        let held = standing.leases.len() as u32;
        let to_take = standing.free > 0 && held < standing.quota;
        if !standing.member || to_take || self.has_to_give(held, self.part(&standing)) {
            return self.renew().await;
        }
        Ok(())
    }

    /// More than its part is held, and a renewal would change that: what leaves already goes when it is drained, or undrained
    /// where that is hopeless.
    fn has_to_give(&self, held: u32, part: u32) -> bool {
        let leaving = self.holdings.borrow().leaving().len() as u32;
        let undrained = leaving > 0 && self.away_for() >= self.terms.give_way_after;
        held.saturating_sub(leaving) > part || undrained
    }

    async fn renew(&mut self) -> Result<(), StoreError> {
        if self.away_for() >= self.terms.give_way_after || mutant!("give-back-undrained") {
            // Nothing of ours will be confirmed; whoever reaches the broker may go on.
            self.empty.extend(self.holdings.borrow().leaving());
        }
        self.member.ready = self.is_ready();
        let drained: Vec<Lease> = self.empty.iter().copied().collect();
        if !drained.is_empty() {
            // Nothing may be sent any more when the table learns of it.
            self.holdings.send_modify(|holdings| holdings.close(&self.empty));
        }
        // Before the question leaves, so that trust ends before the lease does, however long the answer takes.
        let sent = Instant::now();
        self.asked = true;
        let standing = self.pulse.beat_during(self.store.renew(self.member, &drained)).await?;
        self.board.database_up(DatabaseUser::Leases);
        if standing.other_shards.is_none() && !standing.member {
            // Refused for a replica that has gone meanwhile: nothing was renewed or given back, so trust stays as it was.
            self.renewed = None;
            return Ok(());
        }
        self.renewed = Some(sent);
        let given_back = std::mem::take(&mut self.empty);
        match standing.other_shards {
            Some(other) => self.refuse(&standing, other),
            None => self.tell(&standing, sent + self.terms.trust, &given_back),
        }
        Ok(())
    }

    /// Publishes the new state and tells what has changed.
    fn tell(&self, standing: &Standing, trusted_until: Instant, given_back: &HashSet<Lease>) {
        let before = self.holdings.borrow().clone();
        let mut now = before.clone();
        now.refused = None;
        now.update(standing, self.part(standing), trusted_until);
        let held = |holdings: &Holdings| holdings.leases().into_iter().collect::<HashSet<_>>();
        let (had, has) = (held(&before), held(&now));
        let (gained, lost) = (has.difference(&had).count(), had.difference(&has).count());
        let handed_over = given_back.difference(&has).count();
        self.metrics.lease_changes(LeaseChange::Gained, gained);
        self.metrics.lease_changes(LeaseChange::HandedOver, handed_over);
        self.metrics.lease_changes(LeaseChange::Lost, lost);
        if lost > 0 {
            tracing::warn!(lost, owned = has.len(), "leases were lost to another replica");
        }
        if gained + handed_over > 0 || before.trusted_until.is_none() || before.replicas != now.replicas {
            let (owned, replicas) = (has.len(), now.replicas);
            tracing::info!(gained, handed_over, owned, replicas, shards = now.shards(), "ownership");
        }
        self.holdings.send_replace(now);
    }

    /// Rows would belong to other shards here than there. Asked again later: the others may be on their way out.
    fn refuse(&self, standing: &Standing, other: u32) {
        let shards = self.member.shards;
        let sentence = format!(
            "OUTBOX_SHARDS is {shards} here and {other} in a replica that runs; stop those replicas first, or set the same number here"
        );
        if self.holdings.borrow().refused.is_none() {
            tracing::warn!(reason = sentence, "this replica may not publish");
        }
        let mut holdings = Holdings::none(self.member.replica, shards);
        holdings.refused = Some(sentence);
        holdings.replicas = standing.replicas;
        self.holdings.send_replace(holdings);
    }

    /// What this replica should own. One that does not reach the broker waits a little before it gives way; one that
    /// stops does not.
    fn part(&self, standing: &Standing) -> u32 {
        let stopping = self.stopping.is_cancelled();
        let told_only = !self.member.ready && !stopping && self.away_for() < self.terms.give_way_after;
        if told_only { self.member.shards } else { standing.quota }
    }

    /// Counts for a part of its own. One that stops, or has never reached the broker, leaves it to others, if there are any.
    fn is_ready(&self) -> bool {
        self.reached && self.away_for() < self.terms.tell_after && !self.stopping.is_cancelled()
    }

    /// How long the broker has been out of reach.
    fn away_for(&self) -> Duration {
        self.away_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    fn note_broker(&mut self) {
        let away = matches!(*self.sink.borrow_and_update(), SinkState::Away { .. });
        self.reached |= !away;
        self.away_since = away.then(|| self.away_since.unwrap_or_else(Instant::now));
    }

    /// Waits for the next turn; a shard that is drained makes it come at once.
    async fn rest(&mut self, pause: Duration) {
        let until = tokio::time::sleep(pause);
        tokio::pin!(until);
        let mut open = true;
        // As long as the table believes that this replica counts.
        let stopping = self.stopping.clone();
        let told_of_stop = !self.member.ready;
        loop {
            tokio::select! {
                biased;
                // 1. What is drained is given back without delay: somebody waits for it. All at once, where many are.
                drained = self.drained.recv(), if open => match drained {
                    Some(lease) => {
                        self.empty.insert(lease);
                        while let Ok(lease) = self.drained.try_recv() {
                            self.empty.insert(lease);
                        }
                        return;
                    }
                    // Poll has ended; what it had is given back at the end.
                    None => open = false,
                },
                // 2. The table is told of a stop at once, so that others take what is empty.
                () = stopping.cancelled(), if !told_of_stop => return,
                // 3. Time is up.
                () = self.pulse.beat_during(&mut until) => return,
            }
        }
    }

    async fn leave(&self) {
        match tokio::time::timeout(LEAVE_LIMIT, self.store.leave(self.member)).await {
            Ok(Ok(())) => {
                self.holdings.send_replace(Holdings::none(self.member.replica, self.member.shards));
                tracing::info!("leases given back");
            }
            Ok(Err(StoreError { sentence, .. })) => self.kept(&sentence),
            Err(_) => self.kept("no answer from the database in time"),
        }
    }

    fn kept(&self, reason: &str) {
        tracing::warn!(reason, "leases could not be given back; others can take them when they have run out");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;
    use std::sync::Mutex;
    use uuid::Uuid;

    fn keeper<S: LeaseTable>(store: S) -> Keeper<S> {
        let ends = Ends {
            store: Arc::new(store),
            holdings: Arc::new(watch::channel(Holdings::none(Uuid::from_u128(1), 4)).0),
            drained: mpsc::channel(10).1,
            sink: watch::channel(SinkState::Ready).1,
            stopping: CancellationToken::new(),
        };
        // Nothing is due by itself, however long the machine stands still.
        let settings = Settings { lease_ttl: Duration::from_secs(600), ..Settings::plain() };
        let mut keeper = Keeper::new(ends, &settings, Instruments::unseen());
        keeper.note_broker();
        keeper
    }

    #[tokio::test]
    async fn a_lease_is_renewed_when_it_is_time() {
        let store = MemoryStore::default();
        let mut keeper = keeper(store.clone());
        // The first is a member, the second has its part.
        for _ in 0..2 {
            keeper.turn().await.unwrap();
        }
        let (renewed, renew_every) = (keeper.renewed.unwrap(), keeper.terms.renew_every);
        keeper.turn().await.unwrap();
        assert_eq!(keeper.renewed, Some(renewed), "not before");
        keeper.renewed = Some(renewed - renew_every);
        keeper.turn().await.unwrap();
        assert!(keeper.renewed > Some(renewed));
    }

    /// Answers to renewals and looks, the last one again and again.
    struct Answers(Mutex<Vec<Standing>>);

    impl Answers {
        fn next(&self) -> Standing {
            let mut answers = self.0.lock().unwrap();
            if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() }
        }
    }

    impl LeaseTable for Answers {
        async fn look(&self, _: Member) -> Result<Standing, StoreError> {
            Ok(self.next())
        }

        async fn renew(&self, _: Member, _: &[Lease]) -> Result<Standing, StoreError> {
            Ok(self.next())
        }

        async fn leave(&self, _: Member) -> Result<(), StoreError> {
            Ok(())
        }
    }

    /// Because of another number of shards, whose replica had gone when the answer was put together. Its leases run out sooner
    /// than those that were renewed.
    #[tokio::test]
    async fn what_was_not_renewed_is_not_trusted_longer() {
        let leases = vec![Lease { shard: 0, epoch: 1 }];
        let renewed = Standing { member: true, replicas: 1, quota: 4, leases, ..Standing::default() };
        let refused = Standing { member: false, ..renewed.clone() };
        let mut keeper = keeper(Answers(Mutex::new(vec![renewed.clone(), refused, renewed])));
        keeper.turn().await.unwrap();
        let trusted_until = keeper.holdings.borrow().trusted_until;
        keeper.empty.insert(Lease { shard: 0, epoch: 1 });
        keeper.turn().await.unwrap();
        assert_eq!(keeper.holdings.borrow().trusted_until, trusted_until);
        assert_eq!(keeper.empty.len(), 1, "to be given back the next time");
        keeper.turn().await.unwrap();
        assert!(keeper.holdings.borrow().trusted_until > trusted_until, "asked again at once");
        assert!(keeper.empty.is_empty());
    }

    /// Which may be long, where a message of it waits for its confirm. A renewal is a lock that all replicas share.
    #[tokio::test]
    async fn a_shard_that_cannot_be_drained_costs_looks_and_no_renewals() {
        let store = MemoryStore::default();
        let mut keeper = keeper(store.clone());
        let other = Member { replica: Uuid::from_u128(2), ready: true, ..keeper.member };
        for _ in 0..2 {
            keeper.turn().await.unwrap();
        }
        assert_eq!(keeper.holdings.borrow().leases().len(), 4);
        store.renew(other, &[]).await.unwrap();
        keeper.turn().await.unwrap();
        assert_eq!(keeper.holdings.borrow().leaving().len(), 2);
        let renewed = keeper.renewed;
        keeper.turn().await.unwrap();
        assert_eq!(keeper.renewed, renewed, "nothing has changed");
        keeper.empty.extend(keeper.holdings.borrow().leaving());
        keeper.turn().await.unwrap();
        assert_eq!(keeper.holdings.borrow().leases().len(), 2);
    }
}

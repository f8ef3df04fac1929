//! The reading stage: asks the store for pending rows and deals them out to the workers.
//!
//! It owns the budget: it knows every row in flight, asks for no more rows and bytes than there are
//! free places, and frees a place when settle says so. It keeps the order of keys together with the
//! store (a refused row holds back its key in the table) and the workers (see `pipeline/mod.rs`).
//!
//! It reads only while the broker takes messages: an outage fills no memory.

mod probing;
mod reading;
mod settling;
mod sweep;
#[cfg(test)]
mod tests;
mod watching;

use super::gaps::{AGE, Gaps, HORIZON_IDS};
use super::keys::Keys;
use super::known::Known;
use super::releases::Releases;
use super::routes::Routes;
use super::shards::Shards;
use super::{Ending, Settled, Work, hand_over, worth_a_statement};
use crate::config::{Ordering, Settings};
use crate::ownership::Holdings;
use crate::retry::{Delays, Rest};
use crate::sink::SinkState;
use crate::store::{Lease, Route, Store, StoreError, Trouble};
use crate::telemetry::{Board, DatabaseUser, Instruments, Metrics, Pulse};
use reading::Found;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use sweep::Sweep;
use tokio::sync::watch::error::RecvError;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use watching::{VAIN_PAUSE_MAX, Watching};

pub use reading::worker_of;

/// Ranges in one statement at most; each costs an index descent, and what lies between two that are joined is walked over.
/// With replicas there are many: what another one has delivered before we came by looks like a gap.
const RANGES_MAX: usize = 512;
/// Shortest pause after a read that found little: bounds the statements per second of a trickle.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// Size assumed of rows before any was seen: large, so that the first answer is small.
const FIRST_ROW_BYTES: usize = 256 * 1024;
/// A read that finds little may take long, when many rows wait behind a refused one. It is followed by this
/// many times its duration of rest.
const SHORT_READ_REST: Rest = Rest { times: 2, at_most: Duration::from_secs(10) };

/// The stage.
pub struct Poll<S> {
    store: Arc<S>,
    workers: Vec<mpsc::Sender<Work>>,
    settled: mpsc::Receiver<Vec<Settled>>,
    sink: watch::Receiver<SinkState>,
    holdings: watch::Receiver<Holdings>,
    drained: mpsc::Sender<Lease>,
    stop: CancellationToken,
    board: Arc<Board>,
    pulse: Pulse,
    metrics: Arc<Metrics>,
    limits: Limits,

    in_flight: HashMap<i64, InFlight>,
    bytes_in_flight: usize,
    /// So many of them stand aside.
    aside: usize,
    shards: Shards,
    keys: Keys,
    known: Known,
    /// Largest id ever read.
    last_read: i64,
    /// Up to here rows of others have been told.
    told: i64,
    gaps: Gaps,
    sweep: Sweep,
    watching: Watching,
    routes: Routes,
    releases: Releases,
    /// Size of rows seen lately; keeps answers near what fits into the free bytes.
    row_bytes: usize,
    /// The mean of the last rows that came; 0 before any.
    seen_row_bytes: usize,
    delays: Delays,
}

/// What poll is connected to.
pub struct Ends<S> {
    /// Where rows come from.
    pub store: Arc<S>,
    /// A channel to each worker; the last one takes probes of parked routes only.
    pub workers: Vec<mpsc::Sender<Work>>,
    /// Settled rows.
    pub settled: mpsc::Receiver<Vec<Settled>>,
    /// Whether the broker takes messages.
    pub sink: watch::Receiver<SinkState>,
    /// What may be read.
    pub holdings: watch::Receiver<Holdings>,
    /// Told when a shard that leaves has nothing in flight.
    pub drained: mpsc::Sender<Lease>,
}

/// Settings of the stage.
#[derive(Debug, Clone, Copy)]
struct Limits {
    rows: usize,
    bytes: usize,
    /// Rows per statement.
    read_rows: usize,
    poll_interval: Duration,
    keep_order: bool,
}

/// Why a rest is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rested {
    Enough,
    /// There are shards that were not read the last time.
    ShardsCame,
}

#[derive(Debug)]
struct InFlight {
    bytes: usize,
    lease: Lease,
    /// Its key, if keys order anything.
    key: Option<Arc<str>>,
    /// The worker that has it, and that is told when its key may go on.
    worker: usize,
    /// Sent to try a parked route.
    probe: bool,
    /// Set for rows whose success is news: their route has refused lately.
    refusing: Option<Arc<Route>>,
    /// What is settled was forgotten meanwhile, and with it what its mark is worth.
    forgotten: bool,
    /// Its end cannot be written for now.
    aside: Option<Ending>,
}

impl<S: Store> Poll<S> {
    /// A stage that ends on `stop`.
    pub fn new(
        ends: Ends<S>,
        settings: &Settings,
        stop: CancellationToken,
        instruments: Instruments,
    ) -> Self {
        let Instruments { metrics, board, pulse } = instruments;
        let limits = Limits {
            rows: settings.max_in_flight,
            bytes: settings.max_in_flight_bytes,
            read_rows: (settings.batch_size * settings.workers).min(settings.max_in_flight),
            poll_interval: settings.poll_interval,
            keep_order: settings.ordering != Ordering::None,
        };
        Self {
            store: ends.store,
            workers: ends.workers,
            settled: ends.settled,
            sink: ends.sink,
            holdings: ends.holdings,
            drained: ends.drained,
            stop,
            board,
            pulse,
            metrics,
            limits,
            in_flight: HashMap::new(),
            bytes_in_flight: 0,
            aside: 0,
            shards: Shards::default(),
            keys: Keys::default(),
            known: Known::default(),
            last_read: i64::MIN,
            told: i64::MIN,
            gaps: Gaps::default(),
            sweep: Sweep::new(settings.sweep_interval),
            watching: Watching::new(settings.long_poll),
            routes: Routes::new(settings),
            releases: Releases::default(),
            row_bytes: FIRST_ROW_BYTES,
            seen_row_bytes: 0,
            delays: Delays::default(),
        }
    }

    /// Reads until stopped, or until the sink is gone, which is a failure that supervision notices; then follows what
    /// is in flight to its end.
    pub async fn run(mut self) {
        let stop = self.stop.clone();
        // Cancelling a read loses nothing: its rows are still pending, its connection is dropped.
        let _ = stop.run_until_cancelled(self.read_on()).await;
        self.drain().await;
    }

    /// Tells which shards have run empty, so that others can go on with them while this relay finishes the rest.
    async fn drain(mut self) {
        // Nothing more will come: this is what ends the workers, and they settle.
        self.workers.clear();
        loop {
            self.follow_ownership().await;
            let event = async {
                tokio::select! {
                    biased;
                    // 1. What is settled.
                    settled = self.settled.recv() => Some(settled),
                    // 2. Shards are to go.
                    Ok(()) = self.holdings.changed() => None,
                }
            };
            match self.pulse.beat_during(event).await {
                Some(Some(settled)) => self.settle_all(settled).await,
                // Settle has ended: nothing more comes back.
                Some(None) => return,
                None => {}
            }
        }
    }

    async fn read_on(&mut self) {
        let mut pause = PAUSE_MIN;
        loop {
            self.take_settled().await;
            if self.wait_until_reading_helps().await.is_err() {
                return;
            }
            let (found, read_at) = match self.turn().await {
                Ok(turn) => turn,
                Err(error) => {
                    self.recover(&error).await;
                    continue;
                }
            };
            match found {
                Found::More => continue,
                // Its turn comes when something is settled.
                Found::TooLarge if !self.in_flight.is_empty() => {
                    if self.next_event().await.is_err() {
                        return;
                    }
                    continue;
                }
                Found::Some => pause = PAUSE_MIN,
                Found::Nothing | Found::TooLarge => pause *= 2,
            }
            pause = pause.min(self.longest_pause());
            let until_duty = self.next_duty().saturating_duration_since(Instant::now()).max(PAUSE_MIN);
            let rest = pause.min(until_duty).max(SHORT_READ_REST.after(read_at.elapsed()));
            if self.rest(rest).await == Rested::ShardsCame {
                continue;
            }
            if found == Found::Nothing && self.watching.is_open() {
                pause = self.watch_on(read_at, pause).await;
            }
        }
    }

    /// Longest pause between reads that find nothing.
    fn longest_pause(&self) -> Duration {
        let longest = self.limits.poll_interval;
        if self.watching.is_open() { longest.min(VAIN_PAUSE_MAX) } else { longest }
    }

    /// The broker takes messages, and some shard is ours.
    fn may_read(&self) -> bool {
        self.sink.borrow().is_ready() && !self.leases().is_empty()
    }

    /// One round of statements: what is due besides reading, then a read, and when that began: what came before it, which
    /// may take long, is followed by rests of its own.
    async fn turn(&mut self) -> Result<(Found, Instant), StoreError> {
        self.release_a_bite().await?;
        self.probe().await?;
        self.close_gaps().await?;
        let read_at = Instant::now();
        let found = self.read().await?;
        self.board.database_up(DatabaseUser::Poll);
        Ok((found, read_at))
    }

    /// Waits until rows may be read: the broker takes messages, some shard is ours, and enough places are free to be
    /// worth a statement. An error means that the sink or the keeper of leases is gone for good.
    async fn wait_until_reading_helps(&mut self) -> Result<(), RecvError> {
        loop {
            self.follow_ownership().await;
            let may_read = self.may_read();
            if may_read && self.has_room() {
                return Ok(());
            }
            if !may_read {
                // Nothing is asked of the database meanwhile, so nothing is known of it here.
                self.board.database_idle(DatabaseUser::Poll);
                if self.leases().is_empty() {
                    self.metrics.parked_routes.set(0);
                }
            }
            self.next_event().await?;
            self.take_settled().await;
        }
    }

    /// Waits for whatever may make a read right or useful, and takes it in.
    async fn next_event(&mut self) -> Result<(), RecvError> {
        let event = async {
            tokio::select! {
                biased;
                // 1. Places are freed while the broker is away too.
                settled = self.settled.recv() => Ok(settled),
                // 2. The broker is back, or has another reason to be away.
                changed = self.sink.changed() => Err(changed),
                // 3. Shards have come or are to go.
                changed = self.holdings.changed() => Err(changed),
            }
        };
        match self.pulse.beat_during(event).await {
            Ok(settled) => self.settle_or_wait(settled).await,
            Err(changed) => changed?,
        }
        Ok(())
    }

    /// What may be read now.
    fn leases(&self) -> Vec<Lease> {
        self.shards.readable(&self.holdings.borrow())
    }

    /// Lets keys go on whose shard has run empty, and tells which leaving shards have.
    async fn follow_ownership(&mut self) {
        for (worker, key) in self.shards.take_resumed() {
            self.resume(worker, key).await;
        }
        let drained = self.shards.take_drained(&self.holdings.borrow_and_update());
        for lease in drained {
            self.tell_repeats(lease);
            hand_over(&self.drained, lease).await;
        }
    }

    /// Enough places are free.
    fn has_room(&self) -> bool {
        let rows = self.limits.rows - self.in_flight.len();
        let bytes = self.limits.bytes.saturating_sub(self.bytes_in_flight);
        let enough_rows = worth_a_statement(self.limits.rows - self.aside);
        let enough = rows >= enough_rows && bytes >= self.limits.bytes / 4;
        rows > 0 && (enough || self.nothing_moves())
    }

    /// Probes of silent routes keep their places for long, and so do rows that stand aside: a row that needs all the bytes must
    /// not wait for them.
    fn nothing_moves(&self) -> bool {
        self.in_flight.values().all(|row| row.probe || row.aside.is_some())
    }

    /// When something besides reading is to be done next.
    fn next_duty(&self) -> Instant {
        [self.routes.next_probe(), self.releases.next_due()]
            .into_iter()
            .flatten()
            .fold(self.sweep.due(), Instant::min)
    }

    /// Sleeps until the next read is due, or until shards have come.
    async fn rest(&mut self, pause: Duration) -> Rested {
        match self.attend_during(tokio::time::sleep(pause)).await {
            Some(()) => Rested::Enough,
            None => Rested::ShardsCame,
        }
    }

    /// Waits for something while settled rows and a stop are taken in; `None`: shards have come, which are to be read.
    async fn attend_during<T>(&mut self, something: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(something);
        loop {
            tokio::select! {
                biased;
                // 1. Settled rows first: they free places.
                settled = self.settled.recv() => {
                    self.settle_or_wait(settled).await;
                }
                // 2. Shards have come or are to go.
                Ok(()) = self.holdings.changed() => {}
                // 3. There it is.
                it = self.pulse.beat_during(&mut something) => return Some(it),
            }
            self.follow_ownership().await;
            if self.shards.is_news(&self.leases()) {
                return None;
            }
        }
    }

    /// Exact ranges leave out what is in flight; others need the list of it.
    fn in_flight_unless(&self, exact: bool) -> Vec<i64> {
        if exact { Vec::new() } else { self.in_flight.keys().copied().collect() }
    }

    async fn recover(&mut self, error: &StoreError) {
        self.board.database_down(DatabaseUser::Poll, error);
        if error.trouble != Trouble::Contention {
            // A failover may have lost transactions and given their ids to others.
            self.forget_what_is_settled();
        }
        let pause = self.delays.next(error);
        self.rest(pause).await;
    }

    fn forget_what_is_settled(&mut self) {
        self.known = Known::default();
        for (id, in_flight) in &mut self.in_flight {
            self.known.add(*id);
            in_flight.forgotten = true;
        }
        self.last_read = self.in_flight.keys().copied().max().unwrap_or(i64::MIN);
        self.told = i64::MIN;
        self.gaps = Gaps::default();
        self.watching.forget();
    }

    /// Learns which passed-over ids will never appear, so that they are not asked for again.
    async fn close_gaps(&mut self) -> Result<(), StoreError> {
        // Only up to what has been read: what lies beyond, no sweep would find.
        let Some(first_known) = self.known.first() else { return Ok(()) };
        if !self.known.has_gap_below(self.last_read) || !self.gaps.is_due() {
            return Ok(());
        }
        if self.gaps.is_new() {
            let long_passed = self.pulse.beat_during(self.store.long_passed(first_known, AGE)).await;
            self.gaps.begin(unless_lost(long_passed)?.flatten(), self.last_read);
        }
        let Some((first, last)) = self.gaps.ripe() else { return Ok(()) };
        let ranges = self.known.unknown(RANGES_MAX).since(first).ranges;
        let in_flight = self.in_flight_unless(false);
        let started = Instant::now();
        let horizon = self.store.horizon(last, &ranges, &in_flight, HORIZON_IDS);
        let horizon = self.pulse.beat_during(horizon).await;
        match unless_lost(horizon)? {
            Some(horizon) => self.gaps.take(&horizon, self.last_read, &mut self.known),
            None => self.gaps.failed(started.elapsed()),
        }
        Ok(())
    }
}

/// What helps and is not needed: without it all goes on, unless the database itself is in trouble.
fn unless_lost<T>(answer: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
    match answer {
        Err(error) if error.trouble == Trouble::Contention => Ok(None),
        answer => answer.map(Some),
    }
}

//! The reading stage: asks the store for pending rows and deals them out to the workers.
//!
//! It owns the budget: it knows every row in flight, asks for no more rows and bytes than there are
//! free places, and frees a place when settle says so. It keeps the order of keys together with the
//! store (a refused row holds back its key in the table) and the workers (see `pipeline/mod.rs`).
//!
//! It reads only while the broker takes messages: an outage fills no memory.

mod sweep;
mod watching;

use super::gaps::{AGE, Gaps, HORIZON_IDS};
use super::keys::Keys;
use super::known::{Known, Unknown};
use super::routes::{Parking, Routes};
use super::shards::Shards;
use super::{Fate, Settled, Work, hand_over, worth_a_statement};
use crate::config::{Ordering, Settings};
use crate::mutants::mutant;
use crate::ownership::Holdings;
use crate::retry::{Delays, Rest};
use crate::sink::SinkState;
use crate::store::{Ask, Lease, Others, Read, Route, Row, Share, Store, StoreError, Trouble};
use crate::telemetry::{Board, DatabaseUser, Metrics, Pulse};
use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};
use sweep::Sweep;
use tokio::sync::watch::error::RecvError;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use watching::{VAIN_PAUSE_MAX, Watching};

/// Ranges in one statement at most; each costs an index descent, and what lies between two that are joined is walked over.
/// With replicas there are many: what another one has delivered before we came by looks like a gap.
const RANGES_MAX: usize = 512;
/// Reads of fewer rows, because rows are large, leave out those of others: they would take the places.
const TELLING_ROWS: usize = 100;
/// Shortest pause after a read that found little: bounds the statements per second of a trickle.
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// Size assumed of rows before any was seen: large, so that the first answer is small.
const FIRST_ROW_BYTES: usize = 256 * 1024;
/// A read that finds little may take long, when many rows wait behind a refused one. It is followed by this
/// many times its duration of rest.
const SHORT_READ_REST: Rest = Rest { times: 2, at_most: Duration::from_secs(10) };
/// A read that fails after so long did not fail for a lock (5 s) or for a connection that could not be made (10 s).
const LONG_READ: Duration = Duration::from_secs(12);
/// Waiting rows made due with one statement when a route works again.
const RELEASE_ROWS: usize = 1000;

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
    releasing: VecDeque<Arc<Route>>,
    /// Size of rows seen lately; keeps answers near what fits into the free bytes.
    row_bytes: usize,
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
    watched: Option<Arc<Route>>,
}

/// What a turn of the loop found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// A full answer, or a part of the table was left out: more may be there.
    More,
    /// The next row is larger than what is free.
    TooLarge,
    /// Some rows.
    Some,
    /// None.
    Nothing,
}

impl<S: Store> Poll<S> {
    /// A stage that ends on `stop`.
    pub fn new(
        ends: Ends<S>,
        settings: &Settings,
        stop: CancellationToken,
        board: Arc<Board>,
        pulse: Pulse,
        metrics: Arc<Metrics>,
    ) -> Self {
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
            shards: Shards::default(),
            keys: Keys::default(),
            known: Known::default(),
            last_read: i64::MIN,
            told: i64::MIN,
            gaps: Gaps::default(),
            sweep: Sweep::new(settings.sweep_interval),
            watching: Watching::new(settings.long_poll),
            routes: Routes::new(settings.retry_min, settings.retry_max),
            releasing: VecDeque::new(),
            row_bytes: FIRST_ROW_BYTES,
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
                // Settle has ended, and so has everything that was in flight.
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
            let begun = Instant::now();
            let found = match self.turn().await {
                Ok(found) => found,
                Err(error) => {
                    self.recover(&error).await;
                    continue;
                }
            };
            match found {
                Found::More => continue,
                Found::TooLarge => {
                    if self.next_event().await.is_err() {
                        return;
                    }
                    continue;
                }
                Found::Some => pause = PAUSE_MIN,
                Found::Nothing => pause *= 2,
            }
            pause = pause.min(self.longest_pause());
            self.rest(pause.max(SHORT_READ_REST.after(begun.elapsed()))).await;
            if found == Found::Nothing && self.watching.is_open() {
                pause = self.watch_on(begun, pause).await;
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

    /// One round of statements: what is due besides reading, then a read.
    async fn turn(&mut self) -> Result<Found, StoreError> {
        self.release_a_bite().await?;
        self.probe().await?;
        self.close_gaps().await?;
        let found = self.read().await?;
        self.board.database_up(DatabaseUser::Poll);
        Ok(found)
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
            hand_over(&self.drained, lease).await;
        }
    }

    /// Enough places are free.
    fn has_room(&self) -> bool {
        let rows = self.limits.rows - self.in_flight.len();
        let bytes = self.limits.bytes.saturating_sub(self.bytes_in_flight);
        self.in_flight.is_empty()
            || (rows >= worth_a_statement(self.limits.rows) && bytes >= self.limits.bytes / 4)
    }

    /// Sleeps until the next read is due, or until shards have come.
    async fn rest(&mut self, pause: Duration) {
        self.attend_during(tokio::time::sleep(pause)).await;
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
                    self.follow_ownership().await;
                }
                // 2. Shards have come or are to go.
                Ok(()) = self.holdings.changed() => {
                    self.follow_ownership().await;
                    if self.shards.is_news(&self.leases()) {
                        return None;
                    }
                }
                // 3. There it is.
                it = self.pulse.beat_during(&mut something) => return Some(it),
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
        for id in self.in_flight.keys() {
            self.known.add(*id);
        }
        self.last_read = self.in_flight.keys().copied().max().unwrap_or(i64::MIN);
        self.told = i64::MIN;
        self.gaps = Gaps::default();
        self.watching.forget();
    }

    async fn read(&mut self) -> Result<Found, StoreError> {
        let leases = self.leases();
        if leases.is_empty() {
            return Ok(Found::Nothing);
        }
        if self.shards.note_read(&leases) && !mutant!("trust-what-others-had") {
            // Others may have written what we believe to be settled.
            self.forget_what_is_settled();
        }
        let sweeping = self.sweep.is_due();
        // A sweep reads what has been passed; what lies behind is unknown and read anyway, so that a standing
        // backlog does not keep the sweep from ending.
        let passed = || Unknown { ranges: vec![(i64::MIN, self.last_read)], exact: false };
        let Unknown { ranges, exact } = if sweeping { passed() } else { self.known.unknown(RANGES_MAX) };
        let (ranges, exact) = match mutant!("read-after-last-id") {
            true => (vec![(self.last_read.saturating_add(1), i64::MAX)], true),
            false => (ranges, exact),
        };
        let mut others = self.shards.pass_others(&self.holdings.borrow());
        let in_flight = self.in_flight_unless(exact);
        let free_bytes = self.limits.bytes.saturating_sub(self.bytes_in_flight);
        let rows = self.limits.read_rows.min(self.limits.rows - self.in_flight.len());
        let rows = rows.min((free_bytes / self.row_bytes).max(1));
        let tells_others = rows >= TELLING_ROWS.min(self.limits.read_rows);
        if !tells_others {
            others.clear();
        }
        let ask = Ask {
            ranges: &ranges,
            rows,
            bytes: free_bytes,
            room_for_any: self.in_flight.is_empty(),
            in_flight: &in_flight,
            keep_order: self.limits.keep_order && !mutant!("followers-overtake"),
            parked: &self.routes.parked(),
            share: Share { shards: self.holdings.borrow().shards(), leases: &leases },
            others: Others { shards: &others, after: self.told },
        };
        // Once per read, not per settled row: the list has been made here anyway.
        self.metrics.parked_routes.set(ask.parked.len() as i64);
        let started = Instant::now();
        let read = self.pulse.beat_during(self.store.poll(ask)).await;
        let took = started.elapsed();
        let Read { mut rows, passed, more, cut_off: _ } =
            read.inspect_err(|error| self.ask_for_less(error, sweeping, took))?;
        self.metrics.poll_seconds.observe(took.as_secs_f64());
        self.delays = Delays::default();
        let swept = sweeping && !more;
        if sweeping {
            self.sweep.read(took, swept);
        }
        let held = |row: &Row| row.ordering_key.as_deref().is_some_and(|key| self.keys.is_held(key));
        rows.retain(|row| !held(row));
        let found = match (more, rows.is_empty()) {
            (true, false) => Found::More,
            // It has got on.
            (true, true) if !passed.is_empty() => Found::More,
            (true, true) => Found::TooLarge,
            // It has not looked at what is new.
            (false, true) if swept => Found::More,
            (false, false) => Found::Some,
            (false, true) => Found::Nothing,
        };
        if tells_others {
            let last = rows.last().map(|row| row.id).max(passed.last().copied());
            self.told = self.told.max(last.unwrap_or(i64::MIN));
        }
        for id in passed {
            self.last_read = self.last_read.max(id);
            self.known.add(id);
        }
        self.remember_row_size(&rows, more);
        if self.sweeping_found_known_ids(&rows) {
            self.forget_what_is_settled();
        }
        let mut shares: Vec<Vec<Row>> = self.workers.iter().map(|_| Vec::new()).collect();
        for row in rows {
            shares[worker_of(&row, self.limits.keep_order, self.prober())].push(row);
        }
        for (worker, rows) in shares.into_iter().enumerate() {
            self.send(rows, worker).await;
        }
        Ok(found)
    }

    /// Ids that were settled are pending again: the sequence was set back, or an operator sends rows again.
    /// What is known of other ids may be as wrong.
    fn sweeping_found_known_ids(&self, rows: &[Row]) -> bool {
        let again = |row: &Row| self.known.contains(row.id) && !self.in_flight.contains_key(&row.id);
        rows.iter().any(again)
    }

    fn remember_row_size(&mut self, rows: &[Row], more: bool) {
        if rows.is_empty() {
            // Whatever was too much once is gone, or is not ours.
            if !more && self.row_bytes > FIRST_ROW_BYTES {
                self.row_bytes = (self.row_bytes / 2).max(FIRST_ROW_BYTES);
            }
        } else {
            let mean = rows.iter().map(Row::bytes).sum::<usize>() / rows.len();
            // Growing at once and shrinking slowly errs on the side of small answers.
            self.row_bytes = mean.max((self.row_bytes * 3 + mean) / 4).max(1);
        }
    }

    /// A read that failed after a while may have been too much for the time that a statement has: a sweep over what somebody's
    /// transaction keeps in the index, or rows that are too large for a slow link.
    fn ask_for_less(&mut self, error: &StoreError, sweeping: bool, took: Duration) {
        if took < LONG_READ {
            return;
        }
        self.row_bytes = self.row_bytes.saturating_mul(4).min(self.limits.bytes);
        if sweeping {
            self.sweep.read(took, true);
            tracing::warn!(
                reason = error.sentence,
                seconds = took.as_secs(),
                "a sweep could not be read to its end; reading what is new, and sweeping later"
            );
        }
    }

    /// Notes rows and hands them over, but for those that are in flight.
    async fn send(&mut self, mut rows: Vec<Row>, worker: usize) {
        rows.retain(|row| self.note(row, worker));
        if !rows.is_empty() {
            self.show_in_flight();
            hand_over(&self.workers[worker], Work::Publish(rows)).await;
        }
    }

    /// Gives a row its place; false if it has one.
    fn note(&mut self, row: &Row, worker: usize) -> bool {
        if self.in_flight.contains_key(&row.id) {
            return false;
        }
        let watched = self.routes.watches(&row.route).then(|| Arc::clone(&row.route));
        self.last_read = self.last_read.max(row.id);
        self.known.add(row.id);
        self.bytes_in_flight += row.bytes();
        let probe = worker == self.prober();
        let key = row.ordering_key.clone().filter(|_| self.limits.keep_order);
        if let Some(key) = &key {
            self.keys.sent(key);
        }
        self.shards.sent(row.lease);
        let place = InFlight { bytes: row.bytes(), lease: row.lease, key, worker, probe, watched };
        self.in_flight.insert(row.id, place);
        true
    }

    /// The last worker takes probes only, so that a route without answers costs no other row its time. The
    /// order of keys is safe: a probe was refused before, so the table holds back all that follow it.
    fn prober(&self) -> usize {
        self.workers.len() - 1
    }

    async fn take_settled(&mut self) {
        while let Ok(settled) = self.settled.try_recv() {
            self.settle_all(settled).await;
        }
    }

    async fn settle_or_wait(&mut self, settled: Option<Vec<Settled>>) {
        match settled {
            Some(settled) => self.settle_all(settled).await,
            // Settle is gone; supervision stops us.
            None => std::future::pending().await,
        }
    }

    async fn settle_all(&mut self, settled: Vec<Settled>) {
        for settled in settled {
            self.settle(settled).await;
        }
        self.show_in_flight();
    }

    /// Frees the place of a settled row.
    async fn settle(&mut self, Settled { id, fate }: Settled) {
        let Some(settled) = self.in_flight.remove(&id) else { return };
        let InFlight { bytes, lease, key: key_in_flight, worker, probe, watched } = settled;
        self.bytes_in_flight -= bytes;
        self.shards.settled(lease);
        if let Some(key) = &key_in_flight {
            self.keys.settled(key);
        }
        match fate {
            Fate::Delivered { certain } => {
                if !certain {
                    self.known.remove(id);
                }
                if let Some(route) = watched {
                    self.route_works(route);
                }
            }
            Fate::Dead => self.end_probe(watched, probe),
            Fate::Released => {
                self.known.remove(id);
                self.end_probe(watched, probe);
            }
            Fate::Fenced { key } => {
                self.known.remove(id);
                self.end_probe(watched, probe);
                self.shards.fenced(lease.shard, worker, key);
            }
            Fate::Waiting { key, route, reason, fault } => {
                self.known.remove(id);
                if fault.blames_destination() {
                    self.route_refuses(&route, &reason, probe);
                } else {
                    // The message was refused, which says nothing of its route.
                    self.end_probe(watched, probe);
                }
                if let Some(key) = key.filter(|_| self.limits.keep_order) {
                    self.keys.refused(key, worker);
                }
            }
        }
        if let Some(key) = key_in_flight {
            for worker in self.keys.take_resumed(&key) {
                // The table holds the key back from here on.
                self.resume(worker, Arc::clone(&key)).await;
            }
        }
    }

    /// The worker may go on with this key; in vain when it has ended, on a stop.
    async fn resume(&mut self, worker: usize, key: Arc<str>) {
        if let Some(worker) = self.workers.get(worker) {
            hand_over(worker, Work::Resume(key)).await;
        }
    }

    fn show_in_flight(&self) {
        self.metrics.in_flight.set(self.in_flight.len() as i64);
        self.metrics.in_flight_bytes.set(self.bytes_in_flight as i64);
    }

    /// A probe ended without saying anything of its route: another may go.
    fn end_probe(&mut self, route: Option<Arc<Route>>, probe: bool) {
        if let Some(route) = route.filter(|_| probe) {
            self.routes.probe_released(&route, Instant::now());
        }
    }

    fn route_refuses(&mut self, route: &Arc<Route>, reason: &str, probe: bool) {
        if self.routes.refused(route, probe, Instant::now()) == Parking::Parked {
            tracing::warn!(
                exchange = route.exchange,
                routing_key = route.routing_key,
                reason,
                "route parked: it refuses every message; trying one now and then"
            );
        }
    }

    fn route_works(&mut self, route: Arc<Route>) {
        if self.routes.delivered(&route) {
            tracing::info!(
                exchange = route.exchange,
                routing_key = route.routing_key,
                "route works again; its waiting rows are due now"
            );
            self.releasing.push_back(route);
        }
    }

    /// Makes some waiting rows of a route that works again due.
    async fn release_a_bite(&mut self) -> Result<(), StoreError> {
        let Some(route) = self.releasing.front() else { return Ok(()) };
        let released = self.pulse.beat_during(self.store.release(route, RELEASE_ROWS)).await?;
        if released < RELEASE_ROWS as u64 {
            self.releasing.pop_front();
        }
        Ok(())
    }

    /// Sends one waiting row of a parked route that is due for it.
    async fn probe(&mut self) -> Result<(), StoreError> {
        let Some(route) = self.routes.take_due_probe(Instant::now()) else { return Ok(()) };
        let in_flight: Vec<i64> = self.in_flight.keys().copied().collect();
        let leases = self.leases();
        let share = Share { shards: self.holdings.borrow().shards(), leases: &leases };
        let probe = self.store.probe(&route, &in_flight, self.limits.keep_order, share);
        match self.pulse.beat_during(probe).await {
            // Later rows of its key are still on their way back.
            Ok(Some(Row { ordering_key: Some(key), .. })) if self.keys.is_held(&key) => {
                self.routes.probe_released(&route, Instant::now());
            }
            Ok(Some(row)) => {
                let prober = self.prober();
                self.send(vec![row], prober).await;
            }
            Ok(None) if leases.len() == self.holdings.borrow().leases().len() => {
                self.routes.nothing_waits(&route);
            }
            // Its rows may be in shards that are not read at this moment.
            Ok(None) => self.routes.probe_released(&route, Instant::now()),
            Err(error) => {
                self.routes.probe_released(&route, Instant::now());
                return Err(error);
            }
        }
        Ok(())
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
        let in_flight: Vec<i64> = self.in_flight.keys().copied().collect();
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

/// Rows of a key share a worker, which keeps their order.
pub fn worker_of(row: &Row, keep_order: bool, workers: usize) -> usize {
    let mut hasher = DefaultHasher::new();
    match row.ordering_key.as_deref().filter(|_| keep_order) {
        Some(key) => key.hash(&mut hasher),
        None => row.id.hash(&mut hasher),
    }
    (hasher.finish() % workers as u64) as usize
}

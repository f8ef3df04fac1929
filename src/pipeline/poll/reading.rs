//! One read: what is asked for, what its answer tells, and who gets its rows.

use super::{FIRST_ROW_BYTES, InFlight, Poll, RANGES_MAX};
use crate::mutants::mutant;
use crate::pipeline::known::Unknown;
use crate::pipeline::{Work, hand_over};
use crate::retry::Delays;
use crate::store::{Ask, Others, Read, Row, Share, Store, StoreError};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Reads of fewer rows, because rows are large, leave out those of others: they would take the places.
const TELLING_ROWS: usize = 100;
/// A read that fails after so long did not fail for a lock (5 s) or for a connection that could not be made (10 s).
pub(super) const LONG_READ: Duration = Duration::from_secs(12);

/// What a turn of the loop found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// A full answer, or a part of the table was left out: more may be there.
    More,
    /// The next row is larger than what is free.
    TooLarge,
    /// Some rows.
    Some,
    /// None.
    Nothing,
}

impl Found {
    /// By an answer, whether there is something in it that is not asked for again, and whether it was the last of a sweep.
    fn by(read: &Read, got_on: bool, swept: bool) -> Self {
        match (read.more, read.rows.is_empty()) {
            (true, false) => Self::More,
            (true, true) if got_on => Self::More,
            (true, true) => Self::TooLarge,
            // It has not looked at what is new.
            (false, true) if swept => Self::More,
            (false, false) => Self::Some,
            (false, true) => Self::Nothing,
        }
    }
}

impl<S: Store> Poll<S> {
    /// Asks for rows, takes in what the answer tells, and deals the rows out.
    pub(super) async fn read(&mut self) -> Result<Found, StoreError> {
        let leases = self.leases();
        if leases.is_empty() {
            return Ok(Found::Nothing);
        }
        if self.shards.note_read(&leases) && !mutant!("trust-what-others-had") {
            // Others may have written what we believe to be settled.
            self.forget_what_is_settled();
        }
        let sweeping = self.sweep.is_due();
        let Unknown { ranges, exact } = self.not_known(sweeping);
        let not_wanted = self.not_wanted(exact);
        let (rows, bytes) = self.free_places();
        let mut others = self.shards.pass_others(&self.holdings.borrow());
        let tells_others = self.may_tell_others();
        if !tells_others {
            others.clear();
        }
        let ask = Ask {
            ranges: &ranges,
            rows,
            bytes,
            room_for_any: self.nothing_moves(),
            in_flight: &not_wanted,
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
        let mut read = read.inspect_err(|error| self.ask_for_less(error, sweeping, took))?;
        self.metrics.poll_seconds.observe(took.as_secs_f64());
        self.delays = Delays::default();
        let swept = sweeping && !read.more;
        let early_before = self.keys.early().len();
        read.rows.retain(|row| !self.put_off(row));
        let early = self.keys.early().len();
        if sweeping {
            let whole = early == 0 && leases.len() == self.holdings.borrow().leases().len();
            self.sweep.read(took, swept, whole);
        }
        let found = Found::by(&read, early > early_before || !read.passed.is_empty(), swept);
        self.learn(&read, tells_others);
        self.deal_out(read.rows).await;
        Ok(found)
    }

    /// What to ask for.
    fn not_known(&self, sweeping: bool) -> Unknown {
        if mutant!("read-after-last-id") {
            return Unknown { ranges: vec![(self.last_read.saturating_add(1), i64::MAX)], exact: true };
        }
        if sweeping {
            // A sweep reads what has been passed; what lies behind is unknown and read anyway, so that a standing
            // backlog does not keep the sweep from ending.
            return Unknown { ranges: vec![(i64::MIN, self.last_read)], exact: false };
        }
        self.known.unknown(RANGES_MAX)
    }

    /// So many rows and bytes are wanted.
    fn free_places(&self) -> (usize, usize) {
        let (rows, bytes) = self.free();
        (rows.min((bytes / self.row_bytes).max(1)), bytes)
    }

    /// By the size of rows that came, not by what is assumed after reads that failed: telling is what shortens these.
    fn may_tell_others(&self) -> bool {
        let (rows, bytes) = self.free();
        rows.min(bytes / self.seen_row_bytes.max(1)) >= TELLING_ROWS.min(self.limits.read_rows)
    }

    fn free(&self) -> (usize, usize) {
        let rows = self.limits.read_rows.min(self.limits.rows - self.in_flight.len());
        (rows, self.limits.bytes.saturating_sub(self.bytes_in_flight))
    }

    /// Puts a row off if earlier ones of its key are still on their way back: it is not asked for before they are.
    pub(super) fn put_off(&mut self, row: &Row) -> bool {
        let Some(key) = row.ordering_key.as_ref().filter(|key| self.keys.is_held(key)) else { return false };
        // Where a key's refused row was deleted, its whole backlog may come early.
        if self.keys.early().len() < self.limits.rows {
            self.keys.came_early(row.id, Arc::clone(key));
        }
        true
    }

    /// What an answer is to leave out.
    pub(super) fn not_wanted(&self, exact: bool) -> Vec<i64> {
        let mut ids = self.in_flight_unless(exact);
        ids.extend(self.keys.early());
        ids
    }

    /// What an answer tells beside its rows.
    fn learn(&mut self, read: &Read, tells_others: bool) {
        if tells_others {
            let last = read.rows.last().map(|row| row.id).max(read.passed.last().copied());
            self.told = self.told.max(last.unwrap_or(i64::MIN));
        }
        for id in &read.passed {
            self.last_read = self.last_read.max(*id);
            self.known.add(*id);
        }
        self.remember_row_size(&read.rows, read.more);
        if self.found_known_ids(&read.rows) {
            self.forget_what_is_settled();
        }
    }

    /// To the workers.
    async fn deal_out(&mut self, rows: Vec<Row>) {
        let mut shares: Vec<Vec<Row>> = self.workers.iter().map(|_| Vec::new()).collect();
        for row in rows {
            shares[worker_of(&row, self.limits.keep_order, self.prober())].push(row);
        }
        for (worker, rows) in shares.into_iter().enumerate() {
            self.send(rows, worker).await;
        }
    }

    /// Ids that were settled are pending again: the sequence was set back, or an operator sends rows again.
    /// What is known of other ids may be as wrong.
    fn found_known_ids(&self, rows: &[Row]) -> bool {
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
            self.seen_row_bytes = mean;
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
        // Rows that wait for parked routes may be what is walked over.
        self.routes.unpark_all(Instant::now());
        if sweeping {
            self.sweep.read(took, true, true);
            tracing::warn!(
                reason = error.sentence,
                seconds = took.as_secs(),
                "a sweep could not be read to its end; reading what is new, and sweeping later"
            );
        }
    }

    /// Notes rows and hands them over, but for those that are in flight.
    pub(super) async fn send(&mut self, rows: Vec<Row>, worker: usize) {
        self.send_as(Work::Publish, rows, worker).await;
    }

    /// The same for a row that is to try its route.
    pub(super) async fn send_probe(&mut self, row: Row) {
        let work = if self.routes.breaks(&row.route) { Work::TryApart } else { Work::Publish };
        self.send_as(work, vec![row], self.prober()).await;
    }

    async fn send_as(&mut self, work: fn(Vec<Row>) -> Work, mut rows: Vec<Row>, worker: usize) {
        rows.retain(|row| self.note(row, worker));
        if !rows.is_empty() {
            self.show_in_flight();
            hand_over(&self.workers[worker], work(rows)).await;
        }
    }

    /// Gives a row its place; false if it has one.
    fn note(&mut self, row: &Row, worker: usize) -> bool {
        if self.in_flight.contains_key(&row.id) {
            return false;
        }
        let refusing = self.routes.refused_lately(&row.route).then(|| Arc::clone(&row.route));
        self.last_read = self.last_read.max(row.id);
        self.known.add(row.id);
        self.bytes_in_flight += row.bytes();
        let probe = worker == self.prober();
        let key = row.ordering_key.clone().filter(|_| self.limits.keep_order);
        if let Some(key) = &key {
            self.keys.sent(key);
        }
        self.shards.sent(row.lease);
        let (bytes, lease) = (row.bytes(), row.lease);
        let place = InFlight { bytes, lease, key, worker, probe, refusing, forgotten: false, aside: None };
        self.in_flight.insert(row.id, place);
        true
    }

    /// The last worker takes probes only, so that a route without answers costs no other row its time. The
    /// order of keys is safe: a probe was refused before, so the table holds back all that follow it.
    pub(super) fn prober(&self) -> usize {
        self.workers.len() - 1
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;
    use crate::ownership::Holdings;
    use crate::pipeline::poll::tests::stage_with;
    use crate::store::Trouble;
    use crate::store::memory::plain_row;

    #[tokio::test]
    async fn rows_of_others_are_told_also_after_reads_that_failed() {
        let mut stage = stage_with(&Settings::plain());
        let error = StoreError { trouble: Trouble::Contention, sentence: "canceled".to_owned() };
        let before = stage.poll.free_places().0;
        for _ in 0..5 {
            stage.poll.ask_for_less(&error, false, LONG_READ);
        }
        assert!(stage.poll.free_places().0 < TELLING_ROWS && before >= TELLING_ROWS);
        assert!(stage.poll.may_tell_others());
        stage.poll.remember_row_size(&[Row { payload: vec![0; 1_000_000].into(), ..plain_row(1) }], true);
        assert!(!stage.poll.may_tell_others(), "rows are large: others' would take their places");
    }

    /// Nothing moves it on before its key does, and what a read may answer with would be filled with it.
    #[tokio::test]
    async fn a_row_of_a_held_key_hides_none_behind_it() {
        let one_row = Settings { max_in_flight_bytes: FIRST_ROW_BYTES, ..Settings::plain() };
        let mut stage = stage_with(&one_row);
        let key = Arc::<str>::from("k");
        stage.holdings.send_replace(Holdings::everything(4));
        stage.store.insert(Row { ordering_key: Some(Arc::clone(&key)), ..plain_row(1) });
        stage.store.insert(plain_row(2));
        stage.poll.keys.sent(&key);
        stage.poll.keys.refused(Arc::clone(&key), 0);
        assert_eq!(stage.poll.read().await.unwrap(), Found::More);
        stage.poll.read().await.unwrap();
        assert_eq!([stage.handed_to(0), stage.handed_to(1)].concat(), [2]);
        stage.poll.keys.settled(&key);
        stage.poll.resume_key(&key).await;
        stage.poll.read().await.unwrap();
        assert_eq!([stage.handed_to(0), stage.handed_to(1)].concat(), [1]);
    }
}

//! A worker's rows: a queue per key, a queue for rows without a key, and how batches are made of them.
//!
//! Under strict ordering a batch holds at most one row of a key, under pipelined ordering as many as
//! come, in order. A key that is held gives back every row that arrives for it.

use crate::config::Ordering;
use crate::retry::BREAKS_SUSPECT;
use crate::sink::Refusal;
use crate::store::{Route, Row};
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

/// Connections of its own that a row has broken before it may crowd nobody any more.
const CROWDING_BREAKS: u32 = 3;

/// A row with what its worker remembers about it.
#[derive(Debug)]
pub struct Queued {
    /// The row; boxed, because it changes places often.
    pub row: Box<Row>,
    /// What speaks against it.
    pub suspicion: Suspicion,
}

/// What speaks against a row, while it is in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Suspicion {
    /// To be published in a batch of its own, since then.
    pub alone: Option<Instant>,
    /// Times it was alone when it was refused in words that name nobody.
    pub strikes: u32,
    /// Connections that broke with it on its way, or could not be had for it alone.
    pub breaks: u32,
}

impl Suspicion {
    /// To be published on a connection of its own, where so many have broken already.
    pub fn apart(since: Instant, breaks: u32) -> Self {
        Self { alone: Some(since), strikes: 0, breaks: BREAKS_SUSPECT + breaks }
    }

    /// Nobody else may be on its connection.
    pub fn is_apart(self) -> bool {
        self.alone.is_some() && self.breaks >= BREAKS_SUSPECT
    }

    /// Connections of its own that broke, or could not be had.
    pub fn own_breaks(self) -> u32 {
        self.breaks.saturating_sub(BREAKS_SUSPECT)
    }

    /// From now on in a batch of its own.
    pub fn send_alone(&mut self, now: Instant) {
        self.alone.get_or_insert(now);
    }

    /// From now on on a connection of its own.
    pub fn send_apart(&mut self, now: Instant) {
        self.send_alone(now);
        self.breaks = self.breaks.max(BREAKS_SUSPECT);
    }
}

/// How long a row is not sent again, and why.
#[derive(Debug)]
pub struct Suspension {
    /// Not before.
    pub until: Instant,
    /// What became of it last.
    pub refusal: Refusal,
}

/// What suspended rows may take, with what is behind them.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Places.
    pub rows: usize,
    /// Their bytes.
    pub bytes: usize,
}

/// Some seconds long: a connection breaks now and then.
fn had_some_tries(queued: &Queued) -> bool {
    queued.suspicion.own_breaks() >= CROWDING_BREAKS
}

impl From<Row> for Queued {
    fn from(row: Row) -> Self {
        Self { row: Box::new(row), suspicion: Suspicion::default() }
    }
}

/// Rows waiting to be published by one worker.
#[derive(Debug)]
pub struct Queue {
    ordering: Ordering,
    /// Rows of each key, in order. A key is present only while it has rows.
    keyed: HashMap<Arc<str>, VecDeque<Queued>>,
    /// Keys that have rows, in the order of their turn.
    turns: VecDeque<Arc<str>>,
    unkeyed: VecDeque<Queued>,
    /// Keys with refused rows whose wait is not committed yet, and how many.
    held: HashMap<Arc<str>, u32>,
    /// Keys that have rows and no turn for now.
    suspended: HashMap<Arc<str>, Suspension>,
    /// The same of rows without a key.
    suspended_unkeyed: Vec<(Suspension, Queued)>,
    /// Whose turn it is to begin a batch, so that neither keyed nor unkeyed rows starve.
    unkeyed_first: bool,
}

/// The key that orders this row, if keys order anything.
fn key_of(ordering: Ordering, row: &Row) -> Option<&Arc<str>> {
    row.ordering_key.as_ref().filter(|_| ordering != Ordering::None)
}

impl Queue {
    /// An empty queue.
    pub fn new(ordering: Ordering) -> Self {
        Self {
            ordering,
            keyed: HashMap::new(),
            turns: VecDeque::new(),
            unkeyed: VecDeque::new(),
            held: HashMap::new(),
            suspended: HashMap::new(),
            suspended_unkeyed: Vec::new(),
            unkeyed_first: false,
        }
    }

    /// Earlier rows of this key wait here, or in the table since a refusal.
    pub fn is_busy_with(&self, key: &Arc<str>) -> bool {
        self.keyed.contains_key(key) || self.held.contains_key(key)
    }

    /// No row can be taken now.
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty() && self.unkeyed.is_empty()
    }

    /// Appends a row, or gives it back because its key is held.
    #[must_use]
    pub fn push(&mut self, queued: Queued) -> Option<Row> {
        let Some(key) = key_of(self.ordering, &queued.row).cloned() else {
            self.unkeyed.push_back(queued);
            return None;
        };
        if self.held.contains_key(&key) {
            return Some(*queued.row);
        }
        self.key_queue(key).push_back(queued);
        None
    }

    /// Puts rows back in front, as they were taken: they are sent again before anything newer. Rows of a
    /// key that was held meanwhile are given back.
    pub fn put_back(&mut self, rows: Vec<Queued>) -> Vec<Row> {
        let mut given_back = Vec::new();
        for queued in rows.into_iter().rev() {
            let Some(key) = key_of(self.ordering, &queued.row).cloned() else {
                self.unkeyed.push_front(queued);
                continue;
            };
            if self.held.contains_key(&key) {
                given_back.push(*queued.row);
            } else {
                self.key_queue(key).push_front(queued);
            }
        }
        given_back
    }

    /// Puts a row back in front, not to be sent for a while, nor what comes after it in its key. Given back if its key was
    /// held meanwhile.
    #[must_use]
    pub fn suspend(&mut self, queued: Queued, suspension: Suspension) -> Option<Row> {
        let Some(key) = key_of(self.ordering, &queued.row).cloned() else {
            self.suspended_unkeyed.push((suspension, queued));
            return None;
        };
        if self.held.contains_key(&key) {
            return Some(*queued.row);
        }
        self.turns.retain(|turn| *turn != key);
        self.keyed.entry(Arc::clone(&key)).or_default().push_front(queued);
        self.suspended.insert(key, suspension);
        None
    }

    /// When the next of what was suspended may go on.
    pub fn next_wake(&self) -> Option<Instant> {
        let unkeyed = self.suspended_unkeyed.iter().map(|(suspension, _)| suspension);
        self.suspended.values().chain(unkeyed).map(|suspension| suspension.until).min()
    }

    /// Gives the row its turn that may go on for longest, if it is time. One, so that others have turns between.
    pub fn wake(&mut self, now: Instant) {
        let Some(first) = self.next_wake().filter(|first| *first <= now) else { return };
        let mut keyed = self.suspended.iter();
        if let Some(key) =
            keyed.find(|(_, suspension)| suspension.until == first).map(|(key, _)| Arc::clone(key))
        {
            self.suspended.remove(&key);
            self.turns.push_back(key);
        } else if let Some(place) =
            self.suspended_unkeyed.iter().position(|(unkeyed, _)| unkeyed.until == first)
        {
            // Behind all others, which would else wait for one after the other.
            self.unkeyed.push_back(self.suspended_unkeyed.swap_remove(place).1);
        }
    }

    /// Rows of this route that are here already are sent apart from now on.
    pub fn suspect(&mut self, route: &Route, since: Instant) {
        for queued in self.all_of(route).filter(|queued| !queued.suspicion.is_apart()) {
            queued.suspicion = Suspicion::apart(since, 0);
        }
    }

    /// One of them went through, so those that had no try apart yet are sent with all others again.
    pub fn trust(&mut self, route: &Route) {
        let untried =
            |queued: &&mut Queued| queued.suspicion.is_apart() && queued.suspicion.own_breaks() == 0;
        for queued in self.all_of(route).filter(untried) {
            queued.suspicion.alone = None;
        }
    }

    fn all_of(&mut self, route: &Route) -> impl Iterator<Item = &mut Queued> {
        let all = self.keyed.values_mut().flatten().chain(&mut self.unkeyed);
        all.filter(move |queued| *queued.row.route == *route)
    }

    /// If what is suspended, and what is behind it, is too much: takes a row that had some tries, and what became of it. Its
    /// key has to be held.
    pub fn take_crowding(&mut self, room: Room) -> Option<(Row, Refusal)> {
        if self.suspended.is_empty() && self.suspended_unkeyed.is_empty() {
            return None;
        }
        let keyed = self.suspended.keys().filter_map(|key| self.keyed.get(key));
        let unkeyed = self.suspended_unkeyed.iter().map(|(_, queued)| queued);
        let (rows, bytes) = keyed
            .flatten()
            .chain(unkeyed)
            .fold((0, 0), |(rows, bytes), queued| (rows + 1, bytes + queued.row.bytes()));
        if rows <= room.rows && bytes <= room.bytes {
            return None;
        }
        self.take_keyed_crowding().or_else(|| {
            let place = self.suspended_unkeyed.iter().position(|(_, queued)| had_some_tries(queued))?;
            let (suspension, queued) = self.suspended_unkeyed.swap_remove(place);
            Some((*queued.row, suspension.refusal))
        })
    }

    /// Of the key with most rows.
    fn take_keyed_crowding(&mut self) -> Option<(Row, Refusal)> {
        let with_tries =
            |key: &&Arc<str>| self.keyed.get(*key).and_then(VecDeque::front).is_some_and(had_some_tries);
        let rows = |key: &&Arc<str>| self.keyed.get(*key).map_or(0, VecDeque::len);
        let key = Arc::clone(self.suspended.keys().filter(with_tries).max_by_key(rows)?);
        let row = self.keyed.get_mut(&key)?.pop_front()?.row;
        self.suspended.remove(&key).map(|suspension| (*row, suspension.refusal))
    }

    /// This row goes back to the table: holds its key, if keys order anything, and gives back the rows of it.
    pub fn hold_key_of(&mut self, row: &Row) -> Vec<Row> {
        let Some(key) = key_of(self.ordering, row) else { return Vec::new() };
        *self.held.entry(Arc::clone(key)).or_default() += 1;
        let rows = self.keyed.remove(key).unwrap_or_default();
        self.suspended.remove(key);
        if !rows.is_empty() {
            self.turns.retain(|turn| turn != key);
        }
        rows.into_iter().map(|queued| *queued.row).collect()
    }

    /// One refused row of this key is in the table.
    pub fn resume(&mut self, key: &Arc<str>) {
        if let Some(count) = self.held.get_mut(key) {
            *count -= 1;
            if *count == 0 {
                self.held.remove(key);
            }
        }
    }

    /// Takes the next batch: rows of many keys in turn and rows without a key, until `max_rows` or
    /// `max_bytes` (the first row always fits). A row that is sent alone makes a batch of one.
    pub fn next_batch(&mut self, max_rows: usize, max_bytes: usize) -> Vec<Queued> {
        let mut batch = Batch { rows: Vec::new(), bytes: 0, max_rows, max_bytes };
        if self.unkeyed_first {
            batch.take_from(&mut self.unkeyed, usize::MAX);
            self.take_keyed(&mut batch);
        } else {
            self.take_keyed(&mut batch);
            batch.take_from(&mut self.unkeyed, usize::MAX);
        }
        self.unkeyed_first = !self.unkeyed_first;
        batch.rows
    }

    /// Each key has at most one turn per batch; what is left of it queues up behind the others.
    fn take_keyed(&mut self, batch: &mut Batch) {
        let share = if self.ordering == Ordering::Strict { 1 } else { usize::MAX };
        for _ in 0..self.turns.len() {
            let Some(key) = self.turns.pop_front() else { break };
            let Some(rows) = self.keyed.get_mut(&key) else { continue };
            let had_room = batch.take_from(rows, share);
            if rows.is_empty() {
                self.keyed.remove(&key);
            } else if had_room {
                self.turns.push_back(key);
            } else {
                self.turns.push_front(key);
                break;
            }
        }
    }

    fn key_queue(&mut self, key: Arc<str>) -> &mut VecDeque<Queued> {
        self.keyed.entry(key).or_insert_with_key(|key| {
            self.turns.push_back(Arc::clone(key));
            VecDeque::new()
        })
    }
}

struct Batch {
    rows: Vec<Queued>,
    bytes: usize,
    max_rows: usize,
    max_bytes: usize,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.rows.len() >= self.max_rows
            || self.rows.last().is_some_and(|queued| queued.suspicion.alone.is_some())
    }

    /// Moves at most `share` rows over from the front; false if the batch had no room for the next one.
    fn take_from(&mut self, rows: &mut VecDeque<Queued>, share: usize) -> bool {
        for _ in 0..share {
            let Some(next) = rows.front() else { return true };
            let bytes = self.bytes + next.row.bytes();
            let first = self.rows.is_empty();
            if self.is_full() || (!first && (bytes > self.max_bytes || next.suspicion.alone.is_some())) {
                return false;
            }
            self.bytes = bytes;
            self.rows.extend(rows.pop_front());
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::Fault;
    use crate::store::memory::plain_row;
    use proptest::prelude::*;
    use std::time::Duration;

    fn until(until: Instant) -> Suspension {
        Suspension { until, refusal: Refusal::new(Fault::Break, "it broke") }
    }

    /// And its key with it; other keys and rows go on.
    #[test]
    fn a_suspended_row_is_first_of_its_key_when_its_time_has_come() {
        let (mut queue, now) = (Queue::new(Ordering::Strict), Instant::now());
        let later = now + Duration::from_secs(5);
        let keyed = |id| Row { ordering_key: Some("k".into()), ..plain_row(id) };
        let next = |queue: &mut Queue| ids(&queue.next_batch(10, usize::MAX));
        assert!(queue.suspend(keyed(1).into(), until(later)).is_none() && queue.is_empty());
        assert!(queue.push(keyed(2).into()).is_none() && queue.push(plain_row(3).into()).is_none());
        assert!(queue.suspend(plain_row(4).into(), until(later)).is_none());
        assert_eq!(next(&mut queue), [3]);
        queue.wake(now);
        assert!(queue.is_empty() && queue.next_wake() == Some(later));
        queue.wake(later);
        assert_eq!(next(&mut queue), [1]);
        assert_eq!(next(&mut queue), [2]);
        queue.wake(later);
        assert_eq!(next(&mut queue), [4]);
        assert!(queue.is_empty() && queue.next_wake().is_none());
    }

    #[test]
    fn a_suspended_row_goes_back_with_its_key() {
        let (mut queue, now) = (Queue::new(Ordering::Strict), Instant::now());
        let keyed = |id| Row { ordering_key: Some("k".into()), ..plain_row(id) };
        assert!(queue.suspend(keyed(1).into(), until(now)).is_none());
        assert_eq!(queue.hold_key_of(&keyed(0)).len(), 1);
        assert!(queue.next_wake().is_none());
        assert!(queue.suspend(keyed(2).into(), until(now)).is_some(), "its key is held");
    }

    /// Else they take all places, and nobody's rows are read.
    #[test]
    fn few_rows_wait_for_what_is_suspended() {
        let (mut queue, now) = (Queue::new(Ordering::Strict), Instant::now());
        let room = |rows, bytes| Room { rows, bytes };
        for (id, key, breaks) in [(1, Some("a"), 2), (2, Some("b"), 3), (3, None, 3)] {
            let suspicion = Suspicion::apart(now, breaks);
            assert!(queue.suspend(Queued { suspicion, ..row(id, key).into() }, until(now)).is_none());
        }
        for id in 4..8 {
            assert!(queue.push(row(id, Some("b")).into()).is_none());
        }
        assert!(queue.take_crowding(room(7, usize::MAX)).is_none());
        let (crowding, refusal) = queue.take_crowding(room(6, usize::MAX)).expect("there are seven");
        assert_eq!((crowding.id, refusal.fault), (2, Fault::Break));
        assert_eq!(queue.hold_key_of(&crowding).len(), 4);
        assert!(queue.take_crowding(room(2, usize::MAX)).is_none());
        assert_eq!(queue.take_crowding(room(2, 1)).map(|(row, _)| row.id), Some(3));
        assert!(queue.take_crowding(room(0, 0)).is_none(), "it had two tries");
    }

    #[test]
    fn rows_of_a_route_that_breaks_connections_are_sent_apart_wherever_they_are() {
        let mut queue = filled(Ordering::Strict, &ROWS);
        let other = Route { exchange: "x".to_owned(), routing_key: "other".to_owned() };
        let route = plain_row(1).route;
        queue.suspect(&other, Instant::now());
        assert_eq!(queue.next_batch(4, 1 << 20).len(), 4);
        queue.suspect(&route, Instant::now());
        let left = queue.next_batch(4, 1 << 20);
        assert!(left.len() == 1 && left[0].suspicion.is_apart());

        let mut queue = filled(Ordering::Strict, &ROWS);
        queue.suspect(&route, Instant::now());
        let first = queue.next_batch(4, 1 << 20).remove(0);
        let broke = Suspicion { breaks: first.suspicion.breaks + 1, ..first.suspicion };
        assert!(queue.put_back(vec![Queued { suspicion: broke, ..first }]).is_empty());
        queue.trust(&route);
        let batches = [1, 1, 1].map(|_| queue.next_batch(4, 1 << 20).len());
        assert_eq!(
            batches.iter().sum::<usize>(),
            5,
            "the one that broke its own connection is alone: {batches:?}"
        );
        assert!(batches.contains(&1) && batches.iter().any(|rows| *rows > 1));
    }

    fn row(id: i64, key: Option<&str>) -> Row {
        Row { ordering_key: key.map(Into::into), ..plain_row(id) }
    }

    fn ids(batch: &[Queued]) -> Vec<i64> {
        batch.iter().map(|queued| queued.row.id).collect()
    }

    fn filled(ordering: Ordering, rows: &[(i64, Option<&str>)]) -> Queue {
        let mut queue = Queue::new(ordering);
        for (id, key) in rows {
            assert!(queue.push(row(*id, *key).into()).is_none());
        }
        queue
    }

    const ROWS: [(i64, Option<&str>); 5] =
        [(1, Some("a")), (2, Some("a")), (3, None), (4, Some("b")), (5, None)];

    #[test]
    fn strict_takes_one_row_of_each_key() {
        let mut queue = filled(Ordering::Strict, &ROWS);
        assert_eq!(ids(&queue.next_batch(10, 1 << 20)), [1, 4, 3, 5]);
        assert_eq!(ids(&queue.next_batch(10, 1 << 20)), [2]);
        assert!(queue.is_empty());
    }

    #[test]
    fn pipelined_takes_a_key_in_order() {
        assert_eq!(ids(&filled(Ordering::Pipelined, &ROWS).next_batch(10, 1 << 20)), [1, 2, 4, 3, 5]);
    }

    #[test]
    fn none_ignores_keys() {
        assert_eq!(ids(&filled(Ordering::None, &ROWS).next_batch(10, 1 << 20)), [1, 2, 3, 4, 5]);
    }

    #[test]
    fn a_held_key_gives_back_its_rows_until_it_is_resumed() {
        let mut queue = filled(Ordering::Strict, &ROWS);
        let refused = queue.next_batch(1, 1 << 20).remove(0);
        let key = refused.row.ordering_key.clone().expect("keyed");
        assert_eq!(queue.hold_key_of(&refused.row).iter().map(|row| row.id).collect::<Vec<_>>(), [2]);
        assert!(queue.is_busy_with(&key));
        assert!(queue.push(row(6, Some("a")).into()).is_some());
        assert!(queue.push(row(7, Some("b")).into()).is_none());
        queue.resume(&key);
        assert!(queue.push(row(8, Some("a")).into()).is_none());
        let (mut left, first) = (Vec::new(), queue.next_batch(10, 1 << 20));
        left.extend(ids(&first));
        left.extend(ids(&queue.next_batch(10, 1 << 20)));
        left.sort_unstable();
        assert_eq!(left, [3, 4, 5, 7, 8]);
        assert!(queue.is_empty());
    }

    #[test]
    fn a_row_that_must_be_alone_is_alone() {
        let mut queue = filled(Ordering::Strict, &ROWS);
        let mut batch = queue.next_batch(10, 1 << 20);
        batch.iter_mut().for_each(|queued| queued.suspicion.alone = Some(Instant::now()));
        assert!(queue.put_back(batch).is_empty());
        while !queue.is_empty() {
            let batch = queue.next_batch(10, 1 << 20);
            assert!(
                batch.len() == 1 || batch.iter().all(|queued| queued.suspicion.alone.is_none()),
                "{:?}",
                ids(&batch)
            );
        }
    }

    #[test]
    fn a_batch_is_bounded_in_bytes_but_never_empty() {
        let mut queue = filled(Ordering::None, &ROWS);
        let one = row(1, Some("a")).bytes();
        assert_eq!(queue.next_batch(10, 2 * one).len(), 2);
        assert_eq!(queue.next_batch(10, 1).len(), 1);
    }

    proptest! {
        /// Whatever is taken, put back, suspended, held and resumed: rows of a key leave in order, and no row is lost.
        #[test]
        fn key_order_survives_everything(
            keys in prop::collection::vec(prop::option::of(0u8..4), 1..60),
            choices in prop::collection::vec((1usize..7, 0u8..7), 0..80),
            pipelined in any::<bool>(),
        ) {
            let ordering = if pipelined { Ordering::Pipelined } else { Ordering::Strict };
            let mut queue = Queue::new(ordering);
            let names = ["a", "b", "c", "d"];
            for (id, key) in keys.iter().enumerate() {
                let key = key.map(|key| names[key as usize]);
                prop_assert!(queue.push(row(id as i64, key).into()).is_none());
            }
            let (mut sent, mut released) = (Vec::new(), Vec::new());
            let (now, no_room) = (Instant::now(), Room { rows: 0, bytes: 0 });
            for (size, choice) in choices {
                let mut batch = queue.next_batch(if choice == 3 { 1 } else { size }, 1 << 20);
                if ordering == Ordering::Strict {
                    let mut seen = std::collections::HashSet::new();
                    let keyed = batch.iter().filter_map(|queued| queued.row.ordering_key.clone());
                    prop_assert!(keyed.into_iter().all(|key| seen.insert(key)));
                }
                match choice {
                    // All confirmed.
                    0 | 1 => sent.extend(batch),
                    // The connection was lost: all go back.
                    2 => prop_assert!(queue.put_back(batch).is_empty()),
                    // One alone came to nothing.
                    3 => for queued in batch {
                        let suspicion = Suspicion::apart(now, CROWDING_BREAKS);
                        let held = queue.suspend(Queued { suspicion, ..queued }, until(now));
                        prop_assert!(held.is_none());
                    },
                    4 => {
                        queue.wake(now);
                        prop_assert!(queue.put_back(batch).is_empty());
                    }
                    5 => {
                        prop_assert!(queue.put_back(batch).is_empty());
                        if let Some((row, _)) = queue.take_crowding(no_room) {
                            released.push(row.id);
                            released.extend(queue.hold_key_of(&row).iter().map(|row| row.id));
                            row.ordering_key.iter().for_each(|key| queue.resume(key));
                        }
                    }
                    // The first was refused, the others of its key come back, the rest is confirmed.
                    _ if !batch.is_empty() => {
                        let refused = batch.remove(0);
                        released.push(refused.row.id);
                        if let Some(key) = refused.row.ordering_key.clone() {
                            released.extend(queue.hold_key_of(&refused.row).iter().map(|row| row.id));
                            let (same, other): (Vec<_>, Vec<_>) =
                                batch.into_iter().partition(|queued| queued.row.ordering_key.as_ref() == Some(&key));
                            released.extend(queue.put_back(same).iter().map(|row| row.id));
                            sent.extend(other);
                            queue.resume(&key);
                        } else {
                            sent.extend(batch);
                        }
                    }
                    _ => {}
                }
            }
            while !queue.is_empty() || queue.next_wake().is_some() {
                queue.wake(now);
                sent.extend(queue.next_batch(5, 1 << 20));
            }
            for name in names {
                let of_key: Vec<i64> = sent.iter()
                    .filter(|queued| queued.row.ordering_key.as_deref() == Some(name))
                    .map(|queued| queued.row.id).collect();
                prop_assert!(of_key.windows(2).all(|pair| pair[0] < pair[1]), "{}: {:?}", name, of_key);
            }
            let mut all: Vec<i64> = sent.iter().map(|queued| queued.row.id).chain(released).collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..keys.len() as i64).collect::<Vec<_>>());
        }
    }
}

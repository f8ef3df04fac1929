//! Keys with rows in flight, and refused keys that may not go on yet.
//!
//! A worker that refused a row gives back later rows of its key, also those that wait in its channel unread. As long as
//! one of them is on its way, no row of the key may be read: it would get behind the end of the hold and pass them.

use std::collections::HashMap;
use std::sync::Arc;

/// Keys as poll sees them.
#[derive(Debug, Default)]
pub struct Keys {
    in_flight: HashMap<Arc<str>, usize>,
    /// Workers that hold a key, once for each refusal, until nothing of it is in flight.
    held: HashMap<Arc<str>, Vec<usize>>,
    /// Rows of held keys that were read, and are not to be asked for again before their keys go on.
    early: HashMap<i64, Arc<str>>,
}

impl Keys {
    /// A row of this key is in flight.
    pub fn sent(&mut self, key: &Arc<str>) {
        *self.in_flight.entry(Arc::clone(key)).or_default() += 1;
    }

    /// A row of this key is settled.
    pub fn settled(&mut self, key: &Arc<str>) {
        if let Some(count) = self.in_flight.get_mut(key) {
            *count -= 1;
            if *count == 0 {
                self.in_flight.remove(key);
            }
        }
    }

    /// Keys with rows in flight.
    #[cfg(test)]
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The refusal of a row is in the table; this worker holds its key still.
    pub fn refused(&mut self, key: Arc<str>, worker: usize) {
        self.held.entry(key).or_default().push(worker);
    }

    /// No row of this key may be sent now.
    pub fn is_held(&self, key: &str) -> bool {
        self.held.contains_key(key)
    }

    /// A row of a held key was read.
    pub fn came_early(&mut self, id: i64, key: Arc<str>) {
        self.early.insert(id, key);
    }

    /// Rows that are not to be asked for now.
    pub fn early(&self) -> impl ExactSizeIterator<Item = i64> {
        self.early.keys().copied()
    }

    /// The workers that may take this key again, because nothing of it is in flight any more.
    pub fn take_resumed(&mut self, key: &Arc<str>) -> Vec<usize> {
        if self.held.is_empty() || self.in_flight.contains_key(key) {
            return Vec::new();
        }
        let Some(workers) = self.held.remove(key) else { return Vec::new() };
        self.early.retain(|_, early| early != key);
        workers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_key_goes_on_when_its_last_row_is_back() {
        let (mut keys, key) = (Keys::default(), Arc::<str>::from("k"));
        keys.sent(&key);
        keys.sent(&key);
        keys.settled(&key);
        keys.refused(Arc::clone(&key), 3);
        assert!(keys.is_held("k") && keys.take_resumed(&key).is_empty(), "a follower is on its way back");
        keys.settled(&key);
        assert_eq!(keys.take_resumed(&key), [3]);
        assert!(!keys.is_held("k"));
    }

    #[test]
    fn rows_that_came_early_are_asked_for_when_their_key_goes_on() {
        let (mut keys, key, other) = (Keys::default(), Arc::<str>::from("k"), Arc::<str>::from("other"));
        keys.refused(Arc::clone(&key), 0);
        keys.refused(Arc::clone(&other), 0);
        keys.came_early(1, Arc::clone(&key));
        keys.came_early(2, Arc::clone(&other));
        keys.take_resumed(&key);
        assert_eq!(keys.early().collect::<Vec<_>>(), [2]);
        keys.take_resumed(&other);
        assert_eq!(keys.early().len(), 0);
    }

    #[test]
    fn a_key_with_nothing_else_in_flight_goes_on_at_once() {
        let (mut keys, key) = (Keys::default(), Arc::<str>::from("k"));
        keys.sent(&key);
        keys.settled(&key);
        keys.refused(Arc::clone(&key), 0);
        assert_eq!(keys.take_resumed(&key), [0]);
    }
}

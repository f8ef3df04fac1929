//! What poll keeps in mind per shard: how much is in flight, and which shards must run empty before they are read
//! again or given back.
//!
//! A shard runs empty for two reasons:
//!
//! - **Rows of it came back unsent** because the lease was not in force at the moment of sending. Their keys are held
//!   by the workers; other rows of those keys may be on their way back too. Only when all of them are back is id order
//!   right again.
//! - **It is leaving**: another replica is to have it, with nothing of ours on the way.

use crate::ownership::Holdings;
use crate::store::Lease;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

/// Shards with rows in flight or with a past.
#[derive(Debug, Default)]
pub struct Shards {
    in_flight: HashMap<u32, usize>,
    /// Held keys, with the worker that holds them, of shards that run empty.
    recovering: HashMap<u32, Vec<(usize, Arc<str>)>>,
    /// What was read last time, to notice what is new.
    read: Vec<Lease>,
    /// Leaving and told to be empty.
    told: HashSet<Lease>,
}

impl Shards {
    /// A row of this shard is in flight.
    pub fn sent(&mut self, shard: u32) {
        *self.in_flight.entry(shard).or_default() += 1;
    }

    /// A row of this shard is settled.
    pub fn settled(&mut self, shard: u32) {
        if let Some(count) = self.in_flight.get_mut(&shard) {
            *count -= 1;
            if *count == 0 {
                self.in_flight.remove(&shard);
            }
        }
    }

    /// A row of this shard was not sent for want of a lease; its worker holds its key.
    pub fn fenced(&mut self, shard: u32, worker: usize, key: Option<Arc<str>>) {
        let keys = self.recovering.entry(shard).or_default();
        keys.extend(key.map(|key| (worker, key)));
    }

    /// Keys that workers may take again, because their shard has run empty.
    pub fn take_resumed(&mut self) -> Vec<(usize, Arc<str>)> {
        if self.recovering.is_empty() {
            return Vec::new();
        }
        let in_flight = &self.in_flight;
        let empty = self.recovering.extract_if(|shard, _| !in_flight.contains_key(shard));
        empty.flat_map(|(_, keys)| keys).collect()
    }

    /// What may be read now.
    pub fn readable(&self, holdings: &Holdings) -> Vec<Lease> {
        let mut leases = holdings.readable(Instant::now());
        leases.retain(|lease| !self.recovering.contains_key(&lease.shard));
        leases
    }

    /// Notes what is read now. True if some of it was read by others in between, or never by us: what we know of its
    /// rows may be out of date.
    pub fn note_read(&mut self, leases: &[Lease]) -> bool {
        if self.read == leases {
            return false;
        }
        let gained = leases.iter().any(|lease| !self.read.contains(lease));
        // What is merely not read for a moment has not been read by others.
        self.read.retain(|was| leases.iter().all(|lease| lease.shard != was.shard));
        self.read.extend(leases);
        self.read.sort_unstable_by_key(|lease| lease.shard);
        gained
    }

    /// Leaving shards that have run empty, each told once.
    pub fn take_drained(&mut self, holdings: &Holdings) -> Vec<Lease> {
        if !holdings.has_leaving() {
            self.told.clear();
            return Vec::new();
        }
        let leaving = holdings.leaving();
        self.told.retain(|lease| leaving.contains(lease));
        let empty = |lease: &Lease| !self.in_flight.contains_key(&lease.shard);
        let drained: Vec<Lease> =
            leaving.into_iter().filter(empty).filter(|lease| !self.told.contains(lease)).collect();
        self.told.extend(&drained);
        drained
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::leases::Standing;
    use std::time::Duration;
    use uuid::Uuid;

    fn lease(shard: u32, epoch: i64) -> Lease {
        Lease { shard, epoch }
    }

    fn holdings(quota: u32, leases: &[Lease]) -> Holdings {
        let mut holdings = Holdings::none(Uuid::nil(), 4);
        let standing = Standing { member: true, quota, leases: leases.to_vec(), ..Standing::default() };
        holdings.update(&standing, Instant::now() + Duration::from_secs(60));
        holdings
    }

    #[test]
    fn a_shard_with_fenced_rows_is_read_again_when_it_has_run_empty() {
        let (mut shards, held) = (Shards::default(), holdings(4, &[lease(0, 1), lease(1, 1)]));
        shards.sent(0);
        shards.sent(0);
        shards.settled(0);
        shards.fenced(0, 3, Some("key".into()));
        assert_eq!(shards.readable(&held), [lease(1, 1)], "not while a row of it is in flight");
        assert!(shards.take_resumed().is_empty());
        shards.settled(0);
        assert_eq!(shards.take_resumed(), [(3, "key".into())]);
        assert_eq!(shards.readable(&held), [lease(0, 1), lease(1, 1)]);
    }

    #[test]
    fn a_leaving_shard_is_drained_once() {
        let (mut shards, held) = (Shards::default(), holdings(1, &[lease(0, 1), lease(1, 1), lease(2, 1)]));
        shards.sent(1);
        assert_eq!(shards.take_drained(&held), [lease(2, 1)]);
        assert!(shards.take_drained(&held).is_empty(), "told once");
        shards.settled(1);
        assert_eq!(shards.take_drained(&held), [lease(1, 1)]);
        assert_eq!(shards.readable(&held), [lease(0, 1)]);
    }

    #[test]
    fn a_gained_shard_is_noticed_and_a_pause_is_not() {
        let mut shards = Shards::default();
        assert!(shards.note_read(&[lease(0, 1), lease(1, 1)]));
        assert!(!shards.note_read(&[lease(0, 1)]), "losing is not gaining");
        assert!(!shards.note_read(&[lease(0, 1), lease(1, 1)]), "the same epoch: nobody had it in between");
        assert!(shards.note_read(&[lease(0, 1), lease(1, 2)]), "a new epoch");
    }
}

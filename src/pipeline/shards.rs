//! What poll keeps in mind per shard: how much is in flight, and which shards must run empty before they are read
//! again or given back.
//!
//! A shard runs empty for three reasons:
//!
//! - **Rows of it came back unsent** because the lease was not in force at the moment of sending. Their keys are held
//!   by the workers; other rows of those keys may be on their way back too. Only when all of them are back is id order
//!   right again.
//! - **It was lost and is held anew**: what was read under the earlier lease may end without being written.
//! - **It is leaving**: another replica is to have it, with nothing of ours on the way.
//!
//! A row whose end cannot be written for now is on its way no longer, and is not counted here.

use crate::ownership::Holdings;
use crate::store::Lease;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

/// Shards with rows in flight or with a past.
#[derive(Debug, Default)]
pub struct Shards {
    /// By the lease that rows were read under; few besides those that are held.
    in_flight: HashMap<Lease, usize>,
    /// Held keys, with the worker that holds them, of shards that run empty.
    recovering: HashMap<u32, Vec<(usize, Arc<str>)>>,
    /// What was read last time, to notice what is new.
    read: Vec<Lease>,
    /// Leaving and told to be empty.
    told: HashSet<Lease>,
}

impl Shards {
    /// A row read under this lease is in flight.
    pub fn sent(&mut self, lease: Lease) {
        *self.in_flight.entry(lease).or_default() += 1;
    }

    /// A row read under this lease is settled.
    pub fn settled(&mut self, lease: Lease) {
        if let Some(count) = self.in_flight.get_mut(&lease) {
            *count -= 1;
            if *count == 0 {
                self.in_flight.remove(&lease);
            }
        }
    }

    /// No row is in flight.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.in_flight.is_empty()
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
        let busy = self.busy(|_| true);
        let empty = self.recovering.extract_if(|shard, _| !busy.contains(shard));
        empty.flat_map(|(_, keys)| keys).collect()
    }

    /// What may be read now.
    pub fn readable(&self, holdings: &Holdings) -> Vec<Lease> {
        let mut leases = holdings.readable(Instant::now());
        // What was read under an earlier lease may end unwritten; until it has, a later row must not be read.
        let busy = self.busy(|lease| !has(&leases, lease));
        leases.retain(|lease| !self.recovering.contains_key(&lease.shard) && !busy.contains(&lease.shard));
        leases
    }

    /// Some of it was not read the last time.
    pub fn is_news(&self, leases: &[Lease]) -> bool {
        leases.iter().any(|lease| !has(&self.read, lease))
    }

    /// Notes what is read now. True if some of it was read by others in between, or never by us: what we know of its
    /// rows may be out of date.
    pub fn note_read(&mut self, leases: &[Lease]) -> bool {
        if self.read == leases {
            return false;
        }
        let gained = self.is_news(leases);
        // What is merely not read for a moment has not been read by others.
        self.read.retain(|was| Lease::find(leases, was.shard).is_none());
        self.read.extend(leases);
        self.read.sort_unstable_by_key(|lease| lease.shard);
        gained
    }

    /// Shards of others, whose rows may be passed for good: should one of them come to us, that is news.
    pub fn pass_others(&mut self, holdings: &Holdings) -> Vec<u32> {
        let held = holdings.leases();
        self.read.retain(|lease| Lease::find(&held, lease.shard).is_some());
        (0..holdings.shards()).filter(|shard| Lease::find(&held, *shard).is_none()).collect()
    }

    /// Leaving shards that have run empty, each told once.
    pub fn take_drained(&mut self, holdings: &Holdings) -> Vec<Lease> {
        if !holdings.has_leaving() {
            self.told.clear();
            return Vec::new();
        }
        let leaving = holdings.leaving();
        self.told.retain(|lease| leaving.contains(lease));
        let busy = self.busy(|_| true);
        let empty = |lease: &Lease| !busy.contains(&lease.shard);
        let drained: Vec<Lease> =
            leaving.into_iter().filter(empty).filter(|lease| !self.told.contains(lease)).collect();
        self.told.extend(&drained);
        drained
    }

    /// Shards with rows in flight that were read under such leases.
    fn busy(&self, such: impl Fn(&Lease) -> bool) -> HashSet<u32> {
        self.in_flight.keys().filter(|lease| such(lease)).map(|lease| lease.shard).collect()
    }
}

/// This very lease is among them.
fn has(leases: &[Lease], lease: &Lease) -> bool {
    Lease::find(leases, lease.shard).as_ref() == Some(lease)
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
        let standing = Standing { member: true, leases: leases.to_vec(), ..Standing::default() };
        holdings.update(&standing, quota, Instant::now() + Duration::from_secs(60));
        holdings
    }

    #[test]
    fn a_shard_with_fenced_rows_is_read_again_when_it_has_run_empty() {
        let (mut shards, held) = (Shards::default(), holdings(4, &[lease(0, 1), lease(1, 1)]));
        shards.sent(lease(0, 1));
        shards.sent(lease(0, 1));
        shards.settled(lease(0, 1));
        shards.fenced(0, 3, Some("key".into()));
        assert_eq!(shards.readable(&held), [lease(1, 1)], "not while a row of it is in flight");
        assert!(shards.take_resumed().is_empty());
        shards.settled(lease(0, 1));
        assert_eq!(shards.take_resumed(), [(3, "key".into())]);
        assert_eq!(shards.readable(&held), [lease(0, 1), lease(1, 1)]);
    }

    #[test]
    fn a_leaving_shard_is_drained_once() {
        let (mut shards, held) = (Shards::default(), holdings(1, &[lease(0, 1), lease(1, 1), lease(2, 1)]));
        shards.sent(lease(1, 1));
        assert_eq!(shards.take_drained(&held), [lease(2, 1)]);
        assert!(shards.take_drained(&held).is_empty(), "told once");
        shards.settled(lease(1, 1));
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

    #[test]
    fn a_shard_whose_rows_were_passed_is_news_whoever_had_it() {
        let mut shards = Shards::default();
        let both = [lease(0, 1), lease(1, 1)];
        shards.note_read(&both);
        assert_eq!(shards.pass_others(&holdings(4, &both)), [2, 3]);
        assert!(!shards.note_read(&both));
        assert_eq!(shards.pass_others(&holdings(4, &both[..1])), [1, 2, 3]);
        assert!(shards.note_read(&both), "the same epoch, and yet its rows were passed");
    }

    #[test]
    fn a_shard_is_not_read_under_a_new_lease_while_rows_of_the_old_one_are_in_flight() {
        let mut shards = Shards::default();
        shards.sent(lease(0, 1));
        assert_eq!(shards.readable(&holdings(4, &[lease(0, 1), lease(1, 1)])), [lease(0, 1), lease(1, 1)]);
        let regained = holdings(4, &[lease(0, 3), lease(1, 1)]);
        assert_eq!(shards.readable(&regained), [lease(1, 1)]);
        shards.settled(lease(0, 1));
        assert_eq!(shards.readable(&regained), [lease(0, 3), lease(1, 1)]);
    }
}

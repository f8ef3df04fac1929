//! Ownership: each shard of the keys has one publishing replica at a time.
//!
//! ```text
//!   lease table ◀── renew, look ── keeper ── Holdings ──▶ poll      reads only what is held
//!                                    ▲                └─▶ Permit    asked right before each message is sent
//!                                    └────── drained ──── poll
//! ```
//!
//! The rules, each checked by the model in `tests/ownership_model.rs`:
//!
//! 1. **Trust runs out here before the lease does there.** A lease is trusted until the moment its renewal was
//!    *sent*, plus the time it holds in the table, minus a margin; by the monotonic clock. Whatever happens to the
//!    answer or to this process, the table lets nobody else in before that.
//! 2. **The last look is right before the send.** A row goes out only if its shard is held under the very epoch the
//!    row was read under, and is trusted now ([`Permit`]). A process that was frozen finds the permit gone.
//! 3. **What is given back is empty.** A shard that somebody else should have is read no more, and given back when
//!    none of its rows is in flight, but for those whose end cannot be written (decision 0014): they are not on
//!    their way anywhere. Only a replica that cannot reach the broker gives back what is not drained.
//! 4. **Late writes do no harm.** Refusals are written only while the epoch is the same; a delivered mark is always
//!    true, whoever writes it.
//!
//! No session state: leases are rows, so a pooler in transaction mode works.

mod keeper;

pub use keeper::{Ends, Keeper};

use crate::mutants::mutant;
use crate::store::Row;
use crate::store::leases::{Lease, Standing};
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use uuid::Uuid;

/// Times that follow from `OUTBOX_LEASE_TTL`, which promises how long a crash may keep a key from being published.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// How long a lease holds in the table. What is missing to the whole is for noticing that it has run out.
    pub lease_time: Duration,
    /// How long it is trusted, from the moment its renewal was sent. The margin is for clocks that do not run alike.
    pub trust: Duration,
    /// Time between renewals: one may fail.
    pub renew_every: Duration,
    /// Time between looks for free shards and new replicas.
    pub look_every: Duration,
    /// The broker has been away for so long: the table is told, so that those who reach it have larger parts.
    pub tell_after: Duration,
    /// Away for so long: give way to those who reach it. Later than `tell_after` by more than a renewal, so that
    /// in an outage for all everybody has been told of by then, and nobody gives way to nobody.
    pub give_way_after: Duration,
}

impl Terms {
    /// The times for a TTL.
    pub fn new(ttl: Duration) -> Self {
        Self {
            lease_time: ttl * 9 / 10,
            trust: ttl * 17 / 20,
            renew_every: ttl / 3,
            look_every: (ttl / 20).clamp(Duration::from_millis(50), Duration::from_millis(500)),
            tell_after: ttl / 2,
            give_way_after: ttl,
        }
    }
}

/// What this replica holds.
#[derive(Debug, Clone, Default)]
pub struct Holdings {
    /// This replica.
    pub replica: Uuid,
    /// Replicas that live.
    pub replicas: u32,
    /// Why this replica may own nothing at all, in one sentence.
    pub refused: Option<String>,
    /// By shard.
    held: Vec<Option<Held>>,
    trusted_until: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    epoch: i64,
    /// To be given back as soon as it is drained.
    leaving: bool,
}

impl Holdings {
    /// Nothing held yet, of so many shards.
    pub fn none(replica: Uuid, shards: u32) -> Self {
        Self { replica, held: vec![None; shards as usize], ..Self::default() }
    }

    /// Everything, for ever: for benches and tests without a lease table.
    pub fn everything(shards: u32) -> Self {
        let held = Some(Held { epoch: 0, leaving: false });
        let far = Instant::now() + Duration::from_secs(3600 * 24 * 365);
        Self { replicas: 1, held: vec![held; shards as usize], trusted_until: Some(far), ..Self::default() }
    }

    /// The table's answer is the truth; it is trusted until the given moment. Shards that leave go on leaving.
    /// What is more than `part` leaves.
    pub fn update(&mut self, standing: &Standing, part: u32, trusted_until: Instant) {
        let mut held = vec![None; self.held.len()];
        for lease in &standing.leases {
            let Some(place) = held.get_mut(lease.shard as usize) else { continue };
            let leaving =
                self.held[lease.shard as usize].is_some_and(|was| was.epoch == lease.epoch && was.leaving);
            *place = Some(Held { epoch: lease.epoch, leaving });
        }
        self.held = held;
        self.replicas = standing.replicas;
        self.trusted_until = Some(trusted_until);
        self.let_go(part);
    }

    /// Lets go of these before the table is told.
    pub fn close(&mut self, leases: &HashSet<Lease>) {
        for lease in leases {
            if let Some(place) = self.held.get_mut(lease.shard as usize) {
                let _ = place.take_if(|held| held.epoch == lease.epoch);
            }
        }
    }

    /// Marks what is above the part as leaving, from the highest shard down.
    fn let_go(&mut self, part: u32) {
        let keep = self.held.iter_mut().flatten().filter(|held| !held.leaving);
        keep.skip(part as usize).for_each(|held| held.leaving = true);
    }

    /// Shards in all.
    pub fn shards(&self) -> u32 {
        self.held.len() as u32
    }

    /// Everything held, by shard.
    pub fn leases(&self) -> Vec<Lease> {
        self.select(|_| true)
    }

    /// The highest epoch of what is held, 0 for nothing.
    pub fn highest_epoch(&self) -> i64 {
        self.held.iter().flatten().map(|held| held.epoch).max().unwrap_or(0)
    }

    /// What may be read now, by shard.
    pub fn readable(&self, now: Instant) -> Vec<Lease> {
        if self.is_trusted(now) { self.select(|held| !held.leaving) } else { Vec::new() }
    }

    /// Something is to be given back.
    pub fn has_leaving(&self) -> bool {
        self.held.iter().flatten().any(|held| held.leaving)
    }

    /// What is to be given back when it is drained, by shard.
    pub fn leaving(&self) -> Vec<Lease> {
        self.select(|held| held.leaving)
    }

    /// The lease is in force and trusted.
    pub fn allows(&self, lease: Lease, now: Instant) -> bool {
        let held = self.held.get(lease.shard as usize).copied().flatten();
        held.is_some_and(|held| held.epoch == lease.epoch) && self.is_trusted(now)
    }

    /// Trust has not run out.
    pub fn is_trusted(&self, now: Instant) -> bool {
        self.trusted_until.is_some_and(|until| now < until)
    }

    fn select(&self, wanted: impl Fn(&Held) -> bool) -> Vec<Lease> {
        let lease = |(shard, held): (usize, &Option<Held>)| {
            let held = held.as_ref().filter(|held| wanted(held))?;
            Some(Lease { shard: shard as u32, epoch: held.epoch })
        };
        self.held.iter().enumerate().filter_map(lease).collect()
    }
}

/// The right to send a row, asked right before it is sent.
#[derive(Debug, Clone)]
pub struct Permit {
    holdings: watch::Receiver<Holdings>,
}

impl Permit {
    /// A permit that follows what is held.
    pub fn new(holdings: watch::Receiver<Holdings>) -> Self {
        Self { holdings }
    }

    /// The permit for the rows of one batch.
    pub fn for_batch(&self) -> BatchPermit<'_> {
        BatchPermit { permit: self, refused: AtomicBool::new(false) }
    }
}

/// A permit that stays refused once it was: what follows in the batch may be of the same key, and would pass it.
#[derive(Debug)]
pub struct BatchPermit<'a> {
    permit: &'a Permit,
    refused: AtomicBool,
}

impl BatchPermit<'_> {
    /// The row may be sent at this moment.
    pub fn allows(&self, row: &Row) -> bool {
        let in_force = || self.permit.holdings.borrow().allows(row.lease, Instant::now());
        let allowed = mutant!("skip-the-lease-check") || (!self.refused.load(Relaxed) && in_force());
        self.refused.fetch_or(!allowed, Relaxed);
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn standing(leases: &[(u32, i64)]) -> Standing {
        let leases = leases.iter().map(|(shard, epoch)| Lease { shard: *shard, epoch: *epoch }).collect();
        Standing { member: true, replicas: 2, leases, ..Standing::default() }
    }

    fn shards(leases: &[Lease]) -> Vec<u32> {
        leases.iter().map(|lease| lease.shard).collect()
    }

    #[test]
    fn nothing_is_allowed_before_the_first_answer() {
        let holdings = Holdings::none(Uuid::nil(), 4);
        assert!(!holdings.allows(Lease { shard: 0, epoch: 0 }, Instant::now()));
        assert!(holdings.readable(Instant::now()).is_empty());
    }

    #[test]
    fn trust_ends_at_its_moment() {
        let (mut holdings, now) = (Holdings::none(Uuid::nil(), 4), Instant::now());
        let until = now + Duration::from_secs(1);
        holdings.update(&standing(&[(1, 7)]), 4, until);
        let lease = Lease { shard: 1, epoch: 7 };
        assert!(holdings.allows(lease, now));
        assert!(!holdings.allows(lease, until), "the moment itself is too late");
        assert!(holdings.readable(until).is_empty());
        assert!(
            !holdings.allows(Lease { shard: 1, epoch: 6 }, now),
            "an earlier epoch is somebody else's time"
        );
        assert!(!holdings.allows(Lease { shard: 2, epoch: 7 }, now));
        assert!(!holdings.allows(Lease { shard: 99, epoch: 7 }, now));
    }

    #[test]
    fn what_is_above_the_quota_leaves_and_never_comes_back_by_itself() {
        let (mut holdings, now) = (Holdings::none(Uuid::nil(), 4), Instant::now());
        let until = now + Duration::from_secs(1);
        let all = [(0, 1), (1, 1), (2, 1), (3, 1)];
        holdings.update(&standing(&all), 4, until);
        assert!(holdings.leaving().is_empty());
        holdings.update(&standing(&all), 2, until);
        assert_eq!((shards(&holdings.readable(now)), shards(&holdings.leaving())), (vec![0, 1], vec![2, 3]));
        assert!(holdings.allows(Lease { shard: 3, epoch: 1 }, now), "what is in flight may be finished");
        holdings.update(&standing(&all), 4, until);
        assert_eq!(shards(&holdings.leaving()), [2, 3]);
        holdings.update(&standing(&[(0, 1), (1, 1), (2, 1), (3, 2)]), 4, until);
        assert_eq!(shards(&holdings.leaving()), [2], "taken anew, it is a new lease");
        assert_eq!(shards(&holdings.readable(now)), [0, 1, 3]);
    }

    #[test]
    fn the_table_lets_go_after_trust_has_ended() {
        for seconds in [1, 2, 10, 600] {
            let terms = Terms::new(Duration::from_secs(seconds));
            assert!(terms.trust < terms.lease_time && terms.lease_time < Duration::from_secs(seconds));
            assert!(terms.tell_after + terms.renew_every + terms.look_every < terms.give_way_after);
            assert!(terms.renew_every * 2 + terms.look_every < terms.trust, "one renewal may fail");
            assert!(
                terms.lease_time + terms.look_every < Duration::from_secs(seconds) + Duration::from_millis(1)
            );
        }
    }
}

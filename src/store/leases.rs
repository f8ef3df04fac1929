//! The lease table: who owns which shard. See `src/ownership/mod.rs` for the rules that stand on it.
//!
//! Obligations of every implementation, checked by `tests/relay/contract_leases.rs`:
//!
//! 1. [`LeaseTable::renew`] is atomic, and renewals come one after the other.
//! 2. A shard has one owner at a time; it changes hands only when its lease was given back or has expired by the
//!    table's own clock, and its epoch grows with every change of owner.
//! 3. While a replica with another number of shards lives, `renew` writes nothing and says so.
//! 4. Fair parts: what live and ready replicas may own differs by one at most, and adds up to all shards.

use super::StoreError;
use std::future::Future;
use std::time::Duration;
use uuid::Uuid;

/// A shard with the epoch of its ownership.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Lease {
    /// Which shard.
    pub shard: u32,
    /// Grows with each change of owner.
    pub epoch: i64,
}

impl Lease {
    /// The lease of a shard, in leases that are sorted by shard.
    pub fn find(leases: &[Self], shard: u32) -> Option<Self> {
        leases.binary_search_by_key(&shard, |lease| lease.shard).ok().map(|index| leases[index])
    }
}

/// A replica as it presents itself to the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Random, made at the start of the process.
    pub replica: Uuid,
    /// Its `OUTBOX_SHARDS`.
    pub shards: u32,
    /// It reaches the broker.
    pub ready: bool,
    /// How long a lease holds in the table.
    pub lease_time: Duration,
}

/// How things stand, as the table sees them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Standing {
    /// The replica that asks is known as living.
    pub member: bool,
    /// Replicas that live.
    pub replicas: u32,
    /// Another number of shards that a living replica has.
    pub other_shards: Option<u32>,
    /// Shards that are the fair part of the one who asks.
    pub quota: u32,
    /// Shards nobody owns.
    pub free: u32,
    /// What the one who asks owns, by shard, ascending.
    pub leases: Vec<Lease>,
}

/// Where ownership is written down. See the module text for the obligations.
pub trait LeaseTable: Send + Sync + 'static {
    /// Looks, and writes nothing.
    fn look(&self, member: Member) -> impl Future<Output = Result<Standing, StoreError>> + Send;

    /// Says that the replica lives, gives back what is in `drained` if it is still held under that
    /// epoch, prolongs what it owns, and takes what is
    /// free up to its fair part.
    fn renew(
        &self,
        member: Member,
        drained: &[Lease],
    ) -> impl Future<Output = Result<Standing, StoreError>> + Send;

    /// Gives everything back.
    fn leave(&self, member: Member) -> impl Future<Output = Result<(), StoreError>> + Send;
}

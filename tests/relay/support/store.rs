//! A store by itself, without a relay: how tests ask it.

use outbox_relay::config::Settings;
use outbox_relay::store::leases::Member;
use outbox_relay::store::postgres::Connector;
use outbox_relay::store::{Ask, Lease, Others, PostgresStore, Share};
use std::time::Duration;

/// All ids.
pub const ALL: [(i64, i64); 1] = [(i64::MIN, i64::MAX)];

/// One shard, so that everything belongs to it; taken once, so its epoch is 1.
pub const LEASE: Lease = Lease { shard: 0, epoch: 1 };
/// All that there is to own.
pub const ALL_SHARDS: Share<'static> = Share { shards: 1, leases: &[LEASE] };

/// What a relay with these settings reads from and writes to.
pub fn postgres(settings: &Settings) -> PostgresStore {
    let connector = Connector::new(settings.database.clone(), settings.transaction_pooling);
    PostgresStore::new(connector, settings)
}

/// A replica that is ready, for so long that no test outlives its leases.
pub fn member(number: u128, shards: u32) -> Member {
    let lease_time = Duration::from_secs(600);
    Member { replica: uuid::Uuid::from_u128(number), shards, ready: true, lease_time }
}

/// So many rows of whatever may be read.
pub fn ask(rows: usize) -> Ask<'static> {
    Ask {
        ranges: &ALL,
        rows,
        bytes: 1 << 30,
        room_for_any: true,
        in_flight: &[],
        keep_order: true,
        parked: &[],
        share: ALL_SHARDS,
        others: Others::default(),
    }
}

//! The contract of every lease table: the obligations in `src/store/leases.rs`, on Postgres and on its twin in memory.

use crate::support::store::member;
use crate::support::{World, eventually, rng};
use outbox_relay::store::PostgresStore;
use outbox_relay::store::leases::{Lease, LeaseTable, Member, Standing};
use outbox_relay::store::memory::MemoryStore;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

/// Longer than a call, and soon over.
const SHORT: Duration = Duration::from_secs(1);

fn shards(standing: &Standing) -> Vec<u32> {
    standing.leases.iter().map(|lease| lease.shard).collect()
}

async fn renew(table: &impl LeaseTable, member: Member, drained: &[Lease]) -> Standing {
    table.renew(member, drained).await.expect("renew")
}

async fn keeps_the_contract(table: &impl LeaseTable) {
    one_alone_takes_everything_at_once(table).await;
    shards_change_hands_when_they_are_given_back(table).await;
    shards_change_hands_when_their_lease_has_run_out(table).await;
    parts_are_fair(table).await;
    who_cannot_reach_the_broker_has_no_part_unless_nobody_can(table).await;
    another_number_of_shards_is_refused_while_others_live(table).await;
    who_was_away_while_fewer_shards_held_everything_has_nothing_of_old(table).await;
    a_shard_never_has_two_owners(table).await;
}

async fn one_alone_takes_everything_at_once(table: &impl LeaseTable) {
    let me = member(1, 4);
    assert_eq!(table.look(me).await.expect("look").leases, [], "a look takes nothing");
    let standing = renew(table, me, &[]).await;
    assert!(standing.member);
    assert_eq!(
        (shards(&standing), standing.quota, standing.free, standing.replicas),
        (vec![0, 1, 2, 3], 4, 0, 1)
    );
    assert_eq!(renew(table, me, &[]).await.leases, standing.leases, "renewing changes no epoch");
    assert_eq!(table.look(me).await.expect("look"), standing);
    table.leave(me).await.expect("leave");
    assert_eq!(table.look(me).await.expect("look").leases, []);
    let again = renew(table, me, &[]).await;
    let grown = standing.leases.iter().zip(&again.leases).all(|(was, is)| is.epoch > was.epoch);
    assert!(grown, "taken anew: the epoch grows, {again:?}");
    table.leave(me).await.expect("leave");
}

async fn shards_change_hands_when_they_are_given_back(table: &impl LeaseTable) {
    let (one, two) = (member(1, 4), member(2, 4));
    let before = renew(table, one, &[]).await;
    let joined = renew(table, two, &[]).await;
    assert_eq!((joined.leases.len(), joined.quota, joined.replicas), (0, 2, 2), "nothing is free");
    let after = renew(table, one, &before.leases[2..]).await;
    assert_eq!((shards(&after), after.quota, after.free), (vec![0, 1], 2, 2));
    assert_eq!(after.leases, before.leases[..2], "what is kept keeps its epoch");
    let taken = renew(table, two, &[]).await;
    assert_eq!(shards(&taken), [2, 3]);
    assert!(taken.leases.iter().zip(&before.leases[2..]).all(|(is, was)| is.epoch > was.epoch));
    renew(table, one, &taken.leases).await;
    assert_eq!(shards(&renew(table, two, &[]).await), [2, 3], "nobody gives back what is not his");
    // A giving back that comes late, after the shard was taken anew by the same replica.
    renew(table, two, &taken.leases[..1]).await;
    let anew = renew(table, two, &[]).await;
    assert_eq!(
        renew(table, two, &taken.leases[..1]).await.leases,
        anew.leases,
        "another epoch, another lease"
    );
    table.leave(one).await.expect("leave");
    assert_eq!(shards(&renew(table, two, &[]).await), [0, 1, 2, 3], "free at once");
    table.leave(two).await.expect("leave");
}

async fn shards_change_hands_when_their_lease_has_run_out(table: &impl LeaseTable) {
    let (mortal, heir) = (Member { lease_time: SHORT, ..member(1, 4) }, member(2, 4));
    let before = renew(table, mortal, &[]).await;
    renew(table, heir, &[]).await;
    eventually("the heir has everything", async || renew(table, heir, &[]).await.leases.len() == 4).await;
    let late = renew(table, mortal, &[]).await;
    assert_eq!(late.leases, [], "too late: {before:?}");
    table.leave(mortal).await.expect("leave");
    table.leave(heir).await.expect("leave");
    // One that had run out and that nobody took goes on under its epoch.
    let before = renew(table, mortal, &[]).await;
    eventually("the leases have run out", async || table.look(mortal).await.expect("look").leases.is_empty())
        .await;
    assert_eq!(renew(table, mortal, &[]).await.leases, before.leases);
    table.leave(mortal).await.expect("leave");
}

async fn parts_are_fair(table: &impl LeaseTable) {
    for (replicas, shards) in [(3, 16), (5, 16), (5, 3), (7, 7)] {
        let members: Vec<Member> = (1..=replicas).map(|number| member(number, shards)).collect();
        for member in &members {
            renew(table, *member, &[]).await;
        }
        let mut parts = Vec::new();
        for member in &members {
            parts.push(table.look(*member).await.expect("look").quota);
        }
        assert_eq!(parts.iter().sum::<u32>(), shards, "{parts:?}");
        assert!(
            parts.iter().max().zip(parts.iter().min()).is_some_and(|(max, min)| max - min <= 1),
            "{parts:?}"
        );
        for member in members {
            table.leave(member).await.expect("leave");
        }
    }
}

async fn who_cannot_reach_the_broker_has_no_part_unless_nobody_can(table: &impl LeaseTable) {
    let (cut_off, well) = (Member { ready: false, ..member(1, 4) }, member(2, 4));
    assert_eq!(renew(table, cut_off, &[]).await.quota, 4, "nobody else is there");
    assert_eq!(renew(table, well, &[]).await.quota, 4);
    assert_eq!(renew(table, cut_off, &[]).await.quota, 0);
    let well = Member { ready: false, ..well };
    assert_eq!(renew(table, well, &[]).await.quota, 2, "an outage for all changes nothing");
    table.leave(cut_off).await.expect("leave");
    table.leave(well).await.expect("leave");
}

async fn another_number_of_shards_is_refused_while_others_live(table: &impl LeaseTable) {
    let (one, other) = (member(1, 4), member(2, 8));
    renew(table, one, &[]).await;
    let refused = renew(table, other, &[]).await;
    assert_eq!((refused.other_shards, refused.member, refused.leases), (Some(4), false, vec![]));
    assert_eq!(renew(table, one, &[]).await.replicas, 1, "the refused one left no trace");
    table.leave(one).await.expect("leave");
    assert_eq!(renew(table, other, &[]).await.leases.len(), 8);
    table.leave(other).await.expect("leave");
    assert_eq!(renew(table, one, &[]).await.leases.len(), 4, "and back to fewer");
    table.leave(one).await.expect("leave");
}

/// Keys lie in other shards when there are fewer: rows that were read under an old lease may have been published, and later
/// ones after them, by somebody who never had a shard of that number.
async fn who_was_away_while_fewer_shards_held_everything_has_nothing_of_old(table: &impl LeaseTable) {
    let (frozen, other) = (Member { lease_time: SHORT, ..member(1, 8) }, member(2, 4));
    let before = renew(table, frozen, &[]).await;
    eventually("fewer shards have everything", async || renew(table, other, &[]).await.leases.len() == 4)
        .await;
    tokio::time::sleep(SHORT).await;
    renew(table, other, &[]).await;
    table.leave(other).await.expect("leave");
    let after = renew(table, frozen, &[]).await;
    assert_eq!(after.leases.len(), 8);
    let anew = before.leases.iter().zip(&after.leases).all(|(was, is)| is.epoch > was.epoch);
    assert!(anew, "{:?} and now {:?}", before.leases, after.leases);
    table.leave(frozen).await.expect("leave");
}

/// Five replicas come, go, die and give back at random. Seen from outside, no shard has two owners and no epoch two.
async fn a_shard_never_has_two_owners(table: &impl LeaseTable) {
    let mut rng = rng("a_shard_never_has_two_owners");
    let mut owner_of: HashMap<Lease, u128> = HashMap::new();
    for _ in 0..200 {
        let number = rng.u128(1..=5);
        let mut me = member(number, 8);
        if rng.u8(0..4) == 0 {
            me.lease_time = Duration::from_millis(2);
        }
        if rng.u8(0..8) == 0 {
            table.leave(me).await.expect("leave");
            continue;
        }
        let mut drained = table.look(me).await.expect("look").leases;
        drained.retain(|_| rng.u8(0..6) == 0);
        for lease in renew(table, me, &drained).await.leases {
            assert_eq!(*owner_of.entry(lease).or_insert(number), number, "{lease:?} has two owners");
        }
        let mut owned = HashSet::new();
        for number in 1..=5 {
            for lease in table.look(member(number, 8)).await.expect("look").leases {
                assert!(owned.insert(lease.shard), "shard {} has two owners", lease.shard);
            }
        }
    }
    for number in 1..=5 {
        table.leave(member(number, 8)).await.expect("leave");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_memory_store_keeps_leases() {
    keeps_the_contract(&MemoryStore::default()).await;
}

fn postgres(world: &World, pooling: &str) -> PostgresStore {
    postgres_at(world, &world.database_url, pooling)
}

fn postgres_at(world: &World, url: &str, pooling: &str) -> PostgresStore {
    world.store(&[("DATABASE_URL", url), ("OUTBOX_TRANSACTION_POOLING", pooling)])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_keeps_leases() {
    let world = World::new().await;
    keeps_the_contract(&postgres(&world, "false")).await;
    world.abandon();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_without_session_state_keeps_leases() {
    let world = World::new().await;
    keeps_the_contract(&postgres(&world, "true")).await;
    world.abandon();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_behind_pgbouncer_keeps_leases() {
    let (world, url) = World::behind_pgbouncer().await;
    keeps_the_contract(&postgres_at(&world, &url, "true")).await;
    world.abandon();
}

/// Renewals of many replicas at the very same time, each on a connection of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renewals_at_the_same_time_are_serial() {
    let world = World::new().await;
    for _ in 0..20 {
        let members = (1..=4).map(async |number| {
            let store = postgres(&world, "false");
            let me = member(number, 16);
            let mut held = HashSet::new();
            for _ in 0..5 {
                held.extend(renew(&store, me, &[]).await.leases);
            }
            (store, me, held)
        });
        let mut owned = HashSet::new();
        for (store, me, held) in futures_util::future::join_all(members).await {
            for lease in held {
                assert!(owned.insert(lease.shard), "shard {} was owned by two", lease.shard);
            }
            store.leave(me).await.expect("leave");
        }
        assert_eq!(owned.len(), 16, "every shard was taken");
    }
    world.abandon();
}

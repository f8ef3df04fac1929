//! The contract of every store: the obligations in `src/store/mod.rs`, on Postgres and on its twin in memory.

use crate::support::World;
use crate::support::store::{ALL, ALL_SHARDS, LEASE, ask, member};
use outbox_relay::store::leases::LeaseTable;
use outbox_relay::store::memory::{MemoryStore, plain_row};
use outbox_relay::store::{
    Ask, Dead, Delivered, Lease, Others, PostgresStore, Purged, Read, Route, Row, Settlement, Share, Store,
    Waiting, Watch,
};
use sqlx::{Connection, Executor};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

/// A store and a way to commit rows into it.
trait Subject {
    type Store: Store + LeaseTable;
    fn store(&self) -> &Self::Store;
    async fn insert(&self, id: i64, key: Option<&str>, routing_key: &str, bytes: usize);
}

struct InMemory(MemoryStore);

impl Subject for InMemory {
    type Store = MemoryStore;

    fn store(&self) -> &MemoryStore {
        &self.0
    }

    async fn insert(&self, id: i64, key: Option<&str>, routing_key: &str, bytes: usize) {
        self.0.insert(Row {
            message_id: message_id(id),
            route: Arc::new(Route { exchange: "x".to_owned(), routing_key: routing_key.to_owned() }),
            ordering_key: key.map(Into::into),
            payload: vec![b'x'; bytes].into(),
            ..plain_row(id)
        });
    }
}

struct InPostgres {
    world: World,
    store: PostgresStore,
}

impl InPostgres {
    async fn new(pooling: &str) -> Self {
        let world = World::new().await;
        let url = world.database_url.clone();
        Self::at(world, &url, pooling).await
    }

    async fn at(world: World, url: &str, pooling: &str) -> Self {
        world.sql("alter table outbox alter column payload type text using payload::text").await;
        let settings =
            [("DATABASE_URL", url), ("OUTBOX_EXCHANGE", "x"), ("OUTBOX_TRANSACTION_POOLING", pooling)];
        let store = world.store(&settings);
        Self { world, store }
    }
}

impl Subject for InPostgres {
    type Store = PostgresStore;

    fn store(&self) -> &PostgresStore {
        &self.store
    }

    async fn insert(&self, id: i64, key: Option<&str>, routing_key: &str, bytes: usize) {
        let query = sqlx::query(
            "insert into outbox (id, message_id, ordering_key, routing_key, payload) values ($1, $5, $2, $3, repeat('x', $4))",
        );
        self.world
            .db()
            .await
            .execute(query.bind(id).bind(key).bind(routing_key).bind(bytes as i32).bind(message_id(id)))
            .await
            .expect("insert");
    }
}

async fn ids(store: &impl Store, ask: Ask<'_>) -> Vec<i64> {
    store.poll(ask).await.expect("poll").rows.iter().map(|row| row.id).collect()
}

fn message_id(id: i64) -> uuid::Uuid {
    uuid::Uuid::from_u128(id as u128)
}

fn sent(ids: impl IntoIterator<Item = i64>) -> Vec<Delivered> {
    ids.into_iter().map(|id| Delivered { id, message_id: message_id(id) }).collect()
}

fn waiting(id: i64, wait: Duration) -> Settlement {
    let waiting = Waiting {
        id,
        message_id: message_id(id),
        lease: LEASE,
        attempts: 1,
        wait,
        reason: "refused \0 for a test".to_owned(),
    };
    Settlement { waiting: vec![waiting], ..Settlement::default() }
}

async fn keeps_the_contract(subject: &impl Subject) {
    assert_eq!(subject.store().renew(member(1, 1), &[]).await.expect("renew").leases, [LEASE]);
    polls_what_it_is_asked_for(subject).await;
    a_refused_row_holds_back_its_key(subject).await;
    parks_probes_and_releases(subject).await;
    watches_for_rows_that_may_be_read(subject).await;
    settles_all_kinds_and_twice(subject).await;
    counts_and_purges(subject).await;
    reads_only_its_share(subject).await;
    tells_rows_of_others_by_their_ids(subject).await;
    refusals_need_the_lease_and_deliveries_do_not(subject).await;
    outcomes_are_those_of_a_message_not_of_an_id(subject).await;
}

async fn polls_what_it_is_asked_for(subject: &impl Subject) {
    let store = subject.store();
    for id in (1..=20).rev() {
        subject.insert(id, None, "r", 1000).await;
    }
    assert_eq!(ids(store, ask(100)).await, (1..=20).collect::<Vec<_>>(), "in id order");
    let read = store.poll(ask(5)).await.expect("poll");
    assert_eq!((read.rows.len(), read.more), (5, true), "no more than asked for");
    assert!(!store.poll(ask(100)).await.expect("poll").more);
    let ranges = [(2, 3), (7, 7), (19, i64::MAX)];
    assert_eq!(ids(store, Ask { ranges: &ranges, ..ask(100) }).await, [2, 3, 7, 19, 20], "in the ranges");
    assert_eq!(
        ids(store, Ask { in_flight: &[1, 2, 20], ..ask(3) }).await,
        [3, 4, 5],
        "not what is in flight"
    );
    let read = store.poll(Ask { bytes: 5000, ..ask(100) }).await.expect("poll");
    assert!(read.more && (2..5).contains(&read.rows.len()), "{} rows in 5000 bytes", read.rows.len());
    assert_eq!(
        ids(store, Ask { bytes: 10, ..ask(100) }).await,
        [1],
        "one row passes when nothing is in flight"
    );
    assert!(ids(store, Ask { bytes: 10, room_for_any: false, ..ask(100) }).await.is_empty());
    let horizon = store.horizon(6, &ranges, &[3], 10).await.expect("horizon");
    assert_eq!(horizon.pending, [2], "pending ids in the ranges up to the last");
    assert!(horizon.xmin <= horizon.next_xid);
    store
        .settle(&Settlement { delivered: sent(1..=20), ..Settlement::default() }, false)
        .await
        .expect("settle");
    assert!(ids(store, ask(100)).await.is_empty());
}

async fn a_refused_row_holds_back_its_key(subject: &impl Subject) {
    let store = subject.store();
    for (id, key) in [(31, Some("a")), (32, Some("b")), (33, Some("a")), (34, None), (35, Some("a"))] {
        subject.insert(id, key, "r", 10).await;
    }
    store.settle(&waiting(33, Duration::from_secs(60)), false).await.expect("settle");
    assert_eq!(
        ids(store, ask(100)).await,
        [31, 32, 34],
        "rows after the refused one wait, earlier ones do not"
    );
    assert_eq!(ids(store, Ask { keep_order: false, ..ask(100) }).await, [31, 32, 34, 35]);
    store.settle(&waiting(33, Duration::ZERO), false).await.expect("settle");
    assert_eq!(ids(store, ask(100)).await, [31, 32, 33, 34], "due again, and still before its followers");
    let rows = store.poll(ask(100)).await.expect("poll").rows;
    assert_eq!(rows.iter().find(|row| row.id == 33).map(|row| row.attempts), Some(1));
    store
        .settle(&Settlement { delivered: sent(31..=35), ..Settlement::default() }, false)
        .await
        .expect("settle");
}

async fn parks_probes_and_releases(subject: &impl Subject) {
    let store = subject.store();
    let route = Arc::new(Route { exchange: "x".to_owned(), routing_key: "parked".to_owned() });
    for id in 41..=44 {
        subject.insert(id, Some("p"), "parked", 10).await;
    }
    subject.insert(45, None, "parked", 10).await;
    store.settle(&waiting(41, Duration::ZERO), false).await.expect("settle");
    let parked = [Arc::clone(&route)];
    assert_eq!(
        ids(store, Ask { parked: &parked, ..ask(100) }).await,
        [45],
        "a new row is tried, a refused one is not"
    );
    store.settle(&waiting(41, Duration::from_secs(60)), false).await.expect("settle");
    store.settle(&waiting(45, Duration::from_secs(60)), false).await.expect("settle");
    let probe = store.probe(&route, &[], true, ALL_SHARDS).await.expect("probe");
    assert_eq!(probe.map(|row| row.id), Some(41), "due or not");
    let probe = store.probe(&route, &[41], true, ALL_SHARDS).await.expect("probe");
    assert_eq!(probe.map(|row| row.id), Some(45));
    let other = Route { exchange: "y".to_owned(), routing_key: "parked".to_owned() };
    assert!(store.probe(&other, &[], true, ALL_SHARDS).await.expect("probe").is_none());
    assert_eq!(store.release(&route, 1).await.expect("release"), 1);
    assert_eq!(store.release(&route, 100).await.expect("release"), 1);
    assert_eq!(store.release(&route, 100).await.expect("release"), 0);
    assert_eq!(ids(store, ask(100)).await, [41, 45]);
    store
        .settle(&Settlement { delivered: sent(41..=45), ..Settlement::default() }, false)
        .await
        .expect("settle");
}

async fn watches_for_rows_that_may_be_read(subject: &impl Subject) {
    let store = subject.store();
    let long = Duration::from_secs(600);
    let watch = |noticed, lasts| Watch {
        noticed,
        ranges: &ALL,
        in_flight: &[],
        first_poll: long,
        poll_interval: long,
        lasts,
    };
    let at_once = Duration::ZERO;
    let seen = async |watch| store.watch(watch).await.expect("watch");
    assert_eq!(seen(watch(i64::MIN, at_once)).await, None, "nothing is pending");
    // A row that comes while it is waited for.
    let (row, ()) = tokio::join!(seen(watch(45, Duration::from_secs(10))), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        subject.insert(46, Some("w"), "r", 10).await;
    });
    assert_eq!(row, Some(46));
    assert_eq!(seen(watch(45, at_once)).await, Some(46), "one that is there already");
    assert_eq!(seen(watch(46, at_once)).await, None, "one that was noticed");
    // Due rows are looked for in the ranges, now and then.
    let poll = Watch { first_poll: Duration::ZERO, ..watch(46, at_once) };
    assert_eq!(seen(poll).await, Some(46));
    assert_eq!(seen(Watch { in_flight: &[46], ..poll }).await, None);
    assert_eq!(seen(Watch { ranges: &[(i64::MIN, 45), (47, i64::MAX)], ..poll }).await, None);
    assert_eq!(seen(Watch { ranges: &[], ..poll }).await, None);
    store.settle(&waiting(46, Duration::from_secs(3600)), false).await.expect("settle");
    assert_eq!(seen(poll).await, None, "not due");
    store.settle(&waiting(46, Duration::from_millis(300)), false).await.expect("settle");
    let again = Watch { poll_interval: Duration::from_millis(20), lasts: Duration::from_secs(10), ..poll };
    assert_eq!(seen(again).await, Some(46), "due meanwhile");
    store
        .settle(&Settlement { delivered: sent([46]), ..Settlement::default() }, false)
        .await
        .expect("settle");
    assert_eq!(seen(Watch { noticed: 45, ..poll }).await, None, "not pending");
}

async fn settles_all_kinds_and_twice(subject: &impl Subject) {
    let store = subject.store();
    for id in 51..=53 {
        subject.insert(id, None, "r", 10).await;
    }
    let mut settlement = waiting(52, Duration::from_secs(60));
    settlement.delivered = sent([51]);
    settlement.dead = vec![Dead {
        id: 53,
        message_id: message_id(53),
        lease: LEASE,
        attempts: 1,
        reason: "never".to_owned(),
    }];
    for passes_locks in [false, true, false] {
        let written = store.settle(&settlement, passes_locks).await.expect("settle");
        assert!(written.locked.is_empty(), "nobody has locked anything");
        let census = store.census().await.expect("census");
        assert_eq!((census.pending, census.waiting, census.dead, census.blocked_keys), (1, 1, 1, 0));
        assert!(ids(store, ask(100)).await.is_empty());
    }
    // What has an end keeps it.
    store.settle(&waiting(53, Duration::ZERO), false).await.expect("settle");
    assert!(ids(store, ask(100)).await.is_empty());
    store.settle(&Settlement::default(), false).await.expect("nothing to settle");
}

async fn counts_and_purges(subject: &impl Subject) {
    let store = subject.store();
    let bite = store.purge(i64::MIN, 10, Duration::from_secs(3600)).await.expect("purge");
    assert_eq!((bite.looked_at, bite.deleted), (10, 0), "younger than the retention");
    tokio::time::sleep(Duration::from_millis(20)).await;
    let long_passed = async |below, age| store.long_passed(below, age).await.expect("long passed");
    assert_eq!(
        long_passed(25, Duration::from_millis(10)).await,
        Some(20),
        "below that, what was delivered last"
    );
    assert_eq!(long_passed(25, Duration::from_secs(600)).await, None, "not as long ago");
    assert_eq!(long_passed(1, Duration::ZERO).await, None, "nothing is below the first");
    let mut after = i64::MIN;
    let mut purged = 0;
    loop {
        let Purged { looked_at, deleted, last_id } =
            store.purge(after, 7, Duration::ZERO).await.expect("purge");
        assert!(looked_at <= 7);
        purged += deleted;
        after = last_id;
        if looked_at < 7 {
            break;
        }
    }
    assert_eq!(purged, 20 + 5 + 5 + 1 + 1, "all that was delivered, nothing else");
    let census = store.census().await.expect("census");
    assert_eq!((census.pending, census.dead), (1, 1));
}

async fn reads_only_its_share(subject: &impl Subject) {
    let store = subject.store();
    for id in 101..=200 {
        let key = format!("key {}", id % 30);
        subject.insert(id, (id % 2 == 0).then_some(key.as_str()), "r", 10).await;
    }
    let (mut found, mut shard_of_key) = (Vec::new(), HashMap::new());
    for shard in 0..4 {
        let leases = [Lease { shard, epoch: 7 }];
        let share = Share { shards: 4, leases: &leases };
        let rows = store.poll(Ask { share, ..ask(1000) }).await.expect("poll").rows;
        for row in rows {
            assert_eq!(row.lease, leases[0], "a row carries its lease");
            if let Some(key) = row.ordering_key {
                assert_eq!(*shard_of_key.entry(key).or_insert(shard), shard, "a key has one shard");
            }
            found.push(row.id);
        }
    }
    found.retain(|id| *id > 100);
    found.sort_unstable();
    assert_eq!(found, (101..=200).collect::<Vec<_>>(), "every row is in one shard");
    let shards: HashSet<u32> = shard_of_key.values().copied().collect();
    assert!(shards.len() > 1, "keys are spread");
    store
        .settle(&Settlement { delivered: sent(found), ..Settlement::default() }, false)
        .await
        .expect("settle");
}

/// Also those that are not due, and those behind a refused row of their key: nothing of them is this reader's business but
/// that they are there.
async fn tells_rows_of_others_by_their_ids(subject: &impl Subject) {
    const IDS: std::ops::RangeInclusive<i64> = 211..=250;
    let store = subject.store();
    for id in IDS {
        subject.insert(id, Some(&format!("key {}", id % 20)), "r", 10).await;
    }
    store.settle(&waiting(211, Duration::from_secs(600)), false).await.expect("settle");
    let ranges = [(*IDS.start(), *IDS.end())];
    for shard in 0..4 {
        let leases = [Lease { shard, epoch: 7 }];
        let others: Vec<u32> = (0..4).filter(|other| *other != shard).collect();
        let mine = Ask { ranges: &ranges, share: Share { shards: 4, leases: &leases }, ..ask(1000) };
        let own = ids(store, mine).await;
        let Read { rows, mut passed, more, .. } =
            store.poll(Ask { others: Others { shards: &others, after: 0 }, ..mine }).await.expect("poll");
        assert_eq!(rows.iter().map(|row| row.id).collect::<Vec<_>>(), own, "others' rows come besides");
        assert!(rows.iter().all(|row| row.payload.len() == 10 && row.defect.is_none()) && !more);
        passed.extend(own);
        passed.sort_unstable();
        let held_back_here = passed.len() < IDS.count();
        let all: Vec<i64> = IDS.filter(|id| !(held_back_here && id % 20 == 211 % 20)).collect();
        assert_eq!(passed, all, "everything is told of others, and of one's own what may be sent");
    }
    let others = Others { shards: &[0, 1, 2, 3], after: 0 };
    let all = Ask { ranges: &ranges, share: Share { shards: 4, leases: &[] }, others, ..ask(10) };
    let read = store.poll(all).await.expect("poll");
    assert_eq!(
        (read.rows.len(), read.passed, read.more),
        (0, (211..=220).collect(), true),
        "they count as rows"
    );
    let read = store.poll(Ask { in_flight: &[211, 213], ..all }).await.expect("poll");
    assert_eq!(read.passed[..3], [212, 214, 215], "what is in flight is not told");
    let read = store.poll(Ask { others: Others { after: 248, ..others }, ..all }).await.expect("poll");
    assert_eq!((read.passed, read.more), (vec![249, 250], false), "only what is new");
    store.settle(&Settlement { delivered: sent(IDS), ..Settlement::default() }, false).await.expect("settle");
}

async fn refusals_need_the_lease_and_deliveries_do_not(subject: &impl Subject) {
    let store = subject.store();
    for id in 301..=303 {
        subject.insert(id, None, "r", 10).await;
    }
    let late = Lease { epoch: LEASE.epoch - 1, ..LEASE };
    let mut settlement = waiting(301, Duration::from_secs(60));
    settlement.waiting[0].lease = late;
    settlement.dead = vec![Dead {
        id: 302,
        message_id: message_id(302),
        lease: late,
        attempts: 1,
        reason: "late".to_owned(),
    }];
    settlement.delivered = sent([303]);
    store.settle(&settlement, false).await.expect("settle");
    let rows = store.poll(ask(100)).await.expect("poll").rows;
    let left: Vec<(i64, u32)> =
        rows.iter().map(|row| (row.id, row.attempts)).filter(|(id, _)| *id > 300).collect();
    assert_eq!(left, [(301, 0), (302, 0)], "an earlier owner changes nothing but what is true");
}

/// After a failover that lost transactions, an id may belong to another message.
async fn outcomes_are_those_of_a_message_not_of_an_id(subject: &impl Subject) {
    let store = subject.store();
    for id in 401..=405 {
        subject.insert(id, None, "r", 10).await;
    }
    let other = message_id(999);
    let mut settlement = waiting(402, Duration::from_secs(60));
    settlement.waiting[0].message_id = other;
    let dead =
        |id, message_id| Dead { id, message_id, lease: LEASE, attempts: 1, reason: "other".to_owned() };
    settlement.dead = vec![dead(403, other), dead(405, message_id(405))];
    settlement.delivered = sent([404]);
    settlement.delivered.push(Delivered { id: 401, message_id: other });
    assert_eq!(
        store.settle(&settlement, false).await.expect("settle").marked,
        2,
        "one of two each was marked"
    );
    let mut left = ids(store, ask(100)).await;
    left.retain(|id| *id > 400);
    assert_eq!(left, [401, 402, 403]);
    assert_eq!(store.settle(&settlement, false).await.expect("settle").marked, 0, "marked before");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_memory_store_keeps_the_contract() {
    keeps_the_contract(&InMemory(MemoryStore::default())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_keeps_the_contract() {
    let subject = InPostgres::new("false").await;
    keeps_the_contract(&subject).await;
    subject.world.abandon();
}

/// Also the one that began last: the `xmax` of a snapshot is that of the last one that has ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_horizon_covers_every_transaction_that_runs() {
    let world = World::new().await;
    let store = world.store(&[]);
    for _ in 0..10 {
        let mut writer = world.db().await;
        let mut transaction = writer.begin().await.expect("begin");
        let xid: String = sqlx::query_scalar("select pg_current_xact_id()::text")
            .fetch_one(&mut *transaction)
            .await
            .expect("number");
        let (xid, horizon): (u64, _) =
            (xid.parse().expect("number"), store.horizon(0, &ALL, &[], 1).await.expect("horizon"));
        assert!(horizon.xmin <= xid && xid < horizon.next_xid, "{xid} in {horizon:?}");
        transaction.rollback().await.expect("roll back");
    }
    world.abandon();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_without_session_state_keeps_the_contract() {
    let subject = InPostgres::new("true").await;
    keeps_the_contract(&subject).await;
    subject.world.abandon();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_behind_pgbouncer_keeps_the_contract() {
    let (world, url) = World::behind_pgbouncer().await;
    let subject = InPostgres::at(world, &url, "true").await;
    keeps_the_contract(&subject).await;
    subject.world.abandon();
}

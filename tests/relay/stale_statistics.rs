//! The planner's statistics say what the table once was. Whatever that is, each statement keeps to the index it was written
//! for: what it reads is in proportion to what it is asked, not to the backlog.

use crate::support::World;
use crate::support::store::{ALL, ALL_SHARDS, LEASE, ask, member};
use outbox_relay::store::leases::LeaseTable;
use outbox_relay::store::{
    Ask, Dead, Delivered, PostgresStore, Route, Row, Settlement, Store, Waiting, Watch,
};
use std::sync::Arc;
use std::time::Duration;

const BACKLOG: i64 = 150_000;
/// About 4000 rows are asked for, some of them several times. A single walk over the backlog is more than this.
const BOUND: i64 = 100_000;

async fn read(store: &impl Store, after: i64, rows: usize) -> Vec<Row> {
    let ranges = [(after, i64::MAX)];
    store.poll(Ask { ranges: &ranges, ..ask(rows) }).await.expect("poll").rows
}

fn refused(row: &Row) -> Settlement {
    let (id, message_id, reason) = (row.id, row.message_id, "refused".to_owned());
    let wait = Duration::from_secs(60);
    let waiting = vec![Waiting { id, message_id, lease: LEASE, attempts: 1, wait, reason }];
    Settlement { waiting, ..Settlement::default() }
}

fn dead(row: &Row) -> Settlement {
    let (id, message_id, reason) = (row.id, row.message_id, "poison".to_owned());
    Settlement {
        dead: vec![Dead { id, message_id, lease: LEASE, attempts: 1, reason }],
        ..Settlement::default()
    }
}

fn delivered(rows: &[Row]) -> Settlement {
    let delivered = rows.iter().map(|row| Delivered { id: row.id, message_id: row.message_id }).collect();
    Settlement { delivered, ..Settlement::default() }
}

/// What a relay asks besides counting: about 4000 rows in all.
async fn work(store: &PostgresStore, exchange: &str) {
    assert_eq!(store.renew(member(1, 1), &[]).await.expect("renew").leases, [LEASE]);
    let rows = read(store, i64::MIN, 1000).await;
    assert_eq!(rows.len(), 1000);
    for row in &rows[..10] {
        store.settle(&refused(row), false).await.expect("settle");
    }
    for row in &rows[10..20] {
        store.settle(&dead(row), false).await.expect("settle");
    }
    store.settle(&delivered(&rows[20..]), false).await.expect("settle");
    let last = rows.last().map_or(0, |row| row.id);
    assert_eq!(read(store, last, 1000).await.len(), 1000);
    assert_eq!(store.horizon(last, &ALL, &[], 1000).await.expect("horizon").pending.len(), 10);
    let route = Arc::new(Route { exchange: exchange.to_owned(), routing_key: "ok.1".to_owned() });
    assert_eq!(store.purge(0, 100, Duration::from_secs(3600)).await.expect("purge").deleted, 0);
    // Five looks for rows that are not there.
    let nothing = Duration::ZERO;
    let watch = Watch {
        noticed: i64::MAX,
        ranges: &[(i64::MAX, i64::MAX)],
        in_flight: &[],
        first_poll: nothing,
        poll_interval: nothing,
        lasts: Duration::from_millis(50),
    };
    assert_eq!(store.watch(watch).await.expect("watch"), None);
    for _ in 0..5 {
        assert!(store.probe(&route, &[], true, ALL_SHARDS).await.expect("probe").is_some());
        store.release(&route, 100).await.expect("release");
    }
}

async fn reads_in_proportion(past: &[&str]) {
    let world = World::new().await;
    world.sql("alter table outbox set (autovacuum_enabled = off)").await;
    for statement in past {
        world.sql(statement).await;
    }
    world
        .sql(&format!(
            "insert into outbox (routing_key, ordering_key, payload)
             select 'ok.1', 'key ' || i, '{{}}' from generate_series(1, {BACKLOG}) i"
        ))
        .await;
    let store = world.store(&[]);
    let entries = "select sum(idx_tup_read)::bigint from pg_stat_user_indexes where relname = 'outbox'";
    let before = world.number(entries).await;
    work(&store, &world.name).await;
    drop(store);
    world.until_sessions_end().await;
    world.until_at_least(entries, before + 3000).await;
    let entries = world.number(entries).await - before;
    let by_index = "select string_agg(indexrelname || ' ' || idx_tup_read || ' in ' || idx_scan, ', ') from pg_stat_user_indexes where relname = 'outbox'";
    let by_index = world.text(by_index).await.unwrap_or_default();
    eprintln!("{entries} index entries read: {by_index}");
    assert!(entries < BOUND, "{entries} index entries read beside a backlog of {BACKLOG}: {by_index}");
    world.abandon();
}

const DELIVERED: &str = "insert into outbox (routing_key, payload, delivered_at)
    select 'past', '{}', clock_timestamp() from generate_series(1, 40000)";
/// Few: until they are cleaned up, their index entries may be read again and again.
const PENDING: &str =
    "insert into outbox (routing_key, payload) select 'past', '{}' from generate_series(1, 4000)";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn none() {
    reads_in_proportion(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_an_empty_table() {
    reads_in_proportion(&["vacuum analyze outbox"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_table_without_pending_rows() {
    reads_in_proportion(&[DELIVERED, "analyze outbox"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_table_without_pending_rows_that_was_vacuumed() {
    reads_in_proportion(&[DELIVERED, "vacuum analyze outbox"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_backlog_that_was_delivered() {
    reads_in_proportion(&[PENDING, "analyze outbox", "update outbox set delivered_at = clock_timestamp()"])
        .await;
}

/// Rows that wait are as many as rows that are pending, as it seems.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_table_full_of_waiting_rows() {
    let waiting = "update outbox set attempts = 1, available_at = 'infinity'";
    let gone = "update outbox set delivered_at = clock_timestamp()";
    reads_in_proportion(&[PENDING, waiting, "vacuum analyze outbox", gone]).await;
}

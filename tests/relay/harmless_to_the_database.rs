//! Promise 10: no transaction is open while the broker is waited for, and other people's transactions
//! stall nothing.

use crate::support::store::member;
use crate::support::world::Allowed;
use crate::support::{PATIENT, SLEEPS, World, eventually};
use outbox_relay::store::LeaseTable;
use sqlx::{Connection, Executor, PgConnection};
use std::time::Duration;

/// Entries of the pending index that were read so far.
const ENTRIES_READ: &str =
    "select idx_tup_read::bigint from pg_stat_user_indexes where indexrelname = 'outbox_pending'";

/// A transaction that keeps every row version, and every index entry, from now on. It ends with its connection.
async fn old_transaction(world: &World) -> PgConnection {
    let mut connection = world.db().await;
    let begin = "begin isolation level repeatable read; select count(*) from outbox";
    connection.execute(begin).await.expect("begin");
    connection
}

/// Where nothing is kept there is hardly anything to look for, and the only index that a look could use has all that is
/// pending.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retention_of_zero_does_not_walk_over_the_backlog_each_second() {
    let world = World::new().await;
    world
        .sql("insert into outbox (routing_key, payload, available_at) select 'ok.1', '{}', now() + interval '1 hour' from generate_series(1, 20000)")
        .await;
    let relay = world.relay(&[("OUTBOX_RETENTION", "0")]).await;
    relay.ready().await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    let walked = "select idx_tup_read::bigint from pg_stat_user_indexes where indexrelname = 'outbox_pkey'";
    assert_eq!(world.number(walked).await, 0);
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { pending: true, ..Allowed::default() }).await;
}

/// An open transaction in the same database, with a write of its own, stalls nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_transaction_elsewhere_stalls_nothing() {
    let world = World::new().await;
    world.sql("create table elsewhere (id int)").await;
    let mut other = world.db().await;
    let mut transaction = other.begin().await.expect("begin");
    transaction.execute("insert into elsewhere values (1)").await.expect("insert");
    // A sweep would help what is stalled.
    let relay = world.relay(&[("OUTBOX_SWEEP_INTERVAL", "1h")]).await;
    for _ in 0..10 {
        world.write(2000, 100).await;
        world.drained().await;
    }
    transaction.rollback().await.expect("roll back");
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// Somebody holds the lock of one waiting row when its route works again: that row waits, and nobody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_waiting_row_that_somebody_has_locked_stalls_nothing() {
    let world = World::new().await;
    let relay = world.relay_with_parked_rows(20).await;
    let mut other = world.db().await;
    let mut transaction = other.begin().await.expect("begin");
    let lock = "select from outbox where id = (select max(id) from outbox) for update";
    transaction.execute(lock).await.expect("lock");
    world.bind("lost.#").await;
    world.until_delivered(19).await;
    world.write(500, 10).await;
    world.until_delivered(519).await;
    transaction.rollback().await.expect("roll back");
    // Its own time has not come; a later row of its route is what an operator would wait for, or do as he does:
    world.sql("update outbox set available_at = clock_timestamp() where delivered_at is null").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, ..Allowed::default() }).await;
}

/// An operator looks at a row in a transaction and goes to lunch. It is sent, for reading asks for no locks, and its mark waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_are_locked_when_they_are_to_be_marked_keep_only_their_places() {
    let world = World::new().await;
    world.write(100, 10).await;
    world
        .sql("insert into outbox (routing_key, ordering_key, payload) select 'lost.1', 'lost', '{}' from generate_series(1, 20)")
        .await;
    let mut other = world.db().await;
    let mut transaction = other.begin().await.expect("begin");
    // One that is delivered, and the first of a key whose route has no queue: those behind it must not go round and round.
    transaction.execute("select from outbox where id in (7, 101) for update").await.expect("lock");
    let relay = world.relay(&PATIENT).await;
    world.until_delivered(99).await;
    for round in 1..=5 {
        world.write(100, 10).await;
        world.until_delivered(99 + 100 * round).await;
    }
    assert!(
        relay.metric("messages_total{result=\"returned\"}").await <= 1.0,
        "sent once while its wait is not written"
    );
    eventually("the two, and those behind the second, keep their places", async || {
        relay.health().await.in_flight == 21
    })
    .await;
    // And do not go and come.
    for _ in 0..40 {
        let held = relay.health().await;
        assert_eq!((held.status.as_str(), held.in_flight), ("ok", 21), "{:?}", held.reason);
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    transaction.rollback().await.expect("roll back");
    world.bind("lost.#").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, ..Allowed::default() }).await;
}

/// Refused rows that somebody has locked keep no shard where it is: all others of it would be sent by nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shards_of_refused_rows_that_are_locked_are_handed_over() {
    let world = World::new().await;
    world
        .sql("insert into outbox (routing_key, ordering_key, payload) select 'lost.1', 'lost ' || i % 40, '{}' from generate_series(0, 79) i")
        .await;
    let mut other = world.db().await;
    let mut transaction = other.begin().await.expect("begin");
    transaction.execute("select from outbox where id <= 40 for update").await.expect("lock");
    let first = world.relay(&PATIENT).await;
    eventually("all are refused and stand aside", async || {
        let health = first.health().await;
        (health.in_flight, health.in_flight_bytes) == (80, 0)
    })
    .await;
    let second = world.relay(&PATIENT).await;
    for replica in [&first, &second] {
        eventually("shards are shared", async || replica.health().await.ownership.owned == 8).await;
    }
    world.write(200, 50).await;
    world.until_delivered(200).await;
    transaction.rollback().await.expect("roll back");
    world.bind("lost.#").await;
    world.drained().await;
    for replica in [first, second] {
        replica.stop().await.expect("clean stop");
    }
    world.finish(Allowed { refusals: true, ..Allowed::default() }).await;
}

/// The poll reads what it needs: with an old transaction that keeps every dead index entry alive, a read does not
/// walk over the rows that were delivered before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poll_does_not_walk_over_what_was_delivered() {
    reads_do_not_walk_over_what_was_delivered("false").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_does_a_watch() {
    reads_do_not_walk_over_what_was_delivered("true").await;
}

async fn reads_do_not_walk_over_what_was_delivered(long_poll: &str) {
    let world = World::new().await;
    let old = old_transaction(&world).await;
    let relay = world.relay(&[("OUTBOX_SWEEP_INTERVAL", "1h"), ("OUTBOX_LONG_POLL", long_poll)]).await;
    world.write(30_000, 100).await;
    world.drained().await;
    // Reads of the pending index from here on: a handful a poll, not thirty thousand.
    let read = "select coalesce(sum(idx_tup_read), 0)::bigint from pg_stat_user_indexes where indexrelname = 'outbox_pending'";
    tokio::time::sleep(Duration::from_secs(2)).await;
    let scans = &read.replace("idx_tup_read", "idx_scan");
    let (before, scans_before) = (world.number(read).await, world.number(scans).await);
    let begun = std::time::Instant::now();
    world.until_at_least(scans, scans_before + 40).await;
    let (rows, scans) = (world.number(read).await - before, world.number(scans).await - scans_before);
    let seconds = begun.elapsed().as_secs() as i64 + 1;
    eprintln!("{rows} index entries read in {scans} scans, {seconds} s");
    // Counting walks over everything twice, once a second, and Postgres tells of it up to a second late. Polls must not.
    let walks = (2 * seconds + 4).min(scans / 2);
    assert!(rows <= walks * 30_000, "{rows} index entries read in {scans} scans, {seconds} s");
    old.close().await.expect("close");
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// The same for one that has just been started: which ids will never appear it learns from the rows that were delivered long
/// ago, and not by waiting beside reads that walk over them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_walks_over_what_was_delivered_once() {
    a_start_walks_once("false").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_does_the_start_of_a_watch() {
    a_start_walks_once("true").await;
}

async fn a_start_walks_once(long_poll: &str) {
    const PAST: i64 = 30_000;
    // What writes elsewhere on the server, other tests too, keeps gaps open.
    let world = World::alone().await;
    let old = old_transaction(&world).await;
    world.write(PAST, 100).await;
    let settings = [("OUTBOX_SWEEP_INTERVAL", "1h"), ("OUTBOX_LONG_POLL", long_poll)];
    let relay = world.relay(&settings).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    tokio::time::sleep(Duration::from_secs(6)).await;

    let before = world.number(ENTRIES_READ).await;
    world.write(100, 100).await;
    let relay = world.relay(&settings).await;
    let delivered = "messages_total{result=\"delivered\"}";
    eventually("all are delivered", async || relay.metric(delivered).await == 100.0).await;
    // Thirty reads.
    tokio::time::sleep(Duration::from_secs(3)).await;
    relay.stop().await.expect("clean stop");
    world.until_sessions_end().await;
    world.until_at_least(ENTRIES_READ, before + PAST).await;
    let entries = world.number(ENTRIES_READ).await - before;
    eprintln!("{entries} index entries read");
    // The first reads, the horizon, and the counts of health once a second: ten walks, and 21 seen on a busy machine. Where all
    // thirty reads walk it was 39 and 42.
    assert!(entries < 36 * PAST, "{entries} index entries read");
    old.close().await.expect("close");
    world.finish(Allowed::default()).await;
}

/// Rows of another replica, which may take its time to deliver them, are walked over once, not by each read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_another_replica_are_passed_once() {
    const BACKLOG: i64 = 20_000;
    let world = World::new().await;
    let settings = [
        ("OUTBOX_SHARDS", "2"),
        ("OUTBOX_POLL_INTERVAL", "20ms"),
        ("OUTBOX_SWEEP_INTERVAL", "1h"),
        ("OUTBOX_LONG_POLL", "false"),
    ];
    // One that owns a shard, and delivers nothing.
    let (other, me) = (world.store(&settings), member(1, 2));
    let both = other.renew(me, &[]).await.expect("renew").leases;
    let relay = world.relay(&settings).await;
    eventually("there are two", async || other.look(me).await.expect("look").quota == 1).await;
    assert_eq!(other.renew(me, &both[1..]).await.expect("renew").leases, both[..1]);
    world.write(BACKLOG, 1000).await;
    let own =
        "select count(*) from outbox where (hashtextextended(ordering_key, 0) & 9223372036854775807) % 2 = 1";
    let own = world.number(own).await as f64;
    // Asked of the relay: counting in the table would itself walk over it all.
    let delivered = "messages_total{result=\"delivered\"}";
    eventually("its own are delivered", async || relay.metric(delivered).await == own).await;
    let (reads, begun) =
        (async || relay.metric("poll_duration_seconds_count").await, std::time::Instant::now());
    world.until_at_least(ENTRIES_READ, BACKLOG).await;
    let (entries, so_many) = (world.number(ENTRIES_READ).await, reads().await + 200.0);
    eventually("two hundred reads more", async || reads().await >= so_many).await;
    // Postgres tells of reads a second late.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let entries = world.number(ENTRIES_READ).await - entries;
    let seconds = begun.elapsed().as_secs() as i64 + 1;
    eprintln!("{entries} index entries read by two hundred reads, and by counting for {seconds} s");
    // The counts of health walk over them too, once a second. Two hundred reads would walk over two million.
    assert!(entries < BACKLOG * (seconds + 2), "{entries} index entries read in {seconds} s");

    // They are read when their shard comes.
    other.leave(me).await.expect("leave");
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// A sweep that cannot be read within its limit is left for later: here one row, which only it reads, takes 20 s to read (not
/// to count).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_rows_are_read_although_a_sweep_meets_its_limit() {
    let world = World::on_ours().await;
    let relay = world.relay(&[("OUTBOX_SWEEP_INTERVAL", "1s")]).await;
    world.write(10, 10).await;
    world.drained().await;
    let delivered = "messages_total{result=\"delivered\"}";
    world
        .sql(
            "create policy slow on outbox
                 using (case when id = 1 and delivered_at is null and current_query() like '%limit $3%'
                        then pg_sleep(20) is not null else true end)
                 with check (true);
             update outbox set delivered_at = null where id = 1;
             alter table outbox enable row level security, force row level security",
        )
        .await;
    world.until_at_least(SLEEPS, 1).await;
    world.write(10, 10).await;
    eventually("new rows are delivered", async || relay.metric(delivered).await == 20.0).await;
    world.sql("alter table outbox disable row level security").await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { pending: true, ..Allowed::default() }).await;
}

/// A sweep ends although a backlog stands behind it, and does not walk over what was delivered meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_during_a_long_drain_costs_a_read_or_two() {
    let world = World::new().await;
    let old = old_transaction(&world).await;
    world.write(100_000, 1000).await;
    let begun = std::time::Instant::now();
    let relay = world.relay(&[("OUTBOX_SWEEP_INTERVAL", "1s")]).await;
    // Asked of the relay: counting in the table would itself walk over it all.
    let delivered = "messages_total{result=\"delivered\"}";
    eventually("all are delivered", async || relay.metric(delivered).await == 100_000.0).await;
    // Postgres tells of reads a second late.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let entries = world.number(ENTRIES_READ).await;
    let seconds = begun.elapsed().as_secs() as i64;
    eprintln!("{entries} index entries read in {seconds} s");
    // A few sweeps and the counts of health, once a second, walk over it all; the hundreds of reads must not.
    let walks = (seconds + 40).min(4 * seconds + 10);
    assert!(entries < walks * 100_000, "{entries} index entries read in {seconds} s");
    old.close().await.expect("close");
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// While the broker gives no answer, the relay holds no transaction.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_transaction_is_open_while_the_broker_is_waited_for() {
    let world = World::alone().await;
    let relay = world.relay(&[]).await;
    relay.ready().await;
    world.servers().control("pause", "rabbitmq").await;
    world.write(1000, 10).await;
    eventually("they are in flight", async || relay.health().await.in_flight == 1000).await;
    // A transaction that was open when the broker fell silent would be older than this by then, and no look of the relay's is.
    let in_transaction = "select count(*) from pg_stat_activity where application_name = 'outbox-relay' and xact_start < clock_timestamp() - interval '4 seconds'";
    tokio::time::sleep(Duration::from_secs(5)).await;
    for _ in 0..20 {
        assert_eq!(world.number(in_transaction).await, 0);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    world.servers().control("resume", "rabbitmq").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { duplicates: 2000, ..Allowed::default() }).await;
}

/// `lock table` for longer than our lock time-out: the statements give way and come again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_table_is_waited_for_without_queueing_behind_it_for_long() {
    locked_table_is_waited_for("false").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_it_is_behind_a_pooler() {
    locked_table_is_waited_for("true").await;
}

async fn locked_table_is_waited_for(pooling: &str) {
    let world = World::new().await;
    let relay = world.relay(&[("OUTBOX_TRANSACTION_POOLING", pooling)]).await;
    relay.ready().await;
    let mut other = world.db().await;
    let mut transaction = other.begin().await.expect("begin");
    transaction.execute("lock table outbox in access exclusive mode").await.expect("lock");
    let waiting = "select coalesce(max(extract(epoch from clock_timestamp() - waitstart)), 0)::bigint
        from pg_locks join pg_stat_activity using (pid) where application_name = 'outbox-relay' and datname = current_database()";
    let mut longest = 0;
    // For longer than is allowed: without a limit of ours a statement would queue all the time.
    for _ in 0..140 {
        longest = longest.max(world.number(waiting).await);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Five seconds, and some for a machine that is busy.
    assert!((1..=9).contains(&longest), "a statement of ours queued behind the lock for {longest} s");
    transaction.rollback().await.expect("roll back");
    world.write(1000, 10).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

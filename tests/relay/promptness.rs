//! A row does not wait for the relay to look: the database watches for it, and all works where it does not.

use crate::support::process::RelayProcess;
use crate::support::store::ALL;
use crate::support::world::Allowed;
use crate::support::{PATIENT, World, eventually};
use outbox_relay::store::{Store, Watch};
use std::time::{Duration, Instant};

const WRITE: &str = "insert into outbox (routing_key, payload) values ('ok.1', '{}')";

/// How long a row waits whose relay looks for it less and less often.
const SILENCE: Duration = Duration::from_secs(20);
/// Without a watch, reads would follow the one before after 1 ms, 2 ms and so on, twice as long each time: 16.4 s and 32.8 s
/// after the first row, and not in between.
const SOON: Duration = Duration::from_secs(6);

/// It is noticed, although the poll interval is longer than this test has time for.
async fn lone_row_is_noticed(world: World, settings: &[(&str, &str)]) {
    // A sweep would find it, too.
    let rare = [("OUTBOX_POLL_INTERVAL", "1m"), ("OUTBOX_SWEEP_INTERVAL", "1h")];
    let relay = world.relay(&[&rare, settings].concat()).await;
    world.sql(WRITE).await;
    world.drained().await;
    tokio::time::sleep(SILENCE).await;
    world.sql(WRITE).await;
    let written = Instant::now();
    world.drained().await;
    assert!(written.elapsed() < SOON, "delivered {:?} after its commit", written.elapsed());
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_row_does_not_wait_for_the_poll_interval() {
    lone_row_is_noticed(World::new().await, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_row_does_not_wait_behind_a_pooler_either() {
    let (world, url) = World::behind_pgbouncer().await;
    lone_row_is_noticed(world, &[("DATABASE_URL", &url), ("OUTBOX_TRANSACTION_POOLING", "true")]).await;
}

/// Rows of others are news too: reads in vain become rare, and the row that is ours is read all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn news_that_concern_others_do_not_make_an_idle_replica_busy() {
    let world = World::new().await;
    let relays = [world.process(&PATIENT).await, world.process(&PATIENT).await];
    for relay in &relays {
        eventually("it owns its half", async || relay.owned().await == Some(8)).await;
    }
    // One key, one owner; the other replica reads in vain.
    let polls = async |relay: &RelayProcess| relay.metric("poll_duration_seconds_count").await;
    let before = [polls(&relays[0]).await, polls(&relays[1]).await];
    let mut writer = world.db().await;
    let begun = Instant::now();
    for _ in 0..300 {
        let row = "insert into outbox (routing_key, ordering_key, payload) values ('ok.1', 'k', '{}')";
        sqlx::Executor::execute(&mut writer, row).await.expect("a row");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    world.drained().await;
    let seconds = begun.elapsed().as_secs_f64();
    let reads = [polls(&relays[0]).await - before[0], polls(&relays[1]).await - before[1]];
    let idle = reads[0].min(reads[1]);
    assert!(idle < 20.0 * seconds, "{reads:?} reads in {seconds:.1} s");
    for relay in relays {
        assert!(relay.terminate().await.success());
    }
    world.finish(Allowed::default()).await;
}

/// Reads that sweep look at what was passed only, and these are all of them when the relay pauses for longer than that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_keeps_no_new_row_waiting() {
    let world = World::new().await;
    let settings =
        [("OUTBOX_POLL_INTERVAL", "1500ms"), ("OUTBOX_SWEEP_INTERVAL", "1s"), ("OUTBOX_LONG_POLL", "false")];
    let relay = world.relay(&settings).await;
    for silence in [0, 6] {
        tokio::time::sleep(Duration::from_secs(silence)).await;
        world.sql(WRITE).await;
        world.drained().await;
    }
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// A table that was migrated by an older relay, or whose procedure may not be called.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_database_cannot_watch_rows_are_polled() {
    let world = World::new().await;
    for (what, sql) in [
        ("is not allowed to", "revoke execute on procedure outbox_watch from public, current_user"),
        ("has no procedure", "drop procedure outbox_watch"),
        ("has none, and is not asked", "select"),
    ] {
        world.sql(sql).await;
        let long_poll = if sql == "select" { "false" } else { "true" };
        let relay = world.process(&[("OUTBOX_LONG_POLL", long_poll), PATIENT[0]]).await;
        for rows in [1, 100] {
            tokio::time::sleep(Duration::from_millis(500)).await;
            world.write(rows, 10).await;
            world.drained().await;
        }
        assert_eq!(relay.health().await.database.state, "up", "{what}");
        assert_eq!(
            relay.logged().contains("no long polling, rows are polled"),
            long_poll == "true",
            "{what}"
        );
        assert!(relay.terminate().await.success());
    }
    world.finish(Allowed::default()).await;
}

/// Nobody's DDL waits for a relay that waits, nor the vacuum that would shorten the table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_holds_no_lock_while_it_rests() {
    let world = World::new().await;
    let store = world.store(&[]);
    let long = Duration::from_secs(10);
    let watch = Watch {
        noticed: i64::MIN,
        ranges: &ALL,
        in_flight: &[],
        first_poll: long,
        poll_interval: long,
        lasts: long,
    };
    let meanwhile = async {
        let watches = "select count(*) from pg_stat_activity
                       where state = 'active' and query like '%call \"outbox_watch\"%' and pid <> pg_backend_pid() and datname = current_database()";
        world.until(watches, 1).await;
        let locks =
            "select count(*) from pg_locks where relation = 'outbox'::regclass and pid <> pg_backend_pid()
                     and database = (select oid from pg_database where datname = current_database())";
        world.until(locks, 0).await;
        world.sql("set lock_timeout = '3s'; begin; lock table outbox; commit").await;
        assert_eq!(world.number(watches).await, 1, "it goes on");
        world.sql(WRITE).await;
    };
    let (seen, ()) = tokio::join!(store.watch(watch), meanwhile);
    assert_eq!(seen.expect("watch"), Some(1));
    world.abandon();
}

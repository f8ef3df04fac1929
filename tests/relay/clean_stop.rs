//! Promise 11: SIGTERM drains, writes, and exits 0 within the grace period; a second signal ends at once.
//! Stops under load are in `bounded_duplicates.rs`.

use crate::support::world::Allowed;
use crate::support::{World, eventually};
use sqlx::{Connection, Executor};
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_while_the_broker_is_away_does_not_wait_for_it() {
    let world = World::alone().await;
    world.write(20_000, 100).await;
    let relay = world.process(&[]).await;
    world.until_at_least_delivered(1_000).await;
    world.servers().control("kill", "rabbitmq").await;
    eventually("what was under way is kept", async || {
        let health = relay.health().await;
        health.broker.state == "down" && health.in_flight > 0
    })
    .await;
    let begun = Instant::now();
    assert!(relay.terminate().await.success());
    assert!(begun.elapsed() < Duration::from_secs(10), "waited {:?}", begun.elapsed());
    world.servers().control("start", "rabbitmq").await;
    world.finish(Allowed { pending: true, ..Allowed::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_while_the_broker_is_silent_ends_with_the_grace_period() {
    let world = World::alone().await;
    let relay = world.process(&[("OUTBOX_SHUTDOWN_GRACE", "2s")]).await;
    relay.ready().await;
    world.servers().control("pause", "rabbitmq").await;
    world.write(100, 10).await;
    eventually("rows are in flight", async || relay.get("/health").await.1.contains("\"in_flight\":100,"))
        .await;
    let begun = Instant::now();
    let status = relay.terminate().await;
    assert!(status.success(), "{status}");
    assert!(
        begun.elapsed() > Duration::from_millis(1900),
        "did not wait for confirms: {:?}",
        begun.elapsed()
    );
    assert!(begun.elapsed() < Duration::from_secs(10), "waited {:?}", begun.elapsed());
    world.servers().control("resume", "rabbitmq").await;
    world.finish(Allowed { pending: true, duplicates: 100, ..Allowed::default() }).await;
}

/// Confirmed rows that cannot be marked until the end of the grace period: that is said, and the exit code is
/// not 0, because they will be sent again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn confirmed_rows_that_cannot_be_marked_are_told() {
    let world = World::new().await;
    let relay = world.process(&[("OUTBOX_SHUTDOWN_GRACE", "1s")]).await;
    relay.ready().await;
    // From here on nothing can be marked: each mark waits for a lock that the test holds.
    world
        .sql(
            "create function wait_for_the_test() returns trigger language plpgsql as
                 $$ begin perform pg_advisory_xact_lock_shared(42); return new; end $$;
             create trigger wait_for_the_test before update on outbox for each row execute function wait_for_the_test()",
        )
        .await;
    let mut other = world.db().await;
    other.execute("select pg_advisory_lock(42)").await.expect("lock");
    world.write(100, 100).await;
    eventually("all are published", async || world.queue_depth().await == 100).await;
    // And each worker has heard of its batch.
    let batches = "confirm_duration_seconds_count";
    eventually("all are confirmed", async || relay.metric(batches).await >= 4.0).await;
    relay.signal("TERM").await;
    let log = relay.log.clone();
    eventually("it is told", async || {
        let log = std::fs::read_to_string(&log).expect("log");
        log.contains("error: 100 confirmed rows could not be marked before the end of the grace period")
    })
    .await;
    assert_eq!(relay.ended().await.code(), Some(1));
    other.execute("select pg_advisory_unlock(42)").await.expect("unlock");
    // The next start sends them again.
    let relay = world.relay(&[]).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { duplicates: 100, rewinds: true, ..Allowed::default() }).await;
}

/// A statement that waits for the lock when the time is over has locked rows itself, those before it; the others are marked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_locked_row_costs_few_others_their_marks_at_the_end() {
    for (grace, lost) in [("1s", 7), ("8s", 1)] {
        let world = World::new().await;
        world.write(100, 10).await;
        let mut other = world.db().await;
        let mut transaction = other.begin().await.expect("begin");
        transaction.execute("select from outbox where id = 7 for update").await.expect("lock");
        let relay = world.relay(&[("OUTBOX_SHUTDOWN_GRACE", grace)]).await;
        eventually("all are sent", async || world.queue_depth().await == 100).await;
        let error = relay.stop().await.expect_err("one is not marked").to_string();
        assert!(error.contains("rows could not be marked before the end of the grace period"), "{error}");
        let marked = world.delivered().await;
        assert!((100 - lost..100).contains(&marked), "{marked} are marked");
        transaction.rollback().await.expect("roll back");
        let relay = world.relay(&[]).await;
        world.drained().await;
        relay.stop().await.expect("clean stop");
        world.finish(Allowed { duplicates: lost as usize, rewinds: true, ..Allowed::default() }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_at_once() {
    let world = World::alone().await;
    let relay = world.process(&[]).await;
    relay.ready().await;
    world.servers().control("pause", "rabbitmq").await;
    world.write(100, 10).await;
    eventually("rows are in flight", async || relay.get("/health").await.1.contains("\"in_flight\":100,"))
        .await;
    relay.signal("TERM").await;
    eventually("stopping", async || relay.get("/health").await.1.contains("\"stopping\":true")).await;
    assert_eq!(relay.get("/readyz").await, (503, "stopping\n".to_owned()));
    relay.signal("INT").await;
    assert_eq!(relay.ended().await.code(), Some(130));
    world.servers().control("resume", "rabbitmq").await;
    world.finish(Allowed { pending: true, duplicates: 100, ..Allowed::default() }).await;
}

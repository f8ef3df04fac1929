//! Promise 1: a committed row stays pending until it is confirmed and routed.

use crate::support::world::{Allowed, RunningRelay};
use crate::support::{World, eventually, rng};
use sqlx::{Connection, Executor, Postgres, Transaction};
use std::time::{Duration, Instant};

/// Rows that no queue takes, at random among those that one takes: RabbitMQ acks both.
async fn routable_and_unroutable_mixed(rows: i64) {
    let world = World::new().await;
    let mut rng = rng("routable_and_unroutable_mixed");
    let seed = rng.f64() * 2.0 - 1.0;
    world
        .sql(&format!(
            "select setseed({seed});
             insert into outbox (routing_key, ordering_key, payload)
             select case when random() < 0.333 then 'lost.' else 'ok.' end || i % 5,
                    case when random() < 0.3 then 'key ' || i end, jsonb_build_object('i', i)
             from generate_series(1, {rows}) i"
        ))
        .await;
    let routable = world.number("select count(*) from outbox where routing_key like 'ok.%'").await;
    let relay = world.relay(&[]).await;
    world.until_delivered(routable).await;
    world
        .until("select count(*) from outbox where attempts > 0 and last_error like '%312%'", rows - routable)
        .await;

    // Exactly the routable are delivered, exactly the others are pending.
    assert_eq!(
        world
            .number(
                "select count(*) from outbox where delivered_at is not null and routing_key like 'lost.%'"
            )
            .await,
        0
    );
    assert_eq!(world.number("select count(*) from outbox where dead_at is not null").await, 0);
    assert_eq!(i64::from(world.queue_depth().await), routable);

    // The binding appears, and they arrive.
    world.bind("lost.#").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, ..Allowed::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_the_routable_rows_are_delivered_and_the_others_wait_for_their_binding() {
    routable_and_unroutable_mixed(10_000).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exactly_the_routable_rows_are_delivered_with_many_seeds() {
    for _ in 0..8 {
        routable_and_unroutable_mixed(1000).await;
    }
}

/// A row is delivered although it commits after others have written and ended, for longer than ids are kept in mind when
/// nobody could still use them. 500 rows were delivered before.
async fn commits_late(world: World, relay: RunningRelay, transaction: Transaction<'_, Postgres>) {
    tokio::time::sleep(Duration::from_secs(7)).await;
    world.write(500, 10).await;
    world.until_delivered(1000).await;
    transaction.commit().await.expect("commit");
    let committed = Instant::now();
    world.until_delivered(1001).await;
    eprintln!("late commit delivered after {:?}", committed.elapsed());
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// A transaction that inserted first and commits last is delivered once, as soon as it commits,
/// although larger ids were delivered long before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_commit_is_delivered() {
    let world = World::new().await;
    let relay = world.relay(&[("OUTBOX_SWEEP_INTERVAL", "1h")]).await;
    let mut slow = world.db().await;
    let mut transaction = slow.begin().await.expect("begin");
    transaction
        .execute("insert into outbox (routing_key, payload) values ('ok.late', '{}')")
        .await
        .expect("insert");
    world.write(500, 10).await;
    world.until_delivered(500).await;
    commits_late(world, relay, transaction).await;
}

/// The same when the id was taken some moments before the first write, as some mappers do: the transaction has no number yet
/// when its id is first missed, and is not among those that ran then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_commit_is_delivered_also_if_its_id_was_taken_before_its_first_write() {
    let world = World::new().await;
    let relay = world.relay(&[("OUTBOX_SWEEP_INTERVAL", "1h")]).await;
    let id = world.number("select nextval(pg_get_serial_sequence('outbox', 'id'))").await;
    world.write(500, 10).await;
    world.until_delivered(500).await;
    // It must not have been given up by then, and it may have been missed already.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut slow = world.db().await;
    let mut transaction = slow.begin().await.expect("begin");
    sqlx::query("insert into outbox (id, routing_key, payload) values ($1, 'ok.late', '{}')")
        .bind(id)
        .execute(&mut *transaction)
        .await
        .expect("insert");
    commits_late(world, relay, transaction).await;
}

/// Ids that rolled back are forgotten after a while; rows that were given an id long before their commit
/// (hi/lo, sequence cache) are found by the sweep.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_taken_long_before_its_commit_is_found_by_the_sweep() {
    // Transactions of other tests would keep the id in mind.
    let world = World::alone().await;
    let relay = world.relay(&[("OUTBOX_SWEEP_INTERVAL", "25s")]).await;
    // The id is taken and its transaction ends; the row comes with it much later.
    let id = world.number("select nextval(pg_get_serial_sequence('outbox', 'id'))").await;
    world.write(100, 10).await;
    world.until_delivered(100).await;
    tokio::time::sleep(Duration::from_secs(8)).await;
    world
        .sql(&format!("insert into outbox (id, routing_key, payload) values ({id}, 'ok.hilo', '{{}}')"))
        .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(world.delivered().await, 100, "nothing but the sweep finds it");
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_scheduled_for_later_is_sent_then_and_holds_back_nobody() {
    let world = World::new().await;
    world
        .sql(
            "insert into outbox (routing_key, ordering_key, payload, available_at)
             values ('ok.later', 'k', '{}', clock_timestamp() + interval '1 hour');
             insert into outbox (routing_key, ordering_key, payload) values ('ok.now', 'k', '{}')",
        )
        .await;
    let relay = world.relay(&[]).await;
    world.until_delivered(1).await;
    assert_eq!(
        world.text("select routing_key from outbox where delivered_at is not null").await.as_deref(),
        Some("ok.now")
    );
    world.sql("update outbox set available_at = clock_timestamp() + interval '2 s' where routing_key = 'ok.later'").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { disorder: true, ..Allowed::default() }).await;
}

/// `OUTBOX_UNROUTABLE=dead` and `accept`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_unroutable_setting_is_obeyed() {
    let world = World::new().await;
    world.sql("insert into outbox (routing_key, payload) values ('lost.1', '{}')").await;
    let relay = world.relay(&[("OUTBOX_UNROUTABLE", "dead")]).await;
    world.until("select count(*) from outbox where dead_at is not null and attempts = 1", 1).await;
    relay.stop().await.expect("clean stop");

    world.sql("insert into outbox (routing_key, payload) values ('lost.2', '{}')").await;
    let relay = world.relay(&[("OUTBOX_UNROUTABLE", "accept")]).await;
    world.until_delivered(1).await;
    relay.stop().await.expect("clean stop");
    world.abandon();
}

/// A dead row that an operator sends again is delivered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_row_can_be_sent_again() {
    let world = World::new().await;
    world.sql("insert into outbox (routing_key, payload) values ('lost.1', '{}')").await;
    let relay = world.relay(&[("OUTBOX_UNROUTABLE", "dead"), ("OUTBOX_SWEEP_INTERVAL", "1s")]).await;
    world.until("select count(*) from outbox where dead_at is not null", 1).await;
    world.bind("lost.#").await;
    world.sql("update outbox set dead_at = null, attempts = 0, last_error = null, available_at = clock_timestamp()").await;
    world.drained().await;
    eventually("the message is there", async || world.queue_depth().await == 1).await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// Although nothing new comes, and the relay has never seen it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_row_can_be_sent_again_to_a_relay_that_was_started_since() {
    let world = World::new().await;
    world.sql("insert into outbox (routing_key, payload) values ('lost.1', '{}')").await;
    world.write(100, 10).await;
    let settings = [("OUTBOX_UNROUTABLE", "dead"), ("OUTBOX_SWEEP_INTERVAL", "1s")];
    let relay = world.relay(&settings).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    // From then on the delivered ones tell that all ids up to theirs were given out long ago.
    world
        .until("select count(*) from outbox where delivered_at > clock_timestamp() - interval '5 s'", 0)
        .await;
    let relay = world.relay(&settings).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    world.bind("lost.#").await;
    world.sql("update outbox set dead_at = null, attempts = 0, last_error = null, available_at = clock_timestamp() where dead_at is not null").await;
    world.drained().await;
    eventually("the message is there", async || world.queue_depth().await == 101).await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delivered_rows_are_deleted_when_retention_is_zero() {
    let world = World::new().await;
    world.write(1000, 50).await;
    let relay = world.relay(&[("OUTBOX_RETENTION", "0")]).await;
    world.until("select count(*) from outbox", 0).await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delivered_rows_are_purged_after_the_retention_and_no_others() {
    let world = World::new().await;
    world.write(3000, 50).await;
    world.sql("insert into outbox (routing_key, payload) values ('lost.1', '{}')").await;
    let relay = world.relay(&[("OUTBOX_RETENTION", "1s")]).await;
    world.until("select count(*) from outbox", 1).await;
    assert_eq!(world.text("select routing_key from outbox").await.as_deref(), Some("lost.1"));
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, pending: true, ..Allowed::default() }).await;
}

/// Holes by the thousand among the pending ids (scheduled rows here) lead to no second reading of what is in
/// flight: no duplicate, and the budget is whole afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_holes_between_ids_cause_no_second_delivery() {
    // Transactions of other tests would keep these ids in mind.
    let world = World::alone().await;
    let relay = world.relay(&[]).await;
    world.write(100, 10).await;
    world.drained().await;
    // Until the ids before the first row are known to belong to nobody.
    tokio::time::sleep(Duration::from_secs(8)).await;
    world
        .sql(
            "insert into outbox (routing_key, ordering_key, payload, available_at)
             select 'ok.1', 'k' || i % 20, to_jsonb(i), clock_timestamp() + case when i % 2 = 0 then interval '1 hour' else interval '0' end
             from generate_series(1, 6000) i",
        )
        .await;
    world.until_delivered(3100).await;
    eventually("nothing is in flight", async || relay.metric("in_flight_messages").await == 0.0).await;
    assert_eq!(relay.metric("in_flight_bytes").await, 0.0);
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { pending: true, ..Allowed::default() }).await;
}

/// `truncate … restart identity`: ids that were delivered before come again and are delivered again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_that_begin_anew_are_delivered() {
    let world = World::new().await;
    let relay = world.relay(&[("OUTBOX_SWEEP_INTERVAL", "1s")]).await;
    world.write(300, 10).await;
    world.drained().await;
    let before = world.take_messages().await.len();
    assert_eq!(before, 300);
    world.sql("truncate outbox, written restart identity").await;
    world.write(500, 10).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { disorder: true, ..Allowed::default() }).await;
}

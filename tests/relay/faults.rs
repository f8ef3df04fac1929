//! Faults of `docs/TESTING.md` that belong to no single promise: servers out of room, out of slots, without their
//! queue or vhost. Each ends with all promises checked.

use crate::support::world::{Allowed, UNDELIVERED};
use crate::support::{PATIENT, World, eventually};
use std::collections::HashSet;
use std::time::Duration;

/// F05: an alarm of the disk, raised before the relay connects: the first publish is not followed by a confirm, and
/// everything waits without an attempt being counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_alarm_from_before_the_connect_is_waited_out() {
    let world = World::alone().await;
    // More than any disk has free.
    world.servers().rabbitmqctl(&["set_disk_free_limit", "1000000GB"]).await;
    world.write(2_000, 50).await;
    let relay = world.process(&[("OUTBOX_CONFIRM_TIMEOUT", "3s"), PATIENT[0]]).await;
    eventually("health says blocked", async || relay.get("/health").await.1.contains("\"blocked\"")).await;
    assert_eq!(relay.get("/readyz").await.0, 200, "a broker that blocks is reachable");
    // Longer than three confirm time-outs, which would blame the route.
    tokio::time::sleep(Duration::from_secs(10)).await;
    world.servers().rabbitmqctl(&["set_disk_free_limit", "1MB"]).await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    world.finish(Allowed::default()).await;
}

/// F10: the process of the queue is killed inside the broker, again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_whose_process_is_killed_loses_nothing() {
    let world = World::alone().await;
    let relay = world.process(&[("OUTBOX_CONFIRM_TIMEOUT", "1s"), ("OUTBOX_MAX_IN_FLIGHT", "400")]).await;
    let kill = format!(
        "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{}\">>)), exit(amqqueue:get_pid(Q), kill).",
        world.name
    );
    let mut under_load = 0;
    for round in 1..=4 {
        world.write(20_000, 50).await;
        world.until_at_least_delivered(20_000 * (round - 1) + 500).await;
        world.servers().rabbitmqctl(&["eval", &kill]).await;
        under_load += i64::from(world.number(UNDELIVERED).await > 0);
        world.drained().await;
    }
    assert!(under_load >= 2, "{under_load} of 4 kills came while rows flowed");
    assert!(relay.terminate().await.success());
    // Refused by the dying queue, or unroutable for a moment: such an answer counts an attempt.
    world.finish(Allowed { duplicates: 4 * 400, refusals: true, rewinds: true, ..Allowed::default() }).await;
}

/// F11: a queue is deleted with what it holds. The relay cannot see that; the loss is what lay in the queue and what was
/// on its way into it (RabbitMQ confirms that too), and nothing that came after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_is_deleted_loses_what_it_held_and_no_more() {
    let world = World::new().await;
    let relay = world.process(&[("OUTBOX_MAX_IN_FLIGHT", "400")]).await;
    world.write(5_000, 50).await;
    world.until_at_least_delivered(1_000).await;
    let held = world.delete_queue().await;
    // Whatever was left of the others by then.
    world.write(100, 50).await;
    eventually("rows wait for a queue", async || relay.metric("waiting_messages").await > 0.0).await;
    let marked: HashSet<i64> = world.ids("select id from outbox where delivered_at is not null").await;
    world.declare().await;
    world.bind("ok.#").await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    let received = world.take_messages().await;
    let arrived: HashSet<i64> = received.iter().map(|message| message.id).collect();
    let lost = marked.difference(&arrived).count();
    eprintln!("{lost} lost; the queue held {held} when it was deleted, and up to 400 were on their way");
    assert!(lost as u32 <= held + 400, "{lost} lost, {held} were in the queue");
    let after = world.ids("select id from outbox").await.difference(&marked).copied().collect::<HashSet<_>>();
    assert!(after.is_subset(&arrived), "everything that was not yet confirmed arrives");
    world.abandon();
}

/// F13: the postmaster is killed and the server comes back; then it freezes for longer than leases hold.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_that_is_killed_and_frozen_is_waited_for() {
    let world = World::alone().await;
    let relay = world.process(&[("OUTBOX_MAX_IN_FLIGHT", "400")]).await;
    world.write(10_000, 50).await;
    world.until_at_least_delivered(500).await;
    world.servers().control("kill", "postgres").await;
    world.servers().control("start", "postgres").await;
    assert!(world.number(UNDELIVERED).await > 0, "it came while rows flowed");
    world.drained().await;
    world.write(10_000, 50).await;
    world.until_at_least_delivered(10_500).await;
    world.servers().control("pause", "postgres").await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(relay.get("/livez").await.0, 200);
    world.servers().control("resume", "postgres").await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    // What was confirmed stayed in memory, and nobody else took its shards.
    world.finish(Allowed::default()).await;
}

/// F17: the disk of the database is full. The server's own answer, 53100, given here by a trigger, so that the test needs
/// no file system of its own; `docs/TESTING.md` says how to repeat it with one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_keeps_the_marks_in_memory() {
    let world = World::new().await;
    let relay = world.process(&[]).await;
    world.write(500, 20).await;
    world.drained().await;
    world
        .sql(
            "create function full_disk() returns trigger language plpgsql as $$ begin
                 raise exception 'could not extend file: No space left on device' using errcode = '53100';
             end $$;
             create trigger full_disk before update on outbox for each statement execute function full_disk()",
        )
        .await;
    world.write(500, 20).await;
    eventually("health names the cause", async || {
        let (status, body) = relay.get("/health").await;
        status == 503 && body.contains("No space left on device (SQLSTATE 53100)")
    })
    .await;
    world.sql("drop trigger full_disk on outbox").await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    // What was confirmed stayed in memory until it could be marked.
    world.finish(Allowed::default()).await;
}

/// F17: no connection is to be had (53300).
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_database_without_free_slots_is_waited_for() {
    let world = World::new().await;
    let (role, url) = world.login("secret").await;
    world.grant(&role).await;
    let relay = world.process(&[("DATABASE_URL", url.as_str())]).await;
    relay.until_owner().await;
    world.superuser(&format!("alter role {role} connection limit 0")).await;
    world
        .superuser(&format!(
            "select pg_terminate_backend(pid) from pg_stat_activity where usename = '{role}'"
        ))
        .await;
    world.write(500, 20).await;
    eventually("health names the cause", async || {
        let (status, body) = relay.get("/health").await;
        status == 503 && body.contains("SQLSTATE 53300")
    })
    .await;
    assert_eq!(relay.get("/livez").await.0, 200);
    world.superuser(&format!("alter role {role} connection limit -1")).await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    world.finish(Allowed::default()).await;
}

/// F20: the vhost goes away and comes back, with exchange and queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vhost_that_is_removed_and_restored_is_waited_for() {
    let world = World::alone().await;
    let relay = world.process(&[]).await;
    world.write(500, 20).await;
    world.drained().await;
    let mut received = world.take_messages().await;
    world.servers().rabbitmqctl(&["delete_vhost", "/"]).await;
    world.write(500, 20).await;
    relay.until_not_ready("broker").await;
    world.servers().rabbitmqctl(&["add_vhost", "/"]).await;
    world.servers().rabbitmqctl(&["set_permissions", "outbox", ".*", ".*", ".*"]).await;
    world.declare().await;
    world.bind("ok.#").await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    received.extend(world.take_messages().await);
    // Between the vhost and its exchange the relay may have asked for an exchange that was not there.
    world.finish_with(received, Allowed { refusals: true, ..Allowed::default() }).await;
}

/// F19: one hot key; no keys; as many keys as rows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_key_no_key_and_a_key_for_each_row() {
    let world = World::new().await;
    for (key, rows) in [("'hot'", 5_000), ("null", 50_000), ("'key ' || i", 50_000)] {
        world
            .sql(&format!(
                "insert into outbox (routing_key, ordering_key, payload)
                 select 'ok.1', {key}, '1' from generate_series(1, {rows}) i"
            ))
            .await;
    }
    let (first, second) = (world.process(&PATIENT).await, world.process(&PATIENT).await);
    world.drained().await;
    assert!(first.terminate().await.success() && second.terminate().await.success());
    world.finish(Allowed::default()).await;
}

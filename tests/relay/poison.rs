//! Promise 7: a row that can never be delivered is set aside with its reason; nobody waits for it.

use crate::support::world::{Allowed, TRIED, UNDELIVERED};
use crate::support::{DEADLINE, SLEEPS, World, eventually};

/// Poison among good rows of the same key: only the poison is dead, each with a reason for people.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_poison_is_dead() {
    let world = World::new().await;
    let poison = [
        ("repeat('r', 300)", "'{}'", "routing_key is 300 bytes long, AMQP allows 255"),
        ("'ok.1'", "'[1, 2]'", "headers are an array, expected a JSON object"),
        ("'ok.1'", "'\"text\"'", "headers are a string, expected a JSON object"),
        ("'ok.1'", "jsonb_build_object('h', repeat('x', 1000000))", "more than the broker's frame"),
        ("'ok.1'", "jsonb_build_object(repeat('n', 300), 1)", "AMQP allows 255"),
        ("'ok.1'", "'{\"n\": 18446744073709551615}'", "does not fit into 64 bits"),
        ("'ok.1'", "'{\"n\": -123456789012345678901}'", "does not fit into 64 bits"),
    ];
    for (routing_key, headers, _) in poison {
        world.write(50, 3).await;
        world.sql(&format!("insert into outbox (routing_key, ordering_key, payload, headers) values ({routing_key}, 'key 1', '{{}}', {headers})")).await;
    }
    world.write(50, 3).await;
    let relay = world.relay(&[]).await;
    world.drained().await;
    for (_, _, reason) in poison {
        let found = world
            .number(&format!(
                "select count(*) from outbox where dead_at is not null and last_error like '%{}%'",
                reason.replace('\'', "''")
            ))
            .await;
        assert!(found >= 1, "no dead row says {reason:?}");
    }
    assert_eq!(
        world.number("select count(*) from outbox where dead_at is not null").await,
        poison.len() as i64
    );
    world.until_health_dead(&relay, poison.len() as u64).await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { dead: true, ..Allowed::default() }).await;
}

/// The index of waiting rows takes keys up to a third of a page. That shows only when such a row is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_that_cannot_be_written_is_a_death() {
    let world = World::new().await;
    let large = |routing_key: &str| {
        format!(
            "insert into outbox (routing_key, ordering_key, payload)
             select '{routing_key}', (select string_agg(md5(random()::text), '') from generate_series(1, 200)), '{{}}'"
        )
    };
    for _ in 0..3 {
        world.write(100, 10).await;
        world.sql(&large("lost.1")).await;
        world.sql(&large("ok.1")).await;
    }
    let relay = world.relay(&[]).await;
    world.drained().await;
    world.write(100, 10).await;
    world.drained().await;
    let dead = "select count(*) from outbox where dead_at is not null";
    assert_eq!(world.number(dead).await, 3);
    let told = "last_error like 'no queue takes%' and last_error like '%its wait cannot be written: index row size%'";
    assert_eq!(world.number(&format!("{dead} and {told}")).await, 3);
    world.until_health_dead(&relay, 3).await;
    assert_eq!(relay.metric("messages_total{result=\"dead\"}").await, 3.0);
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { dead: true, ..Allowed::default() }).await;
}

/// It passes when nothing else is in flight. Something always is where many routes are tried in turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_above_the_budget_is_sent_beside_parked_routes() {
    let world = World::new().await;
    world
        .sql("insert into outbox (routing_key, payload) select 'lost.' || i % 300, '{}' from generate_series(1, 900) i")
        .await;
    let relay = world.relay(&[("OUTBOX_MAX_IN_FLIGHT_BYTES", "256KiB")]).await;
    eventually("all routes are parked", async || relay.health().await.parked_routes == 300).await;
    world
        .sql("insert into outbox (routing_key, payload) values ('ok.1', to_jsonb(repeat('x', 8000000)))")
        .await;
    world.write(100, 10).await;
    world.until_delivered(101).await;
    world.bind("lost.#").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, ..Allowed::default() }).await;
}

/// Nor does it wait for rows whose marks are rejected: they keep places, and no bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_above_the_budget_is_sent_beside_rows_that_cannot_be_marked() {
    let world = World::new().await;
    world.reject_updates("old.id <= 3", "raise 'not this one'").await;
    world
        .sql("insert into outbox (routing_key, payload) select 'ok.1', to_jsonb(repeat('x', 80000)) from generate_series(1, 3)")
        .await;
    let relay = world.relay(&[("OUTBOX_MAX_IN_FLIGHT_BYTES", "256KiB")]).await;
    eventually("they stand aside", async || {
        let health = relay.health().await;
        (health.in_flight, health.in_flight_bytes) == (3, 0)
    })
    .await;
    world
        .sql("insert into outbox (routing_key, payload) values ('ok.1', to_jsonb(repeat('x', 8000000)))")
        .await;
    world.write(100, 10).await;
    world.until_delivered(101).await;
    world.sql("drop trigger reject on outbox").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// The probe that finds a route working again may be the one row whose mark is rejected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_works_again_although_its_probe_cannot_be_marked() {
    let world = World::new().await;
    // So many that trying them one by one, which is once in five seconds, would take longer than this test waits.
    world.reject_updates("new.delivered_at is not null and old.id <= 20", "raise 'not this one'").await;
    let relay = world.relay_with_parked_rows(30).await;
    world.sql("update outbox set available_at = available_at - interval '1 minute' where id <= 20").await;
    world.bind("lost.#").await;
    world.until_delivered(10).await;
    world.sql("drop trigger reject on outbox").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, ..Allowed::default() }).await;
}

/// A constraint that came after they were refused: making them due would break it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_rows_that_cannot_be_made_due_stop_nothing() {
    let world = World::new().await;
    let relay = world.relay_with_parked_rows(20).await;
    world.sql("alter table outbox add constraint never_refused check (delivered_at is not null or attempts = 0) not valid").await;
    world.bind("lost.#").await;
    world.until_delivered(1).await;
    world.write(100, 10).await;
    world.until_delivered(101).await;
    relay.ready().await;
    world.sql("alter table outbox drop constraint never_refused").await;
    world.sql("update outbox set available_at = clock_timestamp() where delivered_at is null").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, ..Allowed::default() }).await;
}

/// A payload over the broker's limit closes the channel under all others in flight. They are sent again, the
/// culprit is named by its size.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_over_the_brokers_limit_is_dead_and_the_others_go_on() {
    let world = World::alone().await;
    world.servers().rabbitmqctl(&["eval", "persistent_term:put(max_message_size, 100000), application:set_env(rabbit, max_message_size, 100000)."]).await;
    for _ in 0..3 {
        world.write(200, 20).await;
        world.sql("insert into outbox (routing_key, ordering_key, payload) values ('ok.1', 'key 1', to_jsonb(repeat('x', 200000)))").await;
    }
    world.write(200, 20).await;
    let relay = world.relay(&[]).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    assert_eq!(world.number("select count(*) from outbox where dead_at is not null and last_error like '%max%size%100000%'").await, 3);
    // One message of each key is unconfirmed at a time.
    world.finish(Allowed { dead: true, duplicates: 3 * 20, ..Allowed::default() }).await;
}

/// What the broker refuses without naming the culprit (an invalid CC header) is found one by one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_culprit_that_is_not_named_is_found_one_by_one() {
    let world = World::new().await;
    world.write(100, 10).await;
    world.sql("insert into outbox (routing_key, ordering_key, payload, headers) values ('ok.1', 'key 1', '{}', '{\"CC\": \"no array\"}')").await;
    world.write(100, 10).await;
    let relay = world.relay(&[("OUTBOX_MAX_ATTEMPTS", "2"), ("OUTBOX_WORKERS", "1")]).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    assert_eq!(
        world.number("select count(*) from outbox where dead_at is not null and attempts = 2").await,
        1
    );
    eprintln!("reason: {:?}", world.text("select last_error from outbox where dead_at is not null").await);
    world.finish(Allowed { dead: true, duplicates: 2 * 20, ..Allowed::default() }).await;
}

/// A full queue (reject-publish) nacks; its rows wait and are never dead.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_is_waited_for() {
    let world = World::new().await;
    let full = format!("{}_full", world.name);
    world.declare_full_queue(&full, 5).await;
    world.sql(&format!("insert into outbox (exchange, routing_key, ordering_key, payload) select '', '{full}', 'k' || i, '1' from generate_series(1, 20) i")).await;
    world.write(500, 20).await;
    let relay = world.relay(&[("OUTBOX_MAX_ATTEMPTS", "1")]).await;
    world
        .until("select count(*) from outbox where delivered_at is not null and routing_key like 'ok%'", 500)
        .await;
    world.until_at_least("select count(*) from outbox where last_error like '%nack%'", 10).await;
    assert_eq!(world.number("select count(*) from outbox where dead_at is not null").await, 0);
    eventually("all went through, a few at a time", async || {
        world.purge_queue(&full).await;
        world.number(UNDELIVERED).await == 0
    })
    .await;
    relay.stop().await.expect("clean stop");
    world.abandon();
}

/// A full queue takes a message whenever its consumer does. That it takes some does not make all that wait for it due, again
/// and again: back-offs hold, nobody else's copies pile up, and the log stays readable.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_takes_some_and_refuses_some_is_not_flooded() {
    const ROWS: i64 = 3000;
    let world = World::new().await;
    let full = format!("{}_full", world.name);
    world.declare_full_queue(&full, 5).await;
    world
        .sql(&format!(
            "insert into outbox (exchange, routing_key, payload) select '', '{full}', '1' from generate_series(1, {ROWS}) i"
        ))
        .await;
    let relay = world.process(&[("OUTBOX_RETRY_MIN", "30s"), ("OUTBOX_RETRY_MAX", "60s")]).await;
    let begun = std::time::Instant::now();
    let untried = "select count(*) from outbox where attempts = 0 and delivered_at is null";
    while begun.elapsed() < std::time::Duration::from_secs(12) || world.number(untried).await > 0 {
        assert!(begun.elapsed() < DEADLINE, "some are never tried");
        world.purge_queue(&full).await;
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let times = 2 + begun.elapsed().as_secs() as usize / 5;
    let refused = world.number("select coalesce(sum(attempts), 0) from outbox").await;
    let taken = world.delivered().await;
    let told = |words: &str| relay.logged().lines().filter(|line| line.contains(words)).count();
    let (works, parked) = (told("works again"), told("route parked"));
    assert!(relay.terminate().await.success());
    eprintln!(
        "{refused} refused, {taken} taken; told {works} times that it works and {parked} that it is parked"
    );
    // Each row once, and some whenever the route seems to work, which counts once in five seconds.
    assert!(taken > 0 && refused + taken >= ROWS, "each was tried");
    assert!(refused <= ROWS + 2000, "{refused} refusals of {ROWS} rows, none of which was due again");
    assert!(works <= times && (1..=times).contains(&parked), "told {works} and {parked} times");
    world.abandon();
}

/// Poison that is the oldest row of a route without a queue does not keep the route's good rows waiting for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn poison_on_a_parked_route_does_not_keep_it_parked() {
    let world = World::new().await;
    world
        .sql(
            "insert into outbox (routing_key, payload, headers) values ('lost.1', '{}', '{\"CC\": \"no array\"}');
             insert into outbox (routing_key, payload) select 'lost.1', '{}' from generate_series(1, 20)",
        )
        .await;
    // Not dead before its time: it is the oldest as long as this relay runs.
    let relay = world.relay(&[("OUTBOX_MAX_ATTEMPTS", "1000000"), ("OUTBOX_WORKERS", "1")]).await;
    world.until("select count(*) from outbox where last_error like '%312%'", 20).await;
    eventually("the route is parked", async || relay.health().await.parked_routes == 1).await;
    world.bind("lost.#").await;
    world.until_delivered(20).await;
    relay.stop().await.expect("clean stop");
    let relay = world.relay(&[("OUTBOX_MAX_ATTEMPTS", "5"), ("OUTBOX_WORKERS", "1")]).await;
    world.drained().await;
    assert_eq!(world.number("select count(*) from outbox where dead_at is not null").await, 1);
    relay.stop().await.expect("clean stop");
    let received = world.take_messages().await;
    let attempt =
        |message: &crate::support::checker::Received| message.headers.get("x-outbox-attempt").cloned();
    let retried = |message| matches!(attempt(message), Some(lapin::types::AMQPValue::LongLongInt(2..)));
    assert!(received.iter().all(retried), "a retried message says which attempt it is");
    world
        .finish_with(received, Allowed { dead: true, refusals: true, duplicates: 60, ..Allowed::default() })
        .await;
}

/// A full quorum queue whose limit is taken away: RabbitMQ does not tell the channels that were refused, so that they
/// would be refused for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_that_is_taken_away_is_noticed() {
    let world = World::alone().await;
    let full = format!("{}_full", world.name);
    world.declare_quorum_queue(&full).await;
    let limit = r#"{"max-length": 5, "overflow": "reject-publish"}"#;
    world.servers().rabbitmqctl(&["set_policy", "limit", &full, limit, "--apply-to", "queues"]).await;
    world
        .sql(&format!(
            "insert into outbox (exchange, routing_key, ordering_key, payload)
             select '', '{full}', 'k' || i, '1' from generate_series(1, 2000) i"
        ))
        .await;
    let relay = world.process(&[]).await;
    world.until_at_least("select count(*) from outbox where last_error like '%nack%'", 10).await;
    world.servers().rabbitmqctl(&["clear_policy", "limit"]).await;
    world.drained().await;
    assert_eq!(world.number("select count(*) from outbox where dead_at is not null").await, 0);
    assert!(relay.terminate().await.success());
    world.abandon();
}

/// RabbitMQ cuts the text of a refusal after 252 bytes, here within a character. That is no UTF-8, and ends the connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exchange_whose_name_breaks_the_connection_holds_up_nobody() {
    let world = World::new().await;
    let exchange = format!("{}{}", world.name, "ä".repeat(110));
    world
        .sql(&format!(
            "insert into outbox (exchange, routing_key, ordering_key, payload)
             select '{exchange}', 'ok.1', 'broken ' || i % 3, '{{}}' from generate_series(1, 10) i"
        ))
        .await;
    world.write(2000, 40).await;
    let relay = world.relay(&[]).await;
    world.until_delivered(2000).await;
    assert_eq!(world.number(TRIED).await, 0, "nobody has waited for the broken ones");
    let told =
        "select count(*) from outbox where attempts > 0 and last_error like 'the connection breaks when%'";
    // After more than a minute, which a link may be bad for.
    world.until_in(2 * DEADLINE, told, 3).await;
    // From then on it is asked for on connections that nobody else uses, for a minute, and then now and then.
    let connections = relay.metric("reconnects_total{peer=\"broker\"}").await;
    assert!((1.0..=2.0).contains(&connections), "{connections} connections");
    world.declare_other(&exchange).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.delete_exchange(&exchange).await;
    world.finish(Allowed { refusals: true, duplicates: 2 * 2000, ..Allowed::default() }).await;
}

/// A routing key that the login may not use, so long that the broker's answer, cut within a character, breaks the connection.
async fn lethal_routing_key(world: &World) -> String {
    forbid_all_but_ok(world).await;
    format!("x{}", "ä".repeat(119))
}

async fn forbid_all_but_ok(world: &World) {
    world.servers().rabbitmqctl(&["set_topic_permissions", "outbox", &world.name, "^ok", ".*"]).await;
}

async fn allow_all(world: &World, routing_key: &str) {
    world.bind(routing_key).await;
    world.servers().rabbitmqctl(&["clear_topic_permissions", "outbox"]).await;
}

/// A row of the first key.
async fn write_to(world: &World, routing_key: &str) {
    let row = format!("values ('{routing_key}', 'key 1', '{{}}')");
    world.sql(&format!("insert into outbox (routing_key, ordering_key, payload) {row}")).await;
}

const OTHERS_LEFT: &str =
    "select count(*) from outbox where delivered_at is null and ordering_key <> 'key 1'";

/// The same by a message: a login that may not use its routing key is told so in a text that breaks the connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_breaks_the_connection_waits_and_holds_up_nobody() {
    let world = World::alone().await;
    let lethal = lethal_routing_key(&world).await;
    world.write(1000, 40).await;
    write_to(&world, &lethal).await;
    world.write(1000, 40).await;
    let relay = world.process(&[("OUTBOX_MAX_ATTEMPTS", "3")]).await;
    world.until(OTHERS_LEFT, 0).await;
    assert_eq!(world.number(TRIED).await, 0, "nobody has waited for it");
    world.until_in(2 * DEADLINE, "select count(*) from outbox where attempts > 3", 1).await;
    let connections = relay.metric("reconnects_total{peer=\"broker\"}").await;
    // Then it has connections of its own: sooner if its exchange was asked for when one broke, one later if it had to be told
    // from others of its batch.
    assert!((1.0..=4.0).contains(&connections), "{connections} connections");
    allow_all(&world, &lethal).await;
    world.drained().await;
    assert_eq!(world.number(TRIED).await, 1, "it alone was refused");
    assert_eq!(relay.logged().matches("connections break whenever this row").count(), 1);
    assert!(relay.terminate().await.success());
    world.finish(Allowed { refusals: true, duplicates: 4 * 2000, ..Allowed::default() }).await;
}

const WITHOUT_A_CONNECTION: &str =
    "select count(*) from outbox where attempts > 0 and last_error like '%cannot connect%'";

async fn allow_one_connection(world: &World) {
    world.servers().rabbitmqctl(&["set_user_limits", "outbox", "{\"max-connections\": 1}"]).await;
}

async fn allow_everything(world: &World, routing_key: &str) {
    world.servers().rabbitmqctl(&["clear_user_limits", "outbox", "all"]).await;
    allow_all(world, routing_key).await;
}

/// Its login may have no second connection. Others go on; it waits, and says why, after more than a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_no_connection_of_its_own_can_be_had_the_others_go_on() {
    let world = World::alone().await;
    let relay = world.process(&[]).await;
    eventually("connected", async || relay.health().await.broker.state == "up").await;
    allow_one_connection(&world).await;
    let lethal = lethal_routing_key(&world).await;
    write_to(&world, &lethal).await;
    let refused = "cannot open a connection for messages that may break it";
    eventually("it has tried to have one", async || relay.logged().contains(refused)).await;
    world.write(1000, 40).await;
    world.until(OTHERS_LEFT, 0).await;
    let lethal_waits = format!("{WITHOUT_A_CONNECTION} and routing_key not like 'ok%'");
    assert_eq!(world.number(&lethal_waits).await, 0, "nobody has waited for it");
    world.until_in(2 * DEADLINE, &lethal_waits, 1).await;
    allow_everything(&world, &lethal).await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    world.finish(Allowed { refusals: true, duplicates: 4 * 2000, ..Allowed::default() }).await;
}

/// Those that were on their way with it three times are suspected with it, and nothing can clear them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_no_connection_of_its_own_can_be_had_its_company_goes_on() {
    let world = World::alone().await;
    let lethal = lethal_routing_key(&world).await;
    write_to(&world, &lethal).await;
    world.write(1000, 40).await;
    allow_one_connection(&world).await;
    let relay = world.process(&[("OUTBOX_MAX_ATTEMPTS", "1")]).await;
    world.until_in(2 * DEADLINE, OTHERS_LEFT, 0).await;
    world.until_at_least_in(2 * DEADLINE, WITHOUT_A_CONNECTION, 2).await;
    allow_everything(&world, &lethal).await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    world.finish(Allowed { refusals: true, duplicates: 4 * 2000, ..Allowed::default() }).await;
}

/// More of them than there are places: they take but a part of these, and new ones are known by their route.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn however_many_messages_break_connections_the_others_go_on() {
    let world = World::alone().await;
    let lethal = lethal_routing_key(&world).await;
    let write_lethal = format!(
        "insert into outbox (routing_key, ordering_key, payload)
         select '{lethal}', case when i % 2 = 0 then 'lethal ' || i % 50 end, '{{}}' from generate_series(1, 1500) i"
    );
    world.sql(&write_lethal).await;
    world.write(1000, 40).await;
    let relay = world.relay(&[("OUTBOX_MAX_IN_FLIGHT", "500"), ("OUTBOX_BATCH_SIZE", "50")]).await;
    world.until_delivered(1000).await;
    let connections = async || relay.metric("reconnects_total{peer=\"broker\"}").await;
    eventually("the route is parked", async || relay.health().await.parked_routes == 1).await;
    let before = connections().await;
    // Three for each worker at most, until each knows.
    assert!((1.0..=15.0).contains(&before), "{before} connections");
    world.sql(&write_lethal).await;
    world.write(1000, 40).await;
    world.until_delivered(2000).await;
    assert_eq!(connections().await, before, "new ones are sent apart");
    allow_all(&world, &lethal).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, duplicates: 15 * 500, ..Allowed::default() }).await;
}

/// And where the text is merely cut, and names nobody in full.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_routing_key_that_is_not_allowed_waits_alone() {
    let world = World::alone().await;
    forbid_all_but_ok(&world).await;
    world.write(500, 40).await;
    let long = "x".repeat(240);
    write_to(&world, &long).await;
    world.write(500, 40).await;
    let relay = world.relay(&[]).await;
    let waiting = "select count(*) from outbox where attempts > 0 and last_error like '%access to topic%'";
    world.until(waiting, 1).await;
    world.until(OTHERS_LEFT, 0).await;
    world.bind("x#").await;
    allow_all(&world, &long).await;
    world.drained().await;
    assert_eq!(world.number(TRIED).await, 1, "it alone was refused");
    relay.stop().await.expect("clean stop");
    // One message of each key is unconfirmed at a time.
    world.finish(Allowed { refusals: true, duplicates: 3 * 40, ..Allowed::default() }).await;
}

/// Where so many rows wait for a route that none can be found in time to try it, it does not stay parked when it works
/// again. Here a policy makes looking for one take 20 s.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_route_that_cannot_be_probed_in_time_drains_when_it_works() {
    let world = World::on_ours().await;
    world
        .sql("insert into outbox (routing_key, payload) select 'lost.1', '{}' from generate_series(1, 20)")
        .await;
    let relay = world.relay(&[("OUTBOX_SWEEP_INTERVAL", "1h")]).await;
    eventually("the route is parked", async || relay.health().await.parked_routes == 1).await;
    world.until(TRIED, 20).await;
    world
        .sql(
            "create policy slow on outbox
                 using (case when attempts > 0 and current_query() like '%order by o.available_at, o.id%'
                        then pg_sleep(20) is not null else true end)
                 with check (true);
             alter table outbox enable row level security, force row level security",
        )
        .await;
    // From the second probe on, looking for a row takes too long.
    world.until_at_least(SLEEPS, 1).await;
    world.bind("lost.#").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.sql("alter table outbox disable row level security").await;
    world.finish(Allowed { refusals: true, ..Allowed::default() }).await;
}

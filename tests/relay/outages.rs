//! Promise 6: an outage is not a failure. No attempt is lost, nothing is dead, nobody restarts anything.

use crate::support::proxy::{Link, Proxy};
use crate::support::url_file::UrlFile;
use crate::support::world::{Allowed, DELIVERED, UNDELIVERED};
use crate::support::{DEADLINE, PATIENT, World, eventually};
use std::time::Duration;

/// A drain of 100 000 rows while the broker is stopped for ten seconds and the database is restarted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_survives_a_restart_of_the_broker_and_of_the_database() {
    let world = World::alone().await;
    world.write(100_000, 1000).await;
    let relay = world.process(&[]).await;
    world.until_at_least_delivered(5_000).await;

    world.servers().control("stop", "rabbitmq").await;
    eventually("health says that the broker is away", async || {
        let (status, body) = relay.get("/health").await;
        status == 503 && body.contains("\"reason\":\"broker")
    })
    .await;
    assert_eq!(relay.get("/livez").await.0, 200, "an outage must not restart the relay");
    tokio::time::sleep(Duration::from_secs(10)).await;
    world.servers().control("start", "rabbitmq").await;
    let before = world.delivered().await;
    world.until_at_least_delivered(before + 5_000).await;

    world.servers().control("restart", "postgres").await;
    world.drained().await;
    eventually("health is good again", async || relay.get("/health").await.0 == 200).await;
    assert!(relay.terminate().await.success(), "the same process from start to end");
    // Two outages, each of which leaves at most the window without an answer.
    world.finish(Allowed { duplicates: 2 * 2000, ..Allowed::default() }).await;
}

/// The broker is killed and frozen under load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_killed_or_freezes_is_waited_for() {
    let world = World::alone().await;
    world.write(30_000, 300).await;
    let relay = world.relay(&[]).await;
    world.until_at_least_delivered(2_000).await;
    world.servers().control("kill", "rabbitmq").await;
    world.servers().control("start", "rabbitmq").await;
    world.write(30_000, 300).await;
    relay.ready().await;
    world.servers().control("pause", "rabbitmq").await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    world.servers().control("resume", "rabbitmq").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { duplicates: 2 * 2000, ..Allowed::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_are_away_at_the_start_are_waited_for() {
    let world = World::alone().await;
    world.write(100, 10).await;
    world.servers().control("stop", "rabbitmq").await;
    world.servers().control("stop", "postgres").await;
    let relay = world.process(&[]).await;
    relay.until_not_ready("database").await;
    world.servers().control("start", "postgres").await;
    eventually("the broker is what is missing", async || {
        let (status, body) = relay.get("/health").await;
        status == 503 && body.contains("\"reason\":\"broker")
    })
    .await;
    assert_eq!(relay.get("/livez").await.0, 200);
    world.servers().control("start", "rabbitmq").await;
    relay.ready().await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    world.finish(Allowed::default()).await;
}

/// A memory alarm: the broker blocks publishers; health says so; all drains when it is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memory_alarm_is_waited_out() {
    let world = World::alone().await;
    let relay = world.process(&[("OUTBOX_CONFIRM_TIMEOUT", "4s"), PATIENT[0]]).await;
    world.write(100, 10).await;
    world.drained().await;
    world.servers().rabbitmqctl(&["set_vm_memory_high_watermark", "0.00001"]).await;
    world.write(20_000, 100).await;
    eventually("health says blocked", async || {
        let (status, body) = relay.get("/health").await;
        status == 503 && body.contains("\"blocked\"")
    })
    .await;
    assert_eq!(relay.get("/readyz").await.0, 200, "a broker that blocks is reachable");
    let before = relay.usage().rss_bytes;
    // Longer than the confirm time-out: its clock must stand still.
    tokio::time::sleep(Duration::from_secs(9)).await;
    let grown = relay.usage().rss_bytes.saturating_sub(before);
    assert!(grown < 20 << 20, "memory grew by {grown} bytes while blocked");
    world.servers().rabbitmqctl(&["set_vm_memory_high_watermark", "0.8"]).await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    world.finish(Allowed::default()).await;
}

/// What cannot come through a slow link within the time of a call is asked for in smaller parts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_are_too_much_for_a_slow_link_are_read_in_smaller_answers() {
    let world = World::new().await;
    // 29 MB, which take 23 s; a call has 20 s.
    world.sql("insert into outbox (routing_key, payload) select 'ok.1', to_jsonb(repeat('x', 600000)) from generate_series(1, 48)").await;
    let database = Proxy::to(&world.database_url).await;
    database.set(Link::Throttle(1_250_000));
    let url = database.url(&world.database_url);
    let relay = world.relay(&[("DATABASE_URL", &url), ("OUTBOX_MAX_IN_FLIGHT_BYTES", "32MiB")]).await;
    // Two or three answers later, each of which takes up to 20 s.
    world.until_at_least_in(2 * DEADLINE, DELIVERED, 8).await;
    database.set(Link::Pass);
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// Links that are cut or go silent, to the broker and to the database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_is_cut_or_silent_is_made_anew() {
    let world = World::new().await;
    let broker = Proxy::to(&world.servers().amqp_url).await;
    let database = Proxy::to(&world.database_url).await;
    let (amqp_url, database_url) = (broker.url(&world.servers().amqp_url), database.url(&world.database_url));
    let relay = world
        .relay(&[("AMQP_URL", &amqp_url), ("DATABASE_URL", &database_url), ("OUTBOX_CONFIRM_TIMEOUT", "1s")])
        .await;
    relay.ready().await;
    // For this reason and no other, or the fault may be over before its connection has met it.
    let missed = async |name: &str| {
        let (status, reason) = relay.get("/readyz").await;
        status == 503 && reason.starts_with(name)
    };
    // What was confirmed stays in memory while the database is away, so only the broker's faults repeat anything.
    let mut faults = 0;
    for _ in 0..3 {
        for (name, proxy) in [("broker", &broker), ("database", &database)] {
            world.write(3_000, 50).await;
            proxy.set(Link::Cut);
            eventually("not ready", async || missed(name).await).await;
            proxy.set(Link::Pass);
            relay.ready().await;
            faults += usize::from(name == "broker");
        }
    }
    // Silence instead of an end: the broker's is noticed by its missing heartbeat, the database's by the limit of a renewal.
    for (name, proxy) in [("broker", &broker), ("database", &database)] {
        proxy.set(Link::Silent);
        world.write(3_000, 50).await;
        eventually("not ready", async || missed(name).await).await;
        proxy.set(Link::Cut);
        tokio::time::sleep(Duration::from_millis(100)).await;
        proxy.set(Link::Pass);
        faults += 3 * usize::from(name == "broker");
        world.drained().await;
    }
    assert!(relay.metric("reconnects_total{peer=\"broker\"}").await >= 4.0);
    assert!(relay.metric("reconnects_total{peer=\"database\"}").await >= 4.0);
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { duplicates: faults * 2000, ..Allowed::default() }).await;
}

/// What neither a renewal nor the server tells of ends with the limit of a call, 20 s: here the answer to a read, of a relay
/// that has nothing else to do.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_without_an_answer_is_given_up() {
    a_call_without_an_answer_is_given_up(100, "-- Pending and due rows").await;
}

/// And the answer to a mark.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mark_without_an_answer_is_given_up() {
    a_call_without_an_answer_is_given_up(20_000, "-- Confirmed and routed").await;
}

/// The session whose statement begins like this ends, although nothing comes from the server any more.
async fn a_call_without_an_answer_is_given_up(rows: i64, statement: &str) {
    let world = World::new().await;
    let database = Proxy::to(&world.database_url).await;
    let url = database.url(&world.database_url);
    let relay = world.relay(&[("DATABASE_URL", &url), ("OUTBOX_LONG_POLL", "false"), PATIENT[0]]).await;
    world.write(rows, 100).await;
    world.until_at_least_delivered(100).await;
    let of_ours = format!(
        "from pg_stat_activity where application_name = 'outbox-relay' and datname = current_database()
         and query like '{statement}%'"
    );
    world.until(&format!("select count(*) {of_ours}"), 1).await;
    let session = world.number(&format!("select pid::bigint {of_ours}")).await;
    database.set(Link::DeadDown);
    world.until(&format!("select count(*) from pg_stat_activity where pid = {session}"), 0).await;
    database.set(Link::Pass);
    world.drained().await;
    relay.stop().await.expect("clean stop");
    // Nobody else took its shards, and what was confirmed stayed in memory.
    world.finish(Allowed::default()).await;
}

/// Database connections killed again and again while rows flow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_database_connections_cost_nothing() {
    let world = World::new().await;
    let relay = world.relay(&[]).await;
    let mut under_load = 0;
    for _ in 0..40 {
        world.write(500, 50).await;
        world
            .sql("select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'outbox-relay' and datname = current_database()")
            .await;
        under_load += i64::from(world.number(UNDELIVERED).await > 0);
    }
    assert!(under_load >= 20, "{under_load} of 40 kills came while rows flowed");
    world.drained().await;
    relay.stop().await.expect("clean stop");
    // A confirmed row stays in memory until it is marked, so a lost database costs no duplicates.
    world.finish(Allowed::default()).await;
}

/// The exchange is deleted and made again while rows flow to it: nobody reconnects, nothing is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exchange_that_is_deleted_under_load_is_waited_for() {
    let world = World::new().await;
    let other = format!("{}_other", world.name);
    world.declare_other(&other).await;
    let relay = world.relay(&[("OUTBOX_RETRY_MAX", "100ms")]).await;
    for _ in 0..4 {
        for _ in 0..5 {
            world.write(200, 20).await;
            world
                .sql(&format!(
                    "insert into outbox (exchange, routing_key, ordering_key, payload)
                     select '{other}', 'ok.1', 'other ' || i % 5, '1' from generate_series(1, 100) i"
                ))
                .await;
        }
        world.delete_exchange(&other).await;
        world.sql(&format!("insert into outbox (exchange, routing_key, ordering_key, payload) values ('{other}', 'ok.1', 'other 1', '2')")).await;
        world
            .until_at_least("select count(*) from outbox where attempts > 0 and delivered_at is null", 1)
            .await;
        world.declare_other(&other).await;
        // Rows that still wait would end the next round's wait before anything was noticed.
        world.drained().await;
    }
    assert_eq!(relay.metric("reconnects_total{peer=\"broker\"}").await, 0.0);
    assert_eq!(world.number("select count(*) from outbox where dead_at is not null").await, 0);
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, duplicates: 4 * 2000, ..Allowed::default() }).await;
}

/// An exchange that is missing holds up its own rows only, until it is declared.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_exchange_holds_up_nobody_else() {
    let world = World::new().await;
    let other = format!("{}_other", world.name);
    world.sql(&format!("insert into outbox (exchange, routing_key, ordering_key, payload) select '{other}', 'ok.1', 'k' || i % 5, '1' from generate_series(1, 300) i")).await;
    world.write(3_000, 50).await;
    let relay = world.relay(&[]).await;
    world.until_delivered(3_000).await;
    world.until_at_least("select count(*) from outbox where last_error like '%no exchange%'", 5).await;
    assert_eq!(world.number("select count(*) from outbox where dead_at is not null").await, 0);
    assert_eq!(
        relay.metric("reconnects_total{peer=\"broker\"}").await,
        0.0,
        "a missing exchange is no lost connection"
    );
    world.declare_other(&other).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, ..Allowed::default() }).await;
}

/// A password that is rotated in its file is taken up at the next connect.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotated_password_is_taken_up() {
    let world = World::new().await;
    let (role, mut url) = world.login("first").await;
    world.grant(&role).await;
    let file = UrlFile::new(url.as_str());
    let relay = world.process_with_file("DATABASE_URL", &file, &[]).await;
    relay.ready().await;
    world.superuser(&format!("alter role {role} password 'second'")).await;
    let theirs = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'outbox-relay' and usename = '{role}'";
    world.superuser(&theirs.replace("{role}", &role)).await;
    relay.until_not_ready("password authentication failed").await;
    url.set_password(Some("second")).expect("URL");
    file.write(url.as_str());
    world.write(100, 10).await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    world.finish(Allowed::default()).await;
}

/// The same for the broker.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotated_password_of_the_broker_is_taken_up() {
    let world = World::alone().await;
    let servers = world.servers();
    servers.rabbitmqctl(&["add_user", "rotating", "first"]).await;
    servers.rabbitmqctl(&["set_permissions", "rotating", "^$", ".*", "^$"]).await;
    let url = |password: &str| servers.amqp_url.replace("outbox:outbox@", &format!("rotating:{password}@"));
    let file = UrlFile::new(&url("first"));
    let relay = world.process_with_file("AMQP_URL", &file, &[]).await;
    relay.ready().await;
    servers.rabbitmqctl(&["change_password", "rotating", "second"]).await;
    servers.rabbitmqctl(&["close_all_user_connections", "rotating", "rotated"]).await;
    relay.until_not_ready("ACCESS_REFUSED").await;
    file.write(&url("second"));
    world.write(100, 10).await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    world.finish(Allowed::default()).await;
}

/// A wrong login is said in one sentence and tried on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_login_is_told_and_tried_on() {
    let world = World::new().await;
    let mut amqp = url::Url::parse(&world.servers().amqp_url).expect("URL");
    amqp.set_password(Some("not-the-password")).expect("password");
    let relay = world.relay(&[("AMQP_URL", amqp.as_str())]).await;
    eventually("the refusal is told", async || {
        let (status, body) = relay.get("/readyz").await;
        status == 503 && body.contains("ACCESS_REFUSED") && !body.contains("not-the-password")
    })
    .await;
    assert_eq!(relay.get("/livez").await.0, 200);
    relay.stop().await.expect("clean stop");
    world.abandon();
}

/// Write permission is taken away from one exchange and given back: its rows wait, the others flow, nobody
/// reconnects because of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forbidden_exchange_holds_up_nobody_else() {
    let world = World::alone().await;
    let other = format!("{}_other", world.name);
    world.declare_other(&other).await;
    let without_other = format!("^{}$", world.name);
    world.servers().rabbitmqctl(&["add_user", "limited", "limited"]).await;
    world.servers().rabbitmqctl(&["set_permissions", "limited", "^$", &without_other, "^$"]).await;
    let amqp_url = world.servers().amqp_url.replace("outbox:outbox@", "limited:limited@");
    // Rows to the forbidden exchange, and to the default exchange, which is forbidden too.
    world
        .sql(&format!(
            "insert into outbox (exchange, routing_key, ordering_key, payload)
             select case when i % 2 = 0 then '{other}' else '' end, case when i % 2 = 0 then 'ok.1' else '{}' end,
                    'other ' || i % 5, '1' from generate_series(1, 100) i",
            world.name
        ))
        .await;
    world.write(3_000, 50).await;
    let relay = world.relay(&[("AMQP_URL", &amqp_url)]).await;
    world.until_delivered(3_000).await;
    world.until_at_least("select count(*) from outbox where last_error like '%ACCESS_REFUSED%'", 4).await;
    assert_eq!(world.number("select count(*) from outbox where dead_at is not null").await, 0);
    assert_eq!(
        relay.metric("reconnects_total{peer=\"broker\"}").await,
        0.0,
        "a closed channel is no lost connection"
    );
    world.servers().rabbitmqctl(&["set_permissions", "limited", "^$", ".*", "^$"]).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, duplicates: 4_000, ..Allowed::default() }).await;
}

/// A route that gives no answers (a quorum queue without majority does that) costs a few time-outs; then its rows
/// wait, and all other routes flow at full speed. When it answers again, its rows arrive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_route_holds_up_nobody_else() {
    use crate::support::scripted::ScriptedSink;
    use crate::support::world::{RunningRelay, without_servers};
    use outbox_relay::sink::{Fault, Refusal};
    use outbox_relay::store::memory::{MemoryStore, plain_row};
    use outbox_relay::store::{Route, Row};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

    let store = MemoryStore::default();
    for id in 1..=2_000 {
        let routing_key = if id % 2 == 0 { "silent" } else { "fine" };
        store.insert(Row {
            route: Arc::new(Route { exchange: String::new(), routing_key: routing_key.to_owned() }),
            ordering_key: Some(format!("{routing_key} {}", id % 40).into()),
            ..plain_row(id)
        });
    }
    let (silent, sent) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU32::new(0)));
    let (is_silent, count) = (Arc::clone(&silent), Arc::clone(&sent));
    let sink = ScriptedSink::new(move |row| {
        if row.route.routing_key == "silent" && is_silent.load(Relaxed) {
            count.fetch_add(1, Relaxed);
            return Err(Refusal::new(Fault::Silence, "scripted"));
        }
        Ok(())
    });
    let settings = without_servers(&[("OUTBOX_RETRY_MIN", "10ms"), ("OUTBOX_RETRY_MAX", "50ms")]);
    let relay = RunningRelay::between(settings, store.clone(), sink.clone()).await;
    let delivered = |routing_key: &'static str| {
        let rows = store.rows();
        rows.iter()
            .filter(|row| row.row.route.routing_key == routing_key && row.delivered_at.is_some())
            .count()
    };
    eventually("all rows of the other route are delivered", async || delivered("fine") == 1_000).await;
    eventually("the route is parked", async || relay.health().await.parked_routes == 1).await;
    let before = sent.load(Relaxed);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let probes = sent.load(Relaxed) - before;
    assert!(probes < 100, "{probes} messages were sent to a parked route in half a second");
    silent.store(false, Relaxed);
    eventually("its rows arrive when it answers", async || delivered("silent") == 1_000).await;
    relay.stop().await.expect("clean stop");
    assert_eq!(sink.in_order_but_for_repeats(), 0, "rows were sent twice");
}

//! Promise 12: metrics and health agree with the table.

use crate::support::proxy::{Link, Proxy};
use crate::support::scripted::ScriptedSink;
use crate::support::world::{Allowed, RunningRelay, TRIED, without_servers};
use crate::support::{PATIENT, World, eventually};
use outbox_relay::store::memory::{MemoryStore, plain_row};
use std::time::Duration;

/// A trigger that swallows the marks, or a policy that hides the rows from them: that is told, nothing is sent again meanwhile, and all goes on when it is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn marks_that_reach_no_row_are_told_and_repeat_nothing() {
    let swallow = "create function swallow() returns trigger language plpgsql as 'begin return null; end';
        create trigger swallow before update or delete on outbox for each row execute function swallow()";
    let hide = "create policy see on outbox for select using (true);
        create policy write on outbox for insert with check (true);
        alter table outbox enable row level security, force row level security";
    let (no_trigger, no_policy) =
        ("drop trigger swallow on outbox", "alter table outbox disable row level security");
    let hindrances = [
        ("1h", swallow, no_trigger),
        ("0", swallow, no_trigger),
        ("1h", hide, no_policy),
        ("0", hide, no_policy),
    ];
    for (retention, hinder, mend) in hindrances {
        let world = World::on_ours().await;
        world.sql(hinder).await;
        world.write(10, 2).await;
        let relay = world.relay(&[("OUTBOX_RETENTION", retention)]).await;
        relay.until_not_ready("marks did not reach their rows").await;
        eventually("all are sent", async || world.queue_depth().await == 10).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(world.queue_depth().await, 10, "each was sent once");
        world.sql(mend).await;
        world.drained().await;
        relay.ready().await;
        assert_eq!(world.queue_depth().await, 10);
        relay.stop().await.expect("clean stop");
        world.finish(Allowed::default()).await;
    }
}

/// The same of rows that were refused: unwritten, their waits would send them again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_that_reach_no_row_are_told_and_repeat_nothing() {
    let world = World::on_ours().await;
    world
        .sql(
            "create policy see on outbox for select using (true);
             create policy write on outbox for insert with check (true);
             alter table outbox enable row level security, force row level security;
             insert into outbox (routing_key, payload) select 'lost.1', '{}' from generate_series(1, 5);
             insert into outbox (routing_key, payload, headers) values ('ok.1', '{}', '[]')",
        )
        .await;
    let relay = world.relay(&[]).await;
    relay.until_not_ready("marks did not reach their rows").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let returned = relay.metric("messages_total{result=\"returned\"}").await;
    assert!((1.0..=5.0).contains(&returned), "{returned} were returned, and none twice");
    world.sql("alter table outbox disable row level security").await;
    world.bind("lost.#").await;
    world.drained().await;
    relay.ready().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, dead: true, ..Allowed::default() }).await;
}

/// A trigger of somebody's rejects the marks of some rows, or swallows them. They keep their places and are told; all others
/// go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_whose_mark_is_rejected_holds_up_no_other() {
    others_go_on("raise 'not this one'", "not this one").await;
    // Applications have codes of their own.
    others_go_on("raise 'nor this one' using errcode = '45000'", "nor this one").await;
    others_go_on("return null", "1 of 1 marks did not reach their rows").await;
}

async fn others_go_on(reject: &str, reason: &str) {
    let world = World::new().await;
    // The shard of row 6 is the last one, which the first replica gives away, and that of row 50 is among those it keeps.
    world.reject_updates("old.id in (6, 50)", reject).await;
    world.write(100, 10).await;
    let relay = world.relay(&PATIENT).await;
    world.until_delivered(98).await;
    let told = [6, 50].map(|id| format!("2 rows cannot be marked, id {id} for one: {reason}"));
    eventually("not ready, with the reason", async || {
        let (status, reason) = relay.get("/readyz").await;
        status == 503 && told.iter().any(|told| reason.contains(told))
    })
    .await;
    // The server is there: who is called for this should not look for an outage.
    let health = relay.health().await;
    assert_eq!((health.database.state.as_str(), health.reason.as_ref()), ("up", health.unmarked.as_ref()));
    assert_eq!(relay.metric("peer_up{peer=\"database\"}").await, 1.0);
    eventually("both are counted", async || relay.metric("unmarked_messages").await == 2.0).await;
    world.write(100, 10).await;
    world.until_delivered(198).await;
    assert_eq!(world.queue_depth().await, 200, "each was sent once");
    // Nor do their shards stay where they are; who takes them over sends the rows again.
    let second = world.relay(&PATIENT).await;
    for replica in [&relay, &second] {
        eventually("shards are shared", async || replica.health().await.ownership.owned == 8).await;
    }
    world.write(100, 10).await;
    world.until_delivered(298).await;
    world.sql("drop trigger reject on outbox").await;
    world.drained().await;
    assert_eq!(world.queue_depth().await, 301, "the one that was given away is sent again");
    assert_eq!(relay.metric("possible_duplicates_total").await, 1.0, "and told");
    for replica in [relay, second] {
        eventually("nothing is unmarked", async || {
            replica.health().await.unmarked.is_none() && replica.metric("unmarked_messages").await == 0.0
        })
        .await;
        replica.ready().await;
        replica.stop().await.expect("clean stop");
    }
    world.finish(Allowed { duplicates: 1, rewinds: true, ..Allowed::default() }).await;
}

/// The time since a time that is none is an error to Postgres 14 to 16, and infinite to later ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_of_no_time_does_not_stop_the_counting() {
    for time in ["infinity", "-infinity"] {
        let world = World::new().await;
        world
            .sql(&format!(
                "insert into outbox (routing_key, payload, created_at) values ('lost.1', '1', '{time}')"
            ))
            .await;
        let relay = world.relay(&PATIENT).await;
        world.until(TRIED, 1).await;
        eventually("health counts the row", async || relay.health().await.waiting == Some(1)).await;
        let health = relay.health().await;
        assert_eq!((health.status.as_str(), health.oldest_pending_seconds), ("ok", Some(0.0)));
        world.bind("lost.#").await;
        world.drained().await;
        relay.stop().await.expect("clean stop");
        world.finish(Allowed { refusals: true, ..Allowed::default() }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_and_metrics_agree_with_the_table() {
    let world = World::new().await;
    world.write(500, 20).await;
    world.sql("insert into outbox (routing_key, ordering_key, payload) select 'lost.' || i, 'stuck ' || i % 3, '{}' from generate_series(1, 6) i").await;
    world.sql("insert into outbox (routing_key, payload, headers) values ('ok.1', '{}', '[]')").await;
    let relay = world.relay(&PATIENT).await;
    world.until_delivered(500).await;
    world.until("select count(*) from outbox where attempts > 0 and dead_at is null", 3).await;
    eventually("the census has seen it", async || {
        let health = relay.health().await;
        [health.pending, health.waiting, health.dead, health.blocked_keys] == [6, 3, 1, 3].map(Some)
    })
    .await;
    let health = relay.health().await;
    assert_eq!(health.status, "ok");
    assert!(health.oldest_pending_seconds > Some(0.0));
    for (metric, value) in [
        ("pending_messages", 6.0),
        ("waiting_messages", 3.0),
        ("dead_messages", 1.0),
        ("blocked_keys", 3.0),
        ("messages_total{result=\"delivered\"}", 500.0),
        ("messages_total{result=\"dead\"}", 1.0),
        ("possible_duplicates_total", 0.0),
        ("end_to_end_seconds_count", 500.0),
        ("owned_shards", 16.0),
        ("peer_up{peer=\"database\"}", 1.0),
        ("peer_up{peer=\"broker\"}", 1.0),
    ] {
        assert_eq!(relay.metric(metric).await, value, "{metric}");
    }
    assert!(relay.metric("messages_total{result=\"returned\"}").await >= 3.0);
    world.bind("lost.#").await;
    world.drained().await;
    eventually("the census has seen it", async || relay.health().await.pending == Some(0)).await;
    assert_eq!(relay.health().await.oldest_pending_seconds, Some(0.0));
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, dead: true, ..Allowed::default() }).await;
}

/// `status` asks a running relay; the exit code says whether all is well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_tells_how_a_running_relay_is() {
    let world = World::new().await;
    let relay = world.relay(&PATIENT).await;
    relay.ready().await;
    eventually("counted", async || relay.health().await.pending == Some(0)).await;
    let listen = relay.address.to_string();
    let status = async |args: &[&str]| {
        let args: Vec<&str> =
            ["status", "--http-listen", &listen].into_iter().chain(args.iter().copied()).collect();
        crate::support::process::run(&args, &std::collections::BTreeMap::new()).await
    };
    let (code, out, _) = status(&[]).await;
    assert!(code == 0 && out.contains("status      ok") && out.contains("pending     0"), "{code}: {out}");
    let (code, out, _) = status(&["--json"]).await;
    assert!(code == 0 && out.starts_with("{\"status\":\"ok\""), "{code}: {out}");
    let (code, out, _) = status(&["--probe", "livez"]).await;
    assert_eq!((code, out.as_str()), (0, "ok\n"));
    world.sql("alter table outbox rename to elsewhere").await;
    eventually("the exit code says that all is not well", async || status(&[]).await.0 == 3).await;
    relay.stop().await.expect("clean stop");
    world.abandon();
}

/// The same lines go to the log file, without colours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_go_to_a_file_too() {
    let world = World::new().await;
    let file = std::env::temp_dir().join(format!("outbox-relay-{:016x}.log", fastrand::u64(..)));
    let path = file.to_str().expect("UTF-8");
    let relay = world.process(&[("OUTBOX_LOG_FILE", path), ("OUTBOX_LOG_FORMAT", "json")]).await;
    relay.ready().await;
    assert!(relay.terminate().await.success());
    let lines = std::fs::read_to_string(&file).expect("the log file");
    std::fs::remove_file(&file).expect("remove");
    for event in [
        "starting",
        "connected to the database",
        "connected to the broker",
        "stopping",
        "stopped; everything confirmed is marked",
    ] {
        let told = lines.lines().filter(|line| line.contains(&format!("\"message\":\"{event}\""))).count();
        assert_eq!(told, 1, "{event:?} is told {told} times in\n{lines}");
    }
    assert!(lines.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()), "{lines}");
    world.abandon();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_endpoint_answers_nonsense_with_an_error() {
    let world = World::new().await;
    let relay = world.relay(&[]).await;
    relay.ready().await;
    assert_eq!(relay.get("/").await.0, 404);
    assert_eq!(relay.get("/health/../../etc/passwd").await.0, 404);
    assert_eq!(relay.get("/livez").await, (200, "ok\n".to_owned()));
    relay.stop().await.expect("clean stop");
    world.abandon();
}

/// A table that is missing or of the wrong shape is said in one sentence, and taken up when it is mended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_does_not_fit_is_told_and_taken_up_when_mended() {
    let world = World::new().await;
    world.sql("alter table outbox rename to elsewhere").await;
    let relay = world.relay(&[]).await;
    let told = |sentence| relay.until_not_ready(sentence);
    told("table outbox does not exist; run `outbox-relay migrate`").await;
    world
        .sql("alter table elsewhere rename to outbox; alter table outbox drop column available_at cascade")
        .await;
    told("table outbox lacks column available_at").await;
    world.sql("alter table outbox add column available_at timestamptz not null default clock_timestamp(), alter column message_id type text").await;
    told("column message_id of table outbox is text, expected uuid").await;
    world.sql("drop table outbox").await;
    world.sql("drop table outbox_migrations").await;
    world.migrate("outbox").await;
    world.write(10, 1).await;
    world.drained().await;
    relay.ready().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// `check` finds each problem, names the remedy, and has its exit code.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_finds_what_is_wrong_and_says_the_remedy() {
    let world = World::new().await;
    let check =
        async |extra: &[(&str, &str)]| crate::support::process::run(&["check"], &world.pairs(extra)).await;
    let (code, out, _) = check(&[]).await;
    assert_eq!((code, out.contains("all well")), (0, true), "{out}");

    let expect = async |extra: &[(&str, &str)], problem: &str, remedy: &str| {
        let (code, out, _) = check(extra).await;
        assert_eq!(code, 3, "{out}");
        let told = out.lines().any(|line| line.contains(problem) && line.contains(remedy));
        assert!(told, "{out} lacks {problem:?} with {remedy:?}");
    };
    expect(&[("OUTBOX_TABLE", "nothing")], "table nothing does not exist", "migrate").await;
    expect(&[("OUTBOX_EXCHANGE", "nothing")], "no exchange 'nothing'", "declare it").await;
    expect(&[("DATABASE_URL", "postgres://nobody:x@127.0.0.1:1/x")], "cannot connect", "check DATABASE_URL")
        .await;
    expect(&[("AMQP_URL", "amqp://nobody:x@127.0.0.1:1/x")], "cannot connect", "check AMQP_URL").await;
    let wrong_login = world.servers().amqp_url.replace("outbox:outbox@", "outbox:wrong@");
    expect(&[("AMQP_URL", &wrong_login)], "ACCESS_REFUSED", "check AMQP_URL").await;
    let wrong_login = world.database_url.replace("outbox:outbox@", "outbox:wrong@");
    expect(&[("DATABASE_URL", &wrong_login)], "password authentication failed", "check DATABASE_URL").await;

    world.sql("alter procedure outbox_watch rename to elsewhere").await;
    expect(&[], "procedure for long polling", "migrate").await;
    let (code, out, _) = check(&[("OUTBOX_LONG_POLL", "false")]).await;
    assert_eq!(code, 0, "{out}");
    world.sql("alter procedure elsewhere rename to outbox_watch").await;

    world.sql("alter table outbox alter column id set cache 50").await;
    expect(&[], "its cache is 50", "set cache 1").await;
    world.sql("alter table outbox alter column id set cache 1; drop index outbox_pending").await;
    expect(&[], "index for the poll", "migrate").await;
    world.sql("create index outbox_pending on outbox (id) where delivered_at is null and dead_at is null; drop index outbox_waiting").await;
    expect(&[], "index for waiting rows", "migrate").await;
    world.sql("alter table outbox drop column last_error").await;
    expect(&[], "lacks column last_error", "migrate").await;
    world.abandon();
}

/// A relay role without a right is told which, and how to grant it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_finds_missing_grants() {
    let world = World::new().await;
    let (role, url) = world.login("secret").await;
    world.sql(&format!("grant select, update on outbox to {role}")).await;
    let (code, out, _) =
        crate::support::process::run(&["check"], &world.pairs(&[("DATABASE_URL", url.as_str())])).await;
    assert_eq!(code, 3, "{out}");
    assert!(
        out.contains("grant to delete: it is missing; run as owner of the table: grant delete on \"outbox\""),
        "{out}"
    );
    // With the rights of the documentation it does its job.
    assert!(out.contains("grants for ownership: some are missing"), "{out}");
    world.grant(&role).await;
    world.write(100, 5).await;
    let relay = world.relay(&[("DATABASE_URL", url.as_str())]).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// What an alert needs: a replica that the database has left says so, and does not go on to claim its shards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_tell_which_server_is_away() {
    let world = World::new().await;
    let amqp_url = &world.servers().amqp_url;
    let (database, broker) = (Proxy::to(&world.database_url).await, Proxy::to(amqp_url).await);
    let (database_url, amqp_url) = (database.url(&world.database_url), broker.url(amqp_url));
    let relay = world.relay(&[("DATABASE_URL", &database_url), ("AMQP_URL", &amqp_url)]).await;
    relay.ready().await;
    let told = async |name: &str, value: f64| {
        eventually(&format!("{name} is {value}"), async || relay.metric(name).await == value).await;
    };
    broker.set(Link::Cut);
    told("peer_up{peer=\"broker\"}", 0.0).await;
    broker.set(Link::Pass);
    told("peer_up{peer=\"broker\"}", 1.0).await;
    told("owned_shards", 16.0).await;
    database.set(Link::Cut);
    told("peer_up{peer=\"database\"}", 0.0).await;
    told("owned_shards", 0.0).await;
    database.set(Link::Pass);
    told("peer_up{peer=\"database\"}", 1.0).await;
    told("owned_shards", 16.0).await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// A link that stood still for some seconds is no reason to count seldom.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_are_fresh_again_soon_after_a_link_stood_still() {
    let world = World::new().await;
    let proxy = Proxy::to(&world.database_url).await;
    let relay = world.relay(&[("DATABASE_URL", &proxy.url(&world.database_url))]).await;
    relay.ready().await;
    for _ in 0..2 {
        proxy.set(Link::DeadDown);
        // Long enough for a count to be asked for, and for its answer to be late by seconds.
        tokio::time::sleep(Duration::from_secs(6)).await;
        proxy.set(Link::Pass);
    }
    let begun = std::time::Instant::now();
    world.write(100, 5).await;
    world.drained().await;
    world
        .sql("insert into outbox (routing_key, payload, available_at) values ('ok.1', '1', now() + '1 hour')")
        .await;
    eventually("health counts the row", async || relay.health().await.pending == Some(1)).await;
    // Not twenty times as long as the link stood still, nor the longest rest, which is 30 s.
    assert!(begun.elapsed() < Duration::from_secs(20), "counted {:?} later", begun.elapsed());
    world.sql("update outbox set available_at = now()").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// Half alive it would do harm that nobody notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_part_that_dies_ends_the_relay() {
    let store = MemoryStore::default();
    store.insert(plain_row(1));
    let sink = ScriptedSink::new(|_| panic!("a defect"));
    let relay = RunningRelay::between(without_servers(&[]), store, sink).await;
    let error = relay.ended().await.expect_err("it cannot go on");
    assert!(error.to_string().contains("a defect"), "{error}");
}

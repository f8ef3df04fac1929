//! Behind a real PgBouncer in transaction mode that gives each transaction the next of its connections: what leaned on the
//! session of an earlier one would miss it.

use crate::support::process::run;
use crate::support::world::{Allowed, UNDELIVERED};
use crate::support::{PATIENT, World, eventually};
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, Executor, PgConnection, Row};
use std::collections::HashSet;
use std::str::FromStr;

const POOLED: (&str, &str) = ("OUTBOX_TRANSACTION_POOLING", "true");

async fn through_pgbouncer(url: &str) -> PgConnection {
    let options = PgConnectOptions::from_str(url).expect("URL").extra_float_digits(None);
    PgConnection::connect_with(&options).await.expect("the pooler answers")
}

/// Server processes that answer one client in turn.
async fn backends(url: &str) -> HashSet<i32> {
    let mut connection = through_pgbouncer(url).await;
    let mut seen = HashSet::new();
    for _ in 0..20 {
        let row = connection.fetch_one(sqlx::raw_sql("select pg_backend_pid()")).await.expect("a row");
        seen.insert(row.get(0));
    }
    seen
}

/// Two replicas with all they do: ownership, ordered rows, refused ones, dead ones, retention, one that stops.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_works_whatever_connection_a_transaction_gets() {
    let (world, url) = World::behind_pgbouncer().await;
    let settings = [("DATABASE_URL", url.as_str()), POOLED, PATIENT[0], ("OUTBOX_RETENTION", "1s")];
    let relays = [world.relay(&settings).await, world.relay(&settings).await];
    for relay in &relays {
        eventually("it owns its half", async || relay.health().await.ownership.owned == 8).await;
    }
    world.sql("insert into outbox (routing_key, ordering_key, payload) select 'later.1', 'stuck ' || i % 3, '{}' from generate_series(1, 30) i").await;
    world.sql("insert into outbox (routing_key, payload, headers) values ('ok.1', '{}', '[]')").await;
    for _ in 0..20 {
        world.write(200, 50).await;
    }
    world.until("select count(*) from outbox where delivered_at is null and dead_at is null", 30).await;
    assert!(
        backends(&url).await.len() > 1,
        "nothing is shown: the pooler gave the same connection each time"
    );
    let [leaves, stays] = relays;
    leaves.stop().await.expect("clean stop");
    world.bind("later.#").await;
    world.write(2000, 50).await;
    world.until("select count(*) from outbox where dead_at is null", 0).await;
    world.until_health_dead(&stays, 1).await;
    stays.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, dead: true, ..Allowed::default() }).await;
}

/// It is an outage of the database, and ends like one. What was confirmed meanwhile is marked afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pooler_that_is_killed_or_freezes_costs_no_attempt_and_repeats_nothing() {
    let world = World::alone().await;
    let url = world.pgbouncer_url().await;
    let relay = world.relay(&[("DATABASE_URL", &url), POOLED]).await;
    for (harm, remedy) in [("kill", "start"), ("pause", "resume"), ("stop", "start")] {
        world.write(10_000, 100).await;
        world.servers().control(harm, "pgbouncer").await;
        assert!(world.number(UNDELIVERED).await > 0, "it came while rows flowed");
        world.write(100, 10).await;
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        world.servers().control(remedy, "pgbouncer").await;
        world.drained().await;
    }
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_and_migrate_say_what_a_pooler_needs() {
    let (world, url) = World::behind_pgbouncer().await;
    let check = async |pooling: &str| {
        let settings = [("DATABASE_URL", url.as_str()), ("OUTBOX_TRANSACTION_POOLING", pooling)];
        run(&["check"], &world.pairs(&settings)).await
    };
    let (code, output, _) = check("false").await;
    assert_eq!(code, 3, "{output}");
    assert!(output.contains("needs OUTBOX_TRANSACTION_POOLING=true"), "{output}");
    let (code, _, error) = run(&["migrate"], &world.pairs(&[("DATABASE_URL", &url), POOLED])).await;
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("a direct DATABASE_URL to migrate"), "{error}");
    let relay = world.relay(&[("DATABASE_URL", &url), POOLED]).await;
    relay.ready().await;
    for _ in 0..5 {
        let (code, output, _) = check("true").await;
        assert_eq!(code, 0, "{output}");
    }
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// PgBouncer was told to drop what it does not know. All would seem well until two transactions meet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_that_a_pooler_drops_in_silence_are_missed() {
    let world = World::alone().await;
    let url = world.pgbouncer_url().await;
    let console = format!("{}/pgbouncer", url.rsplit_once('/').expect("URL with a database").0);
    let mut console = through_pgbouncer(&console).await;
    console.execute(sqlx::raw_sql("set ignore_startup_parameters = 'options'")).await.expect("set");
    // Our limits are no proof: the role may have them.
    let role = "alter role outbox set statement_timeout = '15s'; alter role outbox set lock_timeout = '5s'";
    world.superuser(role).await;
    let (code, output, _) = run(&["check"], &world.pairs(&[("DATABASE_URL", &url)])).await;
    assert_eq!(code, 3, "{output}");
    assert!(output.contains("needs OUTBOX_TRANSACTION_POOLING=true"), "{output}");
    assert!(!output.contains("check DATABASE_URL"), "{output}");
    let (code, _, error) = run(&["migrate"], &world.pairs(&[("DATABASE_URL", &url)])).await;
    assert_eq!(code, 1, "{error}");
    assert!(error.contains("a direct DATABASE_URL to migrate"), "{error}");
    let relay = world.process(&[("DATABASE_URL", &url)]).await;
    eventually("it says so", async || relay.logged().contains("needs OUTBOX_TRANSACTION_POOLING=true")).await;
    assert!(relay.terminate().await.success());
    world.finish(Allowed::default()).await;
}

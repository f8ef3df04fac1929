//! Migrations: repeatable, harmless when two run at once, and never in a table of somebody else.

use crate::support::World;
use crate::support::process::run;
use crate::support::world::Allowed;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use std::time::Duration;

const DROP_ALL: &str =
    "drop table outbox, outbox_lease, outbox_replica, outbox_migrations; drop procedure outbox_watch";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_migrate_at_once_do_no_harm() {
    let world = World::new().await;
    world.sql(DROP_ALL).await;
    let env = world.pairs(&[]);
    let (env, all) = (&env, 0..6);
    let runs = all.map(|_| run(&["migrate"], env));
    for (code, out, err) in futures_util::future::join_all(runs).await {
        assert_eq!((code, out.as_str()), (0, "table outbox is up to date\n"), "{err}");
    }
    assert_eq!(world.number("select count(*) from outbox_migrations").await, 3);
    assert_eq!(world.number("select count(*) from pg_tables where tablename like '\\_sqlx%'").await, 0);
    world.abandon();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_print_shows_can_be_run_by_hand_and_again_by_the_relay() {
    let world = World::new().await;
    world.sql(DROP_ALL).await;
    let (code, sql, err) = run(&["migrate", "--print"], &world.pairs(&[])).await;
    assert_eq!(code, 0, "{err}");
    world.sql(&sql).await;
    world.sql(&sql).await;
    let known = "select count(*) from pg_tables where tablename = 'outbox_migrations'";
    assert_eq!(world.number(known).await, 0, "who migrates by hand keeps no list");
    let relay = world.relay(&[("OUTBOX_MIGRATE", "true")]).await;
    world.sql("insert into outbox (routing_key, payload) values ('ok.1', '{}')").await;
    world.drained().await;
    assert_eq!(world.number("select count(*) from outbox_migrations").await, 3, "the relay does");
    relay.stop().await.expect("clean stop");
    world.abandon();
}

/// Behind a migration that waits for a lock every writer would wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_print_shows_waits_for_no_lock_for_long() {
    let world = World::new().await;
    let (code, sql, err) = run(&["migrate", "--print"], &world.pairs(&[])).await;
    assert_eq!(code, 0, "{err}");
    let mut writer = PgConnection::connect(&world.database_url).await.expect("database");
    writer.execute("begin; lock table outbox in row exclusive mode").await.expect("lock");
    let mut by_hand = PgConnection::connect(&world.database_url).await.expect("database");
    let refused = tokio::time::timeout(Duration::from_secs(60), by_hand.execute(AssertSqlSafe(sql))).await;
    let error = refused.expect("a limit").expect_err("the table is locked");
    assert_eq!(error.as_database_error().and_then(|error| error.code()).as_deref(), Some("55P03"), "{error}");
    world.abandon();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn run_migrates_when_it_is_told_to() {
    let world = World::new().await;
    world.sql(DROP_ALL).await;
    let relay = world.relay(&[("OUTBOX_MIGRATE", "true")]).await;
    relay.ready().await;
    assert_eq!(world.number("select count(*) from outbox_migrations").await, 3);
    // With the ledger of writers.
    world.migrate("outbox").await;
    world.write(10, 2).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

/// The last statement of a migration takes so many seconds, as an index on a large table does.
async fn slow_to_migrate(world: &World, seconds: u32) {
    world
        .superuser(&format!(
            "create function slow() returns event_trigger language plpgsql as $$ begin perform pg_sleep({seconds}); end $$;
             create event trigger slow on ddl_command_start when tag in ('CREATE PROCEDURE') execute function slow()"
        ))
        .await;
}

/// An index on a large table takes longer than any call of the pipeline may.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_at_the_start_has_more_time_than_a_call() {
    let world = World::new().await;
    slow_to_migrate(&world, 25).await;
    let relay = world.relay(&[("OUTBOX_MIGRATE", "true"), ("OUTBOX_TABLE", "slow")]).await;
    relay.ready().await;
    relay.stop().await.expect("clean stop");
    world.abandon();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_cannot_be_is_told_in_one_sentence() {
    let world = World::new().await;
    let refused = async |extra: &[(&str, &str)], sentence: &str| {
        let (code, _, err) = run(&["migrate"], &world.pairs(extra)).await;
        assert_eq!(code, 1, "{err}");
        assert!(
            err.starts_with("error: ") && err.contains(sentence) && err.trim_end().lines().count() == 1,
            "{err:?} lacks {sentence:?}"
        );
    };
    refused(&[("OUTBOX_TABLE", "nowhere.outbox")], "schema \"nowhere\" does not exist").await;
    world.sql("create table other (id bigint)").await;
    refused(&[("OUTBOX_TABLE", "other")], "cannot migrate table other").await;
    world.sql("insert into outbox_migrations (version, description, success, checksum, execution_time) values (99, 'x', true, '', 0)").await;
    refused(&[], "was migrated by a newer outbox-relay").await;
    world.abandon();
}

/// Trying again would take as long again, for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_that_takes_too_long_is_told_with_the_other_way() {
    let world = World::new().await;
    slow_to_migrate(&world, 60).await;
    let pairs = world.pairs(&[("OUTBOX_TABLE", "slow")]);
    let migrating = run(&["migrate"], &pairs);
    let cancelling = async {
        let cancel = "select count(pg_cancel_backend(pid)) from pg_stat_activity where wait_event = 'PgSleep' and datname = current_database()";
        world.until(cancel, 1).await;
    };
    let ((code, _, err), ()) = tokio::join!(migrating, cancelling);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("SQLSTATE 57014") && err.contains("`outbox-relay migrate --print`"), "{err}");
    world.abandon();
}

/// The state machine is held by the table itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_cannot_be_delivered_and_dead() {
    use sqlx::Executor;
    let world = World::new().await;
    world.sql("insert into outbox (routing_key, payload) values ('ok.1', '{}')").await;
    let refused = world.db().await.execute("update outbox set delivered_at = now(), dead_at = now()").await;
    assert!(refused.expect_err("refused").to_string().contains("outbox_one_end"));
    world.abandon();
}

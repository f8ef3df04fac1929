//! Promise 4: rows that share a key are delivered in id order, through refusals, retries and restarts.

use crate::support::scripted::ScriptedSink;
use crate::support::world::{Allowed, RunningRelay, without_servers};
use crate::support::{World, eventually, rng};
use outbox_relay::sink::{Away, Fault, Refusal, SinkState};
use outbox_relay::store::memory::{MemoryStore, plain_row};
use outbox_relay::store::{Route, Row, StoreError, Trouble};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A key's first row is refused: the others of the key wait for it, other keys do not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_row_holds_back_its_key_and_nobody_else() {
    let world = World::new().await;
    world
        .sql(
            "insert into outbox (routing_key, ordering_key, payload) values ('lost.1', 'held', '0');
             insert into outbox (routing_key, ordering_key, payload)
             select 'ok.1', case when i % 2 = 0 then 'held' else 'free' end, to_jsonb(i) from generate_series(1, 200) i",
        )
        .await;
    let relay = world.relay(&[]).await;
    world.until_delivered(100).await;
    world.until("select count(*) from outbox where attempts > 2", 1).await;
    assert_eq!(
        world
            .number("select count(*) from outbox where ordering_key = 'held' and delivered_at is not null")
            .await,
        0
    );
    eventually("health counts the held key", async || relay.health().await.blocked_keys == Some(1)).await;
    world.bind("lost.#").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, ..Allowed::default() }).await;
}

/// Bindings come and go while rows of few keys flow: refusals everywhere, order everywhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_survives_bindings_that_come_and_go() {
    let world = World::new().await;
    let mut rng = rng("order_survives_bindings_that_come_and_go");
    let relay = world.relay(&[("OUTBOX_RETRY_MAX", "100ms")]).await;
    world.unbind("ok.#").await;
    for _ in 0..30 {
        world.write(200, 5).await;
        let pattern = format!("ok.{}", rng.u8(0..7));
        if rng.bool() {
            world.bind(&pattern).await;
        } else {
            world.unbind(&pattern).await;
        }
    }
    world.bind("ok.#").await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, ..Allowed::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelined_order_holds_without_refusals() {
    let world = World::new().await;
    world.write(5000, 3).await;
    let relay = world.relay(&[("OUTBOX_ORDERING", "pipelined")]).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_ordering_a_refused_row_holds_back_nobody() {
    let world = World::new().await;
    world.sql("insert into outbox (routing_key, ordering_key, payload) values ('lost.1', 'k', '0')").await;
    world.sql("insert into outbox (routing_key, ordering_key, payload) select 'ok.1', 'k', '1' from generate_series(1, 500)").await;
    let relay = world.relay(&[("OUTBOX_ORDERING", "none")]).await;
    world.until_delivered(500).await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed { refusals: true, pending: true, disorder: true, ..Allowed::default() }).await;
}

/// Writers that take turns on a key by its row lock, with think time and other keys between: id order is
/// commit order, and deliveries keep it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_is_right_for_writers_that_take_turns_on_their_key() {
    let world = World::new().await;
    world.sql("create table account (id int primary key, version int not null default 0); insert into account select generate_series(0, 4)").await;
    let relay = world.relay(&[]).await;
    let mut writers = Vec::new();
    for writer in 0..8 {
        let mut db = world.db().await;
        let mut rng = rng(&format!("writer {writer}"));
        writers.push(tokio::spawn(async move {
            use sqlx::Connection;
            for _ in 0..60 {
                let account = rng.i32(0..5);
                let think = rng.f64() / 100.0;
                let rollback = rng.u8(0..10) == 0;
                let mut transaction = db.begin().await.expect("begin");
                sqlx::query("update account set version = version + 1 where id = $1")
                    .bind(account).execute(&mut *transaction).await.expect("update");
                sqlx::query("select pg_sleep($1)").bind(think).execute(&mut *transaction).await.expect("think");
                sqlx::query(
                    "insert into outbox (routing_key, ordering_key, payload)
                     select 'ok.1', 'account ' || id, jsonb_build_object('version', version) from account where id = $1",
                ).bind(account).execute(&mut *transaction).await.expect("insert");
                if rollback { transaction.rollback().await.expect("rollback") } else { transaction.commit().await.expect("commit") }
            }
        }));
    }
    for writer in writers {
        writer.await.expect("writer");
    }
    world.drained().await;
    relay.stop().await.expect("clean stop");
    let received = world.take_messages().await;
    let mut versions: HashMap<String, i64> = HashMap::new();
    for message in &received {
        let version = serde_json::from_slice::<serde_json::Value>(&message.body).expect("JSON")["version"]
            .as_i64()
            .expect("version");
        let key = format!("{:?}", message.headers["x-outbox-key"]);
        let last = versions.insert(key.clone(), version).unwrap_or(0);
        assert_eq!(version, last + 1, "versions of {key} are not consecutive");
    }
    world.finish_with(received, Allowed::default()).await;
}

fn row(id: i64, key: Option<String>) -> Row {
    let route = Route { exchange: "x".to_owned(), routing_key: format!("r{}", id % 3) };
    Row { route: Arc::new(route), ordering_key: key.map(Into::into), ..plain_row(id) }
}

/// Every kind of refusal at random, a database that fails at random, a broker that comes and goes: the
/// in-memory store and the scripted sink play what real servers cannot be made to play.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_survives_every_kind_of_refusal() {
    for round in 0..12 {
        let mut rng = rng(&format!("order_survives_every_kind_of_refusal, round {round}"));
        let store = MemoryStore::default();
        let (mut dice, doubts) = (rng.fork(), Arc::new(AtomicU64::new(0)));
        let doubted = Arc::clone(&doubts);
        let sink = ScriptedSink::new(move |row| {
            let fault = match dice.u8(0..40) {
                0 => Fault::Outage,
                1 | 2 => Fault::Unknown,
                3 => Fault::Silence,
                4 => Fault::Suspect,
                5..=7 => Fault::Unroutable,
                8..=10 => Fault::Destination,
                11 => Fault::Message,
                12 if row.id % 50 == 0 => Fault::Hopeless,
                // Trust that comes and goes between two batches.
                13 | 14 => return Err(Refusal::without_lease()),
                _ => return Ok(()),
            };
            if matches!(fault, Fault::Unknown | Fault::Silence | Fault::Suspect) {
                doubted.fetch_add(1, Relaxed);
            }
            Err(Refusal::new(fault, "scripted"))
        })
        .slow(std::time::Duration::from_millis(round * 5));
        let settings = without_servers(&[
            ("OUTBOX_RETRY_MIN", "1ms"),
            ("OUTBOX_RETRY_MAX", "10ms"),
            ("OUTBOX_MAX_IN_FLIGHT", "60"),
            ("OUTBOX_BATCH_SIZE", "20"),
            ("OUTBOX_POLL_INTERVAL", "5ms"),
            ("OUTBOX_MAX_ATTEMPTS", "1000"),
        ]);
        let relay = RunningRelay::between(settings, store.clone(), sink.clone()).await;
        // Before it owns shards it reads nothing, and no fault would meet a row.
        relay.until_owner().await;
        let keys = rng.i64(1..30);
        for burst in 0..10 {
            for id in 60 * burst + 1..=60 * (burst + 1) {
                let key = (rng.u8(0..5) > 0).then(|| format!("k{}", rng.i64(0..keys)));
                store.insert(row(id, key));
            }
            let error = |trouble| StoreError { trouble, sentence: "scripted".to_owned() };
            for _ in 0..rng.u8(1..4) {
                store.fail_next(error(if rng.bool() { Trouble::Outage } else { Trouble::Contention }));
            }
            let away = rng.u8(0..3) == 0;
            if away {
                sink.set_state(SinkState::Away(Away::outage("scripted")));
            }
            tokio::time::sleep(std::time::Duration::from_millis(rng.u64(0..20))).await;
            if away {
                sink.set_state(SinkState::Ready);
            }
        }
        eventually("all rows are settled", async || store.rows().iter().all(|stored| !stored.pending()))
            .await;
        let counted = relay.metric("possible_duplicates_total").await;
        assert_eq!(counted, doubts.load(Relaxed) as f64, "each that may have arrived is counted");
        relay.stop().await.expect("clean stop");
        assert_eq!(sink.in_order_but_for_repeats(), 0, "rows were sent twice");
        let delivered = store.rows().iter().filter(|stored| stored.delivered_at.is_some()).count();
        assert_eq!(delivered, sink.taken().len(), "every row that was taken is marked, once");
    }
}

/// Refused rows that are tried again by the prober or soon, while the worker of their key is busy with a slow batch and
/// has not yet heard of the refusal's end: what it holds of the key must not be passed by what is read meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_survives_refusals_while_a_worker_is_slow() {
    let mut rng = rng("order_survives_refusals_while_a_worker_is_slow");
    let store = MemoryStore::default();
    let mut asked = 0;
    // In bursts, so that the route is parked and probed.
    let sink = ScriptedSink::new(move |_| {
        asked += 1;
        match asked % 40 < 12 {
            true => Err(Refusal::new(Fault::Unroutable, "scripted")),
            false => Ok(()),
        }
    })
    .slow(std::time::Duration::from_millis(40));
    let settings = without_servers(&[
        ("OUTBOX_RETRY_MIN", "1ms"),
        ("OUTBOX_RETRY_MAX", "5ms"),
        ("OUTBOX_WORKERS", "2"),
        ("OUTBOX_POLL_INTERVAL", "1ms"),
    ]);
    let relay = RunningRelay::between(settings, store.clone(), sink.clone()).await;
    for id in 1..=400 {
        store.insert(row(id, Some(format!("k{}", rng.u8(0..4)))));
        if id % 2 == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }
    eventually("all rows are delivered", async || store.rows().iter().all(|stored| !stored.pending())).await;
    relay.stop().await.expect("clean stop");
    assert_eq!(sink.in_order_but_for_repeats(), 0, "rows were sent twice");
}

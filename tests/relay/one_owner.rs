//! Promise 8: with several replicas each key is published by one replica at a time; when one dies another takes over
//! by itself.

use crate::support::proxy::{Link, Proxy};
use crate::support::scripted::ScriptedSink;
use crate::support::world::{Allowed, RunningRelay, without_servers};
use crate::support::{PATIENT, RelayProcess, World, eventually, rng};
use outbox_relay::sink::{Fault, Refusal};
use outbox_relay::store::Row;
use outbox_relay::store::memory::{MemoryStore, plain_row};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

const SHARDS: u32 = 16;

/// Replicas that own everything together, and each its part.
async fn shared(replicas: &[&RelayProcess]) {
    let fair = SHARDS / replicas.len() as u32;
    eventually("the shards are shared", async || {
        let mut owned = Vec::new();
        for replica in replicas {
            owned.push(replica.owned().await.unwrap_or(0));
        }
        owned.iter().sum::<u32>() == SHARDS && owned.iter().all(|owned| (fair..=fair + 1).contains(owned))
    })
    .await;
}

/// Writes without end, in small transactions, until it is told to stop; answers with the number of rows.
struct Load {
    stop: tokio_util::sync::CancellationToken,
    writer: tokio::task::JoinHandle<()>,
}

impl Load {
    fn start(world: &World, keys: i64) -> Self {
        let stop = tokio_util::sync::CancellationToken::new();
        let (stopped, url) = (stop.clone(), world.database_url.clone());
        let writer = tokio::spawn(async move {
            use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
            let mut db = PgConnection::connect(&url).await.expect("database");
            while !stopped.is_cancelled() {
                let sql = format!(
                    "insert into outbox (routing_key, ordering_key, payload)
                     select 'ok.' || i % 7, 'key ' || i % {keys}, jsonb_build_object('i', i)
                     from generate_series(1, 100) i"
                );
                db.execute(AssertSqlSafe(sql)).await.expect("insert");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        Self { stop, writer }
    }

    async fn end(self) {
        self.stop.cancel();
        self.writer.await.expect("writer");
    }
}

/// Many rows at once, of keys that nobody else writes.
async fn backlog(world: &World) {
    world
        .sql(
            "insert into outbox (routing_key, ordering_key, payload)
             select 'ok.1', 'backlog ' || i % 200, '1' from generate_series(1, 30000) i",
        )
        .await;
}

/// Joining and leaving under load: what is handed over is drained, so nothing is sent twice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_come_and_go_in_order_repeat_nothing() {
    let world = World::new().await;
    // Enough that rows of every shard are in flight whenever one changes hands.
    let load = Load::start(&world, 50);
    let first = world.process(&PATIENT).await;
    eventually("one alone owns everything", async || first.owned().await == Some(SHARDS)).await;
    backlog(&world).await;
    let second = world.process(&PATIENT).await;
    shared(&[&first, &second]).await;
    backlog(&world).await;
    let third = world.process(&PATIENT).await;
    shared(&[&first, &second, &third]).await;
    let begun = Instant::now();
    assert!(first.terminate().await.success());
    shared(&[&second, &third]).await;
    eprintln!("a clean stop and the shards in other hands after {:?}", begun.elapsed());
    assert!(third.terminate().await.success());
    shared(&[&second]).await;
    load.end().await;
    world.drained().await;
    assert_eq!(second.metric("lease_changes_total{change=\"lost\"}").await, 0.0);
    assert!(second.terminate().await.success());
    world.finish(Allowed::default()).await;
}

/// Confirms that take their time: a shard changes hands only when the last of them is in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_that_is_handed_over_has_nothing_under_way() {
    let world = World::new().await;
    let proxy = Proxy::to(&world.servers().amqp_url).await;
    let url = proxy.url(&world.servers().amqp_url);
    let slow = world.process(&[("AMQP_URL", url.as_str()), PATIENT[0]]).await;
    slow.until_owner().await;
    proxy.set(Link::Delay(Duration::from_millis(400)));
    backlog(&world).await;
    world.until_at_least_delivered(100).await;
    let quick = world.process(&PATIENT).await;
    shared(&[&slow, &quick]).await;
    proxy.set(Link::Pass);
    world.drained().await;
    assert!(slow.terminate().await.success() && quick.terminate().await.success());
    world.finish(Allowed::default()).await;
}

/// A stop that waits for one answer keeps the shard of that row only; others go on with the rest meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopping_replica_keeps_only_what_is_under_way() {
    let world = World::new().await;
    let proxy = Proxy::to(&world.servers().amqp_url).await;
    let url = proxy.url(&world.servers().amqp_url);
    // However long the confirm takes, nobody loses patience.
    let url = format!("{url}?heartbeat=60");
    let patient = [("OUTBOX_SHUTDOWN_GRACE", "5m"), ("OUTBOX_CONFIRM_TIMEOUT", "5m"), PATIENT[0]];
    let leaver = world.process(&[&[("AMQP_URL", url.as_str())], &patient[..]].concat()).await;
    eventually("one alone owns everything", async || leaver.owned().await == Some(SHARDS)).await;
    world.write(1, 1).await;
    world.drained().await;
    proxy.set(Link::DeadDown);
    world.write(1, 1).await;
    eventually("a message waits for its confirm", async || {
        leaver.try_health().await.is_some_and(|health| health.in_flight == 1)
    })
    .await;
    let heir = world.process(&PATIENT).await;
    leaver.signal("TERM").await;
    eventually("all other shards are in other hands", async || heir.owned().await == Some(SHARDS - 1)).await;
    let health = leaver.health().await;
    assert_eq!((health.in_flight, health.ownership.owned), (1, 1), "it waits for the confirm");
    proxy.set(Link::Pass);
    assert!(leaver.ended().await.success());
    shared(&[&heir]).await;
    world.drained().await;
    assert!(heir.terminate().await.success());
    world.finish(Allowed::default()).await;
}

/// `kill -9`: the leases of the dead run out, and the other publishes its keys.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_keys_of_a_killed_replica_are_taken_over() {
    let world = World::new().await;
    let window = [("OUTBOX_MAX_IN_FLIGHT", "400"), ("OUTBOX_BATCH_SIZE", "100")];
    let (mortal, heir) = (world.process(&window).await, world.process(&window).await);
    shared(&[&mortal, &heir]).await;
    let load = Load::start(&world, 50);
    world.until_at_least_delivered(500).await;
    let begun = Instant::now();
    mortal.kill().await;
    shared(&[&heir]).await;
    let took = begun.elapsed();
    eprintln!("all shards in other hands {took:?} after the kill; the lease is 2 s");
    assert!(took < Duration::from_secs(10), "{took:?}, of which 8 s are for slow machines");
    load.end().await;
    world.drained().await;
    assert!(heir.terminate().await.success());
    world.finish(Allowed { duplicates: 400, rewinds: true, ..Allowed::default() }).await;
}

/// SIGSTOP beyond the lease, SIGCONT: what it had in memory is not sent any more. Only what had been handed to the
/// operating system before may still arrive, at most a batch of each worker.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_wakes_after_its_lease_publishes_nothing_more() {
    let world = World::new().await;
    let (batch, workers) = (20, 2);
    let settings = [("OUTBOX_MAX_IN_FLIGHT", "1000"), ("OUTBOX_BATCH_SIZE", "20"), ("OUTBOX_WORKERS", "2")];
    let sleeper = world.process(&settings).await;
    sleeper.until_owner().await;
    // Few keys, so that most of what is read waits in memory for its turn.
    world.write(20_000, 5).await;
    world.until_at_least_delivered(200).await;
    sleeper.signal("STOP").await;
    let heir = world.process(&[]).await;
    shared(&[&heir]).await;
    world.drained().await;
    let received_before = world.queue_depth().await;
    sleeper.signal("CONT").await;
    shared(&[&heir, &sleeper]).await;
    eventually("nothing of it is in flight", async || {
        sleeper.try_health().await.is_some_and(|health| health.in_flight == 0)
    })
    .await;
    let strays = world.queue_depth().await - received_before;
    let fenced = sleeper.metric("fenced_messages_total").await;
    eprintln!("{fenced} rows held back, {strays} had been handed over before");
    assert!(strays <= batch * workers, "{strays} messages after it woke");
    assert!(fenced > 0.0, "rows were waiting in its memory");
    assert!(sleeper.metric("lease_changes_total{change=\"lost\"}").await >= 1.0);
    // It is of use again.
    world.write(1000, 50).await;
    world.drained().await;
    assert!(sleeper.terminate().await.success() && heir.terminate().await.success());
    let window = (batch * workers) as usize;
    world.finish(Allowed { duplicates: 1000 + window, rewinds: true, ..Allowed::default() }).await;
}

/// A replica that cannot reach the broker hands its keys to one that can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_cut_off_from_the_broker_gives_way() {
    let world = World::new().await;
    let proxy = Proxy::to(&world.servers().amqp_url).await;
    let url = proxy.url(&world.servers().amqp_url);
    let (cut_off, well) = (world.process(&[("AMQP_URL", &url)]).await, world.process(&[]).await);
    shared(&[&cut_off, &well]).await;
    proxy.set(Link::Cut);
    world.write(1000, 50).await;
    world.drained().await;
    shared(&[&well]).await;
    eventually("it stands by, and cannot be reached", async || {
        let health = cut_off.health().await;
        (health.ownership.state.as_str(), health.status.as_str()) == ("standby", "unavailable")
    })
    .await;
    proxy.set(Link::Pass);
    shared(&[&cut_off, &well]).await;
    world.write(1000, 50).await;
    world.drained().await;
    assert!(cut_off.terminate().await.success() && well.terminate().await.success());
    // Nothing was under way when the link was cut.
    world.finish(Allowed::default()).await;
}

/// A replica that has never reached the broker, by a wrong address or login, takes nothing from one that does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_never_reached_the_broker_takes_nothing() {
    let world = World::new().await;
    let well = world.process(&PATIENT).await;
    eventually("one alone owns everything", async || well.owned().await == Some(SHARDS)).await;
    let lost = world.process(&[("AMQP_URL", "amqp://127.0.0.1:1"), PATIENT[0]]).await;
    eventually("it is seen", async || well.metric("replicas").await == 2.0).await;
    world.write(1000, 50).await;
    world.drained().await;
    assert_eq!(well.metric("lease_changes_total{change=\"handed_over\"}").await, 0.0);
    assert_eq!(lost.health().await.ownership.state, "standby");
    assert_eq!(lost.get("/readyz").await.0, 503, "it could not take over");
    assert!(lost.terminate().await.success() && well.terminate().await.success());
    world.finish(Allowed::default()).await;
}

/// More replicas than shards: the others stand by, are ready, show the database's gauges, and take over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_owns_nothing_stands_by() {
    let world = World::new().await;
    let one_shard = [("OUTBOX_SHARDS", "1"), PATIENT[0]];
    let owner = world.process(&one_shard).await;
    owner.until_owner().await;
    let standby = world.process(&one_shard).await;
    eventually("it stands by", async || {
        standby.try_health().await.is_some_and(|health| health.ownership.state == "standby")
    })
    .await;
    standby.ready().await;
    world
        .sql("insert into outbox (routing_key, payload, available_at) values ('ok.1', '1', now() + '1 hour')")
        .await;
    eventually("it counts rows", async || standby.metric("pending_messages").await == 1.0).await;
    eventually("health says the same", async || {
        let health = standby.health().await;
        (health.ownership.owned, health.ownership.replicas, health.pending) == (0, 2, Some(1))
    })
    .await;
    assert!(owner.terminate().await.success());
    standby.until_owner().await;
    world.sql("update outbox set available_at = now()").await;
    world.drained().await;
    assert!(standby.terminate().await.success());
    world.finish(Allowed::default()).await;
}

/// Another number of shards would give the same key to two replicas.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_number_of_shards_is_refused_with_the_remedy() {
    let world = World::new().await;
    let first = world.process(&PATIENT).await;
    first.until_owner().await;
    let other = world.process(&[("OUTBOX_SHARDS", "8"), PATIENT[0]]).await;
    eventually("it is refused", async || {
        other.try_health().await.is_some_and(|health| health.ownership.state == "refused")
    })
    .await;
    for part in ["OUTBOX_SHARDS is 8 here and 16 in a replica that runs", "stop those replicas first"] {
        other.until_not_ready(part).await;
    }
    world.write(100, 5).await;
    world.drained().await;
    assert!(first.terminate().await.success());
    eventually("the new number holds", async || other.owned().await == Some(8)).await;
    world.write(100, 5).await;
    world.drained().await;
    assert!(other.terminate().await.success());
    world.finish(Allowed::default()).await;
}

/// The database is away longer than the lease: nothing is sent on an old lease, and it goes on by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_sent_on_a_lease_that_cannot_be_renewed() {
    let world = World::new().await;
    let (proxy, broker) = (Proxy::to(&world.database_url).await, Proxy::to(&world.servers().amqp_url).await);
    let (url, amqp_url) = (proxy.url(&world.database_url), broker.url(&world.servers().amqp_url));
    let settings = [
        ("DATABASE_URL", url.as_str()),
        ("AMQP_URL", &amqp_url),
        ("OUTBOX_LEASE_TTL", "1s"),
        ("OUTBOX_MAX_IN_FLIGHT", "400"),
    ];
    let cut_off = world.process(&settings).await;
    cut_off.until_owner().await;
    // Of few keys each batch is small, so what has been read lasts longer than the lease.
    broker.set(Link::Delay(Duration::from_millis(100)));
    world.write(5000, 5).await;
    world.until_at_least_delivered(100).await;
    proxy.set(Link::Silent);
    let heir = world.process(&[]).await;
    shared(&[&heir]).await;
    world.drained().await;
    let health = cut_off.health().await;
    assert_eq!(health.ownership.state, "waiting", "it does not believe in its lease any more");
    let received = world.queue_depth().await;
    proxy.set(Link::Pass);
    shared(&[&heir, &cut_off]).await;
    assert_eq!(world.queue_depth().await, received, "nothing more of what it had read");
    assert!(cut_off.metric("fenced_messages_total").await > 0.0, "rows were waiting in its memory");
    assert!(cut_off.terminate().await.success() && heir.terminate().await.success());
    world.finish(Allowed { duplicates: 400, rewinds: true, ..Allowed::default() }).await;
}

/// A stop that the table could not be told of is told again at once, not when the next renewal is due: others have what is
/// empty long before the stopping replica has drained the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_that_was_not_heard_is_told_again_at_once() {
    let (store, answered) = (MemoryStore::default(), Arc::new(AtomicBool::new(false)));
    let broker = Arc::clone(&answered);
    // Of two replicas the first keeps the lower half of the shards.
    let sink = ScriptedSink::new(move |row| match row.lease.shard > 0 || broker.load(Relaxed) {
        true => Ok(()),
        false => Err(Refusal::new(Fault::Unknown, "no answer yet")),
    });
    // The next renewal is due in 200 s, which is longer than this test waits.
    let settings = without_servers(&[("OUTBOX_LEASE_TTL", "10m"), ("OUTBOX_SHUTDOWN_GRACE", "5m")]);
    let replica = async || RunningRelay::between(settings.clone(), store.clone(), sink.clone()).await;
    let owned = async |relay: &RunningRelay| relay.health().await.ownership.owned;
    let stopping = replica().await;
    eventually("one replica owns everything", async || owned(&stopping).await == SHARDS).await;
    (1..=200).for_each(|id| store.insert(plain_row(id)));
    let stuck = || store.rows().iter().filter(|stored| stored.pending()).count();
    eventually("all but one shard is drained", async || {
        let in_flight = stopping.health().await.in_flight as usize;
        (1..50).contains(&in_flight) && in_flight == stuck()
    })
    .await;
    let heir = replica().await;
    eventually("the shards are shared", async || owned(&heir).await == SHARDS / 2).await;
    store.stall_leases(Duration::from_secs(2));
    let stopped = tokio::spawn(stopping.stop());
    eventually("the heir has all but one", async || owned(&heir).await == SHARDS - 1).await;
    answered.store(true, Relaxed);
    stopped.await.expect("no panic").expect("clean stop");
    eventually("the heir has all", async || owned(&heir).await == SHARDS).await;
    assert_eq!(sink.taken().len(), 200);
    heir.stop().await.expect("clean stop");
}

/// Up to five replicas, started, stopped, killed and frozen at random under load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_holds_while_five_replicas_come_and_go_at_random() {
    let world = World::new().await;
    let mut rng = rng("order_holds_while_five_replicas_come_and_go_at_random");
    let window = 300;
    let settings = [("OUTBOX_MAX_IN_FLIGHT", "300"), ("OUTBOX_BATCH_SIZE", "60"), ("OUTBOX_LEASE_TTL", "1s")];
    let load = Load::start(&world, 40);
    let mut replicas: Vec<RelayProcess> = Vec::new();
    let mut crashes = 0;
    for _ in 0..40 {
        tokio::time::sleep(Duration::from_millis(rng.u64(0..600))).await;
        if replicas.len() < 2 || (replicas.len() < 5 && rng.bool()) {
            replicas.push(world.process(&settings).await);
            continue;
        }
        let replica = replicas.swap_remove(rng.usize(..replicas.len()));
        match rng.u8(0..4) {
            0 => {
                replica.kill().await;
                crashes += 1;
            }
            1 => {
                replica.signal("STOP").await;
                tokio::time::sleep(Duration::from_millis(rng.u64(0..2500))).await;
                replica.signal("CONT").await;
                replicas.push(replica);
                crashes += 1;
            }
            _ => assert!(replica.terminate().await.success()),
        }
    }
    load.end().await;
    if replicas.is_empty() {
        replicas.push(world.process(&settings).await);
    }
    world.drained().await;
    for replica in replicas {
        assert!(replica.terminate().await.success());
    }
    world.finish(Allowed { duplicates: crashes * window, rewinds: true, ..Allowed::default() }).await;
}

fn row(id: i64, key: i64) -> Row {
    Row { ordering_key: Some(format!("k{key}").into()), ..plain_row(id) }
}

/// Leases that lapse and come back, replicas that stop and crash, many times over: in memory, where a sink sees what
/// all replicas send, in one order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn order_survives_leases_that_lapse() {
    for round in 0..3 {
        let mut rng = rng(&format!("order_survives_leases_that_lapse, round {round}"));
        let (store, sink) = (MemoryStore::default(), ScriptedSink::new(|_| Ok(())));
        let settings = without_servers(&[
            ("OUTBOX_LEASE_TTL", "1s"),
            ("OUTBOX_MAX_IN_FLIGHT", "60"),
            ("OUTBOX_BATCH_SIZE", "5"),
            ("OUTBOX_POLL_INTERVAL", "5ms"),
        ]);
        let replica = async || RunningRelay::between(settings.clone(), store.clone(), sink.clone()).await;
        let mut relays = Vec::new();
        let mut id = 0;
        for _ in 0..12 {
            for _ in 0..300 {
                id += 1;
                store.insert(row(id, rng.i64(0..10)));
            }
            tokio::time::sleep(Duration::from_millis(rng.u64(0..250))).await;
            match rng.u8(0..6) {
                0 if relays.len() > 1 => {
                    let relay: RunningRelay = relays.swap_remove(0);
                    relay.stop().await.expect("clean stop");
                }
                1 if relays.len() > 1 => {
                    relays.swap_remove(0).crash().await;
                }
                // Nobody can renew for longer than any lease.
                2 => store.stall_leases(Duration::from_millis(1200)),
                _ if relays.len() < 4 => relays.push(replica().await),
                _ => {}
            }
        }
        if relays.is_empty() {
            relays.push(replica().await);
        }
        eventually("all rows are delivered", async || store.rows().iter().all(|stored| !stored.pending()))
            .await;
        for relay in relays {
            relay.stop().await.expect("clean stop");
        }
        let repeated = sink.in_order_but_for_repeats();
        // What was sent and not marked when a lease ended, others send again. Each crash and each stall ends a lease, and so
        // does a machine that leaves a replica without its cores for a second.
        let lapses = store.lapses();
        assert!(repeated <= lapses * 60, "{repeated} repeated after {lapses} lapses");
        assert_eq!((sink.taken().len() - repeated) as i64, id, "every row was delivered");
    }
}

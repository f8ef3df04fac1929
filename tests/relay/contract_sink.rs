//! The contract of every sink: the obligations in `src/sink/mod.rs`, on RabbitMQ, on the null sink and on the
//! scripted one.

use crate::support::checker::Received;
use crate::support::scripted::ScriptedSink;
use crate::support::{World, eventually};
use outbox_relay::config::Endpoint;
use outbox_relay::ownership::{Holdings, Permit};
use outbox_relay::sink::null::NullSink;
use outbox_relay::sink::{Fault, Publisher, RabbitMq, Sink, SinkState, Verdict};
use outbox_relay::store::memory::plain_row;
use outbox_relay::store::{Route, Row};
use outbox_relay::telemetry::Metrics;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

fn row(id: i64, exchange: &str, routing_key: &str) -> Row {
    let route = Route { exchange: exchange.to_owned(), routing_key: routing_key.to_owned() };
    Row { route: Arc::new(route), content_type: "application/json".into(), ..plain_row(id) }
}

/// Everything may be sent that was read under epoch 0.
fn permit() -> Permit {
    Permit::new(watch::channel(Holdings::everything(1)).1)
}

/// Each row with its verdict.
async fn publish<'a>(publisher: &mut impl Publisher, batch: &'a [Row]) -> Vec<(&'a Row, Verdict)> {
    let verdicts = publisher.publish(batch, &permit(), &CancellationToken::new()).await;
    assert_eq!(verdicts.len(), batch.len(), "one verdict per row");
    batch.iter().zip(verdicts).collect()
}

async fn ready(sink: &impl Sink) {
    let mut state = sink.state();
    let ready = state.wait_for(SinkState::is_ready);
    tokio::time::timeout(Duration::from_secs(30), ready).await.expect("ready in time").expect("a sink");
}

/// What every sink owes, whatever it leads to.
async fn keeps_the_contract(sink: impl Sink, exchange: &str) {
    ready(&sink).await;
    let mut publisher = sink.publisher();
    assert!(publish(&mut publisher, &[]).await.is_empty());
    let batch: Vec<Row> = (0..500).map(|id| row(id, exchange, "ok.1")).collect();
    for (row, verdict) in publish(&mut publisher, &batch).await {
        assert_eq!(verdict, Ok(()), "row {}", row.id);
    }
    // The first row of a lease that is not held stays here, and so do those after it: none may overtake it.
    let mut mixed: Vec<Row> = (0..100).map(|id| row(id, exchange, "ok.3")).collect();
    mixed.iter_mut().filter(|row| row.id % 3 == 2).for_each(|row| row.lease.epoch = 1);
    for (row, verdict) in publish(&mut publisher, &mixed).await {
        match verdict {
            Ok(()) => assert!(row.id < 2, "row {} was sent", row.id),
            Err(refusal) => assert_eq!((refusal.fault, row.id >= 2), (Fault::Fenced, true)),
        }
    }
    // Several publishers at once.
    let publishers = (0..4).map(|number| {
        let mut publisher = if number == 0 { sink.publisher_apart() } else { sink.publisher() };
        let batch: Vec<Row> = (0..200).map(|id| row(1000 * number + id, exchange, "ok.2")).collect();
        async move { publish(&mut publisher, &batch).await.iter().all(|(_, verdict)| verdict.is_ok()) }
    });
    assert_eq!(futures_util::future::join_all(publishers).await, [true; 4]);
    sink.close().await;
}

fn rabbitmq(world: &World) -> RabbitMq {
    let endpoint = Endpoint::Text(world.servers().amqp_url.clone().into());
    RabbitMq::connect(endpoint, Duration::from_secs(10), Arc::new(Metrics::default()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_null_sink_keeps_the_contract() {
    keeps_the_contract(NullSink::default(), "").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_scripted_sink_keeps_the_contract() {
    keeps_the_contract(ScriptedSink::new(|_| Ok(())), "").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rabbitmq_keeps_the_contract() {
    let world = World::new().await;
    keeps_the_contract(rabbitmq(&world), &world.name).await;
    let messages = world.take_messages().await;
    let fenced = |message: &Received| message.routing_key == "ok.3" && message.id >= 2;
    assert!(!messages.iter().any(fenced), "a row without a lease reached the broker, or one behind it");
    // In the order of the batch, and all of it.
    let ids: Vec<i64> = messages.iter().map(|message| message.id).take(500).collect();
    assert_eq!(ids, (0..500).collect::<Vec<_>>());
    world.abandon();
}

/// `Ok` means confirmed *and* routed, for each row by itself, wherever it stands in the batch, and whoever publishes meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ok_means_routed_for_each_row_by_itself() {
    let world = World::new().await;
    let sink = rabbitmq(&world);
    ready(&sink).await;
    let mut publishers = [sink.publisher_apart(), sink.publisher(), sink.publisher(), sink.publisher()];
    let mut rng = crate::support::rng("ok_means_routed_for_each_row_by_itself");
    for round in 0..50 {
        let batches: [Vec<Row>; 4] = std::array::from_fn(|number| {
            let first = 1000 * (4 * round + number as i64);
            let mut drawn = |id| row(id, &world.name, if rng.u8(0..3) == 0 { "lost" } else { "ok.1" });
            (first..first + 300 - 290 * (round % 2)).map(&mut drawn).collect()
        });
        let together =
            publishers.iter_mut().zip(&batches).map(|(publisher, batch)| publish(publisher, batch));
        for (row, verdict) in futures_util::future::join_all(together).await.into_iter().flatten() {
            let fault = verdict.err().map(|refusal| refusal.fault);
            let expected = (row.route.routing_key == "lost").then_some(Fault::Unroutable);
            assert_eq!(fault, expected, "row {} to {}", row.id, row.route.routing_key);
        }
    }
    sink.close().await;
    world.abandon();
}

/// A missing exchange is the fault of its own rows alone; the others of the batch are delivered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_exchange_refuses_its_own_rows_only() {
    let world = World::new().await;
    let sink = rabbitmq(&world);
    ready(&sink).await;
    let mut publisher = sink.publisher();
    let batch: Vec<Row> =
        (0..50).map(|id| row(id, if id % 2 == 0 { &world.name } else { "missing" }, "ok.1")).collect();
    for (row, verdict) in publish(&mut publisher, &batch).await {
        match verdict {
            Ok(()) => assert_eq!(row.id % 2, 0),
            Err(refusal) => {
                assert_eq!((row.id % 2, refusal.fault), (1, Fault::Destination), "{}", refusal.reason);
            }
        }
    }
    sink.close().await;
    world.abandon();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unreachable_broker_is_an_outage_and_no_refusal() {
    let endpoint = Endpoint::Text("amqp://nobody:secret@127.0.0.1:1/%2f".to_owned().into());
    let sink = RabbitMq::connect(endpoint, Duration::from_secs(1), Arc::new(Metrics::default()));
    let verdicts = sink.publisher().publish(&[row(1, "", "q")], &permit(), &CancellationToken::new()).await;
    assert!(matches!(&verdicts[..], [Err(refusal)] if refusal.fault == Fault::Outage), "{verdicts:?}");
    assert!(!sink.state().borrow().is_ready());
    sink.close().await;
}

/// Here by an answer of the broker's that is no UTF-8, about an exchange with a long name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_breaks_a_connection_of_its_own_breaks_no_other() {
    let world = World::new().await;
    let sink = rabbitmq(&world);
    ready(&sink).await;
    let mut state = sink.state();
    state.mark_unchanged();
    let (mut together, mut apart) = (sink.publisher(), sink.publisher_apart());
    let lethal = [row(1, &format!("{}{}", world.name, "ä".repeat(110)), "ok.1")];
    let harmless = [row(2, &world.name, "ok.1")];
    let token = CancellationToken::new();
    assert_ne!(apart.publish(&lethal, &permit(), &token).await, [Ok(())]);
    for _ in 0..2 {
        // What is known of it is known to all.
        let verdicts = together.publish(&lethal, &permit(), &token).await;
        assert!(matches!(&verdicts[..], [Err(refusal)] if refusal.fault == Fault::Risk), "{verdicts:?}");
        assert_eq!(together.publish(&harmless, &permit(), &token).await, [Ok(())]);
        // On another one.
        assert_eq!(apart.publish(&harmless, &permit(), &token).await, [Ok(())]);
    }
    assert!(!state.has_changed().expect("a sink"), "the connection of all was lost");
    sink.close().await;
    world.abandon();
}

/// A connection that ends in disorder stands as a warning in the broker's log, and used to cost a stop two seconds now and
/// then: lapin closes channels in the background when they are dropped, and trips over that when the connection closes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_closed_in_order() {
    const TIMES: usize = 60;
    let world = World::alone().await;
    let exchange = world.name.clone();
    for _ in 0..TIMES {
        let sink = rabbitmq(&world);
        ready(&sink).await;
        let publishers = (0..4).map(|number| {
            let publisher = if number == 0 { sink.publisher_apart() } else { sink.publisher() };
            let (mut publisher, batch) = (publisher, [row(number, &exchange, "ok.1")]);
            async move { publisher.publish(&batch, &permit(), &CancellationToken::new()).await }
        });
        for verdicts in futures_util::future::join_all(publishers).await {
            assert!(verdicts.iter().all(Result::is_ok));
        }
        // All publishers are gone, as when the workers have ended.
        sink.close().await;
    }
    let log = || std::fs::read_to_string(world.servers().value("RABBITMQ_LOG")).expect("the broker's log");
    let ours = |line: &&str| line.contains("closing AMQP connection") && line.contains("outbox-relay");
    let closed = || log().lines().filter(ours).count();
    eventually("the broker has seen all of them end", async || closed() >= 2 * TIMES).await;
    let complains = |line: &&str| line.contains("outbox-relay") && !line.contains("[info]");
    assert_eq!(log().lines().find(complains), None);
    world.abandon();
}

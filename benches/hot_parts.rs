//! The parts of the relay that run once per row, without servers: decoding it, choosing its worker, making a message,
//! forming batches, settling, keeping track of ids; and the whole pipeline between a store in memory and a sink that takes everything.
//!
//! `cargo bench` measures, `cargo bench -- --test` runs each once. Times are noise on a busy machine; compare
//! two runs on the same one.

#![allow(missing_docs, reason = "criterion's macros make public functions")]

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use outbox_relay::config::{Ordering, Settings, Sources};
use outbox_relay::pipeline::known::Known;
use outbox_relay::pipeline::poll::worker_of;
use outbox_relay::pipeline::queue::Queue;
use outbox_relay::pipeline::settle::{bites, settlement};
use outbox_relay::pipeline::{End, Outcome};
use outbox_relay::relay::Relay;
use outbox_relay::sink::null::NullSink;
use outbox_relay::sink::rabbitmq::message::compose;
use outbox_relay::store::memory::{MemoryStore, plain_row};
use outbox_relay::store::postgres::decode::{Decoder, Wire};
use outbox_relay::store::{Lease, Route, Row, Share};
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

const ROWS: i64 = 2_000;

fn row(id: i64) -> Row {
    Row {
        route: Arc::new(Route { exchange: "orders".to_owned(), routing_key: "order.created".to_owned() }),
        ordering_key: Some(format!("order {}", id % 1000).into()),
        payload: Bytes::from(vec![b'x'; 500]),
        content_type: "application/json".into(),
        headers: r#"{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}"#.into(),
        created_at_micros: 1_700_000_000_000_000,
        ..plain_row(id)
    }
}

fn rows() -> Vec<Row> {
    (1..=ROWS).map(row).collect()
}

fn decoding(criterion: &mut Criterion) {
    let payload = vec![b'x'; 500];
    let wire: Wire<'_> = [
        Some(&[0, 0, 0, 0, 0, 0, 0, 1]),
        Some(&[7; 16]),
        Some(b"orders"),
        Some(b"order.created"),
        Some(b"order 17"),
        Some(&payload),
        Some(b"application/json"),
        Some(b"{}"),
        Some(&[0; 8]),
        Some(&[0; 4]),
        Some(&[0; 4]),
    ];
    let leases = [Lease::default()];
    let mut decoder = Decoder::new(Share { shards: 1, leases: &leases }, "");
    criterion.bench_function("row from the wire", |bench| {
        bench.iter(|| decoder.row(black_box(&wire), Bytes::copy_from_slice(&payload)).expect("a row"));
    });
}

fn routing(criterion: &mut Criterion) {
    let row = row(1);
    criterion.bench_function("worker of a row", |bench| bench.iter(|| worker_of(black_box(&row), true, 4)));
}

fn settling(criterion: &mut Criterion) {
    let outcome = |row: Row| Outcome {
        id: row.id,
        message_id: row.message_id,
        lease: row.lease,
        end: End::Delivered { created_at_micros: row.created_at_micros },
    };
    let outcomes = || rows().into_iter().map(outcome).collect::<Vec<_>>();
    let mut group = criterion.benchmark_group("settling");
    group.throughput(Throughput::Elements(ROWS as u64));
    group.bench_function("statements for 2000 rows", |bench| {
        let form = |outcomes| bites(outcomes, true).iter().map(|bite| settlement(bite)).collect::<Vec<_>>();
        bench.iter_batched(outcomes, form, BatchSize::LargeInput);
    });
    group.finish();
}

fn message(criterion: &mut Criterion) {
    let row = row(1);
    criterion.bench_function("message from a row", |bench| bench.iter(|| compose(black_box(&row), 131_072)));
}

fn batches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("batches of 250 from 2000 rows over 1000 keys");
    group.throughput(Throughput::Elements(ROWS as u64));
    for (name, ordering) in [("strict", Ordering::Strict), ("pipelined", Ordering::Pipelined)] {
        group.bench_function(name, |bench| {
            let form = |rows: Vec<Row>| {
                let mut queue = Queue::new(ordering);
                for row in rows {
                    assert!(queue.push(row.into()).is_none());
                }
                while !queue.is_empty() {
                    black_box(queue.next_batch(250, 1 << 24));
                }
            };
            bench.iter_batched(rows, form, BatchSize::LargeInput);
        });
    }
    group.finish();
}

fn known_ids(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ids kept in mind");
    group.throughput(Throughput::Elements(ROWS as u64));
    group.bench_function("2000 ids, one in ten missing", |bench| {
        bench.iter(|| {
            let mut known = Known::default();
            (0..ROWS).filter(|id| id % 10 != 0).for_each(|id| known.add(id));
            black_box(known.unknown(512))
        });
    });
    group.finish();
}

fn pipeline(criterion: &mut Criterion) {
    let env = [
        ("DATABASE_URL", "postgres://unused"),
        ("AMQP_URL", "amqp://unused"),
        ("OUTBOX_HTTP_LISTEN", "127.0.0.1:0"),
    ];
    let settings = Settings::resolve(&Sources::from_env(env).expect("sources")).expect("settings");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("runtime");
    let mut group = criterion.benchmark_group("pipeline");
    group.throughput(Throughput::Elements(ROWS as u64)).sample_size(10);
    group.bench_function("memory to nowhere, with the start", |bench| {
        // The making of the rows and the stop are nobody's time but the bench's.
        let drain = async || {
            let (store, sink) = (MemoryStore::default(), NullSink::default());
            rows().into_iter().for_each(|row| store.insert(row));
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
            let stop = CancellationToken::new();
            let relay = Relay::new(settings.clone(), store, sink.clone(), Arc::default());
            let begun = Instant::now();
            let relay = tokio::spawn(relay.run(listener, stop.clone()));
            while sink.taken() < ROWS as u64 {
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
            let took = begun.elapsed();
            stop.cancel();
            relay.await.expect("no panic").expect("clean stop");
            took
        };
        let several = async |times| {
            let mut took = Duration::ZERO;
            for _ in 0..times {
                took += drain().await;
            }
            took
        };
        bench.iter_custom(|times| runtime.block_on(several(times)));
    });
    group.finish();
}

criterion_group!(benches, decoding, routing, message, batches, settling, known_ids, pipeline);
criterion_main!(benches);

//! Promise 9: rows and bytes in flight are bounded, whatever the backlog and whatever its rows weigh.

use crate::support::scripted::ScriptedSink;
use crate::support::world::{RunningRelay, without_servers};
use crate::support::{World, eventually};
use outbox_relay::relay::Relay;
use outbox_relay::store::Row;
use outbox_relay::store::memory::{MemoryStore, plain_row};
use outbox_relay::telemetry::Metrics;
use proptest::prelude::*;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// 2 000 rows of 1 MB under a budget of 64 MiB stay under 250 MB of memory; rows of 10 MB pass.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_thousand_rows_of_a_megabyte_fit_into_250_megabytes() {
    let world = World::alone().await;
    world.sql("alter table outbox disable trigger keep_written; alter table outbox alter column payload type bytea using payload::text::bytea; alter table outbox alter column payload set storage external").await;
    world.sql("insert into outbox (routing_key, ordering_key, payload) select 'ok.1', 'k' || i % 100, convert_to(repeat('x', 1000000), 'UTF8') from generate_series(1, 2000) i").await;
    let relay = world.process(&[("OUTBOX_MAX_IN_FLIGHT_BYTES", "64MiB")]).await;
    world.drained().await;
    let peak = relay.usage().peak_rss_bytes;
    assert!(peak < 250 * MIB, "peak of {} MiB", peak / MIB);
    eprintln!("peak RSS with rows of 1 MB: {} MiB", peak / MIB);
    assert_eq!(world.queue_depth().await, 2000);

    world.sql("insert into outbox (routing_key, payload) select 'ok.2', convert_to(repeat('y', 10000000), 'UTF8') from generate_series(1, 10) i").await;
    world.drained().await;
    let peak = relay.usage().peak_rss_bytes;
    assert!(peak < 250 * MIB, "peak of {} MiB with rows of 10 MB", peak / MIB);
    eprintln!("peak RSS with rows of 10 MB: {} MiB", peak / MIB);
    // What large rows took is given back.
    let rss = relay.usage().rss_bytes;
    eprintln!("RSS when they are delivered: {} MiB", rss / MIB);
    assert!(rss < 100 * MIB, "{} MiB are held when all is delivered", rss / MIB);
    // A row larger than the whole budget passes alone.
    world.sql("insert into outbox (routing_key, payload) values ('ok.3', convert_to(repeat('z', 100000000), 'UTF8'))").await;
    world.drained().await;
    assert_eq!(world.queue_depth().await, 2011);
    assert!(relay.terminate().await.success());
    world.abandon();
}

/// A backlog ten times as large changes nothing: memory while draining it is that of the window.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_does_not_follow_the_backlog() {
    let (small, large) = (peak_with_backlog(20_000).await, peak_with_backlog(200_000).await);
    eprintln!("peak RSS {} MiB and {} MiB", small / MIB, large / MIB);
    assert!(large < 100 * MIB, "{} MiB", large / MIB);
    assert!(
        large < small + 10 * MIB,
        "{} MiB, and {} MiB where there are ten times as many",
        small / MIB,
        large / MIB
    );
}

/// While the first 20 000 rows are delivered.
async fn peak_with_backlog(rows: i64) -> u64 {
    let world = World::new().await;
    world.sql("alter table outbox disable trigger keep_written").await;
    world.sql(&format!("insert into outbox (routing_key, ordering_key, payload) select 'ok.1', 'k' || i % 1000, to_jsonb(repeat('x', 500)) from generate_series(1, {rows}) i")).await;
    let relay = world.process(&[]).await;
    world.until_at_least_delivered(20_000).await;
    let peak = relay.usage().peak_rss_bytes;
    relay.kill().await;
    world.abandon();
    peak
}

fn row(id: i64, bytes: usize) -> Row {
    Row { payload: vec![0; bytes].into(), ..plain_row(id) }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever the sizes of rows, the gauges of rows and bytes in flight never exceed the budget, except for a
    /// single row that is larger than all of it; and everything arrives.
    #[test]
    fn the_budget_of_rows_and_bytes_is_never_exceeded(
        sizes in prop::collection::vec(prop_oneof![8 => 0usize..2_000, 1 => 0usize..90_000], 1..120),
        window in 1usize..40,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            const BUDGET: usize = 64 * 1024;
            let store = MemoryStore::default();
            let rows: Vec<Row> = sizes.iter().enumerate().map(|(id, bytes)| row(id as i64, *bytes)).collect();
            let largest = rows.iter().map(Row::bytes).max().unwrap_or(0);
            rows.iter().for_each(|row| store.insert(row.clone()));
            let metrics = Arc::new(Metrics::default());
            let (seen, peak) = (Arc::clone(&metrics), Arc::new(std::sync::Mutex::new((0i64, 0i64))));
            let peaks = Arc::clone(&peak);
            let sink = ScriptedSink::new(move |_| {
                let mut peak = peaks.lock().unwrap();
                *peak = (peak.0.max(seen.in_flight.get()), peak.1.max(seen.in_flight_bytes.get()));
                Ok(())
            });
            let (window_text, batch) = (window.to_string(), window.min(7).to_string());
            let settings = without_servers(&[
                ("OUTBOX_MAX_IN_FLIGHT", &window_text),
                ("OUTBOX_BATCH_SIZE", &batch),
                ("OUTBOX_WORKERS", "1"),
                ("OUTBOX_MAX_IN_FLIGHT_BYTES", "64KiB"),
                ("OUTBOX_POLL_INTERVAL", "1ms"),
            ]);
            let relay = RunningRelay::spawn(Relay::new(settings, store.clone(), sink, metrics)).await;
            eventually("all rows are delivered", async || store.rows().iter().all(|stored| !stored.pending())).await;
            relay.stop().await.expect("clean stop");
            let (rows, bytes) = *peak.lock().unwrap();
            assert!(rows as usize <= window, "{rows} rows in flight, {window} allowed");
            assert!(bytes as usize <= BUDGET.max(largest), "{bytes} bytes in flight");
        });
    }
}

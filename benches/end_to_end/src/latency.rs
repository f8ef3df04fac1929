//! From commit to consumer.
//!
//! Rows are due by the clock, not when the one before is done (an open loop), so a stall is felt by all rows that were
//! due during it. Two spans are measured: from the moment the commit was answered, and from the moment the row was *due*,
//! which counts what the stall kept from being written at all (coordinated omission).
//!
//! A steady rate is written once more by writers that publish each row themselves as soon as it is committed, with no relay
//! (and no promise: a writer that dies between the two has lost the message). No relay can be earlier than they are.

use crate::cost::{Meter, SETTLED};
use crate::measures::P99_OF_ALL;
use crate::raw;
use crate::run::Sample;
use crate::stand::{NAME, Place, Stand};
use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use hdrhistogram::Histogram;
use lapin::options::{BasicConsumeOptions, ConfirmSelectOptions};
use lapin::types::FieldTable;
use lapin::{Channel, PublisherConfirm};
use sqlx::{Connection, PgConnection};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

/// No row may be under way for longer.
const LIMIT: Duration = Duration::from_secs(60);

/// When each row was due, answered and received.
#[derive(Debug)]
struct Times {
    due: Vec<Option<Instant>>,
    committed: Vec<Option<Instant>>,
    received: Vec<Option<Instant>>,
}

/// From commit to consumer, of all rounds together.
pub type AllRounds = Histogram<u64>;

type Shared = Arc<Mutex<Times>>;

fn note(times: &Shared, note: impl FnOnce(&mut Times)) {
    note(&mut times.lock().unwrap_or_else(PoisonError::into_inner));
}

/// Nothing yet. Microseconds, to three digits.
pub fn histogram() -> Result<AllRounds> {
    Ok(Histogram::new(3)?)
}

/// So many rows a second for so long.
pub async fn steady(
    stand: &Stand,
    name: &str,
    rate: u32,
    lasts: Duration,
    all: &mut AllRounds,
) -> Result<Sample> {
    let place = stand.place(name).await?;
    let (times, consumer) = consumer(&place, rows_of(rate, lasts)).await?;
    let relay = place.relay(&[])?;
    relay.until_ready().await?;
    sleep(SETTLED).await;
    let meter = Meter::start(&place, &relay).await?;
    let written = write_by_the_clock(&place, &times, rate, lasts, None).await?;
    tokio::time::timeout(LIMIT, consumer).await.context("rows did not arrive")???;
    // Postgres's part and the statements are the writers' too.
    let costs = meter.read(&place, &relay).await?;
    relay.stop().await?;
    place.leave().await?;
    Ok([spans(&times, all)?, vec![("rows written", "/s", written)], costs].concat())
}

/// The same, and each writer publishes what it has committed.
pub async fn without_a_relay(stand: &Stand, name: &str, rate: u32, lasts: Duration) -> Result<Sample> {
    let place = stand.place(name).await?;
    let (times, consumer) = consumer(&place, rows_of(rate, lasts)).await?;
    let (connection, channel) = stand.channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    write_by_the_clock(&place, &times, rate, lasts, Some(&channel)).await?;
    tokio::time::timeout(LIMIT, consumer).await.context("messages did not arrive")???;
    connection.close(200, "done".into()).await?;
    place.leave().await?;
    let spans = spans_since(&times, |times| &times.committed)?;
    let names = [("the writer publishes itself, p50", 0.5), ("the writer publishes itself, p99", 0.99)];
    Ok(figures(&spans, &names))
}

fn rows_of(rate: u32, lasts: Duration) -> usize {
    (f64::from(rate) * lasts.as_secs_f64()) as usize
}

/// Gives the rows that were written per second. With a channel each is published there, too, as soon as it is committed.
async fn write_by_the_clock(
    place: &Place<'_>,
    times: &Shared,
    rate: u32,
    lasts: Duration,
    channel: Option<&Channel>,
) -> Result<f64> {
    let rows = rows_of(rate, lasts);
    let writers = if rate > 1_000 { 16 } else { 4 };
    let mut connections = Vec::new();
    for _ in 0..writers {
        connections.push(place.db().await?);
    }
    let begin = Instant::now();
    let mut tasks = Vec::new();
    for (writer, mut db) in connections.into_iter().enumerate() {
        let (times, channel) = (Arc::clone(times), channel.cloned());
        tasks.push(tokio::spawn(async move {
            let mut answers = Vec::new();
            for row in (writer..rows).step_by(writers) {
                let due = begin + Duration::from_secs_f64(row as f64 / f64::from(rate));
                sleep_until(due).await;
                write(&mut db, &times, row, due).await?;
                if let Some(channel) = &channel {
                    answers.push(publish(channel, row).await?);
                }
            }
            for answer in answers {
                raw::is_ack(answer.await)?;
            }
            db.close().await.map_err(anyhow::Error::from)
        }));
    }
    for task in tasks {
        task.await??;
    }
    Ok(rows as f64 / begin.elapsed().as_secs_f64())
}

async fn publish(channel: &Channel, row: usize) -> Result<PublisherConfirm> {
    let body = serde_json::json!({ "row": row, "x": "x".repeat(480) }).to_string();
    let properties = raw::usual_properties();
    Ok(channel
        .basic_publish(NAME.into(), "bench".into(), raw::MANDATORY, body.as_bytes(), properties)
        .await?)
}

/// One row after a silence, again and again.
pub async fn lone(
    stand: &Stand,
    name: &str,
    silence: Duration,
    watched: bool,
    rows: usize,
    all: &mut AllRounds,
) -> Result<Sample> {
    let place = stand.place(name).await?;
    let (times, consumer) = consumer(&place, rows).await?;
    let relay = place.relay(&[("OUTBOX_LONG_POLL", if watched { "true" } else { "false" })])?;
    relay.until_ready().await?;
    let mut db = place.db().await?;
    for row in 0..rows {
        let due = Instant::now() + silence;
        sleep_until(due).await;
        write(&mut db, &times, row, due).await?;
    }
    tokio::time::timeout(LIMIT, consumer).await.context("rows did not arrive")???;
    relay.stop().await?;
    place.leave().await?;
    spans(&times, all)
}

async fn write(db: &mut PgConnection, times: &Shared, row: usize, due: Instant) -> Result<()> {
    let insert = "insert into outbox (routing_key, ordering_key, payload)
                  values ('bench', 'key ' || $1 % 1000, jsonb_build_object('row', $1, 'x', repeat('x', 480)))";
    sqlx::query(insert).bind(row as i64).execute(db).await?;
    let now = Instant::now();
    note(times, |times| (times.due[row], times.committed[row]) = (Some(due), Some(now)));
    Ok(())
}

/// Notes when each row arrives, until all have.
async fn consumer(place: &Place<'_>, rows: usize) -> Result<(Shared, JoinHandle<Result<()>>)> {
    place.stand.fresh_queue("quorum").await?;
    let (connection, channel) = place.stand.channel().await?;
    let at_once = BasicConsumeOptions { no_ack: true, ..Default::default() };
    let mut messages = channel.basic_consume(NAME.into(), "".into(), at_once, FieldTable::default()).await?;
    let times = Shared::new(Mutex::new(Times {
        due: vec![None; rows],
        committed: vec![None; rows],
        received: vec![None; rows],
    }));
    let arrivals = Arc::clone(&times);
    let task = tokio::spawn(async move {
        for _ in 0..rows {
            let message = messages.next().await.context("the consumer was cancelled")??;
            let now = Instant::now();
            let body: serde_json::Value = serde_json::from_slice(&message.data)?;
            let row = body["row"].as_u64().context("a row without a number")? as usize;
            ensure!(row < rows, "row {row} was never written");
            note(&arrivals, |times| times.received[row] = Some(now));
        }
        connection.close(200, "done".into()).await?;
        drop(channel);
        Ok(())
    });
    Ok((times, task))
}

fn spans(times: &Shared, all: &mut AllRounds) -> Result<Sample> {
    let committed = spans_since(times, |times| &times.committed)?;
    let due = spans_since(times, |times| &times.due)?;
    all.add(&committed)?;
    let of_committed = [
        ("commit to consumer, p50", 0.5),
        ("commit to consumer, p95", 0.95),
        ("commit to consumer, p99", 0.99),
        ("commit to consumer, max", 1.0),
    ];
    let of_due = [
        ("due to consumer, p50", 0.5),
        ("due to consumer, p95", 0.95),
        ("due to consumer, p99", 0.99),
        ("due to consumer, max", 1.0),
    ];
    let of_all = [(P99_OF_ALL, 0.99)];
    Ok([figures(&committed, &of_committed), figures(&due, &of_due), figures(all, &of_all)].concat())
}

fn spans_since(times: &Shared, since: fn(&Times) -> &Vec<Option<Instant>>) -> Result<Histogram<u64>> {
    let times = times.lock().unwrap_or_else(PoisonError::into_inner);
    let mut spans = histogram()?;
    for (from, to) in since(&times).iter().zip(&times.received) {
        let (from, to) = from.zip(*to).context("a row has no times")?;
        // The message may be here before the writer has heard of its commit.
        spans.record(to.saturating_duration_since(from).as_micros() as u64)?;
    }
    Ok(spans)
}

fn figures(spans: &Histogram<u64>, names: &[(&'static str, f64)]) -> Sample {
    let figure = |&(name, quantile): &(&'static str, f64)| Some((name, "ms", quantile_ms(spans, quantile)?));
    names.iter().filter_map(figure).collect()
}

/// `None` where no row lies above it: then it is the largest, by another name.
fn quantile_ms(spans: &Histogram<u64>, quantile: f64) -> Option<f64> {
    let above = spans.len() as f64 * (1.0 - quantile);
    (quantile >= 1.0 || above >= 1.0).then(|| spans.value_at_quantile(quantile) as f64 / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_too_few_rows_are_left_out() {
        let mut spans = histogram().unwrap();
        (1..=50).for_each(|ms| spans.record(ms * 1000).unwrap());
        assert_eq!(quantile_ms(&spans, 0.5).map(f64::round), Some(25.0));
        assert_eq!(quantile_ms(&spans, 0.99), None);
        assert_eq!(quantile_ms(&spans, 1.0).map(f64::round), Some(50.0));
    }
}

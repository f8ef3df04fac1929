//! A relay that promises nothing: about the least that reading rows, publishing them and marking them costs beside the raw
//! publisher, with the libraries that ours is built with.
//!
//! ```text
//!   one connection reads ──▶ four channels publish, a batch at a time ──▶ one connection marks
//! ```
//!
//! No order, no ownership, no attempts, no stop; an unroutable row or a lost connection ends it. It shows what a machine
//! allows a relay, and what the promises of ours cost on top.

use crate::raw::{Done, MANDATORY, is_ack, poll_for_nobody, properties};
use anyhow::{Context, Result, ensure};
use clap::ArgMatches;
use futures_util::future::try_join_all;
use futures_util::{FutureExt, TryFutureExt};
use lapin::options::ConfirmSelectOptions;
use lapin::{Channel, ConnectionProperties};
use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Connection, Row};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

/// As the relay has by default: workers, rows of a batch, rows in flight.
const WORKERS: usize = 4;
const BATCH: usize = 250;
const IN_FLIGHT: usize = 2000;
/// Marks are gathered until there are so many, or for so long.
const MARKS: usize = 500;
const COMPANY: Duration = Duration::from_millis(10);

const READ: &str = "select id, message_id, routing_key, ordering_key, payload from outbox
                    where delivered_at is null and dead_at is null and id > $1 order by id limit $2";
const MARK: &str = "update outbox set delivered_at = clock_timestamp() where id = any($1)";
const DELETE: &str = "delete from outbox where id = any($1)";

/// `bench bare`: relays so many rows, prints what it took, and ends.
pub async fn main(matches: &ArgMatches) -> Result<()> {
    let begun = Instant::now();
    let text = |name: &str| matches.get_one::<String>(name).cloned().unwrap_or_default();
    let rows = matches.get_one::<usize>("messages").copied().unwrap_or_default();
    let mark = if matches.get_flag("delete") { DELETE } else { MARK };
    relay(&text("database-url"), &text("amqp-url"), &text("exchange"), rows, mark).await?;
    println!("{}", serde_json::to_string(&Done::since(begun)?)?);
    Ok(())
}

async fn relay(
    database_url: &str,
    amqp_url: &str,
    exchange: &str,
    rows: usize,
    mark: &'static str,
) -> Result<()> {
    let places = Arc::new(Semaphore::new(IN_FLIGHT));
    let (delivered, to_mark) = mpsc::channel(WORKERS);
    let broker = lapin::Connection::connect(amqp_url, ConnectionProperties::default()).await?;
    let (mut workers, mut publishing) = (Vec::new(), Vec::new());
    for _ in 0..WORKERS {
        let channel = broker.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let (worker, batches) = mpsc::channel(1);
        workers.push(worker);
        publishing.push(tokio::spawn(publish(channel, exchange.to_owned(), batches, delivered.clone())));
    }
    drop(delivered);
    let (reader, marker) = (PgConnection::connect(database_url), PgConnection::connect(database_url));
    let marking = tokio::spawn(mark_all(marker.await?, mark, to_mark, Arc::clone(&places)));
    let reading = read(reader.await?, rows, workers, &places);
    // Whoever fails ends all: those before it wait for places that nobody would give back.
    let publishing = try_join_all(publishing.into_iter().map(async |worker| worker.await?));
    // A channel that is dropped while its connection closes makes lapin fail the connection.
    let (_open, marked, ()) = tokio::try_join!(publishing, async { marking.await? }, reading)?;
    ensure!(marked == rows as u64, "{marked} of {rows} rows were marked");
    Ok(broker.close(200, "done".into()).await?)
}

/// Rows in the order of their ids, a batch to each worker in turn, as long as there are places.
async fn read(
    mut db: PgConnection,
    rows: usize,
    workers: Vec<mpsc::Sender<Vec<PgRow>>>,
    places: &Semaphore,
) -> Result<()> {
    let (mut left, mut last) = (rows, 0_i64);
    for worker in workers.iter().cycle() {
        if left == 0 {
            break;
        }
        let wanted = BATCH.min(left);
        places.acquire_many(u32::try_from(wanted)?).await?.forget();
        let batch = sqlx::query(READ).bind(last).bind(wanted as i64).fetch_all(&mut db).await?;
        ensure!(batch.len() == wanted, "{} rows where {wanted} should be", batch.len());
        left -= wanted;
        last = batch.last().context("an empty batch")?.try_get(0)?;
        if worker.send(batch).await.is_err() {
            // It says itself why it has ended.
            break;
        }
    }
    Ok(db.close().await?)
}

/// A batch out, all confirms in, and on to be marked.
async fn publish(
    channel: Channel,
    exchange: String,
    mut batches: mpsc::Receiver<Vec<PgRow>>,
    delivered: mpsc::Sender<Vec<i64>>,
) -> Result<Channel> {
    while let Some(batch) = batches.recv().await {
        let mut ids = Vec::with_capacity(batch.len());
        let mut open = Vec::with_capacity(batch.len());
        for row in &batch {
            let id: i64 = row.try_get(0)?;
            let message_id: sqlx::types::Uuid = row.try_get(1)?;
            let key: Option<&str> = row.try_get(3)?;
            let payload = row.try_get_raw(4)?;
            // jsonb on the wire: a byte for the version, then the text.
            let payload = payload.as_bytes().map_err(anyhow::Error::from_boxed)?.get(1..).unwrap_or_default();
            let properties = properties(id, key, &message_id.to_string());
            let routing_key: &str = row.try_get(2)?;
            let sent = channel.basic_publish(
                exchange.as_str().into(),
                routing_key.into(),
                MANDATORY,
                payload,
                properties,
            );
            let mut answer = sent.and_then(|confirm| confirm).boxed();
            ids.push(id);
            match poll_for_nobody(&mut answer) {
                Poll::Ready(answer) => is_ack(answer)?,
                Poll::Pending => open.push(answer),
            }
        }
        for answer in open {
            is_ack(answer.await)?;
        }
        if delivered.send(ids).await.is_err() {
            // The marking says itself why it has ended.
            break;
        }
    }
    Ok(channel)
}

async fn mark_all(
    mut db: PgConnection,
    mark: &'static str,
    mut delivered: mpsc::Receiver<Vec<i64>>,
    places: Arc<Semaphore>,
) -> Result<u64> {
    let mut marked = 0;
    while let Some(mut ids) = delivered.recv().await {
        let until = Instant::now() + COMPANY;
        while ids.len() < MARKS {
            let rest = until.saturating_duration_since(Instant::now());
            match timeout(rest, delivered.recv()).await {
                Ok(Some(more)) => ids.extend(more),
                Ok(None) | Err(_) => break,
            }
        }
        marked += sqlx::query(mark).bind(&ids).execute(&mut db).await?.rows_affected();
        places.add_permits(ids.len());
    }
    db.close().await?;
    Ok(marked)
}

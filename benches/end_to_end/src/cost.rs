//! What the relay costs when there is nothing to do, what it costs the writers, and how soon it is there.

use crate::process::Relay;
use crate::run::Sample;
use crate::stand::{Counted, Place, ServersCpu, Stand};
use anyhow::Result;
use sqlx::{Connection, Executor};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// After its start a relay has a few things to do once.
const SETTLED: Duration = Duration::from_secs(5);
/// What wakes other relays.
const NOTIFY_PER_INSERT: &str = "
    create function notify_rows() returns trigger language plpgsql as
        $$ begin perform pg_notify('outbox_rows', ''); return null; end $$;
    create trigger notify_rows after insert on outbox for each statement execute function notify_rows()";

/// Processor time and statements of a relay without work.
pub async fn idle(stand: &Stand, name: &str, lasts: Duration) -> Result<Sample> {
    let place = stand.place(name).await?;
    stand.fresh_queue("quorum").await?;
    let relay = place.relay(&[])?;
    relay.until_ready().await?;
    tokio::time::sleep(SETTLED).await;
    let meter = Meter::start(&place, &relay).await?;
    tokio::time::sleep(lasts).await;
    let costs = meter.read(&place, &relay).await?;
    relay.stop().await?;
    place.leave().await?;
    Ok(costs)
}

/// What a while costs.
pub struct Meter {
    begun: Instant,
    cpu_seconds: f64,
    servers: ServersCpu,
    counted: Counted,
}

impl Meter {
    /// From now on.
    pub async fn start(place: &Place<'_>, relay: &Relay) -> Result<Self> {
        let (cpu_seconds, servers) = (relay.usage()?.cpu_seconds, place.stand.cpu());
        let counted = place.counted().await?;
        Ok(Self { begun: Instant::now(), cpu_seconds, servers, counted })
    }

    /// Until now.
    pub async fn read(self, place: &Place<'_>, relay: &Relay) -> Result<Sample> {
        let seconds = self.begun.elapsed().as_secs_f64();
        let (usage, servers) = (relay.usage()?, place.stand.cpu().since(self.servers));
        let counted = place.counted().await?.since(self.counted);
        Ok(vec![
            ("CPU", "%", (usage.cpu_seconds - self.cpu_seconds) / seconds * 100.0),
            ("Postgres's CPU", "%", servers.database / seconds * 100.0),
            ("statements", "/s", counted.statements() / seconds),
            ("WAL", "B/s", counted.wal_bytes() / seconds),
            ("peak RSS", "MiB", usage.peak_rss_mib()),
        ])
    }
}

/// From the start of the process to ready, owning shards.
pub async fn start(stand: &Stand, name: &str) -> Result<Sample> {
    let place = stand.place(name).await?;
    stand.fresh_queue("quorum").await?;
    let relay = place.relay(&[])?;
    relay.until_ready().await?;
    let took = relay.started.elapsed();
    relay.stop().await?;
    place.leave().await?;
    Ok(vec![("start to ready", "ms", took.as_secs_f64() * 1e3)])
}

/// Commits a second of so many connections that write a row each time: without a relay, beside one that lets the database
/// watch, beside one that polls, and beside that with what others use to wake theirs.
pub async fn writers(stand: &Stand, name: &str, connections: usize, lasts: Duration) -> Result<Sample> {
    let place = stand.place(name).await?;
    stand.fresh_queue("quorum").await?;
    let without = commits(&place, connections, lasts).await?;
    let beside = async |long_poll| {
        place.sql("truncate outbox").await?;
        let relay = place.relay(&[("OUTBOX_LONG_POLL", long_poll)])?;
        relay.until_ready().await?;
        let commits = commits(&place, connections, lasts).await?;
        relay.stop().await?;
        anyhow::Ok(commits)
    };
    let (watched, polled) = (beside("true").await?, beside("false").await?);
    place.sql(NOTIFY_PER_INSERT).await?;
    let mut listener = place.db().await?;
    listener.execute("listen outbox_rows").await?;
    let notified = beside("false").await?;
    drop(listener);
    place.leave().await?;
    Ok(vec![
        ("commits beside a relay", "of those without", watched / without),
        ("without long polling", "of those without", polled / without),
        ("with a NOTIFY per insert", "of those without", notified / without),
        ("commits without a relay", "/s", without),
    ])
}

async fn commits(place: &Place<'_>, connections: usize, lasts: Duration) -> Result<f64> {
    let insert = "insert into outbox (routing_key, ordering_key, payload)
                  values ('bench', 'key ' || $1, jsonb_build_object('x', repeat('x', 490)))";
    let over = CancellationToken::new();
    let mut tasks = Vec::new();
    let mut open = Vec::new();
    for _ in 0..connections {
        open.push(place.db().await?);
    }
    let begun = Instant::now();
    for (writer, mut db) in open.into_iter().enumerate() {
        let over = over.clone();
        tasks.push(tokio::spawn(async move {
            let mut commits = 0_u64;
            while !over.is_cancelled() {
                sqlx::query(insert).bind(writer as i64).execute(&mut db).await?;
                commits += 1;
            }
            db.close().await?;
            Ok::<_, sqlx::Error>(commits)
        }));
    }
    tokio::time::sleep(lasts).await;
    over.cancel();
    let seconds = begun.elapsed().as_secs_f64();
    let mut commits = 0;
    for task in tasks {
        commits += task.await??;
    }
    Ok(commits as f64 / seconds)
}

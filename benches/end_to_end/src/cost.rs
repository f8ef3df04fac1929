//! What the relay costs when there is nothing to do, what it costs the writers, and how soon it is there.

use crate::process::Relay;
use crate::run::Sample;
use crate::stand::{Counted, Place, ServersCpu, Stand};
use anyhow::{Context, Result};
use outbox_relay_chaos::usage::MachineCpu;
use sqlx::{Connection, Executor};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// After its start a relay has a few things to do once.
pub const SETTLED: Duration = Duration::from_secs(5);
/// What wakes other relays.
const NOTIFY_PER_INSERT: &str = "
    create function notify_rows() returns trigger language plpgsql as
        $$ begin perform pg_notify('outbox_rows', ''); return null; end $$;
    create trigger notify_rows after insert on outbox for each statement execute function notify_rows()";

/// Processor time and statements of a relay without work.
pub async fn idle(stand: &Stand, name: &str, lasts: Duration) -> Result<Sample> {
    let place = stand.place(name).await?;
    stand.fresh_queue("quorum").await?;
    // Of those within a procedure too, from the relay's connections on.
    place.count_nested_statements().await?;
    let (before, begun) = (stand.cpu(), Instant::now());
    tokio::time::sleep(lasts / 4).await;
    let alone = stand.cpu().since(before).database / begun.elapsed().as_secs_f64();
    let relay = place.relay(&[])?;
    relay.until_ready().await?;
    tokio::time::sleep(SETTLED).await;
    let meter = Meter::start(&place, &relay).await?;
    tokio::time::sleep(lasts).await;
    let mut costs = meter.read(&place, &relay).await?;
    costs.push(("Postgres's CPU without a relay", "%", alone * 100.0));
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
    machine: MachineCpu,
}

impl Meter {
    /// From now on.
    pub async fn start(place: &Place<'_>, relay: &Relay) -> Result<Self> {
        let (cpu_seconds, servers) = (relay.usage()?.cpu_seconds, place.stand.cpu());
        let counted = place.counted().await?;
        let machine = MachineCpu::now().context("no /proc/stat")?;
        Ok(Self { begun: Instant::now(), cpu_seconds, servers, counted, machine })
    }

    /// Until now.
    pub async fn read(self, place: &Place<'_>, relay: &Relay) -> Result<Sample> {
        let seconds = self.begun.elapsed().as_secs_f64();
        let machine = MachineCpu::now().context("no /proc/stat")?.since(self.machine);
        let (usage, servers) = (relay.usage()?, place.stand.cpu().since(self.servers));
        let counted = place.counted().await?.since(self.counted);
        let mut sample = vec![
            ("CPU", "%", (usage.cpu_seconds - self.cpu_seconds) / seconds * 100.0),
            ("Postgres's CPU", "%", servers.database / seconds * 100.0),
            ("the machine's CPU", "% of all cores", machine.busy / machine.total * 100.0),
            ("statements", "/s", counted.statements() / seconds),
            ("WAL", "B/s", counted.wal_bytes() / seconds),
            ("peak RSS", "MiB", usage.peak_rss_mib()),
        ];
        if counted.nested() > 0.0 {
            sample.push(("statements within those", "/s", counted.nested() / seconds));
        }
        Ok(sample)
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

/// Beside what the writers write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nobody,
    /// A relay that lets the database watch.
    Watching,
    /// One that polls.
    Polling,
    /// One that polls, and what others use to wake theirs.
    Notified,
}

/// Commits a second of so many connections that write a row each time: without a relay, and beside several. Each round
/// begins with another of them, since a machine is not the same from minute to minute.
pub async fn writers(
    stand: &Stand,
    name: &str,
    connections: usize,
    lasts: Duration,
    round: usize,
) -> Result<Sample> {
    let mut order = [Beside::Nobody, Beside::Watching, Beside::Polling, Beside::Notified];
    let places = order.len();
    order.rotate_left((round - 1) % places);
    let mut found = Vec::new();
    for beside in order {
        let name = format!("{name}_{beside:?}");
        found.push((beside, commits_beside(stand, &name, connections, lasts, beside).await?));
    }
    let of = |beside| {
        let found = found.iter().find(|(of, _)| *of == beside).map(|(_, written)| *written);
        found.context("each is there once")
    };
    let without = of(Beside::Nobody)?.commits;
    let (watching, polling, notified) = (of(Beside::Watching)?, of(Beside::Polling)?, of(Beside::Notified)?);
    Ok(vec![
        ("commits beside a relay", "of those without", watching.commits / without),
        ("without long polling", "of those without", polling.commits / without),
        ("with a NOTIFY per insert", "of those without", notified.commits / without),
        // A relay that falls behind leaves more to the writers.
        ("delivered by then, beside a relay", "of all", watching.delivered),
        ("delivered by then, without long polling", "of all", polling.delivered),
        ("delivered by then, with a NOTIFY per insert", "of all", notified.delivered),
        ("commits without a relay", "/s", without),
    ])
}

/// What writers and the relay beside them have done.
#[derive(Debug, Clone, Copy)]
struct Written {
    /// A second.
    commits: f64,
    /// Of the rows, when the writers end.
    delivered: f64,
}

async fn commits_beside(
    stand: &Stand,
    name: &str,
    connections: usize,
    lasts: Duration,
    beside: Beside,
) -> Result<Written> {
    let place = stand.place(name).await?;
    stand.fresh_queue("quorum").await?;
    let mut listener = place.db().await?;
    if beside == Beside::Notified {
        place.sql(NOTIFY_PER_INSERT).await?;
        listener.execute("listen outbox_rows").await?;
    }
    let long_poll = if beside == Beside::Watching { "true" } else { "false" };
    let relay = match beside {
        Beside::Nobody => None,
        _ => Some(place.relay(&[("OUTBOX_LONG_POLL", long_poll)])?),
    };
    if let Some(relay) = &relay {
        relay.until_ready().await?;
    }
    let (rows, commits) = commits(&place, connections, lasts).await?;
    let mut delivered = 0.0;
    if let Some(relay) = relay {
        delivered = relay.delivered().await as f64 / rows as f64;
        relay.stop().await?;
    }
    listener.close().await?;
    place.leave().await?;
    Ok(Written { commits, delivered })
}

/// Rows in all, and a second.
async fn commits(place: &Place<'_>, connections: usize, lasts: Duration) -> Result<(u64, f64)> {
    // Keys in turns, as of a backlog: with few, the relay would wait for confirms and leave the machine to the writers.
    let insert = "insert into outbox (routing_key, ordering_key, payload)
                  values ('bench', 'key ' || $1 % 1000, jsonb_build_object('x', repeat('x', 490)))";
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
                let row = commits * connections as u64 + writer as u64;
                sqlx::query(insert).bind(row as i64).execute(&mut db).await?;
                commits += 1;
            }
            db.close().await?;
            Ok::<_, sqlx::Error>(commits)
        }));
    }
    tokio::time::sleep(lasts).await;
    over.cancel();
    let seconds = begun.elapsed().as_secs_f64();
    let mut rows = 0;
    for task in tasks {
        rows += task.await??;
    }
    Ok((rows, rows as f64 / seconds))
}

//! A look at the replicas once a second, and what they say when all is calm.

use crate::ledger::Clock;
use crate::observations::{Sample, Says};
use crate::relays::{Fleet, get};
use crate::usage::usage;
use crate::world::World;
use serde_json::Value;
use sqlx::Row;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

const EVERY: Duration = Duration::from_secs(1);
/// The database may be frozen; a look without it is a look.
const DATABASE_LIMIT: Duration = Duration::from_secs(2);
/// Counts in health are about a second old.
const AGREE_LIMIT: Duration = Duration::from_secs(15);

/// Looks until told to stop.
pub async fn look(
    world: Arc<World>,
    fleet: Arc<Fleet>,
    clock: Clock,
    stop: CancellationToken,
) -> Vec<Sample> {
    let mut samples = Vec::new();
    let mut tick = interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! { _ = tick.tick() => {}, () = stop.cancelled() => return samples }
        samples.push(sample(&world, &fleet, clock).await);
    }
}

/// One look.
pub async fn sample(world: &World, fleet: &Fleet, clock: Clock) -> Sample {
    let (at_rest, processes) = (fleet.at_rest(), fleet.processes());
    let mut sample = Sample { at: clock.ms(), replicas: at_rest.len() as u64, ..Sample::default() };
    for (_, _, pid) in &at_rest {
        sample.rss_mib = sample.rss_mib.max(usage(*pid).unwrap_or_default().rss_bytes >> 20);
        let open = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        sample.descriptors = sample.descriptors.max(open as u64);
    }
    // All at the same time, so that a shard moving between two answers is rare.
    let asked = at_rest.iter().map(|(_, address, _)| tokio::spawn(owned(*address)));
    let answers = futures_util::future::join_all(asked).await;
    let answers: Option<Vec<(u64, u64)>> = answers.into_iter().map(|answer| answer.ok().flatten()).collect();
    // While one is being started or stopped its shards may be on their way; only full sets count.
    if let Some(answers) = answers.filter(|answers| !answers.is_empty()) {
        sample.owned = Some(answers.iter().map(|(owned, _)| owned).sum());
        sample.shards = answers.first().map(|(_, shards)| *shards);
    }
    if let Ok(Some((connections, oldest))) = tokio::time::timeout(DATABASE_LIMIT, sessions(world)).await {
        (sample.connections, sample.transaction_ms) = (Some(connections), Some(oldest));
    }
    // One may have come or gone meanwhile.
    sample.processes = processes.max(fleet.processes());
    sample
}

async fn owned(address: SocketAddr) -> Option<(u64, u64)> {
    let health: Value = serde_json::from_str(&get(address, "/health").await.1).ok()?;
    let ownership = health.get("ownership")?;
    Some((ownership.get("owned")?.as_u64()?, ownership.get("shards")?.as_u64()?))
}

/// Sessions of the relays, and the age of their oldest transaction. Only on a database of our own.
async fn sessions(world: &World) -> Option<(u64, u64)> {
    let mut db = world.superuser_db().await.ok()?;
    let sql = "select count(*),
                   coalesce(max(extract(epoch from clock_timestamp() - xact_start) * 1000), 0)::bigint
               from pg_stat_activity where application_name = 'outbox-relay' and backend_type = 'client backend'";
    let row = sqlx::query(sql).fetch_one(&mut db).await.ok()?;
    let number = |place| row.try_get::<i64, _>(place).ok().and_then(|number| u64::try_from(number).ok());
    Some((number(0)?, number(1)?))
}

/// Asks all replicas until they say what the table says and own all shards together, or for a while.
pub async fn ask(world: &World, fleet: &Fleet, clock: Clock, pending: u64, dead: u64) -> (Vec<Says>, Sample) {
    let begun = Instant::now();
    loop {
        let mut all = Vec::new();
        for (replica, address, _) in fleet.at_rest() {
            all.push(says(replica, address).await);
        }
        let agrees = |says: &Says| {
            let health = [says.pending, says.dead, says.in_flight];
            let metrics = [says.metric_pending, says.metric_dead, says.metric_in_flight];
            let truth = [Some(pending), Some(dead), Some(0)];
            says.status == "ok" && health == truth && metrics == truth
        };
        let look = sample(world, fleet, clock).await;
        if (all.iter().all(agrees) && look.owned == look.shards) || begun.elapsed() > AGREE_LIMIT {
            return (all, look);
        }
        sleep(EVERY / 2).await;
    }
}

async fn says(replica: usize, address: SocketAddr) -> Says {
    let health: Value = serde_json::from_str(&get(address, "/health").await.1).unwrap_or_default();
    let metrics = get(address, "/metrics").await.1;
    let field = |name: &str| health.get(name).and_then(Value::as_u64);
    let metric = |name: &str| {
        let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        value.trim().parse::<u64>().ok()
    };
    Says {
        replica,
        status: health.get("status").and_then(Value::as_str).unwrap_or("silent").to_owned(),
        pending: field("pending"),
        dead: field("dead"),
        in_flight: field("in_flight"),
        metric_pending: metric("outbox_relay_pending_messages"),
        metric_dead: metric("outbox_relay_dead_messages"),
        metric_in_flight: metric("outbox_relay_in_flight_messages"),
    }
}

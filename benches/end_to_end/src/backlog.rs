//! A table with a past, a backlog in it, and the relays that drain it.

use crate::distance;
use crate::measures::{Drain, Keys, Past};
use crate::process::{self, Relay};
use crate::raw;
use crate::stand::{Counted, NAME, Place, ServersCpu, Stand};
use crate::stolen::Stolen;
use anyhow::{Context, Result, ensure};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use std::time::{Duration, Instant};

/// Between two looks at the relays, each of which costs them a little: rarely as long as much is left, and often at the end.
const LOOKS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(200));
/// A drain that stands still for so long has failed.
const STUCK: Duration = Duration::from_secs(60);
/// What a relay that runs already has delivered before.
const FIRST: usize = 1;
/// Some seconds after the first row it has read, a relay knows which ids before it belong to none.
const SETTLED: Duration = Duration::from_secs(8);
/// A past is over: what writing it left to disks and caches of the machine, and of its host, is not the drain's.
const PAST_RESTS: Duration = Duration::from_secs(30);

/// A place with its past, and what holds it open.
pub struct Backlog<'a> {
    place: Place<'a>,
    drain: Drain,
    open: Option<PgConnection>,
}

/// What a drain has taken.
pub struct Done {
    /// Rows a second.
    pub rate: f64,
    /// Of all relays together, in seconds.
    pub cpu: f64,
    /// Of the largest relay.
    pub peak_rss_mib: f64,
    /// The servers' processor time.
    pub servers: ServersCpu,
    /// What Postgres has counted.
    pub counted: Counted,
    /// A vacuum afterwards: it is off while a drain is measured. None beside an open transaction, which leaves it nothing to do.
    pub vacuum: Option<Vacuum>,
    /// What the host took meanwhile, in percent.
    pub stolen: Option<f64>,
}

/// What a drain by the relay that promises nothing has taken.
pub struct Bare {
    /// The process.
    pub done: raw::Done,
    /// The servers' processor time.
    pub servers: ServersCpu,
    /// What the host took meanwhile, in percent.
    pub stolen: Option<f64>,
}

/// What a vacuum has taken.
pub struct Vacuum {
    /// Of Postgres, in seconds.
    pub cpu: f64,
    /// Of the write-ahead log.
    pub wal_bytes: f64,
}

impl<'a> Backlog<'a> {
    /// Makes a table with its past and a backlog, drains it, and ends it.
    pub async fn drained(stand: &'a Stand, name: &str, drain: Drain) -> Result<Done> {
        let backlog = Self::prepare(stand, name, drain).await?;
        let done = backlog.drain().await?;
        drop(backlog.open);
        backlog.place.leave().await?;
        Ok(done)
    }

    async fn prepare(stand: &'a Stand, name: &str, drain: Drain) -> Result<Self> {
        let place = stand.place(name).await?;
        if drain.payload != "jsonb" {
            let using = match drain.payload {
                "bytea" => "convert_to(payload::text, 'UTF8')".to_owned(),
                text => format!("payload::text::{text}"),
            };
            place
                .sql(&format!("alter table outbox alter payload type {} using {using}", drain.payload))
                .await?;
        }
        if drain.bytes > 2_000 {
            place.sql("alter table outbox alter payload set storage external").await?;
        }
        let open = give_past(&place, drain.past).await?;
        Ok(Self { place, drain, open })
    }

    async fn drain(&self) -> Result<Done> {
        let stand = self.place.stand;
        self.clear_the_way().await?;
        let mut relays = Vec::new();
        if self.drain.running {
            self.fill(FIRST).await?;
            relays = self.start().await?;
            self.wait(&relays, FIRST).await?;
            tokio::time::sleep(SETTLED).await;
        }
        let first = if self.drain.running { FIRST } else { 0 };
        let mut writer = self.fill_uncommitted(self.drain.rows - first).await?;
        stand.rest().await;
        let (counted, servers, cpu) = (self.place.counted().await?, stand.cpu(), cpu_seconds(&relays)?);
        // Before the commit, from which on a relay that runs may read.
        let (begun, stolen) = (Instant::now(), Stolen::from_now());
        writer.execute("commit").await?;
        if relays.is_empty() {
            relays = self.start().await?;
        }
        self.wait(&relays, self.drain.rows).await?;
        let (seconds, stolen) = (begun.elapsed().as_secs_f64(), stolen.percent());
        let (servers, cpu) = (stand.cpu().since(servers), cpu_seconds(&relays)? - cpu);
        let counted = self.place.counted().await?.since(counted);
        let mut peak_rss_mib = 0.0_f64;
        for relay in relays {
            peak_rss_mib = peak_rss_mib.max(relay.usage()?.peak_rss_mib());
            relay.stop().await?;
        }
        self.nothing_is_left().await?;
        writer.close().await?;
        let vacuum = if self.open.is_none() { Some(self.vacuum().await?) } else { None };
        let rate = self.drain.rows as f64 / seconds;
        Ok(Done { rate, cpu, peak_rss_mib, servers, counted, vacuum, stolen })
    }

    /// An empty queue, and a checkpoint: whatever that costs, the drain does not pay for it, for rows are marked soon after
    /// they were written, on pages that are in the log already.
    async fn clear_the_way(&self) -> Result<()> {
        self.place.stand.fresh_queue(self.drain.queue).await?;
        self.place.administer("checkpoint").await
    }

    /// The same by the relay that promises nothing.
    pub async fn drained_bare(stand: &'a Stand, name: &str, drain: Drain) -> Result<Bare> {
        let backlog = Self::prepare(stand, name, drain).await?;
        let bare = backlog.drain_bare().await?;
        backlog.place.leave().await?;
        Ok(bare)
    }

    async fn drain_bare(&self) -> Result<Bare> {
        let Place { stand, database_url, .. } = &self.place;
        self.clear_the_way().await?;
        self.fill(self.drain.rows).await?;
        let mut bare = process::subcommand("bare")?;
        bare.args(["--database-url", database_url, "--amqp-url", stand.amqp_url(), "--exchange", NAME])
            .args(["--messages", &self.drain.rows.to_string()])
            .args(self.drain.delete.then_some("--delete"));
        stand.rest().await;
        let (backends, servers, stolen) = (stand.backends(), stand.cpu(), Stolen::from_now());
        let done = process::done(bare).await.context("bare relay")?;
        let (broker, stolen) = (stand.cpu().since(servers).broker, stolen.percent());
        stand.until_ended_but(&backends).await?;
        let servers = ServersCpu { broker, ..stand.cpu().since(servers) };
        self.nothing_is_left().await?;
        Ok(Bare { done, servers, stolen })
    }

    async fn vacuum(&self) -> Result<Vacuum> {
        let stand = self.place.stand;
        let (counted, mut db, before) = (self.place.counted().await?, self.place.db().await?, stand.cpu());
        db.execute("vacuum outbox").await?;
        // Before its backend ends, whose time would be nowhere for a moment.
        let cpu = stand.cpu().since(before).database;
        db.close().await?;
        Ok(Vacuum { cpu, wal_bytes: self.place.counted().await?.since(counted).wal_bytes() })
    }

    async fn fill(&self, rows: usize) -> Result<()> {
        let mut writer = self.fill_uncommitted(rows).await?;
        writer.execute("commit").await?;
        Ok(writer.close().await?)
    }

    /// So many rows, with statistics of them, in a transaction that is still open.
    async fn fill_uncommitted(&self, rows: usize) -> Result<PgConnection> {
        let bytes = self.drain.bytes;
        let object = format!("json_build_object('x', repeat('x', {}))", bytes.saturating_sub(9));
        let payload = match self.drain.payload {
            "jsonb" => object.replace("json_", "jsonb_"),
            "json" => object,
            "text" => format!("repeat('x', {bytes})"),
            _ => format!("convert_to(repeat('x', {bytes}), 'UTF8')"),
        };
        let key = match self.drain.keys {
            Keys::Many(keys) => format!("'key ' || i % {keys}"),
            Keys::Drawn(keys) => format!("'key ' || floor(random() * {keys})"),
            Keys::None => "null".to_owned(),
        };
        let mut writer = self.place.db().await?;
        let sql = format!(
            "begin;
             insert into outbox (routing_key, ordering_key, payload)
             select 'bench', {key}, {payload} from generate_series(1, {rows}) as i;
             analyze outbox"
        );
        writer.execute(AssertSqlSafe(sql)).await?;
        Ok(writer)
    }

    async fn start(&self) -> Result<Vec<Relay>> {
        let retention = if self.drain.delete { "0" } else { "7d" };
        let mut settings = vec![("OUTBOX_RETENTION", retention), ("OUTBOX_ORDERING", self.drain.ordering)];
        let url = distance::amqp_url(self.place.stand, self.drain.round_trip).await?;
        settings.push(("AMQP_URL", &url));
        (0..self.drain.replicas).map(|_| self.place.relay(&settings)).collect()
    }

    /// Until so many rows are delivered and committed as such.
    async fn wait(&self, relays: &[Relay], rows: usize) -> Result<()> {
        let (begun, mut last, mut moved) = (Instant::now(), 0, Instant::now());
        loop {
            let mut delivered = 0;
            for relay in relays {
                delivered += relay.delivered().await;
            }
            if delivered >= rows as u64 {
                return Ok(());
            }
            if delivered > last {
                (last, moved) = (delivered, Instant::now());
            }
            ensure!(moved.elapsed() < STUCK, "nothing was delivered for a minute, after {delivered} rows");
            let left = begun.elapsed().as_secs_f64() * (rows as f64 / (delivered as f64).max(1.0) - 1.0);
            let (often, rarely) = LOOKS;
            tokio::time::sleep(Duration::from_secs_f64(left / 4.0).clamp(often, rarely)).await;
        }
    }

    async fn nothing_is_left(&self) -> Result<()> {
        let pending = self.place.number("select count(*) from outbox where delivered_at is null").await?;
        let received = self.place.stand.take_all().await?;
        ensure!(
            pending == 0 && received == self.drain.rows as u64,
            "{pending} rows pending, {received} messages received"
        );
        Ok(())
    }
}

async fn give_past(place: &Place<'_>, past: Past) -> Result<Option<PgConnection>> {
    let open = match past {
        Past::Fresh => return Ok(None),
        Past::Delivered(rows) => {
            let past = "insert into outbox (routing_key, payload, delivered_at)
                        select 'past', '{}', clock_timestamp() from generate_series(1, ";
            place.sql(&format!("{past}{rows}) as i")).await?;
            None
        }
        Past::OpenTransaction(rows) => {
            let mut open = place.db().await?;
            open.execute("begin isolation level repeatable read; select count(*) from outbox").await?;
            let past =
                "insert into outbox (routing_key, payload) select 'past', '{}' from generate_series(1, ";
            place.sql(&format!("{past}{rows}) as i")).await?;
            place.sql("update outbox set delivered_at = clock_timestamp()").await?;
            Some(open)
        }
    };
    place.sql("vacuum analyze outbox").await?;
    place.administer("checkpoint").await?;
    tokio::time::sleep(PAST_RESTS).await;
    Ok(open)
}

fn cpu_seconds(relays: &[Relay]) -> Result<f64> {
    relays.iter().map(|relay| Ok(relay.usage()?.cpu_seconds)).sum()
}

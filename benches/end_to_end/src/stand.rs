//! The test stand: a Postgres and a RabbitMQ of its own, set up as servers in earnest are (everything is synced to disk),
//! and a clean place on them for each measure.

use crate::process::Relay;
use anyhow::{Context, Result, bail, ensure};
use lapin::options::{
    ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, ExchangeKind};
use outbox_relay_chaos::relays::Registry;
use outbox_relay_chaos::servers::Servers;
use outbox_relay_chaos::usage::{children, family_cpu_seconds};
use sqlx::{AssertSqlSafe, Connection as _, Executor, PgConnection};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::Command;

/// Exchange and queue of every measure.
pub const NAME: &str = "bench";

/// As for a small server with an ordinary disk. No checkpoint falls into a measure, and no vacuum, which comes once a minute
/// and would hit one round and not the other: what it costs is measured by itself.
const SETTINGS: &[&str] = &[
    "shared_preload_libraries = 'pg_stat_statements'",
    "autovacuum = off",
    "shared_buffers = '512MB'",
    "max_wal_size = '16GB'",
    "checkpoint_timeout = '1h'",
];

/// Of one core: a server that takes less has nothing to do.
const AT_REST: f64 = 0.1;

/// Processor time of the servers, in seconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct ServersCpu {
    /// Of Postgres with all its connections.
    pub database: f64,
    /// Of RabbitMQ.
    pub broker: f64,
}

impl ServersCpu {
    /// From then to now.
    pub fn since(self, then: Self) -> Self {
        Self { database: self.database - then.database, broker: self.broker - then.broker }
    }
}

/// Who may use which cores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cores {
    /// All may use all.
    Shared,
    /// The broker half of them, everybody else the others.
    Apart,
}

/// The servers.
#[derive(Debug)]
pub struct Stand {
    servers: Servers,
    /// Of database and broker.
    pids: [u32; 2],
    /// That this process may use.
    cores: Vec<usize>,
    versions: (String, String),
    /// Of the relays; they go with this process, however it ends.
    relays: Registry,
    /// The relay that is measured.
    pub relay: PathBuf,
    /// Where logs go.
    pub dir: PathBuf,
    /// Nobody else uses the folder.
    _lock: File,
}

impl Stand {
    /// Starts the servers in `dir`.
    pub async fn start(script: &Path, built: &Path, dir: &Path) -> Result<Self> {
        ensure!(
            built.is_file(),
            "there is no relay at {}: build it, or name it with --relay",
            built.display()
        );
        std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        let lock =
            File::create(dir.join("lock")).with_context(|| format!("cannot write into {}", dir.display()))?;
        ensure!(
            lock.try_lock().is_ok(),
            "another benchmark runs in {}: wait for its end, or name another folder with --dir",
            dir.display()
        );
        let (script, services) = (script.to_owned(), dir.join("services"));
        let servers =
            tokio::task::spawn_blocking(move || Servers::start_durable(&script, &services)).await??;
        let mut db = superuser(&servers, "postgres").await?;
        for setting in SETTINGS {
            db.execute(AssertSqlSafe(format!("alter system set {setting}"))).await?;
        }
        drop(db);
        servers.run(vec!["restart".to_owned(), "postgres".to_owned()]).await?;
        let mut db = superuser(&servers, "postgres").await?;
        db.execute("create extension if not exists pg_stat_statements").await?;
        let pids = server_pids(&servers).await?;
        // Whoever builds meanwhile does not change what is measured.
        let relay = dir.join("relay");
        let _ = std::fs::remove_file(&relay);
        std::fs::copy(built, &relay).with_context(|| format!("cannot copy {}", built.display()))?;
        let relays = Registry::new(dir, &relay)?;
        let postgres: String = sqlx::query_scalar("show server_version").fetch_one(&mut db).await?;
        let versions = (postgres, servers.rabbitmqctl(&["version"]).await?.trim().to_owned());
        let status = std::fs::read_to_string("/proc/self/status")?;
        let cores = allowed_cores(&status).context("/proc/self/status names no cores")?;
        let dir = dir.to_owned();
        Ok(Self { servers, pids, cores, versions, relays, relay, dir, _lock: lock })
    }

    /// Of Postgres and RabbitMQ.
    pub fn versions(&self) -> (String, String) {
        self.versions.clone()
    }

    /// What Postgres was told.
    pub fn settings(&self) -> &'static [&'static str] {
        SETTINGS
    }

    /// A database of its own, with the relay's tables.
    pub async fn place(&self, name: &str) -> Result<Place<'_>> {
        // As Postgres folds it.
        let database = format!("bench_{}", name.replace('-', "_")).to_lowercase();
        let mut db = self.superuser("postgres").await?;
        // It counts so many different statements and no more; those of ended databases are many.
        db.execute("select pg_stat_statements_reset()").await?;
        // A run that ended with the machine has left its own.
        db.execute(AssertSqlSafe(format!("drop database if exists {database} with (force)"))).await?;
        db.execute(AssertSqlSafe(format!("create database {database} owner outbox"))).await?;
        let (url, _) = self.servers.database_url.rsplit_once('/').context("no database in the URL")?;
        let place = Place { stand: self, database_url: format!("{url}/{database}"), database };
        place.migrate().await?;
        Ok(place)
    }

    /// Processor time of the servers up to now.
    pub fn cpu(&self) -> ServersCpu {
        let [database, broker] = self.pids.map(family_cpu_seconds);
        ServersCpu { database, broker }
    }

    /// Processes of Postgres's connections, and its other ones.
    pub fn backends(&self) -> Vec<u32> {
        children(self.pids[0])
    }

    /// Waits until Postgres has noticed that all others have ended: until then their time is nowhere.
    pub async fn until_ended_but(&self, backends: &[u32]) -> Result<()> {
        const LIMIT: Duration = Duration::from_secs(10);
        let begun = Instant::now();
        while self.backends().iter().any(|pid| !backends.contains(pid)) {
            ensure!(begun.elapsed() < LIMIT, "a connection to Postgres does not end");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// Divides the cores among the broker and all others, or gives them back. What this process starts is one of the others.
    pub async fn share_cores(&self, cores: Cores) -> Result<()> {
        let (brokers, others) = match cores {
            Cores::Shared => (&self.cores[..], &self.cores[..]),
            Cores::Apart => self.cores.split_at(self.cores.len() / 2),
        };
        ensure!(!brokers.is_empty(), "one core cannot be divided");
        let [database, broker] = self.pids;
        let mut pids = vec![(std::process::id(), others), (database, others), (broker, brokers)];
        pids.extend(self.backends().into_iter().map(|pid| (pid, others)));
        for (pid, cores) in pids {
            let cores: Vec<String> = cores.iter().map(usize::to_string).collect();
            confine(pid, &cores.join(",")).await?;
        }
        Ok(())
    }

    /// Waits until the servers have done what was left to do, so that nobody pays for what was before; for a while.
    pub async fn rest(&self) {
        const LOOK: Duration = Duration::from_millis(500);
        const LOOKS: usize = 20;
        for _ in 0..LOOKS {
            let before = self.cpu();
            tokio::time::sleep(LOOK).await;
            let ServersCpu { database, broker } = self.cpu().since(before);
            if database.max(broker) < AT_REST * LOOK.as_secs_f64() {
                return;
            }
        }
    }

    /// The URL of the broker.
    pub fn amqp_url(&self) -> &str {
        &self.servers.amqp_url
    }

    /// As superuser in that database.
    async fn superuser(&self, database: &str) -> Result<PgConnection> {
        superuser(&self.servers, database).await
    }

    /// An empty queue of that type, bound to the exchange of all measures, and an empty log of all quorum queues: when that
    /// is full, which is after half a million messages, those that are still in queues are written once more. Whom it hit,
    /// raw publisher or relay, would be chance.
    pub async fn fresh_queue(&self, kind: &str) -> Result<()> {
        let (connection, channel) = self.channel().await?;
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        channel.exchange_declare(NAME.into(), ExchangeKind::Fanout, durable, FieldTable::default()).await?;
        channel.queue_delete(NAME.into(), QueueDeleteOptions::default()).await?;
        self.servers.rabbitmqctl(&["eval", "ra_log_wal:force_roll_over(ra_log_wal)."]).await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(NAME.into(), durable, arguments).await?;
        channel
            .queue_bind(
                NAME.into(),
                NAME.into(),
                "".into(),
                QueueBindOptions::default(),
                FieldTable::default(),
            )
            .await?;
        connection.close(200, "done".into()).await?;
        Ok(())
    }

    /// Messages in the queue, which is emptied.
    pub async fn take_all(&self) -> Result<u64> {
        let (connection, channel) = self.channel().await?;
        let purged = channel.queue_purge(NAME.into(), QueuePurgeOptions::default()).await?;
        connection.close(200, "done".into()).await?;
        Ok(u64::from(purged))
    }

    /// A channel of a connection of its own.
    pub async fn channel(&self) -> Result<(Connection, Channel)> {
        let connection = Connection::connect(self.amqp_url(), ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        Ok((connection, channel))
    }
}

/// Cores of a line such as "Cpus_allowed_list: 0-3,8".
fn allowed_cores(status: &str) -> Option<Vec<usize>> {
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut cores = Vec::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        cores.extend(first.parse::<usize>().ok()?..=last.parse().ok()?);
    }
    Some(cores)
}

/// Binds a process with all its threads to some cores. Asked again when one of the threads has ended meanwhile.
async fn confine(pid: u32, cores: &str) -> Result<()> {
    const TRIES: usize = 20;
    let mut said = String::new();
    for _ in 0..TRIES {
        let mut taskset = Command::new("taskset");
        taskset.args(["--all-tasks", "--cpu-list", "--pid", cores, &pid.to_string()]);
        let output = taskset.stdin(Stdio::null()).output().await.context("taskset does not run")?;
        if output.status.success() || !Path::new(&format!("/proc/{pid}")).exists() {
            return Ok(());
        }
        said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    }
    bail!("process {pid} cannot be bound to cores {cores}: {said}")
}

async fn superuser(servers: &Servers, database: &str) -> Result<PgConnection> {
    let url = servers.superuser_url.as_deref().context("servers of our own")?;
    let (url, _) = url.rsplit_once('/').context("no database in the URL")?;
    Ok(PgConnection::connect(&format!("{url}/{database}")).await?)
}

/// As `scripts/services status` tells them: "postgres  running  127.0.0.1:PORT  pid PID".
async fn server_pids(servers: &Servers) -> Result<[u32; 2]> {
    let status = servers.run(vec!["status".to_owned()]).await?;
    let pid = |server: &str| {
        let line = status.lines().find(|line| line.starts_with(server))?;
        line.rsplit_once("pid ")?.1.trim().parse::<u32>().ok()
    };
    let pids = pid("postgres").zip(pid("rabbitmq")).with_context(|| format!("no pids in: {status}"))?;
    Ok(pids.into())
}

/// A database on the stand.
#[derive(Debug)]
pub struct Place<'a> {
    /// Where it is.
    pub stand: &'a Stand,
    /// Its URL.
    pub database_url: String,
    database: String,
}

/// What the database has counted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counted {
    wal_bytes: f64,
    statements: f64,
    nested: f64,
}

impl Counted {
    /// From then to now.
    pub fn since(self, then: Self) -> Self {
        Self {
            wal_bytes: self.wal_bytes - then.wal_bytes,
            statements: self.statements - then.statements,
            nested: self.nested - then.nested,
        }
    }

    /// Bytes of write-ahead log.
    pub fn wal_bytes(self) -> f64 {
        self.wal_bytes
    }

    /// Statements of clients.
    pub fn statements(self) -> f64 {
        self.statements
    }

    /// Statements within procedures that they call, where these are counted.
    pub fn nested(self) -> f64 {
        self.nested
    }
}

impl Place<'_> {
    async fn migrate(&self) -> Result<()> {
        let output = Command::new(&self.stand.relay)
            .arg("migrate")
            .env_clear()
            .envs(self.settings(&[]))
            .stdin(Stdio::null())
            .output()
            .await?;
        ensure!(output.status.success(), "migrate: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(())
    }

    /// Settings of a relay here, with others on top.
    pub fn settings(&self, more: &[(&str, &str)]) -> BTreeMap<String, String> {
        let own = [
            ("DATABASE_URL", self.database_url.as_str()),
            ("AMQP_URL", self.stand.amqp_url()),
            ("OUTBOX_EXCHANGE", NAME),
            ("OUTBOX_LOG", "warn"),
        ];
        own.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    /// Starts a relay here.
    pub fn relay(&self, more: &[(&str, &str)]) -> Result<Relay> {
        let Stand { relay, dir, relays, .. } = self.stand;
        Relay::start(relay, &self.settings(more), &dir.join("relay.log"), relays)
    }

    /// A connection as the writers have it.
    pub async fn db(&self) -> Result<PgConnection> {
        Ok(PgConnection::connect(&self.database_url).await?)
    }

    /// Carries out statements.
    pub async fn sql(&self, sql: &str) -> Result<()> {
        self.db().await?.execute(AssertSqlSafe(sql.to_owned())).await.with_context(|| sql.to_owned())?;
        Ok(())
    }

    /// As superuser: what an administrator would do.
    pub async fn administer(&self, sql: &str) -> Result<()> {
        self.stand.superuser(&self.database).await?.execute(AssertSqlSafe(sql.to_owned())).await?;
        Ok(())
    }

    /// A number.
    pub async fn number(&self, sql: &str) -> Result<i64> {
        Ok(sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).fetch_one(&mut self.db().await?).await?)
    }

    /// What the server has counted for this database. The asking itself is one statement more.
    pub async fn counted(&self) -> Result<Counted> {
        let mut db = self.stand.superuser("postgres").await?;
        let sql = "select (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::float8,
                          coalesce(sum(calls) filter (where toplevel), 0)::float8,
                          coalesce(sum(calls) filter (where not toplevel), 0)::float8
                   from pg_stat_statements as s join pg_database as d on d.oid = s.dbid where d.datname = $1";
        let (wal_bytes, statements, nested) =
            sqlx::query_as(sql).bind(&self.database).fetch_one(&mut db).await?;
        Ok(Counted { wal_bytes, statements, nested })
    }

    /// Statements within procedures are counted from the next connections on. Costs each of them a little.
    pub async fn count_nested_statements(&self) -> Result<()> {
        let database = &self.database;
        self.administer(&format!("alter database {database} set pg_stat_statements.track = 'all'")).await
    }

    /// Ends the database.
    pub async fn leave(self) -> Result<()> {
        let mut db = self.stand.superuser("postgres").await?;
        db.execute(AssertSqlSafe(format!("drop database {} with (force)", self.database))).await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_those_that_are_allowed() {
        let of = |list: &str| allowed_cores(&format!("Name:\tx\nCpus_allowed_list:\t{list}\n"));
        assert_eq!(of("0-2,7"), Some(vec![0, 1, 2, 7]));
        assert_eq!(of("4"), Some(vec![4]));
        assert_eq!(of("none"), None);
        assert_eq!(allowed_cores(""), None);
    }
}

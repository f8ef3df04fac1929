//! A run: a place, relays, writers and a consumer; then faults, then calm, then judgement.
//!
//! Whatever goes wrong on the way, faults are mended, relays ended and servers wiped: everything that was
//! started is owned by a value here and ends with it.

use crate::board::Board;
use crate::checker::{Evidence, Judgement, judge};
use crate::cli::Options;
use crate::consumer::{Consumer, PREFETCH, until_read};
use crate::faults::{Fault, Means};
use crate::inject::Injector;
use crate::ledger::{self, Clock, Journal};
use crate::observations::{Observations, Setting, Span, TableRow};
use crate::relays::Fleet;
use crate::report::Report;
use crate::schedule::{Event, PAUSE, schedule};
use crate::servers::{Servers, may_mount};
use crate::usage::memory_bytes;
use crate::world::World;
use crate::writer::{Writers, witness};
use crate::{cli, sampler};
use anyhow::{Context, Result};
use sqlx::{AssertSqlSafe, Row};
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex as Plain;
use std::sync::PoisonError;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{interval, sleep};
use tokio_util::sync::CancellationToken;

/// Writers beside the one whose transactions stay open.
const WRITERS: u64 = 6;
const GRACE_MS: u64 = 10_000;
/// For an empty cluster, its log of changes, and temporary files.
const DISK_MB: u64 = 600;
/// Of a row with its indexes and old versions, and its witness.
const ROW_BYTES: u64 = 3_000;
/// After writers stopped, their open transactions may still take this long.
const WRITERS_END: Duration = Duration::from_secs(90);
const LOOK: Duration = Duration::from_millis(250);

/// Bounds of I10 for one replica. Measured values are far below; a leak is not.
const MAX_RSS_MIB: u64 = 256;
const MAX_DESCRIPTORS: u64 = 128;
/// Four are promised; while one is being replaced there may be a fifth, and one for ownership.
const MAX_CONNECTIONS: u64 = 6;

/// Runs and prints; the exit code.
pub async fn run(options: Options) -> Result<u8> {
    let (faults, left_out) = possible(&options);
    anyhow::ensure!(!faults.is_empty(), "none of these faults can be done here: {}", left_out.join(", "));
    for reason in &left_out {
        println!("left out: {reason}");
    }
    let dir = options.dir.join(format!("run-{}", options.seed));
    prepare(&dir, &options.relay)?;
    let length = u64::try_from(options.length.as_millis()).unwrap_or(u64::MAX);
    let events = schedule(options.seed, &faults, options.overlap, options.stretch, length);
    announce(&options, &events, &dir)?;

    let stop = CancellationToken::new();
    let interrupts = Interrupts::listen(stop.clone());
    let finished = tokio::select! {
        finished = Run::carry_out(&options, &events, &dir, stop) => finished?,
        () = interrupts.second() => {
            println!("\nended by a second Ctrl-C; ledgers and logs: {}", dir.display());
            return Ok(cli::INTERRUPTED);
        }
    };
    let (judgement, seen) = finished;
    let report = Report::new(&options, &left_out, &events, &judgement, &seen);
    print!("{}", report.text());
    report.write(&dir.join("report.json"))?;
    if let Some(path) = &options.report {
        report.write(path)?;
    }
    conclude(&options, &dir, judgement.all_held())
}

fn conclude(options: &Options, dir: &Path, all_held: bool) -> Result<u8> {
    if !all_held || options.keep {
        println!("\nledgers, logs and report: {}", dir.display());
    } else {
        std::fs::remove_dir_all(dir).context("cannot clean up")?;
    }
    println!("{}", if all_held { "All held." } else { "An invariant was BROKEN." });
    Ok(if all_held { cli::HELD } else { cli::BROKEN })
}

/// The faults that this run can do, and why others are left out.
fn possible(options: &Options) -> (Vec<Fault>, Vec<String>) {
    let given = options.servers.as_ref();
    let means = Means {
        servers: given.is_none(),
        disk: given.is_none() && may_mount() && disk_mb(options) <= free_memory_mb() / 2,
        broker_proxy: given.is_none_or(|(_, amqp)| !amqp.starts_with("amqps")),
        database_proxy: given.is_none_or(|(database, _)| !database.contains("sslmode=verify")),
        replicas: options.replicas > 1,
    };
    let (can, cannot): (Vec<Fault>, Vec<Fault>) =
        options.faults.iter().partition(|fault| fault.spec().needs.are_met(means));
    let why = |fault: &Fault| {
        let spec = fault.spec();
        format!("{} {} ({})", spec.id, spec.name, spec.needs.sentence())
    };
    (can, cannot.iter().map(why).collect())
}

fn prepare(dir: &Path, relay: &Path) -> Result<()> {
    anyhow::ensure!(
        relay.is_file(),
        "there is no relay at {}: build it, or name it with --relay",
        relay.display()
    );
    if dir.exists() {
        std::fs::remove_dir_all(dir).with_context(|| format!("cannot empty {}", dir.display()))?;
    }
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))
}

fn announce(options: &Options, events: &[Event], dir: &Path) -> Result<()> {
    println!(
        "seed {}   {} replicas, {} rows/s, ordering {}, {:.1} minutes, {} faults:",
        options.seed,
        options.replicas,
        options.rate,
        options.ordering,
        options.length.as_secs_f64() / 60.0,
        events.len()
    );
    for event in events {
        println!("{event}");
    }
    std::fs::write(dir.join("schedule.json"), serde_json::to_string_pretty(events)?)?;
    Ok(())
}

/// The first Ctrl-C (or SIGTERM) stops the faults, the second one everything.
struct Interrupts(CancellationToken);

impl Interrupts {
    fn listen(first: CancellationToken) -> Self {
        let second = CancellationToken::new();
        let told = second.clone();
        tokio::spawn(async move {
            for token in [first, told] {
                interrupted().await;
                token.cancel();
            }
        });
        Self(second)
    }

    async fn second(&self) {
        self.0.cancelled().await;
    }
}

async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else { return std::future::pending().await };
    tokio::select! { _ = tokio::signal::ctrl_c() => {}, _ = terminate.recv() => {} }
}

/// The parts of a run.
struct Run<'a> {
    options: &'a Options,
    dir: PathBuf,
    world: Arc<World>,
    fleet: Arc<Fleet>,
    board: Arc<Board>,
    clock: Clock,
    phase: Arc<Plain<String>>,
    stop: CancellationToken,
}

type Task = JoinHandle<Result<()>>;

impl<'a> Run<'a> {
    async fn carry_out(
        options: &'a Options,
        events: &[Event],
        dir: &Path,
        stop: CancellationToken,
    ) -> Result<(Judgement, Observations)> {
        let run = Self::set_up(options, events, dir, stop).await?;
        let progress = tokio::spawn(progress(Arc::clone(&run.board), Arc::clone(&run.phase), run.clock));
        let finished = run.through(events).await;
        progress.abort();
        println!();
        if !run.world.servers.are_ours() && !options.keep {
            run.world.leave().await.context("cannot clean up on the servers")?;
        }
        finished
    }

    async fn set_up(
        options: &'a Options,
        events: &[Event],
        dir: &Path,
        stop: CancellationToken,
    ) -> Result<Self> {
        let servers = match &options.servers {
            Some((database, amqp)) => Servers::given(database.clone(), amqp.clone()),
            None => {
                println!("starting a Postgres and a RabbitMQ …");
                let (script, dir) = (options.services.clone(), dir.join("services"));
                let is_filled = events.iter().any(|event| event.fault == Fault::DiskFull);
                let disk = is_filled.then(|| disk_mb(options).to_string());
                let start = move || match &disk {
                    Some(mb) => Servers::start_with(&script, &dir, &["--disk", mb]),
                    None => Servers::start(&script, &dir),
                };
                tokio::task::spawn_blocking(start).await??
            }
        };
        let name = format!("chaos_{:08x}", fastrand::u32(..));
        let world = Arc::new(World::make(servers, &options.relay, dir, &name, options.quorum).await?);
        let clock = Clock::start();
        let mut env = settings(options);
        env.extend(world.relay_env());
        let fleet = Arc::new(Fleet::new(&options.relay, dir, env, clock)?);
        fleet.fill(options.replicas).await?;
        for (_, address, _) in fleet.at_rest() {
            until_ready(address, dir).await?;
        }
        let phase = Arc::new(Plain::new("no fault".to_owned()));
        Ok(Self { options, dir: dir.to_owned(), world, fleet, board: Arc::default(), clock, phase, stop })
    }

    async fn through(&self, events: &[Event]) -> Result<(Judgement, Observations)> {
        let (consume, look) = (CancellationToken::new(), CancellationToken::new());
        let journal = Journal::create(&self.dir.join("consumer.jsonl"))?;
        let (world, board) = (Arc::clone(&self.world), Arc::clone(&self.board));
        let consumer = Consumer { world, board, journal, clock: self.clock };
        let consumer = tokio::spawn(consumer.read(consume.clone()));
        let (world, fleet) = (Arc::clone(&self.world), Arc::clone(&self.fleet));
        let sampler = tokio::spawn(sampler::look(world, fleet, self.clock, look.clone()));
        let write = CancellationToken::new();
        let writers = self.start_writers(&write)?;

        let faults = self.faults(events).await?;
        write.cancel();
        self.tell("calm: writers end");
        for writer in writers {
            tokio::time::timeout(WRITERS_END, writer).await.context("a writer does not end")???;
        }
        let calm_from = self.clock.ms();
        self.tell("calm: draining");
        let drained_at = self.drain().await;
        self.tell("calm: asking the replicas");
        let table = self.table().await?;
        let pending = table.iter().filter(|row| !row.delivered && !row.dead).count() as u64;
        let dead = table.iter().filter(|row| row.dead).count() as u64;
        let (says, last_look) = sampler::ask(&self.world, &self.fleet, self.clock, pending, dead).await;
        look.cancel();
        let mut samples = sampler.await?;
        samples.push(last_look);
        self.tell("calm: stopping the replicas");
        self.fleet.look_after()?;
        self.fleet.thin_out(0, false).await?;
        until_read(&self.world, &self.board, self.options.calm).await?;
        consume.cancel();
        consumer.await??;

        let (stops, exits) = self.fleet.ledger();
        let seen = Observations {
            setting: self.setting(),
            faults,
            stops,
            exits,
            samples,
            calm_from,
            drained_at,
            says,
        };
        let evidence = Evidence {
            written: ledger::read(&self.dir.join("writers.jsonl"))?,
            witness: witness(&self.world).await?,
            delivered: ledger::read(&self.dir.join("consumer.jsonl"))?,
            table: self.table().await?,
            seen,
        };
        Ok((judge(&evidence), evidence.seen))
    }

    fn start_writers(&self, stop: &CancellationToken) -> Result<Vec<Task>> {
        let writers = Arc::new(Writers {
            world: Arc::clone(&self.world),
            board: Arc::clone(&self.board),
            journal: Journal::create(&self.dir.join("writers.jsonl"))?,
            clock: self.clock,
            next: 1.into(),
        });
        let (seed, rate) = (self.options.seed, self.options.rate / WRITERS as f64);
        let mut tasks: Vec<Task> = (1..=WRITERS)
            .map(|number| tokio::spawn(Arc::clone(&writers).write(number, seed, rate, stop.clone())))
            .collect();
        tasks.push(tokio::spawn(writers.linger(WRITERS + 1, seed, stop.clone())));
        Ok(tasks)
    }

    /// The phase of faults: each begins at its time, or when what it disturbs is free.
    async fn faults(&self, events: &[Event]) -> Result<Vec<Span>> {
        let injector = Arc::new(Injector {
            world: Arc::clone(&self.world),
            fleet: Arc::clone(&self.fleet),
            board: Arc::clone(&self.board),
            clock: self.clock,
            replicas: self.options.replicas,
            stop: self.stop.clone(),
            parts: std::array::from_fn(|_| Mutex::new(())),
        });
        let from = self.clock.ms();
        let mut begun: Vec<(u64, JoinHandle<Result<Span>>)> = Vec::new();
        for event in events {
            self.wait_until(from + event.at).await?;
            // What the schedule keeps apart stays apart, even if the one before takes longer than planned.
            let late = |(over, task): &(u64, JoinHandle<_>)| *over <= event.at && !task.is_finished();
            if begun.iter().any(late) {
                while begun.iter().any(late) && !self.stop.is_cancelled() {
                    self.wait_until(self.clock.ms() + 100).await?;
                }
                self.wait_until(self.clock.ms() + PAUSE.start()).await?;
            }
            if self.stop.is_cancelled() {
                break;
            }
            let (injector, event) = (Arc::clone(&injector), event.clone());
            begun.push((
                event.at + event.lasts,
                tokio::spawn(async move { injector.carry_out(&event).await }),
            ));
        }
        let length = u64::try_from(self.options.length.as_millis()).unwrap_or(u64::MAX);
        self.wait_until(from.saturating_add(length)).await?;
        let mut spans = Vec::new();
        for (_, task) in begun {
            spans.push(task.await??);
        }
        injector.mend().await?;
        spans.sort_by_key(|span| span.began);
        Ok(spans)
    }

    /// Until that time of the run, or until faults shall end.
    async fn wait_until(&self, ms: u64) -> Result<()> {
        while self.clock.ms() < ms && !self.stop.is_cancelled() {
            self.fleet.look_after()?;
            let left = Duration::from_millis(ms.saturating_sub(self.clock.ms()));
            tokio::select! { () = sleep(left.min(LOOK)) => {}, () = self.stop.cancelled() => {} }
        }
        Ok(())
    }

    /// Waits until nothing is pending; when that was.
    async fn drain(&self) -> Option<u64> {
        let limit = self.clock.ms() + u64::try_from(self.options.calm.as_millis()).unwrap_or(u64::MAX);
        let sql = format!(
            "select count(*) from {} where delivered_at is null and dead_at is null",
            self.world.table()
        );
        while self.clock.ms() < limit {
            let count = async {
                let mut db = self.world.db().await.ok()?;
                sqlx::query_scalar::<_, i64>(AssertSqlSafe(sql.clone())).fetch_one(&mut db).await.ok()
            };
            if count.await == Some(0) {
                return Some(self.clock.ms());
            }
            let _ = self.fleet.look_after();
            sleep(LOOK).await;
        }
        None
    }

    async fn table(&self) -> Result<Vec<TableRow>> {
        let sql = format!(
            "select id, message_id::text, delivered_at is not null, dead_at is not null, attempts, last_error
             from {} order by id",
            self.world.table()
        );
        let rows = sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut self.world.db().await?).await?;
        let read = |row: &sqlx::postgres::PgRow| -> Result<TableRow> {
            Ok(TableRow {
                id: row.try_get(0)?,
                message_id: row.try_get(1)?,
                delivered: row.try_get(2)?,
                dead: row.try_get(3)?,
                attempts: row.try_get(4)?,
                last_error: row.try_get(5)?,
            })
        };
        rows.iter().map(read).collect()
    }

    fn setting(&self) -> Setting {
        Setting {
            replicas: self.options.replicas,
            max_in_flight: self.options.max_in_flight,
            ordering: self.options.ordering.clone(),
            grace_ms: GRACE_MS,
            prefetch: usize::from(PREFETCH),
            max_rss_mib: MAX_RSS_MIB,
            max_descriptors: MAX_DESCRIPTORS,
            max_connections: MAX_CONNECTIONS,
        }
    }

    fn tell(&self, phase: &str) {
        phase.clone_into(&mut self.phase.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Size of a file system for the database in memory: room for all that is written, and to spare.
fn disk_mb(options: &Options) -> u64 {
    let rows = options.rate * options.length.as_secs_f64();
    DISK_MB + (rows as u64 * ROW_BYTES) / 1_000_000
}

fn free_memory_mb() -> u64 {
    memory_bytes("MemAvailable:").unwrap_or(0) / 1_000_000
}

/// What the relays are told beside their servers.
fn settings(options: &Options) -> BTreeMap<String, String> {
    let own = [
        ("OUTBOX_LEASE_TTL", options.lease_ttl.clone()),
        ("OUTBOX_MAX_IN_FLIGHT", options.max_in_flight.to_string()),
        ("OUTBOX_BATCH_SIZE", options.max_in_flight.min(100).to_string()),
        ("OUTBOX_ORDERING", options.ordering.clone()),
        ("OUTBOX_SHUTDOWN_GRACE", format!("{}s", GRACE_MS / 1000)),
        // Short enough to be seen within a run, long enough that one freeze costs one time-out.
        ("OUTBOX_CONFIRM_TIMEOUT", "10s".to_owned()),
        ("OUTBOX_RETRY_MIN", "50ms".to_owned()),
        ("OUTBOX_RETRY_MAX", "2s".to_owned()),
        ("OUTBOX_LOG_FORMAT", "json".to_owned()),
    ];
    let own = own.into_iter().map(|(name, value)| (name.to_owned(), value));
    own.chain(options.set.clone()).collect()
}

async fn until_ready(address: std::net::SocketAddr, dir: &Path) -> Result<()> {
    for _ in 0..240 {
        if crate::relays::get(address, "/readyz").await.0 == 200 {
            return Ok(());
        }
        sleep(LOOK).await;
    }
    anyhow::bail!("a relay did not become ready: see the logs in {}", dir.display())
}

/// One line, rewritten on a terminal; elsewhere a line every ten seconds.
async fn progress(board: Arc<Board>, phase: Arc<Plain<String>>, clock: Clock) {
    let terminal = std::io::stdout().is_terminal();
    let mut tick = interval(if terminal { LOOK } else { Duration::from_secs(10) });
    loop {
        tick.tick().await;
        let phase = phase.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let line = format!("{:5} s  {}", clock.ms() / 1000, board.line(&phase));
        let mut out = std::io::stdout();
        let _ = if terminal { write!(out, "\r\x1b[2K{line}") } else { writeln!(out, "{line}") };
        let _ = out.flush();
    }
}

//! How each fault is carried out: begin, wait, mend.
//!
//! The wait ends early when the run is stopped; mending always happens. What a fault does to servers is
//! tried again until it works, since faults that overlap may be in each other's way.

use crate::board::Board;
use crate::faults::{Duplicates, Fault, Part};
use crate::ledger::Clock;
use crate::observations::Span;
use crate::proxy::{Link, Proxy};
use crate::relays::{Fleet, MOST};
use crate::schedule::Event;
use crate::world::{RELAY, ROUTES, World};
use anyhow::{Context, Result};
use sqlx::{AssertSqlSafe, Connection, Executor};
use std::fs::File;
use std::future::Future;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// How long something that must work is tried.
const TRIES: Duration = Duration::from_secs(90);
/// 20 a second.
const TERMINATE_EVERY: Duration = Duration::from_millis(50);
const REPLICAS_EVERY: Duration = Duration::from_millis(900);
/// Restored after alarms: the defaults of `scripts/services` and of RabbitMQ.
const MEMORY_LIMIT: &str = "0.4";
const DISK_LIMIT: &str = "50MB";

/// Carries out faults.
#[derive(Debug)]
pub struct Injector {
    /// Where.
    pub world: Arc<World>,
    /// The relays.
    pub fleet: Arc<Fleet>,
    /// Switches of writers and consumer.
    pub board: Arc<Board>,
    /// The clock of the run.
    pub clock: Clock,
    /// Replicas that should run between faults.
    pub replicas: u64,
    /// Ends waits early.
    pub stop: CancellationToken,
    /// What may be disturbed by one fault at a time.
    pub parts: [Mutex<()>; 4],
}

impl Injector {
    /// Carries out one fault from beginning to end.
    pub async fn carry_out(&self, event: &Event) -> Result<Span> {
        let spec = event.fault.spec();
        let _turn = self.parts[spec.part as usize].lock().await;
        let began = self.clock.ms();
        self.board.begins(event.at, spec.name);
        let done = self.act(event).await;
        self.board.ends(event.at);
        let hits = done.with_context(|| format!("fault {} could not be carried out", spec.name))?;
        let may_repeat = match spec.duplicates {
            Duplicates::No => false,
            Duplicates::Window => true,
            Duplicates::TakeOver => self.replicas > 1,
        };
        Ok(Span {
            id: spec.id.to_owned(),
            name: spec.name.to_owned(),
            began,
            ended: self.clock.ms(),
            windows: if may_repeat { hits } else { 0 },
            refuses: spec.refuses,
            database: spec.part == Part::Database,
            broker: spec.part == Part::Broker,
            counted_loss: 0,
        })
    }

    /// How many windows of rows in flight it may have cost, if it is one that costs any.
    async fn act(&self, event: &Event) -> Result<u64> {
        let all = self.fleet.running().await;
        match event.fault {
            Fault::RelayKilled => self.kill_a_relay(event).await,
            Fault::RollingRestart => self.roll().await,
            Fault::RelayFrozen => self.freeze_a_relay(event).await,
            Fault::BrokerKilled => self.server("rabbitmq", "kill", "start", event, all).await,
            Fault::BrokerFrozen => self.server("rabbitmq", "pause", "resume", event, all).await,
            Fault::BrokerRestarted => {
                let ctl = |command: &'static str| async move { self.ctl(&[command]).await };
                self.between(event, all, || ctl("stop_app"), || ctl("start_app")).await
            }
            Fault::MemoryAlarm => {
                self.alarm("set_vm_memory_high_watermark", ["0", MEMORY_LIMIT], event).await
            }
            Fault::DiskAlarm => self.alarm("set_disk_free_limit", ["1000000GB", DISK_LIMIT], event).await,
            Fault::BrokerLinkCut => self.broker_link(Link::Cut, event).await,
            Fault::BrokerLinkClosed => self.broker_link(Link::Close, event).await,
            Fault::BrokerLinkCutInside => {
                self.broker_link(Link::CutAfter(5_000 + bounded(event.pick, 60_000)), event).await
            }
            Fault::BrokerLinkSilent => self.broker_link(Link::Silent, event).await,
            Fault::BrokerLinkDeadUp => self.broker_link(Link::DeadUp, event).await,
            Fault::BrokerLinkDeadDown => self.broker_link(Link::DeadDown, event).await,
            Fault::BrokerLinkThrottled => self.broker_link(Link::Throttle(20_000), event).await,
            Fault::BrokerLinkDelayed => self.broker_link(SLOW, event).await,
            Fault::ExchangeDeleted => {
                self.between(event, all, || self.world.delete_exchange(), || self.world.declare()).await
            }
            Fault::WriteRevoked => self.permissions(&["^$", "^$", ".*"], event, all).await,
            Fault::PermissionsRemoved => self.permissions(&[], event, all).await,
            Fault::BindingRemoved => {
                let route = ROUTES[bounded(event.pick, ROUTES.len())];
                self.between(event, 0, || self.world.unbind(route), || self.world.declare()).await
            }
            Fault::Poison => self.switch(&self.board.poison, event).await,
            Fault::QueueFull => self.fill_the_queue(event).await,
            Fault::BackendsTerminated => self.terminate_backends(event, all).await,
            Fault::DatabaseKilled => self.server("postgres", "kill", "start", event, all).await,
            Fault::DatabaseRestarted => self.server("postgres", "stop", "start", event, all).await,
            Fault::DatabaseFrozen => self.server("postgres", "pause", "resume", event, all).await,
            Fault::DatabaseLinkCut => self.database_link(Link::Cut, event, all).await,
            Fault::DatabaseLinkSilent => self.database_link(Link::Silent, event, all).await,
            Fault::DatabaseLinkDeadDown => self.database_link(Link::DeadDown, event, all).await,
            Fault::DatabaseLinkDelayed => self.database_link(SLOW, event, all).await,
            Fault::LongTransaction => {
                let key = format!("insert into {}.chaos_key values ('long transaction', 0)", self.world.name);
                self.hold(&["begin", &key], "rollback", event).await
            }
            Fault::PreparedTransaction => {
                let key = format!("insert into {}.chaos_key values ('prepared', 0)", self.world.name);
                self.hold(&["begin", &key, "prepare transaction 'chaos'"], "rollback prepared 'chaos'", event)
                    .await
            }
            Fault::IdleReader => {
                let read = format!("select count(*) from {}", self.world.table());
                self.hold(&["begin isolation level repeatable read", &read], "rollback", event).await
            }
            Fault::TableLocked => {
                let lock = format!("lock table {} in access exclusive mode", self.world.table());
                self.hold(&["begin", &lock], "rollback", event).await?;
                Ok(all)
            }
            Fault::DiskFull => self.fill_the_disk(event, all).await,
            Fault::ReplicasComeAndGo => self.come_and_go(event).await,
            Fault::DatabasePassword => self.rotate_database_password(event, all).await,
            Fault::BrokerPassword => self.rotate_broker_password(event, all).await,
        }
    }

    async fn wait(&self, event: &Event) {
        let lasts = Duration::from_millis(event.lasts);
        tokio::select! { () = sleep(lasts) => {}, () = self.stop.cancelled() => {} }
    }

    /// Begins, waits, mends.
    async fn between<A, B>(
        &self,
        event: &Event,
        hits: u64,
        begin: impl Fn() -> A,
        mend: impl Fn() -> B,
    ) -> Result<u64>
    where
        A: Future<Output = Result<()>>,
        B: Future<Output = Result<()>>,
    {
        insist(&begin).await?;
        self.wait(event).await;
        insist(&mend).await?;
        Ok(hits)
    }

    // --- relays ---

    async fn kill_a_relay(&self, event: &Event) -> Result<u64> {
        let Some(mut slot) = self.fleet.pick(event.pick, true).await else { return Ok(0) };
        self.fleet.kill(&mut slot).await?;
        self.wait(event).await;
        self.fleet.start(&mut slot)?;
        Ok(1)
    }

    async fn freeze_a_relay(&self, event: &Event) -> Result<u64> {
        let Some(slot) = self.fleet.pick(event.pick, true).await else { return Ok(0) };
        self.fleet.signal(&slot, "STOP").await?;
        self.wait(event).await;
        self.fleet.signal(&slot, "CONT").await?;
        Ok(1)
    }

    /// Another fault is on beside this one.
    fn disturbed(&self) -> bool {
        self.board.on() > 1
    }

    async fn roll(&self) -> Result<u64> {
        for turn in 0..self.fleet.running().await {
            let Some(mut slot) = self.fleet.pick(turn, true).await else { break };
            self.fleet.terminate(&mut slot, self.disturbed()).await?;
            self.fleet.start(&mut slot)?;
            self.fleet.until_ready(&slot).await;
        }
        Ok(0)
    }

    async fn come_and_go(&self, event: &Event) -> Result<u64> {
        let mut rng = fastrand::Rng::with_seed(event.pick);
        let (begun, lasts) = (Instant::now(), Duration::from_millis(event.lasts));
        while begun.elapsed() < lasts && !self.stop.is_cancelled() {
            let running = self.fleet.running().await;
            let stop_one = running >= MOST as u64 || (running > 1 && rng.bool());
            if let Some(mut slot) = self.fleet.pick(rng.u64(..), stop_one).await {
                if stop_one {
                    self.fleet.terminate(&mut slot, self.disturbed()).await?;
                } else {
                    self.fleet.start(&mut slot)?;
                }
            }
            sleep(REPLICAS_EVERY).await;
        }
        self.fleet.thin_out(self.replicas, self.disturbed()).await?;
        self.fleet.fill(self.replicas).await?;
        Ok(0)
    }

    // --- servers ---

    async fn server(
        &self,
        server: &'static str,
        begin: &'static str,
        mend: &'static str,
        event: &Event,
        hits: u64,
    ) -> Result<u64> {
        let control = |command| async move { self.world.servers.control(command, server).await };
        self.between(event, hits, || control(begin), || control(mend)).await
    }

    async fn ctl(&self, args: &[&str]) -> Result<()> {
        self.world.servers.rabbitmqctl(args).await.map(drop)
    }

    async fn alarm(
        &self,
        setting: &'static str,
        [low, normal]: [&'static str; 2],
        event: &Event,
    ) -> Result<u64> {
        let set = |value: &'static str| async move { self.ctl(&[setting, value]).await };
        self.between(event, 0, || set(low), || set(normal)).await
    }

    /// Gives the relays these permissions, or none, for a while.
    async fn permissions(&self, these: &'static [&'static str], event: &Event, hits: u64) -> Result<u64> {
        let take = || async move {
            if these.is_empty() {
                return self.ctl(&["clear_permissions", RELAY]).await;
            }
            self.ctl(&[&["set_permissions", RELAY], these].concat()).await
        };
        self.between(event, hits, take, || self.ctl(&["set_permissions", RELAY, ".*", ".*", ".*"])).await
    }

    /// The limit is raised again, not removed: RabbitMQ before 4.0 never tells publishers of a quorum queue that a
    /// limit is gone, and goes on refusing on their channels (rabbitmq-server issue 12206).
    async fn fill_the_queue(&self, event: &Event) -> Result<u64> {
        let queue = format!("^{}$", self.world.name);
        let [full, roomy] = [20, 100_000_000]
            .map(|length| format!(r#"{{"max-length": {length}, "overflow": "reject-publish"}}"#));
        let policy = |limit| ["set_policy", "chaos-full", &queue, limit, "--apply-to", "queues"];
        let (full, roomy) = (policy(&full), policy(&roomy));
        self.board.paused.store(true, Relaxed);
        let done = self.between(event, 0, || self.ctl(&full), || self.ctl(&roomy)).await;
        self.board.paused.store(false, Relaxed);
        done
    }

    // --- links ---

    /// A link may cost each relay a window, or one for each connection that the proxy has ended.
    async fn link(&self, proxy: &Proxy, link: Link, event: &Event) -> u64 {
        let before = proxy.broken();
        proxy.set(link);
        self.wait(event).await;
        proxy.set(Link::Pass);
        proxy.broken() - before
    }

    async fn broker_link(&self, link: Link, event: &Event) -> Result<u64> {
        let proxy = self.world.broker.as_ref().context("no proxy to the broker")?;
        let broken = self.link(proxy, link, event).await;
        Ok(broken.max(self.fleet.running().await))
    }

    async fn database_link(&self, link: Link, event: &Event, hits: u64) -> Result<u64> {
        let proxy = self.world.database.as_ref().context("no proxy to the database")?;
        self.link(proxy, link, event).await;
        Ok(hits)
    }

    // --- database ---

    async fn terminate_backends(&self, event: &Event, hits: u64) -> Result<u64> {
        let sql = "select pg_terminate_backend(pid) from pg_stat_activity
                   where backend_type = 'client backend' and pid <> pg_backend_pid() order by random() limit 1";
        let (begun, lasts) = (Instant::now(), Duration::from_millis(event.lasts));
        let mut db = insist(&|| self.world.superuser_db()).await?;
        while begun.elapsed() < lasts && !self.stop.is_cancelled() {
            if db.execute(sql).await.is_err() {
                db = insist(&|| self.world.superuser_db()).await?;
            }
            sleep(TERMINATE_EVERY).await;
        }
        Ok(hits)
    }

    /// Takes every free block, again and again: what the server frees meanwhile is gone too. A Postgres that cannot
    /// write its log ends, and cannot start before there is room.
    async fn fill_the_disk(&self, event: &Event, hits: u64) -> Result<u64> {
        let filler = self.world.servers.disk().context("no disk of our own")?.join("filler");
        let over = CancellationToken::new();
        let (path, told) = (filler.clone(), over.clone());
        // Also when this future is dropped: the end of the process waits for the thread.
        let over = over.drop_guard();
        let filling = tokio::task::spawn_blocking(move || fill(&path, &told));
        self.wait(event).await;
        drop(over);
        let filled = filling.await?;
        std::fs::remove_file(&filler)?;
        filled.context("cannot fill the disk")?;
        let mend = || async {
            self.world.servers.control("start", "postgres").await?;
            // One that was about to end is not up.
            self.world.superuser_db().await.map(drop)
        };
        insist(&mend).await?;
        Ok(hits)
    }

    /// Holds a transaction open.
    async fn hold(&self, begin: &[&str], end: &str, event: &Event) -> Result<u64> {
        let mut db = insist(&|| self.world.db()).await?;
        for sql in begin {
            // A fault beside this one may take the connection away; then there is nothing to hold.
            if db.execute(AssertSqlSafe((*sql).to_owned())).await.is_err() {
                return Ok(0);
            }
        }
        self.wait(event).await;
        if end.starts_with("rollback prepared") {
            insist(&|| self.world.sql(end)).await?;
        } else {
            let _ = db.execute(AssertSqlSafe(end.to_owned())).await;
        }
        let _ = db.close().await;
        Ok(0)
    }

    async fn switch(&self, switch: &std::sync::atomic::AtomicBool, event: &Event) -> Result<u64> {
        switch.store(true, Relaxed);
        self.wait(event).await;
        switch.store(false, Relaxed);
        Ok(0)
    }

    // --- passwords ---

    async fn rotate_database_password(&self, event: &Event, hits: u64) -> Result<u64> {
        let password = format!("rotated-{}", event.pick);
        let alter = format!("alter role {RELAY} password '{password}'");
        let end = format!("select pg_terminate_backend(pid) from pg_stat_activity where usename = '{RELAY}'");
        let begin = || async {
            self.world.superuser(&alter).await?;
            self.world.superuser(&end).await
        };
        self.between(event, hits, begin, || async { self.world.change_login(true, &password) }).await
    }

    async fn rotate_broker_password(&self, event: &Event, hits: u64) -> Result<u64> {
        let password = format!("rotated-{}", event.pick);
        let begin = || async {
            self.ctl(&["change_password", RELAY, &password]).await?;
            self.ctl(&["close_all_user_connections", RELAY, "the password has changed"]).await
        };
        self.between(event, hits, begin, || async { self.world.change_login(false, &password) }).await
    }

    /// Whatever happened before: links pass, switches are off, so many replicas run.
    pub async fn mend(&self) -> Result<()> {
        for proxy in [&self.world.broker, &self.world.database].into_iter().flatten() {
            proxy.set(Link::Pass);
        }
        self.board.poison.store(false, Relaxed);
        self.board.paused.store(false, Relaxed);
        self.fleet.fill(self.replicas).await
    }
}

const SLOW: Link = Link::Delay(Duration::from_millis(200));

/// Writes until there is no room left, and goes on trying.
fn fill(path: &Path, over: &CancellationToken) -> std::io::Result<()> {
    let zeros = vec![0; 1 << 20];
    let mut file = File::create(path)?;
    let mut piece = zeros.len();
    while !over.is_cancelled() {
        match file.write(&zeros[..piece]) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => {
                // The last bytes go in small pieces.
                piece = (piece / 2).max(512);
                std::thread::park_timeout(Duration::from_millis(1));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn bounded(pick: u64, bound: usize) -> usize {
    usize::try_from(pick % bound as u64).unwrap_or(0)
}

/// Tries until it works.
async fn insist<T, A: Future<Output = Result<T>>>(act: &impl Fn() -> A) -> Result<T> {
    let begun = Instant::now();
    loop {
        match act().await {
            Ok(done) => return Ok(done),
            Err(error) if begun.elapsed() > TRIES => return Err(error),
            Err(_) => sleep(Duration::from_millis(200)).await,
        }
    }
}

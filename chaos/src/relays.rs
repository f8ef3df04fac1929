//! The relays under test, each a process of its own, known only by its settings, signals and HTTP.
//!
//! A replica keeps its number, HTTP port and log file through all its lives. Whoever stops, kills or
//! starts one holds its lock, so a process that ends while nobody holds it has ended by itself.

use crate::ledger::Clock;
use crate::observations::{Exit, Stop};
use crate::servers::Undertaker;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Mutex as Ledger;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};
use tokio::sync::{Mutex, MutexGuard};

/// Most replicas at a time.
pub const MOST: usize = 5;
/// How long over the grace a stop may take: the product's own word for it is 4 s, and the machine is shared.
pub const GRACE_SLACK: Duration = Duration::from_secs(5);
/// After this a relay that was asked to stop is killed, and the stop counts as failed.
const STOP_LIMIT: Duration = Duration::from_secs(60);
const READY_LIMIT: Duration = Duration::from_secs(30);

/// Kills relays should this process end without having ended them, in whatever way.
///
/// It reads a file of process ids then, and leaves alone what has become another program meanwhile.
#[derive(Debug)]
pub struct Registry {
    pids: PathBuf,
    _undertaker: Undertaker,
}

impl Registry {
    /// For relays that are `binary`; the file of ids lies in `dir`.
    pub fn new(dir: &Path, binary: &Path) -> Result<Self> {
        const KILL: &str = r#"while read -r pid; do
            case $(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") in "$2 run "*) kill -9 "$pid" ;; esac
        done <"$1""#;
        let pids = dir.join("relays.pids");
        File::create(&pids).with_context(|| format!("cannot create {}", pids.display()))?;
        let undertaker = Undertaker::new(KILL, &[&pids, binary])?;
        Ok(Self { pids, _undertaker: undertaker })
    }

    /// To be called as soon as it has been started; its process id.
    pub fn enter(&self, relay: &Child) -> Result<u32> {
        let pid = relay.id().context("the relay ended at once")?;
        writeln!(File::options().append(true).open(&self.pids)?, "{pid}")?;
        Ok(pid)
    }
}

/// The mark by which `scripts/test` finds what is left of it.
pub fn mark() -> Option<(&'static str, String)> {
    std::env::var("RELAY_TEST_RUN").ok().map(|run| ("RELAY_TEST_RUN", run))
}

/// All relays of a run.
#[derive(Debug)]
pub struct Fleet {
    binary: PathBuf,
    dir: PathBuf,
    env: BTreeMap<String, String>,
    clock: Clock,
    slots: Vec<Mutex<Slot>>,
    /// Processes there are, whatever is being done to them.
    processes: AtomicU64,
    stops: Ledger<Vec<Stop>>,
    exits: Ledger<Vec<Exit>>,
    registry: Registry,
}

/// One replica, running or not.
#[derive(Debug)]
pub struct Slot {
    number: usize,
    /// Where its HTTP endpoint listens when it runs.
    pub address: SocketAddr,
    child: Option<Child>,
}

impl Slot {
    /// Its process id, if it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().and_then(Child::id)
    }
}

impl Fleet {
    /// A fleet of which nobody runs yet. `env` is the whole environment of a relay, without its HTTP address.
    pub fn new(binary: &Path, dir: &Path, env: BTreeMap<String, String>, clock: Clock) -> Result<Self> {
        let slots =
            (1..=MOST).map(|number| Ok(Mutex::new(Slot { number, address: free_address()?, child: None })));
        Ok(Self {
            binary: binary.to_owned(),
            dir: dir.to_owned(),
            env,
            clock,
            slots: slots.collect::<Result<_>>()?,
            processes: AtomicU64::new(0),
            stops: Ledger::default(),
            exits: Ledger::default(),
            registry: Registry::new(dir, binary)?,
        })
    }

    /// Takes hold of the replica that `pick` falls on among those that run, or of the stopped ones.
    pub async fn pick(&self, pick: u64, running: bool) -> Option<MutexGuard<'_, Slot>> {
        let mut found = Vec::new();
        for slot in &self.slots {
            let slot = slot.lock().await;
            if slot.pid().is_some() == running {
                found.push(slot);
            }
        }
        let place = usize::try_from(pick).unwrap_or(0) % found.len().max(1);
        (!found.is_empty()).then(|| found.swap_remove(place))
    }

    /// How many run.
    pub async fn running(&self) -> u64 {
        let mut running = 0;
        for slot in &self.slots {
            running += u64::from(slot.lock().await.pid().is_some());
        }
        running
    }

    /// HTTP address and process id of those that run and that nobody is working on just now.
    pub fn at_rest(&self) -> Vec<(usize, SocketAddr, u32)> {
        let free = self.slots.iter().filter_map(|slot| slot.try_lock().ok());
        free.filter_map(|slot| Some((slot.number, slot.address, slot.pid()?))).collect()
    }

    /// How many processes there are, also frozen, starting and ending ones.
    pub fn processes(&self) -> u64 {
        self.processes.load(Relaxed)
    }

    /// Starts it, unless it runs.
    pub fn start(&self, slot: &mut Slot) -> Result<()> {
        if slot.child.is_some() {
            return Ok(());
        }
        let log = self.dir.join(format!("relay-{}.log", slot.number));
        let log = File::options().create(true).append(true).open(log)?;
        let child = Command::new(&self.binary)
            // The flag says nothing new; it makes the process known by its command line.
            .args(["run", "--http-listen", &slot.address.to_string()])
            .env_clear()
            .envs(&self.env)
            .envs(mark())
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{} does not run", self.binary.display()))?;
        self.registry.enter(&child)?;
        slot.child = Some(child);
        self.processes.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Starts stopped replicas until so many run.
    pub async fn fill(&self, wanted: u64) -> Result<()> {
        while self.running().await < wanted {
            let mut slot = self.pick(0, false).await.context("all replicas run already")?;
            self.start(&mut slot)?;
        }
        Ok(())
    }

    /// Stops running replicas in order until only so many run.
    pub async fn thin_out(&self, wanted: u64, disturbed: bool) -> Result<()> {
        while self.running().await > wanted {
            let Some(mut slot) = self.pick(u64::MAX, true).await else { break };
            self.terminate(&mut slot, disturbed).await?;
        }
        Ok(())
    }

    /// Sends a signal by its name.
    pub async fn signal(&self, slot: &Slot, name: &str) -> Result<()> {
        let Some(pid) = slot.pid() else { return Ok(()) };
        let pid = pid.to_string();
        let status = Command::new("kill").args([&format!("-{name}"), &pid]).status().await?;
        ensure!(status.success(), "kill -{name} {pid} failed");
        Ok(())
    }

    /// SIGKILL, then the end.
    pub async fn kill(&self, slot: &mut Slot) -> Result<()> {
        if let Some(mut child) = slot.child.take() {
            child.kill().await?;
            self.processes.fetch_sub(1, Relaxed);
        }
        Ok(())
    }

    /// SIGTERM, then the end, which is written down. `disturbed`: another fault is on, which may excuse
    /// an exit code of 1 and costs a window of duplicates.
    pub async fn terminate(&self, slot: &mut Slot, disturbed: bool) -> Result<()> {
        self.signal(slot, "TERM").await?;
        let Some(mut child) = slot.child.take() else { return Ok(()) };
        let (at, begun) = (self.clock.ms(), Instant::now());
        let code = match tokio::time::timeout(STOP_LIMIT, child.wait()).await {
            Ok(status) => status?.code(),
            Err(_) => {
                child.kill().await?;
                None
            }
        };
        self.processes.fetch_sub(1, Relaxed);
        let took = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let stop = Stop { replica: slot.number, at, took, code, disturbed };
        self.stops.lock().unwrap_or_else(PoisonError::into_inner).push(stop);
        Ok(())
    }

    /// Waits until it is ready, for a while: an outage may last longer.
    pub async fn until_ready(&self, slot: &Slot) {
        let begun = Instant::now();
        while begun.elapsed() < READY_LIMIT && get(slot.address, "/readyz").await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Writes down and starts again those that have ended by themselves.
    pub fn look_after(&self) -> Result<()> {
        for mut slot in self.slots.iter().filter_map(|slot| slot.try_lock().ok()) {
            let Some(child) = &mut slot.child else { continue };
            if let Some(status) = child.try_wait()? {
                let exit = Exit { replica: slot.number, at: self.clock.ms(), code: status.code() };
                self.exits.lock().unwrap_or_else(PoisonError::into_inner).push(exit);
                slot.child = None;
                self.processes.fetch_sub(1, Relaxed);
                self.start(&mut slot)?;
            }
        }
        Ok(())
    }

    /// What was written down: stops, and ends that nobody asked for.
    pub fn ledger(&self) -> (Vec<Stop>, Vec<Exit>) {
        let stops = self.stops.lock().unwrap_or_else(PoisonError::into_inner);
        let exits = self.exits.lock().unwrap_or_else(PoisonError::into_inner);
        (stops.clone(), exits.clone())
    }
}

fn free_address() -> Result<SocketAddr> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// Status and body of a path; status 0 if nobody answers within two seconds.
pub async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let url = format!("http://{address}{path}");
    let ask = move || {
        let config = ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(2)));
        let agent: ureq::Agent = config.http_status_as_error(false).build().into();
        let mut answer = agent.get(&url).call().ok()?;
        Some((answer.status().as_u16(), answer.body_mut().read_to_string().unwrap_or_default()))
    };
    tokio::task::spawn_blocking(ask).await.ok().flatten().unwrap_or_default()
}

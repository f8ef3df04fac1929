//! What is measured, as child processes.

use crate::raw::Done;
use anyhow::{Context, Result, ensure};
use outbox_relay_chaos::relays::{Registry, get, mark};
use outbox_relay_chaos::usage::{Usage, usage};
use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::{Child, Command};

/// A subcommand of this program, as a process whose processor time can be told from everything else's.
pub fn subcommand(name: &str) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(name).stdin(Stdio::null()).kill_on_drop(true);
    Ok(command)
}

/// Runs it to its end.
pub async fn done(mut subcommand: Command) -> Result<Done> {
    let output = subcommand.output().await?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// After this a relay that should be ready, or gone, has failed.
const LIMIT: Duration = Duration::from_secs(60);

/// A relay under measurement; killed when dropped.
#[derive(Debug)]
pub struct Relay {
    child: Child,
    address: SocketAddr,
    /// When it was started.
    pub started: Instant,
}

impl Relay {
    /// Starts `relay run` with these settings and nothing else in its environment.
    pub fn start(
        binary: &Path,
        settings: &BTreeMap<String, String>,
        log: &Path,
        registry: &Registry,
    ) -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let log = std::fs::File::options().create(true).append(true).open(log)?;
        let mut command = Command::new(binary);
        command
            .arg("run")
            .env_clear()
            .envs(settings)
            .env("OUTBOX_HTTP_LISTEN", address.to_string())
            .envs(mark());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).kill_on_drop(true);
        let started = Instant::now();
        let child = command.spawn().with_context(|| format!("{} does not run", binary.display()))?;
        registry.enter(&child)?;
        Ok(Self { child, address, started })
    }

    /// Waits until it is ready and owns shards.
    pub async fn until_ready(&self) -> Result<()> {
        while get(self.address, "/readyz").await.0 != 200 || self.metric("owned_shards").await < 1.0 {
            ensure!(self.started.elapsed() < LIMIT, "the relay does not become ready");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    /// A metric by its name without the prefix, with its labels; 0 as long as nobody answers.
    pub async fn metric(&self, name: &str) -> f64 {
        let scrape = get(self.address, "/metrics").await.1;
        let prefix = format!("outbox_relay_{name} ");
        let value = scrape.lines().find_map(|line| line.strip_prefix(&prefix)?.trim().parse().ok());
        value.unwrap_or(0.0)
    }

    /// Rows that are delivered and committed as such.
    pub async fn delivered(&self) -> u64 {
        self.metric("messages_total{result=\"delivered\"}").await as u64
    }

    /// What it has cost so far.
    pub fn usage(&self) -> Result<Usage> {
        let pid = self.child.id().context("the relay has ended by itself: see its log")?;
        usage(pid).context("the relay has ended by itself: see its log")
    }

    /// SIGTERM, and the end.
    pub async fn stop(mut self) -> Result<()> {
        let pid = self.child.id().context("the relay has ended by itself: see its log")?;
        let kill = Command::new("kill").args(["-TERM", &pid.to_string()]).status().await?;
        ensure!(kill.success(), "kill failed");
        let status =
            tokio::time::timeout(LIMIT, self.child.wait()).await.context("the relay does not stop")??;
        ensure!(status.success(), "the relay ended with {status}");
        Ok(())
    }
}

//! The real binary as a child process, to be killed, stopped and measured.

use super::{DEADLINE, eventually};
use outbox_relay::http::Health;
use outbox_relay_chaos::usage::{Usage, usage};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::process::{Child, Command};

/// Path of the binary under test.
pub fn binary() -> PathBuf {
    env!("CARGO_BIN_EXE_outbox-relay").into()
}

/// A command with nothing of this process's environment but the given pairs.
pub fn command(args: &[&str], env: &BTreeMap<String, String>) -> Command {
    let mut command = Command::new(binary());
    command.args(args).env_clear().envs(env).current_dir(std::env::temp_dir()).kill_on_drop(true);
    // Set by scripts/mutants only, and known only to builds of it.
    if let Ok(mutant) = std::env::var("RELAY_MUTANT") {
        command.env("RELAY_MUTANT", mutant);
    }
    command
}

/// Runs the binary to its end.
pub async fn run(args: &[&str], env: &BTreeMap<String, String>) -> (i32, String, String) {
    let output = command(args, env).stdin(Stdio::null()).output().await.expect("the binary runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// A running relay; killed when dropped.
#[derive(Debug)]
pub struct RelayProcess {
    child: Child,
    /// Where its HTTP endpoint listens.
    pub address: SocketAddr,
    /// What it logs.
    pub log: PathBuf,
}

impl RelayProcess {
    /// Starts `outbox-relay run` on a free HTTP port.
    pub async fn start(env: &BTreeMap<String, String>) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("address");
        drop(listener);
        let log = std::env::temp_dir().join(format!("outbox-relay-{:016x}.log", fastrand::u64(..)));
        let file = std::fs::File::create(&log).expect("log file");
        let mut env = env.clone();
        env.insert("OUTBOX_HTTP_LISTEN".to_owned(), address.to_string());
        let child = command(&["run"], &env).stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).spawn();
        let process = Self { child: child.expect("the binary starts"), address, log };
        eventually("the relay answers on HTTP", async || process.get("/livez").await.0 == 200).await;
        process
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id().expect("running")
    }

    /// Sends a signal by its name, as `kill -NAME PID` does.
    pub async fn signal(&self, name: &str) {
        let pid = self.pid().to_string();
        let status =
            Command::new("kill").args([&format!("-{name}"), &pid]).status().await.expect("kill runs");
        assert!(status.success(), "kill -{name} {pid}");
    }

    /// Waits for the end.
    pub async fn ended(mut self) -> ExitStatus {
        let status = tokio::time::timeout(DEADLINE, self.child.wait()).await.expect("the process ends");
        status.expect("exit status")
    }

    /// SIGTERM, then the end.
    pub async fn terminate(self) -> ExitStatus {
        self.signal("TERM").await;
        self.ended().await
    }

    /// SIGKILL, then the end.
    pub async fn kill(self) {
        self.signal("KILL").await;
        self.ended().await;
    }

    /// Everything logged so far.
    pub fn logged(&self) -> String {
        std::fs::read_to_string(&self.log).expect("log")
    }

    /// What it has cost up to now.
    pub fn usage(&self) -> Usage {
        usage(self.pid()).expect("running")
    }

    /// The health report; `None` if nobody answers.
    pub async fn health(&self) -> Option<Health> {
        serde_json::from_str(&self.get("/health").await.1).ok()
    }

    /// Shards it owns, as it says itself.
    pub async fn owned(&self) -> Option<u32> {
        self.health().await.map(|health| health.ownership.owned)
    }

    /// Waits until it owns shards.
    pub async fn until_owner(&self) {
        let owner = async || self.health().await.is_some_and(|health| health.ownership.state == "owner");
        eventually("the relay owns shards", owner).await;
    }

    /// The value of a metric, by its name with labels.
    pub async fn metric(&self, name: &str) -> f64 {
        metric(&self.get("/metrics").await.1, name)
    }

    /// Status and body of a path; status 0 if nobody answers.
    pub async fn get(&self, path: &str) -> (u16, String) {
        get(self.address, path).await
    }
}

impl Drop for RelayProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("log of the relay:\n{}", self.logged());
        }
        let _ = std::fs::remove_file(&self.log);
    }
}

/// Status and body of a path; status 0 if nobody answers.
pub async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let url = format!("http://{address}{path}");
    let ask = move || {
        let config = ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(10)));
        let agent: ureq::Agent = config.http_status_as_error(false).build().into();
        match agent.get(&url).call() {
            Ok(mut answer) => {
                (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap_or_default())
            }
            Err(_) => (0, String::new()),
        }
    };
    tokio::task::spawn_blocking(ask).await.expect("ask")
}

/// The value of a metric in a scrape, by its name with labels and without the prefix.
pub fn metric(scrape: &str, name: &str) -> f64 {
    let prefix = format!("outbox_relay_{name} ");
    let value = scrape.lines().find_map(|line| line.strip_prefix(&prefix));
    value.unwrap_or_else(|| panic!("no metric {name}")).trim().parse().expect("a number")
}

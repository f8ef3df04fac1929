//! The real binary as a child process, to be killed, stopped and measured.

use super::endpoint::Endpoint;
use super::{DEADLINE, eventually};
use outbox_relay_chaos::relays::mark;
use outbox_relay_chaos::usage::{Usage, usage};
use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
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
    command.envs(mark());
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
    endpoint: Endpoint,
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
        let process = Self { child: child.expect("the binary starts"), endpoint: Endpoint { address }, log };
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
}

impl Deref for RelayProcess {
    type Target = Endpoint;

    fn deref(&self) -> &Endpoint {
        &self.endpoint
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

//! Real Postgres and RabbitMQ servers, started by `scripts/services`.
//!
//! Most tests share one pair; a test that breaks servers has a pair of its own. `TEST_DATABASE_URL`
//! and `TEST_AMQP_URL` name servers that already run, for the shared pair. A server that cannot be
//! had fails the test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// A pair of servers.
#[derive(Debug)]
pub struct Servers {
    /// Role with the right to create databases.
    pub database_url: String,
    /// User with all rights on the vhost.
    pub amqp_url: String,
    /// Superuser of the database, where it is ours.
    pub superuser_url: Option<String>,
    dir: Option<PathBuf>,
    /// Stops the servers when this process is gone, however it went.
    _undertaker: Option<Child>,
}

static SHARED: OnceLock<Servers> = OnceLock::new();
static COUNT: AtomicU32 = AtomicU32::new(0);

impl Servers {
    /// The pair that all harmless tests share.
    pub fn shared() -> &'static Self {
        SHARED.get_or_init(|| {
            let given = |name: &str| std::env::var(name).ok().filter(|url| !url.is_empty());
            match (given("TEST_DATABASE_URL"), given("TEST_AMQP_URL")) {
                (Some(database_url), Some(amqp_url)) => {
                    Self { database_url, amqp_url, superuser_url: None, dir: None, _undertaker: None }
                }
                (None, None) => Self::start(),
                _ => panic!("set both TEST_DATABASE_URL and TEST_AMQP_URL, or neither"),
            }
        })
    }

    /// A pair of one's own.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// A pair of one's own, with more options of `scripts/services start`.
    pub fn start_with(options: &[&str]) -> Self {
        let number = COUNT.fetch_add(1, Relaxed);
        let dir = root().join(format!("target/test-servers/{}-{number}", std::process::id()));
        let undertaker = undertaker(&dir);
        services(&[&["start", "--fast"], options].concat(), &dir);
        Self {
            database_url: value_in(&dir, "DATABASE_URL"),
            amqp_url: value_in(&dir, "AMQP_URL"),
            superuser_url: Some(value_in(&dir, "PG_SUPERUSER_URL")),
            dir: Some(dir),
            _undertaker: Some(undertaker),
        }
    }

    /// A value in DIR/env.
    pub fn value(&self, name: &str) -> String {
        value_in(self.dir.as_deref().expect("only servers of one's own have a folder"), name)
    }

    /// `scripts/services ARGS` on these servers.
    pub async fn services(&self, args: &[&str]) {
        let dir = self.dir.clone().expect("only servers of one's own may be controlled");
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let run = move || services(&args.iter().map(String::as_str).collect::<Vec<_>>(), &dir);
        tokio::task::spawn_blocking(run).await.expect("scripts/services");
    }

    /// `scripts/services COMMAND SERVER` on this pair: stop, start, kill, pause, resume.
    pub async fn control(&self, command: &str, server: &str) {
        match command {
            "start" => self.services(&[command, server, "--fast"]).await,
            _ => self.services(&[command, server]).await,
        }
    }

    /// `rabbitmqctl ARGS` on this pair.
    pub async fn rabbitmqctl(&self, args: &[&str]) {
        let dir = self.dir.clone().expect("only servers of one's own may be controlled");
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        let run = move || {
            let output = Command::new(root().join("scripts/services"))
                .args(["ctl", "--dir"])
                .arg(&dir)
                .arg("--")
                .args(&args)
                .output()
                .expect("scripts/services runs");
            assert!(
                output.status.success(),
                "rabbitmqctl {args:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        };
        tokio::task::spawn_blocking(run).await.expect("rabbitmqctl");
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        if let Some(dir) = &self.dir {
            services(&["stop", "--wipe"], dir);
        }
    }
}

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn value_in(dir: &Path, name: &str) -> String {
    let env = std::fs::read_to_string(dir.join("env")).expect("scripts/services writes DIR/env");
    let value = env.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    value.unwrap_or_else(|| panic!("{name} is missing in {}/env", dir.display())).to_owned()
}

fn services(args: &[&str], dir: &Path) {
    let output = Command::new(root().join("scripts/services"))
        .args(args)
        .arg("--dir")
        .arg(dir)
        .stdin(Stdio::null())
        .output()
        .expect("scripts/services runs");
    assert!(
        output.status.success(),
        "scripts/services {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A shell that waits for the end of its input, which is the end of this process, and then stops the
/// servers. In a group of its own, so that Ctrl-C does not end it.
fn undertaker(dir: &Path) -> Child {
    use std::os::unix::process::CommandExt;
    let script = root().join("scripts/services");
    Command::new("sh")
        .args(["-c", "read -r _; [ ! -d \"$2\" ] || exec \"$1\" stop --wipe --dir \"$2\"", "undertaker"])
        .arg(script)
        .arg(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
        .expect("sh runs")
}

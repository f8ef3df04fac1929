//! Real Postgres and RabbitMQ servers, started and controlled by `scripts/services`.
//!
//! Servers that were started here end with this process, however it ends: a shell waits for that.
//! Servers that were given are never touched.

use anyhow::{Context, Result, bail, ensure};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A pair of servers.
#[derive(Debug)]
pub struct Servers {
    /// Role with the right to create databases.
    pub database_url: String,
    /// User with all rights on the vhost.
    pub amqp_url: String,
    /// Superuser of the database, where it is ours.
    pub superuser_url: Option<String>,
    own: Option<Own>,
}

#[derive(Debug)]
struct Own {
    script: PathBuf,
    dir: PathBuf,
    /// The database's files have a file system of their own.
    has_disk: bool,
    _undertaker: Undertaker,
}

/// Whether this process may mount a file system: tried where nobody else sees it.
pub fn may_mount() -> bool {
    let mut trial = Command::new("unshare");
    trial.args(["--mount", "sh", "-c", "mount -t tmpfs trial /mnt"]);
    trial.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    trial.status().is_ok_and(|status| status.success())
}

impl Servers {
    /// Servers that run already and belong to somebody else.
    pub fn given(database_url: String, amqp_url: String) -> Self {
        Self { database_url, amqp_url, superuser_url: None, own: None }
    }

    /// A pair of one's own in `dir`. `script` is the path of `scripts/services`.
    pub fn start(script: &Path, dir: &Path) -> Result<Self> {
        Self::start_with(script, dir, &[])
    }

    /// The same, with more options of `scripts/services start`.
    pub fn start_with(script: &Path, dir: &Path, options: &[&str]) -> Result<Self> {
        Self::launch(script, dir, &[&["--fast"], options].concat())
    }

    /// A pair that syncs to disk, as in earnest.
    pub fn start_durable(script: &Path, dir: &Path) -> Result<Self> {
        Self::launch(script, dir, &[])
    }

    fn launch(script: &Path, dir: &Path, options: &[&str]) -> Result<Self> {
        const STOP: &str = r#"[ ! -d "$2" ] || exec "$1" stop --wipe --dir "$2""#;
        let undertaker = Undertaker::new(STOP, &[script, dir])?;
        run(script, dir, &[&["start"], options].concat())?;
        Ok(Self {
            database_url: value_in(dir, "DATABASE_URL")?,
            amqp_url: value_in(dir, "AMQP_URL")?,
            superuser_url: Some(value_in(dir, "PG_SUPERUSER_URL")?),
            own: Some(Own {
                script: script.to_owned(),
                dir: dir.to_owned(),
                has_disk: options.contains(&"--disk"),
                _undertaker: undertaker,
            }),
        })
    }

    /// A value of `DIR/env`, which grows with what is started.
    pub fn value(&self, name: &str) -> Result<String> {
        let own = self.own.as_ref().context("only servers of one's own have a folder")?;
        value_in(&own.dir, name)
    }

    /// Started here, so they may be broken.
    pub fn are_ours(&self) -> bool {
        self.own.is_some()
    }

    /// Where the database's files lie, if that is a file system of its own.
    pub fn disk(&self) -> Option<PathBuf> {
        self.own.as_ref().filter(|own| own.has_disk).map(|own| own.dir.join("postgres"))
    }

    /// `scripts/services COMMAND SERVER`: stop, start, restart, kill, pause, resume.
    pub async fn control(&self, command: &str, server: &str) -> Result<()> {
        let mut args = vec![command.to_owned(), server.to_owned()];
        if matches!(command, "start" | "restart") {
            args.push("--fast".to_owned());
        }
        self.run(args).await.map(drop)
    }

    /// `rabbitmqctl ARGS`; what it prints.
    pub async fn rabbitmqctl(&self, args: &[&str]) -> Result<String> {
        self.run(["ctl", "--"].iter().chain(args).map(|arg| (*arg).to_owned()).collect()).await
    }

    /// `scripts/services ARGS` on these servers; what it prints.
    pub async fn run(&self, args: Vec<String>) -> Result<String> {
        let Some(Own { script, dir, .. }) = &self.own else {
            bail!("only servers of one's own may be controlled")
        };
        let (script, dir) = (script.clone(), dir.clone());
        let call = move || run(&script, &dir, &args.iter().map(String::as_str).collect::<Vec<_>>());
        tokio::task::spawn_blocking(call).await.context("scripts/services")?
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        if let Some(Own { script, dir, .. }) = &self.own
            && let Err(error) = run(script, dir, &["stop", "--wipe"])
        {
            eprintln!("warning: {error:#}");
        }
    }
}

fn value_in(dir: &Path, name: &str) -> Result<String> {
    let env = std::fs::read_to_string(dir.join("env")).context("scripts/services wrote no DIR/env")?;
    let line = env.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    line.map(str::to_owned).with_context(|| format!("{name} is missing in {}/env", dir.display()))
}

/// `--dir` goes in front of `--`, behind which everything is for rabbitmqctl.
fn run(script: &Path, dir: &Path, args: &[&str]) -> Result<String> {
    let (command, rest) = args.split_first().context("no command")?;
    let output = Command::new(script)
        .args([OsStr::new(command), OsStr::new("--dir"), dir.as_os_str()])
        .args(rest)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{} does not run", script.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "scripts/services {}: {}", args.join(" "), said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A shell that waits for the end of its input, which is the end of this process or of this value, and
/// then runs a script. In a group of its own, so that Ctrl-C does not end it.
#[derive(Debug)]
pub struct Undertaker(#[allow(dead_code, reason = "its end is what counts")] Child);

impl Undertaker {
    /// The arguments are `$1` and on in the script.
    pub fn new(script: &str, args: &[&Path]) -> Result<Self> {
        use std::os::unix::process::CommandExt;
        let child = Command::new("sh")
            .args(["-c", &format!("read -r _; {script}"), "undertaker"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        Ok(Self(child.context("sh does not run")?))
    }
}

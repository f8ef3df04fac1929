//! The outcome of a run: a table for people, all figures as JSON, and pictures.

use crate::ceiling::Trial;
use crate::cli::Options;
use crate::measures::{Goal, Measure, P99_OF_ALL};
use crate::plot::{self, PLOTS};
use crate::run::{Sample, Taken};
use crate::stand::Stand;
use crate::stats::Spread;
use anyhow::{Context, Result, ensure};
use outbox_relay_chaos::usage::memory_bytes;
use serde::Serialize;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

const TABLE: &str = "table.md";
/// All figures.
pub const JSON: &str = "results.json";
/// Where this was built.
const SOURCES: &str = env!("CARGO_MANIFEST_DIR");

/// A figure of a measure over all rounds.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What.
    pub name: &'static str,
    /// In what.
    pub unit: &'static str,
    /// Middle and ends.
    #[serde(flatten)]
    pub spread: Spread,
    /// Each round.
    pub rounds: Vec<f64>,
    /// What is to be reached, in words.
    pub goal: Option<String>,
    /// The median does.
    pub reached: Option<bool>,
}

/// A measure that was taken.
#[derive(Debug, Clone, Serialize)]
pub struct Measured {
    /// Its name.
    pub name: &'static str,
    /// What it shows.
    pub about: &'static str,
    /// How often it was taken.
    pub rounds: usize,
    /// Its figures.
    pub figures: Vec<Figure>,
    /// Rounds that do not count: the host had stolen too much.
    pub disturbed: Vec<Sample>,
    /// Why there are not as many rounds as there should be.
    pub failure: Option<String>,
    #[serde(skip)]
    goals: &'static [(&'static str, Goal)],
}

impl Measured {
    /// From its rounds.
    pub fn new(measure: &Measure, taken: Taken, failure: Option<String>) -> Self {
        let Measure { name, about, goals, .. } = *measure;
        let Taken { rounds: samples, disturbed } = taken;
        let mut measured =
            Self { name, about, rounds: samples.len(), figures: Vec::new(), disturbed, failure, goals };
        for (name, unit, _) in samples.last().into_iter().flatten() {
            let of = |sample: &Sample| Some(sample.iter().find(|(of, _, _)| of == name)?.2);
            let mut rounds: Vec<f64> = samples.iter().filter_map(of).collect();
            if *name == P99_OF_ALL {
                // It grows from round to round.
                rounds = rounds.split_off(rounds.len() - 1);
            }
            measured.add(name, unit, rounds);
        }
        measured
    }

    fn add(&mut self, name: &'static str, unit: &'static str, rounds: Vec<f64>) {
        let Some(spread) = Spread::of(rounds.iter().copied()) else { return };
        let goal = self.goals.iter().find(|(of, _)| *of == name).map(|(_, goal)| *goal);
        let words = goal.map(|goal| match goal {
            Goal::AtLeast(bound) => format!("≥ {bound}"),
            Goal::AtMost(bound) => format!("≤ {bound}"),
        });
        let reached = goal.map(|goal| match goal {
            Goal::AtLeast(bound) => spread.median >= bound,
            Goal::AtMost(bound) => spread.median <= bound,
        });
        self.figures.push(Figure { name, unit, spread, rounds, goal: words, reached });
    }
}

/// A run.
#[derive(Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Report {
    pub at: String,
    pub commit: String,
    pub relay: String,
    pub rustc: String,
    pub postgres: String,
    pub rabbitmq: String,
    pub machine: Machine,
    pub postgres_settings: &'static [&'static str],
    pub quick: bool,
    pub seconds: f64,
    pub measures: Vec<Measured>,
    /// Which raw publisher is the best.
    pub trials: Vec<Trial>,
}

/// Where it ran.
#[derive(Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub memory_mib: u64,
    pub kernel: String,
}

impl Report {
    /// Of a run that begins now.
    pub fn new(stand: &Stand, options: &Options, commit: String) -> Result<Self> {
        let (postgres, rabbitmq) = stand.versions();
        let at = OffsetDateTime::now_utc().truncate_to_second().format(&Rfc3339)?;
        Ok(Self {
            at,
            commit,
            relay: said(&[&options.relay.to_string_lossy(), "--version"]),
            rustc: said(&["rustc", "--version"]),
            postgres,
            rabbitmq,
            machine: Machine::this(),
            postgres_settings: stand.settings(),
            quick: options.quick,
            seconds: 0.0,
            measures: Vec::new(),
            trials: Vec::new(),
        })
    }

    /// Names of measures that failed.
    pub fn failed(&self) -> impl Iterator<Item = &'static str> {
        self.measures.iter().filter(|measured| measured.failure.is_some()).map(|measured| measured.name)
    }

    /// In Markdown.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let Machine { cpu, cores, memory_mib, kernel } = &self.machine;
        let _ = writeln!(
            text,
            "{} · commit {} · {} · Postgres {} · RabbitMQ {} · {cpu}, {cores} cores, {memory_mib} MiB, Linux {kernel} · {:.0} s{}\n",
            self.at,
            self.commit,
            self.relay,
            self.postgres,
            self.rabbitmq,
            self.seconds,
            if self.quick { " · quick: shows that all works, claims nothing" } else { "" },
        );
        text.push_str(
            "| measure | figure | median | min – max | rounds | goal | |\n|---|---|---|---|---|---|---|\n",
        );
        for measured in &self.measures {
            if let Some(failure) = &measured.failure {
                // A cell is one line.
                let failure = failure.replace(['\n', '|'], " ");
                let _ = writeln!(text, "| {} | failed: {failure} | | | | | |", measured.name);
            }
            for (place, figure) in measured.figures.iter().enumerate() {
                let name = if place == 0 { measured.name } else { "" };
                let again = match measured.disturbed.len() {
                    again if again > 0 && place == 0 => format!(", {again} more disturbed"),
                    _ => String::new(),
                };
                let Figure { spread, unit, .. } = figure;
                let reached = match figure.reached {
                    Some(true) => "reached",
                    Some(false) => "missed",
                    None => "",
                };
                let _ = writeln!(
                    text,
                    "| {name} | {} | {} {unit} | {} – {} | {}{again} | {} | {reached} |",
                    figure.name,
                    digits(spread.median),
                    digits(spread.min),
                    digits(spread.max),
                    measured.rounds,
                    figure.goal.as_deref().unwrap_or(""),
                );
            }
        }
        text
    }
}

impl Machine {
    fn this() -> Self {
        let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            cpu: cpu.map_or("unknown", |(_, model)| model).to_owned(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: memory_bytes("MemTotal:").unwrap_or(0) / 1_048_576,
            kernel: said(&["uname", "-r"]),
        }
    }
}

/// What a command prints, or nothing.
fn said(command: &[&str]) -> String {
    let output = Command::new(command[0]).args(&command[1..]).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

/// Three digits that mean something.
fn digits(value: f64) -> String {
    match value.abs() {
        0.0..1.0 => format!("{value:.3}"),
        1.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// The commit of these sources, asked before anything is written among them, if the relay was built of them: then it lies
/// beside this program.
pub fn commit(relay: &Path) -> Result<String> {
    if relay.parent() != std::env::current_exe()?.parent() {
        return Ok("unknown".to_owned());
    }
    let git = |words: &[&str]| said(&[&["git", "-C", SOURCES], words].concat());
    let commit = git(&["rev-parse", "--short", "HEAD"]);
    Ok(match (commit.is_empty(), git(&["status", "--porcelain"]).is_empty()) {
        (true, _) => "unknown".to_owned(),
        (false, true) => commit,
        (false, false) => commit + ", changed",
    })
}

/// All that a run writes.
fn files() -> impl Iterator<Item = &'static str> {
    [TABLE, JSON].into_iter().chain(PLOTS)
}

/// A folder for a run that is to be kept.
pub fn prepare(dir: &Path) -> Result<()> {
    // Empty ones are of a run that has measured nothing.
    let held = |name: &str| std::fs::metadata(dir.join(name)).is_ok_and(|file| file.len() > 0);
    ensure!(!files().any(held), "{} holds a run already: name another folder", dir.display());
    begin(dir)
}

/// A folder of which only the last run is wanted.
pub fn clear(dir: &Path) -> Result<()> {
    for name in files() {
        let _ = std::fs::remove_file(dir.join(name));
    }
    begin(dir)
}

/// Now, since it would be late to find after an hour that nothing can be written there.
fn begin(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    std::fs::write(dir.join(TABLE), "").with_context(|| format!("cannot write into {}", dir.display()))
}

/// `table.md`, `results.json`, and its pictures.
pub fn save(report: &Report, dir: &Path) -> Result<()> {
    std::fs::write(dir.join(TABLE), report.table())?;
    std::fs::write(dir.join(JSON), serde_json::to_string_pretty(report)? + "\n")?;
    plot::draw(dir).map(drop)
}

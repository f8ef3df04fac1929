//! The outcome of a run: a table for people, all figures as JSON, and a plot.

use crate::cli::Options;
use crate::measures::{Goal, Measure, P99_OF_ALL};
use crate::plot;
use crate::run::Sample;
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
    /// Its figures.
    pub figures: Vec<Figure>,
    #[serde(skip)]
    goals: &'static [(&'static str, Goal)],
}

impl Measured {
    /// From its rounds, of which there is at least one.
    pub fn new(measure: &Measure, samples: &[Sample]) -> Self {
        let mut measured =
            Self { name: measure.name, about: measure.about, figures: Vec::new(), goals: measure.goals };
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

    /// A figure by its name.
    pub fn figure(&self, name: &str) -> Option<&Figure> {
        self.figures.iter().find(|figure| figure.name == name)
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
    pub fn new(stand: &Stand, options: &Options) -> Result<Self> {
        let (postgres, rabbitmq) = stand.versions();
        let at = OffsetDateTime::now_utc().truncate_to_second().format(&Rfc3339)?;
        let git = |words: &[&str]| said(&[&["git", "-C", SOURCES], words].concat());
        let dirty = if git(&["status", "--porcelain"]).is_empty() { "" } else { ", changed" };
        Ok(Self {
            at,
            commit: git(&["rev-parse", "--short", "HEAD"]) + dirty,
            relay: said(&[&options.relay.to_string_lossy(), "--version"]),
            rustc: said(&["rustc", "--version"]),
            postgres,
            rabbitmq,
            machine: Machine::this(),
            postgres_settings: stand.settings(),
            quick: options.quick,
            seconds: 0.0,
            measures: Vec::new(),
        })
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
        text.push_str("| measure | figure | median | min – max | goal | |\n|---|---|---|---|---|---|\n");
        for measured in &self.measures {
            for (place, figure) in measured.figures.iter().enumerate() {
                let name = if place == 0 { measured.name } else { "" };
                let Figure { spread, unit, .. } = figure;
                let reached = match figure.reached {
                    Some(true) => "reached",
                    Some(false) => "missed",
                    None => "",
                };
                let _ = writeln!(
                    text,
                    "| {name} | {} | {} {unit} | {} – {} | {} | {reached} |",
                    figure.name,
                    digits(spread.median),
                    digits(spread.min),
                    digits(spread.max),
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
        0.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// A folder for a run that is to be kept.
pub fn prepare(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let table = dir.join(TABLE);
    // An empty one is of a run that has measured nothing.
    let held = std::fs::metadata(&table).map_or(0, |table| table.len());
    ensure!(held == 0, "{} holds a run already: name another folder", dir.display());
    std::fs::write(table, "").with_context(|| format!("cannot write into {}", dir.display()))
}

/// `table.md`, `results.json`, `ratios.svg`.
pub fn save(report: &Report, dir: &Path) -> Result<()> {
    std::fs::write(dir.join(TABLE), report.table())?;
    std::fs::write(dir.join("results.json"), serde_json::to_string_pretty(report)? + "\n")?;
    plot::ratios(report, &dir.join("ratios.svg"))
}

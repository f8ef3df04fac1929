//! A run: servers, then one measure after the other, each some times.

use crate::cli::Options;
use crate::drain::Drained;
use crate::latency::AllRounds;
use crate::measures::{Drain, Keys, Kind, Measure, Past};
use crate::report::{Measured, Report};
use crate::stand::Stand;
use crate::{cost, latency, report};
use anyhow::{Context, Result};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// One round of a measure: figures by name, with unit and value.
pub type Sample = Vec<(&'static str, &'static str, f64)>;

/// A quick run shows that all works, no more.
const QUICK_ROWS: usize = 20_000;

/// Runs and prints.
pub async fn run(options: Options) -> Result<()> {
    let begun = Instant::now();
    if let Some(dir) = &options.save {
        report::prepare(dir)?;
    }
    println!("{} measures; starting a Postgres and a RabbitMQ …", options.measures.len());
    let stand = Stand::start(&options.services, &options.relay, &options.dir).await?;
    let mut report = Report::new(&stand, &options)?;
    let mut failure = Ok(());
    for (place, measure) in options.measures.iter().enumerate() {
        let progress =
            Progress { name: measure.name, place, of: options.measures.len(), begun: Instant::now() };
        let samples = take(&stand, measure, &options, &progress).await.with_context(|| {
            format!("measure {} failed (relay's log: {}/relay.log)", measure.name, options.dir.display())
        });
        match samples {
            Ok(samples) => report.measures.push(Measured::new(measure, &samples)),
            // What was measured before is worth as much as without it.
            Err(error) => {
                failure = Err(error);
                break;
            }
        }
        report.seconds = begun.elapsed().as_secs_f64();
        // Now, since a run takes long and may be ended before its end.
        if let Some(dir) = &options.save {
            report::save(&report, dir)?;
        }
        progress.done();
    }
    print!("\n{}", report.table());
    if let Some(dir) = &options.save {
        println!("\nsaved in {}", dir.display());
    }
    failure
}

async fn take(
    stand: &Stand,
    measure: &Measure,
    options: &Options,
    progress: &Progress,
) -> Result<Vec<Sample>> {
    let rounds = options.rounds(measure);
    let mut samples = Vec::new();
    let mut drained = match measure.kind {
        Kind::Drain(drain) => Some(Drained::new(stand, measure.name, scaled(drain, options.quick))),
        _ => None,
    };
    let mut all = latency::histogram()?;
    for round in 1..=rounds {
        progress.tell(&format!("round {round} of {rounds}"));
        samples.push(match &mut drained {
            Some(drained) => drained.round(round).await?,
            None => take_other(stand, measure, round, options.quick, &mut all).await?,
        });
    }
    Ok(samples)
}

async fn take_other(
    stand: &Stand,
    measure: &Measure,
    round: usize,
    quick: bool,
    all: &mut AllRounds,
) -> Result<Sample> {
    let name = &format!("{}_{round}", measure.name);
    let seconds = |normal, short| Duration::from_secs(if quick { short } else { normal });
    match measure.kind {
        Kind::Drain(_) => anyhow::bail!("a drain has a table"),
        Kind::Latency { rate } => latency::steady(stand, name, rate, seconds(20, 3), all).await,
        Kind::LoneRow { silence } => {
            let rows = if silence > Duration::from_secs(10) { 10 } else { 100 };
            latency::lone(stand, name, silence, if quick { 3 } else { rows }, all).await
        }
        Kind::Idle => cost::idle(stand, name, seconds(60, 5)).await,
        Kind::Start => cost::start(stand, name).await,
        Kind::Writers { connections } => cost::writers(stand, name, connections, seconds(10, 2), round).await,
    }
}

/// With fewer rows in a quick run.
fn scaled(drain: Drain, quick: bool) -> Drain {
    if !quick {
        return drain;
    }
    let past = match drain.past {
        Past::Fresh => Past::Fresh,
        Past::Delivered(rows) => Past::Delivered(rows / 100),
        Past::OpenTransaction(rows) => Past::OpenTransaction(rows / 100),
    };
    let rows = if drain.keys == Keys::Many(1) { QUICK_ROWS / 10 } else { QUICK_ROWS };
    Drain { rows: rows.min(drain.rows), past, ..drain }
}

/// A line that says what is being done.
struct Progress {
    name: &'static str,
    place: usize,
    of: usize,
    begun: Instant,
}

impl Progress {
    fn tell(&self, what: &str) {
        if std::io::stdout().is_terminal() {
            print!("\r\x1b[2K{:>3} of {}  {:<24} {what}", self.place + 1, self.of, self.name);
            let _ = std::io::stdout().flush();
        }
    }

    fn done(&self) {
        let clear = if std::io::stdout().is_terminal() { "\r\x1b[2K" } else { "" };
        println!(
            "{clear}{:>3} of {}  {:<24} {:.0} s",
            self.place + 1,
            self.of,
            self.name,
            self.begun.elapsed().as_secs_f64()
        );
    }
}

//! A run: servers, then one measure after the other, each some times.

use crate::ceiling::Ceilings;
use crate::cli::Options;
use crate::drain::Drained;
use crate::latency::AllRounds;
use crate::measures::{Against, Drain, Keys, Kind, Measure, Past, Size};
use crate::report::{Measured, Report};
use crate::stand::Stand;
use crate::stolen::{self, Stolen};
use crate::{cost, latency, report};
use anyhow::{Context, Result, ensure};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// One round of a measure: figures by name, with unit and value.
pub type Sample = Vec<(&'static str, &'static str, f64)>;

/// A quick run shows that all works, no more.
const QUICK_ROWS: usize = 20_000;

/// How long a round waits for neighbours that are busy.
const QUIET_MAX: Duration = Duration::from_secs(60);

/// Where results are written where nobody says otherwise: the last run's.
const LAST: &str = "last";

/// Runs and prints.
pub async fn run(options: Options) -> Result<()> {
    let begun = Instant::now();
    let commit = report::commit(&options.relay)?;
    if let Some(dir) = &options.save {
        report::prepare(dir)?;
    }
    println!("{} measures; starting a Postgres and a RabbitMQ …", options.measures.len());
    let stand = Stand::start(&options.services, &options.relay, &options.dir).await?;
    let last = options.dir.join(LAST);
    let dir = options.save.as_ref().unwrap_or(&last);
    if options.save.is_none() {
        // Not before the folder is ours: another benchmark may write there.
        report::clear(dir)?;
    }
    let mut report = Report::new(&stand, &options, commit)?;
    let mut ceilings = Ceilings::new(options.quick);
    let mut saved = Ok(());
    for (place, measure) in options.measures.iter().enumerate() {
        let progress =
            Progress { name: measure.name, place, of: options.measures.len(), begun: Instant::now() };
        let mut taken = Taken::default();
        let ended = take(&stand, measure, &options, &progress, &mut ceilings, &mut taken).await;
        // What was measured is worth as much beside what failed.
        let failure = ended.err().map(|error| format!("{error:#}"));
        progress.done(failure.as_deref());
        report.measures.push(Measured::new(measure, taken, failure));
        report.trials.append(&mut ceilings.take_tried());
        report.seconds = begun.elapsed().as_secs_f64();
        // Now, since a run takes long and may be ended before its end.
        saved = report::save(&report, dir);
    }
    print!("\n{}", report.table());
    saved.with_context(|| format!("the results are not saved in {}", dir.display()))?;
    println!("\nsaved in {}", dir.display());
    let failed: Vec<&str> = report.failed().collect();
    ensure!(
        failed.is_empty(),
        "failed: {} (relay's log: {}/relay.log)",
        failed.join(", "),
        options.dir.display()
    );
    Ok(())
}

/// The rounds of a measure.
#[derive(Debug, Default)]
pub struct Taken {
    /// Those that count.
    pub rounds: Vec<Sample>,
    /// Those that were taken again, since the host had stolen too much.
    pub disturbed: Vec<Sample>,
}

/// All rounds, or those before the one that failed.
async fn take(
    stand: &Stand,
    measure: &Measure,
    options: &Options,
    progress: &Progress,
    ceilings: &mut Ceilings,
    taken: &mut Taken,
) -> Result<()> {
    let rounds = options.rounds(measure);
    // Neighbours may be busy all day.
    let again_max =
        if options.quick || options.relay_only || measure.size == Size::Long { 0 } else { 2 * rounds };
    let mut drained = match measure.kind {
        Kind::Drain(drain) => Some(Drained::new(stand, measure.name, wanted(drain, options), ceilings)),
        _ => None,
    };
    let mut all = latency::histogram()?;
    while taken.rounds.len() < rounds {
        let (round, again) = (taken.rounds.len() + 1, taken.disturbed.len());
        let so_far = if again > 0 { format!(", {again} taken again") } else { String::new() };
        progress.tell(&format!("round {round} of {rounds}{so_far}"));
        if again_max > 0 {
            stolen::until_little(QUIET_MAX).await;
        }
        let before = all.clone();
        let sample = match &mut drained {
            Some(drained) => drained.round(round).await,
            None => take_other(stand, measure, round, options, &mut all).await,
        };
        let sample = sample.with_context(|| format!("round {round}"))?;
        if stolen::disturbed(&sample) && again < again_max {
            taken.disturbed.push(sample);
            all = before;
        } else {
            taken.rounds.push(sample);
        }
    }
    Ok(())
}

async fn take_other(
    stand: &Stand,
    measure: &Measure,
    round: usize,
    options: &Options,
    all: &mut AllRounds,
) -> Result<Sample> {
    let name = &format!("{}_{round}", measure.name);
    let quick = options.quick;
    let seconds = |normal, short| Duration::from_secs(if quick { short } else { normal });
    stand.rest().await;
    let stolen = Stolen::from_now();
    let mut sample = match measure.kind {
        Kind::Drain(_) => anyhow::bail!("a drain has a table"),
        Kind::Latency { rate } => {
            let mut sample = latency::steady(stand, name, rate, seconds(20, 3), all).await?;
            if !options.relay_only {
                let name = &format!("{name}_without");
                sample.extend(latency::without_a_relay(stand, name, rate, seconds(20, 3)).await?);
            }
            Ok(sample)
        }
        Kind::LoneRow { silence, watched } => {
            let rows = if silence > Duration::from_secs(10) { 10 } else { 100 };
            latency::lone(stand, name, silence, watched, if quick { 3 } else { rows }, all).await
        }
        Kind::Idle => cost::idle(stand, name, seconds(60, 5)).await,
        Kind::Start => cost::start(stand, name).await,
        Kind::Writers { connections } => cost::writers(stand, name, connections, seconds(10, 2), round).await,
    }?;
    sample.extend(stolen::figure("stolen by the host", stolen.percent()));
    Ok(sample)
}

/// A drain as it was asked for.
fn wanted(drain: Drain, options: &Options) -> Drain {
    let drain = scaled(drain, options.quick);
    if options.relay_only { Drain { against: Against::Nothing, bare: false, ..drain } } else { drain }
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

    fn done(&self, failure: Option<&str>) {
        let clear = if std::io::stdout().is_terminal() { "\r\x1b[2K" } else { "" };
        println!(
            "{clear}{:>3} of {}  {:<24} {:.0} s{}",
            self.place + 1,
            self.of,
            self.name,
            self.begun.elapsed().as_secs_f64(),
            failure.map_or_else(String::new, |failure| format!(", failed: {failure}"))
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli;

    #[test]
    fn a_relay_alone_is_compared_with_nothing() {
        let asked = |words: &[&str]| {
            let matches =
                cli::command().try_get_matches_from([&["bench", "--only", "marked"], words].concat());
            let options = cli::options(&matches.unwrap()).unwrap();
            let drain = match options.measures[0].kind {
                Kind::Drain(drain) => Some(drain),
                _ => None,
            };
            wanted(drain.unwrap(), &options)
        };
        let (usual, alone) = (asked(&[]), asked(&["--relay-only"]));
        assert!(matches!(usual.against, Against::Best) && usual.bare);
        assert!(matches!(alone.against, Against::Nothing) && !alone.bare);
        assert_eq!(alone.rows, usual.rows);
    }
}

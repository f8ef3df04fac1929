//! The report of a run, for people and as JSON.

use crate::checker::{Judgement, State};
use crate::cli::Options;
use crate::observations::Observations;
use crate::schedule::Event;
use anyhow::{Context, Result};
use serde::Serialize;
use std::fmt::Write;
use std::path::Path;

/// Everything worth keeping of a run, except the ledgers.
#[derive(Debug, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Report<'a> {
    pub all_held: bool,
    pub seed: u64,
    pub seconds: f64,
    pub left_out: &'a [String],
    pub schedule: &'a [Event],
    #[serde(flatten)]
    pub judgement: &'a Judgement,
    pub seen: &'a Observations,
}

impl<'a> Report<'a> {
    /// A report.
    pub fn new(
        options: &Options,
        left_out: &'a [String],
        schedule: &'a [Event],
        judgement: &'a Judgement,
        seen: &'a Observations,
    ) -> Self {
        let (seed, seconds) = (options.seed, options.length.as_secs_f64());
        Self { all_held: judgement.all_held(), seed, seconds, left_out, schedule, judgement, seen }
    }

    /// As JSON.
    pub fn write(&self, path: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self)?;
        std::fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))
    }

    /// As text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        self.faults(&mut text);
        self.summaries(&mut text);
        self.totals(&mut text);
        self.verdicts(&mut text);
        text
    }

    fn faults(&self, text: &mut String) {
        let _ = writeln!(
            text,
            "\nfault                        began    lasted   next row   caught up  duplicates"
        );
        for recovery in &self.judgement.recoveries {
            let note = if recovery.disturbed { "  beside another fault" } else { "" };
            let _ = writeln!(
                text,
                "{}  {:<22}{:7.1} s{:8.1} s{} {:8.1} s  {:10}{note}",
                recovery.id,
                recovery.fault,
                seconds(recovery.began),
                seconds(recovery.lasted),
                recovery
                    .next_row_after
                    .map_or_else(|| "         –".to_owned(), |ms| format!("{:8.1} s", seconds(ms))),
                seconds(recovery.caught_up_after),
                recovery.duplicates,
            );
        }
    }

    /// Times are counted from the end of a fault. All figures are of those beside which no other one was on.
    fn summaries(&self, text: &mut String) {
        let both = |times: Option<(u64, u64)>| {
            let both = times.map(|(median, most)| format!("{:.1} / {:.1} s", seconds(median), seconds(most)));
            both.unwrap_or_else(|| "–".to_owned())
        };
        let _ = writeln!(
            text,
            "\nfault                    times  alone  next row, median / max  caught up, median / max  duplicates, max"
        );
        for line in &self.judgement.summaries {
            let (next_row, caught_up) = (both(line.next_row_after), both(line.caught_up_after));
            let _ = writeln!(
                text,
                "{}  {:<20}{:5}  {:5}  {next_row:>22}  {caught_up:>23}  {:>15}",
                line.id,
                line.fault,
                line.times,
                line.alone,
                line.duplicates.map_or_else(|| "–".to_owned(), |duplicates| duplicates.to_string())
            );
        }
    }

    fn totals(&self, text: &mut String) {
        let totals = &self.judgement.totals;
        let kinds: Vec<String> =
            totals.transactions.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        let _ = writeln!(
            text,
            "\n{} transactions ({}), {} with an unknown outcome, of which {} had committed",
            totals.transactions.values().sum::<usize>(),
            kinds.join(", "),
            totals.unknown_transactions,
            totals.unknown_that_committed,
        );
        let _ = writeln!(
            text,
            "{} rows committed, {} not; {} deliveries of {} messages on {} connections of the consumer: {} duplicates, {} redeliveries, {} rewinds\n",
            totals.committed_rows,
            totals.aborted_rows,
            totals.deliveries,
            totals.messages,
            totals.consumer_connections,
            totals.duplicates,
            totals.redeliveries,
            totals.rewinds,
        );
    }

    fn verdicts(&self, text: &mut String) {
        for verdict in &self.judgement.verdicts {
            let state = match verdict.state {
                State::Held => "held",
                State::Broken => "BROKEN",
                State::NotSeen => "not seen",
            };
            let _ = writeln!(text, "{:<4}{state:<9} {}", verdict.id, verdict.says);
            let _ = writeln!(text, "             {}", verdict.figures);
            if let Some(case) = &verdict.counter_example {
                let _ = writeln!(text, "             first: {case}");
            }
        }
    }
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

//! The command line.

use crate::measures::{MEASURES, Measure, Size};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use std::path::PathBuf;

/// What a run shall be.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "named after the options")]
pub struct Options {
    pub measures: Vec<&'static Measure>,
    pub quick: bool,
    pub relay_only: bool,
    /// `None`: by the size of a measure.
    pub rounds: Option<usize>,
    pub relay: PathBuf,
    pub services: PathBuf,
    pub dir: PathBuf,
    pub save: Option<PathBuf>,
}

impl Options {
    /// How often a measure is taken.
    pub fn rounds(&self, measure: &Measure) -> usize {
        // Long measures are about what many rows do; once is enough where nobody says otherwise.
        let usual = if self.quick || measure.size == Size::Long { 1 } else { 3 };
        self.rounds.unwrap_or(usual)
    }
}

/// The command.
pub fn command() -> Command {
    let path = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).value_parser(value_parser!(PathBuf)).help(help)
    };
    let flag = |name: &'static str, help: &'static str| {
        Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
    };
    Command::new("bench")
        // scripts/bench says its own first; the caller's word counts.
        .args_override_self(true)
        .about("Measures the relay between real servers of its own, as a ratio to what the broker alone can take")
        .after_help(
            "Each measure is taken several times, and each drain in turns with a raw publisher (persistent, mandatory\n\
             messages with confirms, no database; the best of six shapes). Claim ratios, not rates: rates are the\n\
             machine's.\n\n\
             Exit codes: 0 measured, 1 failed, 2 wrong usage. A goal that is missed is told, and is no failure.",
        )
        .arg(
            Arg::new("only")
                .long("only")
                .value_name("NAMES")
                .value_delimiter(',')
                .help("Only these measures, separated by commas; see --list"),
        )
        .arg(flag("quick", "A few measures with few rows, once: shows that all works, and claims nothing"))
        .arg(flag("all", "Long measures too").conflicts_with("quick"))
        .arg(flag("relay-only", "Without what it is compared with, and no ratio: no raw publisher, no bare relay, no writers that publish themselves"))
        .arg(
            Arg::new("rounds")
                .long("rounds")
                .value_name("N")
                .value_parser(value_parser!(u64).range(1..=100))
                .help("How often each measure is taken [default: 3; quick and long ones: 1]"),
        )
        .arg(path("save", "DIR", "Where to keep the table, the raw data and pictures, written after each measure [default: the folder 'last' in --dir, of which only the last run is kept]"))
        .arg(flag("list", "Show all measures, and end"))
        .arg(
            path("draw", "DIR", "Draw the pictures of the run in this folder again, and end")
                .conflicts_with_all(["only", "quick", "all", "relay-only", "rounds", "save", "list"]),
        )
        .arg(path("relay", "PATH", "The outbox-relay to measure").default_value("target/release/outbox-relay"))
        .arg(path("services", "PATH", "scripts/services").default_value("scripts/services").hide(true))
        .arg(path("dir", "DIR", "Where servers and logs live").default_value("target/bench"))
        .subcommand(raw())
        .subcommand(bare())
}

/// The raw publisher, which a run starts as a process of its own.
fn raw() -> Command {
    let text = |name: &'static str| Arg::new(name).long(name).required(true);
    let number =
        |name: &'static str| Arg::new(name).long(name).required(true).value_parser(value_parser!(usize));
    Command::new("raw")
        .hide(true)
        .about("Publishes to an exchange as fast as it can")
        .args([text("amqp-url"), text("exchange")])
        .args(["messages", "bytes", "connections", "channels", "window"].map(number))
}

/// The relay that promises nothing, the same.
fn bare() -> Command {
    let text = |name: &'static str| Arg::new(name).long(name).required(true);
    Command::new("bare")
        .hide(true)
        .about("Relays rows with no promise")
        .args(["database-url", "amqp-url", "exchange"].map(text))
        .arg(text("messages").value_parser(value_parser!(usize)))
        .arg(Arg::new("delete").long("delete").action(ArgAction::SetTrue))
}

/// The options, or one sentence that says what is wrong.
pub fn options(matches: &ArgMatches) -> Result<Options, String> {
    let path = |name: &str| {
        let given = matches.get_one::<PathBuf>(name).cloned().unwrap_or_default();
        std::path::absolute(&given).map_err(|error| format!("--{name} {}: {error}", given.display()))
    };
    let (quick, all) = (matches.get_flag("quick"), matches.get_flag("all"));
    let names: Option<Vec<String>> = matches.get_many("only").map(|names| names.cloned().collect());
    if let Some(unknown) =
        names.iter().flatten().find(|name| MEASURES.iter().all(|measure| measure.name != name.as_str()))
    {
        return Err(format!("no measure is called '{unknown}': --list shows them all"));
    }
    let wanted = |measure: &&Measure| match &names {
        Some(names) => names.iter().any(|name| name == measure.name),
        None if quick => measure.size == Size::Quick,
        None => all || measure.size != Size::Long,
    };
    Ok(Options {
        measures: MEASURES.iter().filter(wanted).collect(),
        quick,
        relay_only: matches.get_flag("relay-only"),
        rounds: matches.get_one::<u64>("rounds").and_then(|rounds| usize::try_from(*rounds).ok()),
        relay: path("relay")?,
        services: path("services")?,
        dir: path("dir")?,
        save: matches.get_one::<PathBuf>("save").cloned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Options, String> {
        let words = std::iter::once("bench").chain(words.iter().copied());
        options(&command().try_get_matches_from(words).map_err(|error| error.to_string())?)
    }

    #[test]
    fn measures_are_chosen_by_name_or_size() {
        command().debug_assert();
        let names = |words: &[&str]| -> Vec<&str> {
            parse(words).unwrap().measures.iter().map(|measure| measure.name).collect()
        };
        assert_eq!(names(&["--only", "start,backlog"]), ["backlog", "start"]);
        assert!(names(&["--quick"]).len() < names(&[]).len());
        assert!(names(&[]).len() < names(&["--all"]).len());
        assert!(parse(&["--only", "nothing"]).unwrap_err().contains("'nothing'"));
        assert!(parse(&["--rounds", "0"]).is_err());
        assert!(parse(&["--draw", "kept", "--quick"]).unwrap_err().contains("'--draw <DIR>'"));
        assert!(parse(&["--relay-only"]).unwrap().relay_only && !parse(&[]).unwrap().relay_only);
    }
}

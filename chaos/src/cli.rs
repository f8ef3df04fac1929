//! The command line.

use crate::faults::{self, EVERYTHING, FAULTS, Fault};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// All held.
pub const HELD: u8 = 0;
/// An invariant was broken.
pub const BROKEN: u8 = 1;
/// Wrong usage.
pub const WRONG_USAGE: u8 = 2;
/// The run itself failed: no servers, no disk, a fault that could not be mended.
pub const FAILED: u8 = 3;
/// Ended by a second Ctrl-C.
pub const INTERRUPTED: u8 = 130;

/// What a run shall be.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "named after the options")]
pub struct Options {
    pub seed: u64,
    pub length: Duration,
    pub calm: Duration,
    pub replicas: u64,
    pub faults: Vec<Fault>,
    pub overlap: bool,
    pub stretch: f64,
    pub rate: f64,
    pub ordering: String,
    pub quorum: bool,
    pub lease_ttl: String,
    pub max_in_flight: u64,
    pub set: BTreeMap<String, String>,
    pub keep: bool,
    pub report: Option<PathBuf>,
    /// Database and broker that run already.
    pub servers: Option<(String, String)>,
    pub relay: PathBuf,
    pub services: PathBuf,
    pub dir: PathBuf,
}

/// The command.
pub fn command() -> Command {
    let option = |name: &'static str, value: &'static str, default: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).default_value(default).help(help)
    };
    let path = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).value_parser(value_parser!(PathBuf)).help(help)
    };
    let flag = |name: &'static str, help: &'static str| {
        Arg::new(name).long(name).action(ArgAction::SetTrue).help(help)
    };
    Command::new("chaos")
        // scripts/chaos says its own first; the caller's word counts.
        .args_override_self(true)
        .about("Runs relays under load while servers, links and relays fail, and judges the outcome from ledgers")
        .after_help(
            "First the faults, then calm, in which everything must drain; then twelve invariants are judged, and whether the ledgers agree.\n\
             Ctrl-C ends the faults early and judges; a second one ends at once.\n\
             The same seed gives the same schedule of faults.\n\n\
             Exit codes: 0 all held, 1 an invariant was broken, 2 wrong usage, 3 the run itself failed, 130 ended by a second Ctrl-C",
        )
        .arg(Arg::new("seed").long("seed").value_name("N").value_parser(value_parser!(u64)).help(
            "Decides the schedule and the writers' choices [default: random, and printed]",
        ))
        .arg(option("minutes", "M", "2", "How long faults go on; may be a fraction").value_parser(value_parser!(f64)))
        .arg(
            option("replicas", "N", "3", "Relays that run beside each other")
                .value_parser(value_parser!(u64).range(1..=5)),
        )
        .arg(option("faults", "IDS", EVERYTHING, "Ids or names, separated by commas; F21 is everything, with overlaps"))
        .arg(
            option("stretch", "N", "1", "Makes each fault last so many times longer, such as 5 for freezes of half a minute")
                .value_parser(value_parser!(f64)),
        )
        .arg(option("rate", "ROWS", "200", "Rows written a second").value_parser(value_parser!(f64)))
        .arg(option("ordering", "WORD", "strict", "OUTBOX_ORDERING").value_parser(["strict", "pipelined", "none"]))
        .arg(option("queue", "TYPE", "quorum", "Type of the queue").value_parser(["quorum", "classic"]))
        .arg(option("lease-ttl", "TIME", "2s", "OUTBOX_LEASE_TTL"))
        .arg(
            option("max-in-flight", "ROWS", "500", "OUTBOX_MAX_IN_FLIGHT, the unit of the bound of duplicates")
                .value_parser(value_parser!(u64).range(1..)),
        )
        .arg(
            Arg::new("set")
                .long("set")
                .value_name("NAME=VALUE")
                .action(ArgAction::Append)
                .value_parser(pair)
                .help("Another setting of the relays, such as OUTBOX_RETENTION=0; may be repeated"),
        )
        .arg(
            option("calm", "TIME", "2m", "Longest time to drain after the faults")
                .value_parser(humantime::parse_duration),
        )
        .arg(flag("keep", "Leave ledgers and logs, also if all held"))
        .arg(path("report", "FILE", "Write the report as JSON"))
        .arg(flag("list", "Show all faults, and end"))
        .arg(
            Arg::new("database-url")
                .long("database-url")
                .value_name("URL")
                .requires("amqp-url")
                .help("A Postgres that runs already; only faults that leave servers alone are used then"),
        )
        .arg(
            Arg::new("amqp-url")
                .long("amqp-url")
                .value_name("URL")
                .requires("database-url")
                .help("A RabbitMQ that runs already"),
        )
        .arg(path("relay", "PATH", "The outbox-relay to test").default_value("target/release/outbox-relay"))
        .arg(path("services", "PATH", "scripts/services").default_value("scripts/services").hide(true))
        .arg(path("dir", "DIR", "Where runs keep their files").default_value("target/chaos"))
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// The options, or one sentence that says what is wrong.
pub fn options(matches: &ArgMatches) -> Result<Options, String> {
    let text = |name: &str| matches.get_one::<String>(name).cloned().unwrap_or_default();
    let number = |name: &str| matches.get_one::<u64>(name).copied().unwrap_or_default();
    let path = |name: &str| {
        let given = matches.get_one::<PathBuf>(name).cloned().unwrap_or_default();
        std::path::absolute(&given).map_err(|error| format!("--{name} {}: {error}", given.display()))
    };
    let positive = |name: &str| {
        let given = matches.get_one::<f64>(name).copied().unwrap_or_default();
        let fits = given > 0.0 && given <= 100_000.0;
        if fits {
            Ok(given)
        } else {
            Err(format!("--{name} {given}: expected more than 0, and at most 100000"))
        }
    };
    let (faults, overlap) = faults::select(&text("faults"))?;
    let database = matches.get_one::<String>("database-url").cloned();
    Ok(Options {
        seed: matches.get_one("seed").copied().unwrap_or_else(|| fastrand::u64(..1_000_000)),
        length: Duration::from_secs_f64(positive("minutes")? * 60.0),
        calm: matches.get_one("calm").copied().unwrap_or_default(),
        replicas: number("replicas"),
        faults,
        overlap,
        stretch: positive("stretch")?,
        rate: positive("rate")?,
        ordering: text("ordering"),
        quorum: text("queue") == "quorum",
        lease_ttl: text("lease-ttl"),
        max_in_flight: number("max-in-flight"),
        set: matches.get_many::<(String, String)>("set").into_iter().flatten().cloned().collect(),
        keep: matches.get_flag("keep"),
        report: matches.get_one::<PathBuf>("report").cloned(),
        servers: database.zip(matches.get_one::<String>("amqp-url").cloned()),
        relay: path("relay")?,
        services: path("services")?,
        dir: path("dir")?,
    })
}

/// All faults, a line each.
pub fn list() -> String {
    let mut lines = vec![format!("{EVERYTHING}  {:<24}everything at random, with overlaps", "everything")];
    for spec in FAULTS {
        let needs = match spec.needs {
            faults::Needs::Nothing => String::new(),
            needs => format!(" ({})", needs.sentence()),
        };
        lines.push(format!("{}  {:<24}{}{needs}", spec.id, spec.name, spec.about));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Options, String> {
        let words = std::iter::once("chaos").chain(words.iter().copied());
        options(&command().try_get_matches_from(words).map_err(|error| error.to_string())?)
    }

    #[test]
    fn the_command_is_sound() {
        command().debug_assert();
        let options = parse(&["--seed", "7", "--minutes", "0.5", "--faults", "F01,poison"]).unwrap();
        assert_eq!((options.seed, options.length), (7, Duration::from_secs(30)));
        assert_eq!(options.faults, [Fault::RelayKilled, Fault::Poison]);
        assert!(parse(&["--dir", "/one", "--dir", "/two"]).unwrap().dir.ends_with("two"));
        assert_eq!(list().lines().count(), FAULTS.len() + 1);
    }

    #[test]
    fn wrong_usage_is_refused() {
        for words in [
            ["--replicas", "6"],
            ["--minutes", "0"],
            ["--rate", "-1"],
            ["--stretch", "0"],
            ["--faults", "F99"],
            ["--ordering", "loose"],
            ["--database-url", "postgres://localhost/x"],
            ["--set", "OUTBOX_RETENTION"],
        ] {
            assert!(parse(&words).is_err(), "{words:?}");
        }
    }
}

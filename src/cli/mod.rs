//! Commands of the binary. Each is a file; this one parses, dispatches, and turns errors into one line
//! on stderr and an exit code.

mod check;
mod migrate;
mod run;
mod status;

use crate::config::{ConfigError, Sources, catalog::SETTINGS};
use clap::{Arg, ArgAction, ArgMatches, Command};
use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

/// Something went wrong while running.
const FAILURE: u8 = 1;
/// The command line or a setting is wrong; nothing was started.
const USAGE: u8 = 2;
/// `check` found something, or `status` says that all is not well.
const UNWELL: u8 = 3;

const EXIT_CODES: &str = "\
Exit codes:
  0    done, or stopped cleanly
  1    failed while running
  2    wrong usage or settings; nothing was started
  3    `check` found a problem, or `status` says the relay is not well
  130, 143  ended at once by a second SIGINT or SIGTERM";

/// Parses the command line, runs the command, and says how it ended.
pub fn main(
    args: impl IntoIterator<Item = OsString>,
    env: impl Iterator<Item = (String, String)>,
) -> ExitCode {
    let matches = match command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) => return usage(&error),
    };
    match dispatch(&matches, env) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            let code = if error.downcast_ref::<ConfigError>().is_some() { USAGE } else { FAILURE };
            ExitCode::from(code)
        }
    }
}

/// clap prints help and version itself; its errors are long, so only the first line is kept.
fn usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
    match error.kind() {
        DisplayHelp | DisplayVersion => {
            let _ = error.print();
            ExitCode::SUCCESS
        }
        DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(USAGE)
        }
        _ => {
            let text = error.to_string();
            let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
            let tip = lines
                .iter()
                .find(|line| line.starts_with("tip:"))
                .map_or(String::new(), |tip| format!(" ({tip})"));
            eprintln!("{}{tip}; see --help", lines.first().unwrap_or(&"error: wrong usage"));
            ExitCode::from(USAGE)
        }
    }
}

fn dispatch(matches: &ArgMatches, env: impl Iterator<Item = (String, String)>) -> anyhow::Result<ExitCode> {
    let Some((name, matches)) = matches.subcommand() else { return Ok(ExitCode::from(USAGE)) };
    if let Some(shell) = matches.try_get_one::<clap_complete::Shell>("shell").ok().flatten() {
        clap_complete::generate(*shell, &mut command(), "outbox-relay", &mut std::io::stdout());
        return Ok(ExitCode::SUCCESS);
    }
    let sources = sources(matches, env)?;
    match name {
        "run" => run::run(&sources),
        "migrate" => migrate::run(&sources, matches.get_flag("print")),
        "check" => check::run(&sources),
        _ => status::run(&sources, matches),
    }
}

fn sources(
    matches: &ArgMatches,
    env: impl Iterator<Item = (String, String)>,
) -> Result<Sources, ConfigError> {
    let env: Vec<(String, String)> = env.collect();
    let given = |key: &str| matches.try_get_one::<String>(key).ok().flatten().cloned();
    let flags: HashMap<&'static str, String> =
        SETTINGS.iter().filter_map(|setting| Some((setting.key, given(setting.key)?))).collect();
    let named = env.iter().find(|(name, path)| name == "OUTBOX_CONFIG" && !path.is_empty());
    let flag = matches.try_get_one::<PathBuf>("config").ok().flatten().cloned();
    let file = flag.or_else(|| named.map(|(_, path)| PathBuf::from(path)));
    Sources::new(flags, env.into_iter(), file.as_deref())
}

/// The whole command line.
pub fn command() -> Command {
    Command::new("outbox-relay")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Publishes the rows of a Postgres outbox table to RabbitMQ.\nDelivered means confirmed by the broker and routed to a queue.")
        .after_help(EXIT_CODES)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(
            with_settings(Command::new("run"), |_| true)
                .about("Publish pending rows until stopped (SIGTERM or SIGINT; a second one ends at once)"),
        )
        .subcommand(
            with_settings(Command::new("migrate"), |key| key.starts_with("database_url") || key == "table")
                .about("Create or update the outbox table")
                .arg(Arg::new("print").long("print").action(ArgAction::SetTrue).help("Print the SQL and change nothing")),
        )
        .subcommand(
            with_settings(Command::new("check"), |_| true)
                .about("Check both servers, the table, grants and the exchange; exit code 3 if anything is wrong"),
        )
        .subcommand(
            with_settings(Command::new("status"), |key| key == "http_listen")
                .about("Ask a running relay how it is; exit code 3 if it is not well or not there")
                .arg(Arg::new("probe").long("probe").value_parser(["health", "readyz", "livez"]).default_value("health").help("Which endpoint to ask"))
                .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print the answer as it is")),
        )
        .subcommand(
            Command::new("completions")
                .about("Print a completion script for a shell")
                .arg(Arg::new("shell").required(true).value_parser(clap::value_parser!(clap_complete::Shell))),
        )
}

/// Adds a flag for each of the settings that concern a command.
fn with_settings(mut command: Command, concerns: impl Fn(&str) -> bool) -> Command {
    for setting in SETTINGS.iter().filter(|setting| concerns(setting.key)) {
        let default = setting.default.filter(|default| !default.is_empty());
        let default = default.map_or(String::new(), |default| format!(" [default: {default}]"));
        let arg = Arg::new(setting.key)
            .long(setting.long())
            .value_name(setting.takes)
            .help(format!("{} [env: {}]{default}", setting.help, setting.env))
            .help_heading(setting.group)
            .allow_hyphen_values(true);
        command = command.arg(arg);
    }
    let help = "Settings file; without this, outbox-relay.toml if it is there [env: OUTBOX_CONFIG]";
    command
        .arg(
            Arg::new("config")
                .long("config")
                .value_name("FILE")
                .value_parser(clap::value_parser!(PathBuf))
                .help(help),
        )
        .after_help(EXIT_CODES)
}

/// A runtime for the commands that speak with servers.
fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(work);
    // A name that is being resolved would hold up the end.
    runtime.shutdown_background();
    result
}

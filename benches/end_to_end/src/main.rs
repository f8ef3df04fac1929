//! Measures the relay between real servers of its own, and the broker alone in the same minutes.
//!
//! ```text
//!            raw publisher ───────────▶ RabbitMQ        the ceiling
//!  rows ──▶ Postgres ──▶ relay ───────▶ RabbitMQ        what is measured, as a ratio to it
//! ```
//!
//! Absolute times depend on the machine, and on who else uses it. So each measure runs beside the raw publisher, in
//! turns, and only their ratio is claimed.
//!
//! - [`measures`]: what is measured, as data
//! - [`stand`], [`process`], [`distance`]: servers, processes and a network to measure on
//! - [`raw`], [`ceiling`], [`bare`], [`drain`], [`latency`], [`cost`]: how
//! - [`stats`], [`stolen`], [`report`], [`plot`]: what came of it

mod backlog;
mod bare;
mod ceiling;
mod cli;
mod cost;
mod distance;
mod drain;
mod latency;
mod measures;
mod plot;
mod process;
mod raw;
mod report;
mod run;
mod stand;
mod stats;
mod stolen;

use anyhow::{Result, ensure};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    let matches = cli::command().get_matches();
    if matches.get_flag("list") {
        println!("{}", measures::list());
        return ExitCode::SUCCESS;
    }
    let done = match (matches.subcommand(), matches.get_one::<PathBuf>("draw")) {
        (Some(("raw", matches)), _) => raw::main(matches).await,
        (Some(("bare", matches)), _) => bare::main(matches).await,
        (_, Some(dir)) => draw_again(dir),
        _ => match cli::options(&matches) {
            Ok(options) => run::run(options).await,
            Err(sentence) => {
                eprintln!("error: {sentence} (see --help)");
                return ExitCode::from(2);
            }
        },
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn draw_again(dir: &Path) -> Result<()> {
    let pictures = plot::draw(dir)?;
    ensure!(!pictures.is_empty(), "{}: this run has neither a ratio nor a latency to draw", dir.display());
    for picture in pictures {
        println!("{}", picture.display());
    }
    Ok(())
}

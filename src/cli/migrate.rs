//! `outbox-relay migrate`.

use crate::config::{self, Sources};
use crate::store::postgres::{Connector, migrate};
use std::process::ExitCode;

pub(super) fn run(sources: &Sources, print: bool) -> anyhow::Result<ExitCode> {
    let table = config::table(sources)?;
    if print {
        print!("{}", migrate::print(&table));
        return Ok(ExitCode::SUCCESS);
    }
    let connector = Connector::new(config::database(sources)?, false);
    super::block_on(async { Ok(migrate::run(&connector, &table).await?) })?;
    println!("table {table} is up to date");
    Ok(ExitCode::SUCCESS)
}

//! `chaos`: see `chaos --help`, and `scripts/chaos`, which builds everything first.

use outbox_relay_chaos::{cli, run};
use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    let matches = cli::command().get_matches();
    if matches.get_flag("list") {
        println!("{}", cli::list());
        return ExitCode::SUCCESS;
    }
    let code = match cli::options(&matches) {
        Ok(options) => run::run(options).await.unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            cli::FAILED
        }),
        Err(sentence) => {
            eprintln!("error: {sentence} (see --help)");
            cli::WRONG_USAGE
        }
    };
    ExitCode::from(code)
}

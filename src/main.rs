//! `outbox-relay`: see `outbox-relay --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    outbox_relay::cli::main(std::env::args_os(), std::env::vars())
}

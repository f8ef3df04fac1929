//! `outbox-relay`: see `outbox-relay --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    outbox_relay::allocator::give_large_blocks_back();
    // A variable that is not UTF-8 is shown as well as can be, in the error that refuses it.
    let lossy = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
    let env = std::env::vars_os().map(|(name, value)| (lossy(name), lossy(value)));
    outbox_relay::cli::main(std::env::args_os(), env)
}

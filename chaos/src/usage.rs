//! What a process has cost: processor time and memory as the kernel counts them.

use std::fs::read_to_string;

/// What the kernel counts in: USER_HZ, which is 100 on every Linux that Rust runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// Of one process, up to now.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// User and system time.
    pub cpu_seconds: f64,
    /// Resident memory.
    pub rss_bytes: u64,
    /// The most resident memory there has been.
    pub peak_rss_bytes: u64,
}

/// `None` if there is no such process.
pub fn usage(pid: u32) -> Option<Usage> {
    let stat = read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets may hold anything; behind it come numbers. 14 and 15 of all are utime and stime.
    let numbers = stat.rsplit_once(')')?.1;
    let ticks = |place: usize| numbers.split_whitespace().nth(place - 3)?.parse::<f64>().ok();
    let status = read_to_string(format!("/proc/{pid}/status")).ok()?;
    let bytes = |field: &str| {
        let kib = status.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB"));
        // A process that has ended and was not waited for has none.
        kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
    };
    Some(Usage {
        cpu_seconds: (ticks(14)? + ticks(15)?) / TICKS_PER_SECOND,
        rss_bytes: bytes("VmRSS:"),
        peak_rss_bytes: bytes("VmHWM:"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_some_and_no_process_has_none() {
        let usage = usage(std::process::id()).expect("this process");
        assert!(usage.peak_rss_bytes >= usage.rss_bytes && usage.rss_bytes > 100_000, "{usage:?}");
        assert_eq!(super::usage(u32::MAX), None);
    }
}

//! What a process has cost, and what the machine has: as the kernel counts them.

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

impl Usage {
    /// The most resident memory there has been, in MiB.
    pub fn peak_rss_mib(&self) -> f64 {
        self.peak_rss_bytes as f64 / 1_048_576.0
    }
}

/// Numbers of `/proc/PID/stat` by their places in proc(5).
struct Stat(Vec<f64>);

impl Stat {
    fn of(pid: u32) -> Option<Self> {
        let stat = read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in brackets may hold anything; behind it comes the third, a letter, and then numbers.
        let numbers = stat.rsplit_once(')')?.1.split_whitespace().skip(1);
        Some(Self(numbers.map(|number| number.parse().unwrap_or(0.0)).collect()))
    }

    fn at(&self, place: usize) -> f64 {
        self.0.get(place - 4).copied().unwrap_or(0.0)
    }

    fn parent(&self) -> u32 {
        self.at(4) as u32
    }

    /// utime and stime.
    fn cpu_seconds(&self) -> f64 {
        (self.at(14) + self.at(15)) / TICKS_PER_SECOND
    }

    /// cutime and cstime: of children that have ended.
    fn ended_children_cpu_seconds(&self) -> f64 {
        (self.at(16) + self.at(17)) / TICKS_PER_SECOND
    }
}

/// Processor time of a process and of all children it has or had, which are Postgres's connections; 0 if there is none.
pub fn family_cpu_seconds(pid: u32) -> f64 {
    let Some(parent) = Stat::of(pid) else { return 0.0 };
    let children = children(pid).into_iter().filter_map(Stat::of);
    let running: f64 = children.map(|stat| stat.cpu_seconds() + stat.ended_children_cpu_seconds()).sum();
    parent.cpu_seconds() + parent.ended_children_cpu_seconds() + running
}

/// Processes that it has started and that are there still.
pub fn children(pid: u32) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|child| Stat::of(*child).is_some_and(|stat| stat.parent() == pid)).collect()
}

/// `None` if there is no such process, or if it has ended: then it has no memory, whether it was waited for or not.
pub fn usage(pid: u32) -> Option<Usage> {
    let stat = Stat::of(pid)?;
    let status = read_to_string(format!("/proc/{pid}/status")).ok()?;
    Some(Usage {
        cpu_seconds: stat.cpu_seconds(),
        rss_bytes: bytes(&status, "VmRSS:")?,
        peak_rss_bytes: bytes(&status, "VmHWM:")?,
    })
}

/// Processor time of the whole machine up to now, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MachineCpu {
    /// Of all who ran.
    pub busy: f64,
    /// That somebody here wanted, and the host gave to another machine.
    pub stolen: f64,
    /// Of all cores.
    pub total: f64,
}

impl MachineCpu {
    /// Up to now; `None` without `/proc`.
    pub fn now() -> Option<Self> {
        let stat = read_to_string("/proc/stat").ok()?;
        let all = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
        // user nice system idle iowait irq softirq steal, and guests' time, which is in user's and nice's already.
        let ticks = all.split_whitespace().take(8).filter_map(|ticks| ticks.parse::<f64>().ok());
        let seconds: Vec<f64> = ticks.map(|ticks| ticks / TICKS_PER_SECOND).collect();
        let (idle, stolen, total) =
            (seconds.get(3)? + seconds.get(4)?, *seconds.get(7)?, seconds.iter().sum());
        Some(Self { busy: total - idle - stolen, stolen, total })
    }

    /// From then to now.
    pub fn since(self, then: Self) -> Self {
        Self {
            busy: self.busy - then.busy,
            stolen: self.stolen - then.stolen,
            total: self.total - then.total,
        }
    }
}

/// A field of `/proc/meminfo`, such as `MemTotal:`, in bytes.
pub fn memory_bytes(field: &str) -> Option<u64> {
    bytes(&read_to_string("/proc/meminfo").ok()?, field)
}

/// The value of a line "FIELD: N kB", which is the kernel's way to say KiB.
fn bytes(lines: &str, field: &str) -> Option<u64> {
    let kib = lines.lines().find_map(|line| line.strip_prefix(field)?.trim().strip_suffix(" kB"))?;
    Some(kib.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::process::{Command, Stdio};

    #[test]
    fn this_process_has_some_and_no_process_has_none() {
        let usage = usage(std::process::id()).expect("this process");
        assert!(usage.peak_rss_bytes >= usage.rss_bytes && usage.rss_bytes > 100_000, "{usage:?}");
        assert_eq!(super::usage(u32::MAX), None);
        assert!(memory_bytes("MemTotal:") > memory_bytes("MemAvailable:"));
        assert_eq!(memory_bytes("Nothing:"), None);
    }

    #[test]
    fn the_machine_has_been_busy_for_some_of_its_time() {
        let now = MachineCpu::now().expect("/proc/stat");
        assert!(0.0 < now.busy && 0.0 <= now.stolen && now.busy + now.stolen <= now.total, "{now:?}");
    }

    /// Its entry stays until it is waited for; a bound on its memory must not be met by it.
    #[test]
    fn a_process_that_has_ended_has_none() {
        let mut child = Command::new("true").stdin(Stdio::null()).spawn().expect("true");
        let stat = || read_to_string(format!("/proc/{}/stat", child.id())).expect("not waited for yet");
        while !stat().contains(") Z ") {
            std::thread::yield_now();
        }
        assert_eq!(usage(child.id()), None);
        assert!(child.wait().expect("its end").success());
    }

    #[test]
    fn the_time_of_children_counts_also_when_they_have_ended() {
        // A parent that does next to nothing itself; its child was busy and has ended.
        let family = "sh -c 'i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done'; echo done; read -r _";
        let mut parent = Command::new("sh");
        parent.args(["-c", family]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut parent = parent.spawn().expect("sh");
        let mut said = [0; 4];
        parent.stdout.take().expect("a pipe").read_exact(&mut said).expect("done");
        let (own, all) = (usage(parent.id()).expect("it reads").cpu_seconds, family_cpu_seconds(parent.id()));
        assert!(all > own + 0.05, "{own} s of its own, {all} s in all");
        drop(parent.stdin.take());
        assert!(!parent.wait().expect("its end").success(), "read has met the end");
        assert_eq!(family_cpu_seconds(u32::MAX), 0.0);
    }
}

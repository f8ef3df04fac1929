//! What is measured, as data.

use crate::raw::Shape;
use std::time::Duration;

/// One measure.
#[derive(Debug, Clone, Copy)]
pub struct Measure {
    /// Its name on the command line and in reports.
    pub name: &'static str,
    /// What it shows.
    pub about: &'static str,
    /// How it is taken.
    pub kind: Kind,
    /// Which runs it belongs to.
    pub size: Size,
    /// What is to be reached: name of a figure, and its bound.
    pub goals: &'static [(&'static str, Goal)],
}

/// How a measure is taken.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// A backlog is there, a relay starts: how fast is it gone?
    Drain(Drain),
    /// So many rows a second for a while: how long from commit to consumer?
    Latency {
        /// Rows a second.
        rate: u32,
    },
    /// One row after a silence, again and again.
    LoneRow {
        /// How long nothing is written before it.
        silence: Duration,
        /// The database watches for it, as it does by default.
        watched: bool,
    },
    /// Nothing to do.
    Idle,
    /// From the start of the process to ready.
    Start,
    /// The writers' commits a second, without a relay, beside one, and with what others use to wake theirs.
    Writers {
        /// Connections that write.
        connections: usize,
    },
}

/// In which runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// In all, with fewer rows in a quick one.
    Quick,
    /// Not in quick ones.
    Normal,
    /// Only when named, or with `--all`: takes many minutes.
    Long,
}

/// A bound.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// No less.
    AtLeast(f64),
    /// No more.
    AtMost(f64),
}

/// A backlog, and the relay that drains it.
#[derive(Debug, Clone, Copy)]
pub struct Drain {
    /// Rows.
    pub rows: usize,
    /// Ordering keys.
    pub keys: Keys,
    /// Bytes of a payload.
    pub bytes: usize,
    /// Type of the column.
    pub payload: &'static str,
    /// `OUTBOX_ORDERING`.
    pub ordering: &'static str,
    /// Type of the queue.
    pub queue: &'static str,
    /// Delivered rows are deleted, not marked.
    pub delete: bool,
    /// What the table has behind it.
    pub past: Past,
    /// The broker is further away, by this much for a way there and back.
    pub round_trip: Duration,
    /// The broker has half of the cores for itself, everything else the other half: as on machines of their own.
    pub apart: bool,
    /// Relays.
    pub replicas: usize,
    /// They run already, and have for a while, when the rows are committed.
    pub running: bool,
    /// The raw publisher it is compared with.
    pub against: Against,
    /// It is compared with a relay that promises nothing, too.
    pub bare: bool,
}

/// What a drain is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Against {
    /// The best raw publisher, with as many messages.
    Best,
    /// One in particular.
    Shape(Shape),
    /// Nothing: it is measured for something else.
    Nothing,
}

/// Ordering keys of a backlog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    /// So many, in turns: neighbours never share one.
    Many(u32),
    /// One of so many for each row, drawn at random.
    Drawn(u32),
    /// All rows have none.
    None,
}

/// What a table has behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Past {
    /// Nothing.
    Fresh,
    /// So many delivered rows that are still kept.
    Delivered(u32),
    /// So many rows delivered since a transaction began that is still open: nothing of them can be cleaned up.
    OpenTransaction(u32),
}

/// The row that all others differ from in one thing.
const USUAL: Drain = Drain {
    rows: 200_000,
    keys: Keys::Many(1000),
    bytes: 500,
    payload: "jsonb",
    ordering: "strict",
    queue: "quorum",
    delete: false,
    past: Past::Fresh,
    round_trip: Duration::ZERO,
    apart: false,
    replicas: 1,
    running: false,
    against: Against::Best,
    bare: false,
};

use Goal::{AtLeast, AtMost};
use Kind::{Idle, Latency, LoneRow, Start, Writers};
use Size::{Long, Normal, Quick};

/// The figure of a drain of a table with a past: its rate by that of a fresh table in the same round.
pub const AGAINST_FRESH: &str = "against a fresh table";
/// The figure of a latency over the rows of all rounds together.
pub const P99_OF_ALL: &str = "commit to consumer, p99 of all rounds";

const fn measure(
    name: &'static str,
    size: Size,
    kind: Kind,
    goals: &'static [(&'static str, Goal)],
    about: &'static str,
) -> Measure {
    Measure { name, about, kind, size, goals }
}

const MIB_OF_40_MB: f64 = 38.1;
const FIVE_MS: Duration = Duration::from_millis(5);

/// All measures, in the order in which they run.
#[rustfmt::skip]
pub const MEASURES: &[Measure] = &[
    measure("marked", Quick, Kind::Drain(Drain { bare: true, ..USUAL }),
        &[("ratio", AtLeast(0.95)), ("CPU per 100 000 rows", AtMost(0.9)), ("peak RSS", AtMost(MIB_OF_40_MB)), ("WAL per row", AtMost(350.0))],
        "200 000 rows of 500 bytes over 1000 keys, strict, quorum queue, marked as delivered"),
    measure("deleted", Quick, Kind::Drain(Drain { delete: true, bare: true, ..USUAL }),
        &[("ratio", AtLeast(1.0)), ("WAL per row", AtMost(120.0))],
        "the same, delivered rows are deleted"),
    measure("pipelined", Normal, Kind::Drain(Drain { ordering: "pipelined", ..USUAL }), &[], "many messages of a key at a time"),
    measure("unordered", Normal, Kind::Drain(Drain { ordering: "none", ..USUAL }), &[], "no order kept"),
    measure("no-keys", Normal, Kind::Drain(Drain { keys: Keys::None, ..USUAL }), &[], "rows without a key"),
    measure("drawn-keys", Normal, Kind::Drain(Drain { keys: Keys::Drawn(1000), ..USUAL }), &[], "each row has one of 1000 keys, drawn at random"),
    measure("one-key", Quick, Kind::Drain(Drain { rows: 20_000, keys: Keys::Many(1), against: Against::Shape(Shape { connections: 1, channels: 1, window: 1 }), ..USUAL }),
        &[("ratio", AtLeast(0.9))],
        "one hot key, strict, against a raw publisher that waits for each confirm"),
    measure("classic", Normal, Kind::Drain(Drain { queue: "classic", ..USUAL }), &[], "a classic queue"),
    measure("json", Normal, Kind::Drain(Drain { payload: "json", ..USUAL }), &[], "payload of type json"),
    measure("text", Normal, Kind::Drain(Drain { payload: "text", ..USUAL }), &[], "payload of type text"),
    measure("bytea", Normal, Kind::Drain(Drain { payload: "bytea", ..USUAL }), &[], "payload of type bytea"),
    measure("20-bytes", Normal, Kind::Drain(Drain { bytes: 20, ..USUAL }), &[], "small rows"),
    measure("100-kB", Normal, Kind::Drain(Drain { bytes: 100_000, rows: 20_000, payload: "bytea", ..USUAL }), &[], "large rows, stored uncompressed"),
    measure("old-rows", Normal, Kind::Drain(Drain { past: Past::Delivered(10_000_000), ..USUAL }),
        &[(AGAINST_FRESH, AtLeast(0.95))],
        "the table keeps 10 million delivered rows"),
    measure("open-transaction", Normal, Kind::Drain(Drain { past: Past::OpenTransaction(1_000_000), running: true, ..USUAL }),
        &[(AGAINST_FRESH, AtLeast(0.95))],
        "a million dead index entries, and a transaction open since before; the relay runs when the rows come"),
    measure("open-transaction-start", Normal, Kind::Drain(Drain { past: Past::OpenTransaction(1_000_000), ..USUAL }),
        &[(AGAINST_FRESH, AtLeast(0.95))],
        "the same, the relay is started when the rows are there"),
    measure("distant", Normal, Kind::Drain(Drain { round_trip: FIVE_MS, against: Against::Shape(Shape { connections: 1, channels: 4, window: 250 }), ..USUAL }),
        &[("ratio", AtLeast(0.9))],
        "the broker 5 ms away, against raw at the same distance with the same number unconfirmed"),
    measure("broker-apart", Normal, Kind::Drain(Drain { apart: true, ..USUAL }),
        &[("ratio", AtLeast(0.95))],
        "the broker on half of the cores, everything else on the others, as on machines of their own"),
    measure("broker-apart-deleted", Normal, Kind::Drain(Drain { apart: true, delete: true, ..USUAL }),
        &[("ratio", AtLeast(1.0))],
        "the same, delivered rows are deleted"),
    measure("one-replica", Normal, Kind::Drain(Drain { running: true, ..USUAL }), &[], "one relay, which runs when the rows come"),
    measure("two-replicas", Normal, Kind::Drain(Drain { replicas: 2, running: true, ..USUAL }), &[], "two relays share the work, and run when the rows come"),
    measure("four-replicas", Normal, Kind::Drain(Drain { replicas: 4, running: true, ..USUAL }), &[], "four relays share the work, and run when the rows come"),
    measure("backlog", Long, Kind::Drain(Drain { rows: 5_000_000, against: Against::Nothing, ..USUAL }),
        &[("peak RSS", AtMost(MIB_OF_40_MB))],
        "a backlog of 5 million rows"),
    measure("latency-10", Normal, Latency { rate: 10 }, &[], "10 rows a second, commit to consumer"),
    measure("latency-500", Quick, Latency { rate: 500 },
        &[("commit to consumer, p50", AtMost(3.0)), ("commit to consumer, p99", AtMost(10.0))],
        "500 rows a second, commit to consumer, the relay idle before"),
    measure("latency-5000", Normal, Latency { rate: 5_000 }, &[], "5000 rows a second, commit to consumer"),
    measure("lone-row", Normal, LoneRow { silence: Duration::from_secs(2), watched: true },
        &[(P99_OF_ALL, AtMost(15.0))],
        "one row after two seconds of silence, a hundred times a round"),
    measure("lone-row-polled", Normal, LoneRow { silence: Duration::from_secs(2), watched: false },
        &[(P99_OF_ALL, AtMost(115.0))],
        "the same with OUTBOX_LONG_POLL=false: the poll interval, which is 100 ms, and 15 ms"),
    measure("lone-row-minute", Long, LoneRow { silence: Duration::from_secs(60), watched: true },
        &[("commit to consumer, max", AtMost(15.0))],
        "one row after a minute of silence, ten times a round"),
    measure("idle", Normal, Idle,
        &[("CPU", AtMost(0.5)), ("statements", AtMost(15.0))],
        "nothing to do for a minute"),
    measure("start", Quick, Start, &[("start to ready", AtMost(300.0))], "start of the process to ready"),
    measure("writers-1", Normal, Writers { connections: 1 }, &[], "one writing connection: without a relay, beside one, and with a NOTIFY per insert"),
    measure("writers-8", Normal, Writers { connections: 8 }, &[], "eight writing connections, the same"),
    measure("writers-32", Normal, Writers { connections: 32 }, &[], "32 writing connections, the same"),
];

/// A line for each.
pub fn list() -> String {
    let line = |measure: &Measure| {
        let size = match measure.size {
            Quick => "quick",
            Normal => "",
            Long => "long",
        };
        format!("{:<24}{size:<7}{}", measure.name, measure.about)
    };
    MEASURES.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_used_once() {
        let names: HashSet<_> = MEASURES.iter().map(|measure| measure.name).collect();
        assert_eq!(names.len(), MEASURES.len());
    }

    #[test]
    fn the_bare_relay_is_given_what_it_can_read() {
        for drain in MEASURES.iter().filter_map(|measure| match measure.kind {
            Kind::Drain(drain) if drain.bare => Some(drain),
            _ => None,
        }) {
            assert_eq!((drain.payload, drain.past, drain.round_trip), ("jsonb", Past::Fresh, Duration::ZERO));
        }
    }
}

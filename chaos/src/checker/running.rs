//! Invariants about the processes: I7, I8, I10, I11, I12.

use super::{Case, Verdict};
use crate::observations::{Sample, Says, Span, Stop, TableRow};
use crate::relays::GRACE_SLACK;

/// No transaction of a relay is open longer.
const MAX_TRANSACTION_MS: u64 = 1_000;
/// After a fault of the database, transactions may be slow for so long.
const DATABASE_RECOVERS_MS: u64 = 5_000;

impl Case<'_> {
    pub(super) fn everything_drains(&self) -> Verdict {
        let pending = self.evidence.table.iter().filter(|row| !row.delivered && !row.dead);
        let left = pending.clone().next().map(|row| {
            let reason = row.last_error.as_deref().unwrap_or("never refused");
            format!("row {} is still pending ({reason})", row.id)
        });
        let never = self.seen().drained_at.is_none().then(|| "rows were pending until the limit".to_owned());
        let exit = self.seen().exits.first().map(|exit| {
            format!("relay {} ended by itself with {:?} after {} ms", exit.replica, exit.code, exit.at)
        });
        let recoveries = self.recoveries().into_iter().filter(|recovery| !recovery.disturbed);
        let slowest = recoveries.map(|recovery| (recovery.caught_up_after, recovery.fault));
        let slowest = slowest.max().map_or_else(
            || "no fault to recover from".to_owned(),
            |(ms, fault)| format!("slowest to catch up: {:.1} s after {fault}", seconds(ms)),
        );
        let drained = self.seen().drained_at.map_or_else(
            || "not drained".to_owned(),
            |at| format!("drained {:.1} s into the calm", seconds(at.saturating_sub(self.seen().calm_from))),
        );
        let figures = format!("{drained}, {} pending; {slowest}", pending.count());
        Verdict::of(
            "I7",
            "everything drains once the fault is gone, without a restart",
            figures,
            left.or(never).or(exit),
        )
    }

    /// Seen from outside, two owners of a shard show in what the replicas say they own. (That they also
    /// send twice shows in I4 and I5.) One look is no proof, since replicas answer one after the other.
    pub(super) fn one_owner(&self) -> Verdict {
        const SAYS: &str = "no key has two publishers at once";
        let over =
            |sample: &&Sample| sample.owned.zip(sample.shards).is_some_and(|(owned, shards)| owned > shards);
        let samples = &self.seen().samples;
        let Some(last) = samples.iter().rfind(|sample| sample.owned.is_some()) else {
            return Verdict::not_seen("I8", SAYS, "no replica said what it owns");
        };
        let pair = samples.windows(2).find(|pair| over(&&pair[0]) && over(&&pair[1]));
        let twice = pair.map(|pair| {
            format!(
                "{:?} of {:?} shards owned at {} ms and {} ms",
                pair[0].owned, pair[0].shards, pair[0].at, pair[1].at
            )
        });
        let short = last.owned < last.shards;
        let missing =
            short.then(|| format!("at the end {:?} of {:?} shards have an owner", last.owned, last.shards));
        let looks = samples.iter().filter(|sample| sample.owned.is_some()).count();
        let figures = format!(
            "{looks} looks, {} above {} shards, at the end {}",
            samples.iter().filter(over).count(),
            last.shards.unwrap_or(0),
            last.owned.unwrap_or(0)
        );
        Verdict::of("I8", SAYS, figures, twice.or(missing))
    }

    pub(super) fn resources_are_bounded(&self) -> Verdict {
        const SAYS: &str = "memory, descriptors, connections bounded; no transaction over a second";
        let samples = &self.seen().samples;
        if samples.is_empty() {
            return Verdict::not_seen("I10", SAYS, "no replica was looked at");
        }
        let setting = &self.seen().setting;
        let most = |what: fn(&Sample) -> u64| samples.iter().map(what).max().unwrap_or(0);
        let excused = |at: u64| {
            let disturbs = |fault: &&Span| {
                fault.database && fault.began <= at && at <= fault.ended + DATABASE_RECOVERS_MS
            };
            self.seen().faults.iter().any(|fault| disturbs(&fault))
        };
        let transaction = |sample: &Sample| sample.transaction_ms.unwrap_or(0);
        let slow = samples.iter().filter(|sample| !excused(sample.at)).map(transaction).max().unwrap_or(0);
        let (rss, descriptors) = (most(|sample| sample.rss_mib), most(|sample| sample.descriptors));
        let per_replica = |sample: &Sample| sample.connections.unwrap_or(0).div_ceil(sample.processes.max(1));
        let connections = samples.iter().map(per_replica).max().unwrap_or(0);
        let bounds = [
            ("MiB resident", rss, setting.max_rss_mib),
            ("descriptors", descriptors, setting.max_descriptors),
            ("database connections of a replica", connections, setting.max_connections),
            ("ms of a transaction", slow, MAX_TRANSACTION_MS),
        ];
        let beyond = bounds.iter().find(|(_, found, bound)| found > bound);
        let beyond = beyond.map(|(what, found, bound)| format!("{found} {what}, more than {bound}"));
        let asked = samples.iter().any(|sample| sample.connections.is_some());
        let database = if asked {
            format!("{connections} connections of a replica, transactions {slow} ms")
        } else {
            "database not asked, since it is not ours".to_owned()
        };
        let figures = format!("at most {rss} MiB, {descriptors} descriptors, {database}");
        Verdict::of("I10", SAYS, figures, beyond)
    }

    pub(super) fn health_tells_the_truth(&self) -> Verdict {
        const SAYS: &str = "metrics and health agree with the table";
        if self.seen().says.is_empty() {
            return Verdict::not_seen("I11", SAYS, "no replica was asked");
        }
        let count = |wanted: fn(&TableRow) -> bool| {
            self.evidence.table.iter().filter(|row| wanted(row)).count() as u64
        };
        let (pending, dead) = (count(|row| !row.delivered && !row.dead), count(|row| row.dead));
        let lie = self.seen().says.iter().find_map(|says| lie(says, pending, dead));
        let figures = format!(
            "{} replicas asked; {pending} pending, {dead} dead, none in flight",
            self.seen().says.len()
        );
        Verdict::of("I11", SAYS, figures, lie)
    }

    pub(super) fn stops_are_clean(&self) -> Verdict {
        const SAYS: &str = "SIGTERM exits 0 inside the grace period";
        let stops = &self.seen().stops;
        if stops.is_empty() {
            return Verdict::not_seen("I12", SAYS, "nobody was stopped");
        }
        let limit = self.seen().setting.grace_ms + u64::try_from(GRACE_SLACK.as_millis()).unwrap_or(0);
        // Confirmed rows that cannot be written while the database is away: documented as exit code 1.
        let excused = |stop: &Stop| stop.disturbed && stop.code == Some(1);
        let bad = |stop: &&Stop| (stop.code != Some(0) && !excused(stop)) || stop.took > limit;
        let first = stops.iter().find(bad).map(|stop| {
            let code = stop.code.map_or_else(|| "by a signal".to_owned(), |code| format!("with {code}"));
            format!("relay {} ended {code} {} ms after SIGTERM", stop.replica, stop.took)
        });
        let slowest = stops.iter().map(|stop| stop.took).max().unwrap_or(0);
        let figures = format!(
            "{} stops, slowest {:.1} s of {:.1} s, {} excused by a fault at the same time",
            stops.len(),
            seconds(slowest),
            seconds(limit),
            stops.iter().filter(|stop| excused(stop)).count()
        );
        Verdict::of("I12", SAYS, figures, first)
    }
}

fn lie(says: &Says, pending: u64, dead: u64) -> Option<String> {
    let told = [
        ("health: pending", says.pending, pending),
        ("health: dead", says.dead, dead),
        ("health: in flight", says.in_flight, 0),
        ("metrics: pending", says.metric_pending, pending),
        ("metrics: dead", says.metric_dead, dead),
        ("metrics: in flight", says.metric_in_flight, 0),
    ];
    let wrong = told.into_iter().find(|(_, told, truth)| *told != Some(*truth));
    let wrong = wrong.map(|(what, told, truth)| {
        format!(
            "relay {} says {what} {}, which is {truth}",
            says.replica,
            told.map_or_else(|| "nothing".to_owned(), |n| n.to_string())
        )
    });
    wrong.or_else(|| {
        (says.status != "ok").then(|| format!("relay {} says it is {}", says.replica, says.status))
    })
}

fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}

//! What runs beside the flow: counting for health and metrics, and deleting what has been kept long
//! enough. Both are gentle: a connection each, short statements, and rest in proportion to what the last
//! statement took.

use crate::ownership::Holdings;
use crate::retry::{Delays, Rest, WALK_REST};
use crate::store::{Bite, Census, Store, StoreError, Trouble};
use crate::telemetry::{Board, DatabaseUser, Metrics, Pulse};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// How often rows are counted while counting is quick.
const CENSUS_INTERVAL: Duration = Duration::from_secs(1);
/// A statement that took long is followed by this many times its duration of rest: 5 % of one connection up to 1.5 s, a
/// third at its time limit. Not for longer, so that a server that was frozen while it counted is in sight again soon.
const CENSUS_REST: Rest = Rest { times: 20, at_most: Duration::from_secs(30) };
/// Rows a bite of retention looks at.
const BITE_ROWS: usize = 1000;
/// Bites without an expired row that end a pass: rows that were delivered late lie among older ones.
const BITES_IN_VAIN: u32 = 20;
/// Rest after a bite, in times of its duration.
const BITE_REST: u32 = 4;
/// Longest and shortest pause between two passes of retention.
const PASS_MAX: Duration = Duration::from_secs(60);
const PASS_MIN: Duration = Duration::from_secs(1);

/// Counts rows until stopped.
pub async fn census<S: Store>(
    store: Arc<S>,
    board: Arc<Board>,
    metrics: Arc<Metrics>,
    pulse: Pulse,
    stop: CancellationToken,
) {
    let count = async {
        let mut delays = Delays::default();
        loop {
            let started = Instant::now();
            let rest = match pulse.beat_during(store.census()).await {
                Ok(census) => {
                    delays = Delays::default();
                    board.database_up(DatabaseUser::Census);
                    show(&census, &metrics);
                    board.set_census(census);
                    // By the server's own measure: a link that stood still costs it nothing.
                    let took = Duration::from_secs_f64(census.took_seconds.max(0.0));
                    CENSUS_INTERVAL.max(CENSUS_REST.after(took))
                }
                Err(error) => {
                    board.database_down(DatabaseUser::Census, &error);
                    rest_after(&error, started.elapsed(), &mut delays)
                }
            };
            pulse.beat_during(tokio::time::sleep(rest)).await;
        }
    };
    let _ = stop.run_until_cancelled(count).await;
}

/// A count that met its time limit has cost the server as much as one that went well.
fn rest_after(error: &StoreError, took: Duration, delays: &mut Delays) -> Duration {
    let delay = delays.next(error);
    if error.trouble == Trouble::Contention { delay.max(CENSUS_REST.after(took)) } else { delay }
}

fn show(census: &Census, metrics: &Metrics) {
    metrics.pending.set(census.pending as i64);
    metrics.oldest_pending_seconds.set(census.oldest_seconds);
    metrics.dead_rows.set(census.dead as i64);
    metrics.waiting.set(census.waiting as i64);
    metrics.blocked_keys.set(census.blocked_keys as i64);
}

/// Deletes delivered rows after their retention until stopped. A pass that fails begins again later; what is
/// wrong with the database itself is told by the census.
pub async fn purge<S: Store>(
    store: Arc<S>,
    holdings: watch::Receiver<Holdings>,
    retention: Duration,
    metrics: Arc<Metrics>,
    pulse: Pulse,
    stop: CancellationToken,
) {
    let passes = async {
        let (mut in_vain, mut failing) = (Duration::ZERO, false);
        loop {
            let rest = rest_after_pass(retention, std::mem::take(&mut in_vain));
            pulse.beat_during(tokio::time::sleep(rest)).await;
            // One replica is enough: the owner of the first shard.
            if holdings.borrow().leases().first().is_none_or(|lease| lease.shard != 0) {
                continue;
            }
            let ended;
            (in_vain, ended) = pulse.beat_during(pass(&*store, retention, &metrics)).await;
            let was_failing = std::mem::replace(&mut failing, ended.is_err());
            if let Err(error) = ended
                && !was_failing
            {
                let reason = error.sentence;
                tracing::warn!(reason, "cannot delete rows after their retention; trying again later");
            }
        }
    };
    let _ = stop.run_until_cancelled(passes).await;
}

/// Without a retention there are only rows of earlier settings.
fn rest_after_pass(retention: Duration, in_vain: Duration) -> Duration {
    let interval = if retention.is_zero() { PASS_MAX } else { (retention / 10).clamp(PASS_MIN, PASS_MAX) };
    interval.max(WALK_REST.after(in_vain))
}

/// One pass over the delivered rows in id order. Rows are delivered nearly in id order, so after some
/// bites in which nothing had expired, what lies behind is younger still. Tells how long statements have looked in vain:
/// where no delivered row is left, all that are pending are walked over.
async fn pass<S: Store>(
    store: &S,
    retention: Duration,
    metrics: &Metrics,
) -> (Duration, Result<(), StoreError>) {
    let (mut after, mut bites_in_vain, mut in_vain) = (i64::MIN, 0, Duration::ZERO);
    while bites_in_vain < BITES_IN_VAIN {
        let started = Instant::now();
        let bitten = store.purge(after, BITE_ROWS, retention).await;
        let took = started.elapsed();
        let Bite { looked_at, purged, last_id } = match bitten {
            Ok(bite) => bite,
            Err(error) => return (in_vain + took, Err(error)),
        };
        metrics.purged.inc_by(purged);
        if looked_at < BITE_ROWS as u64 {
            return (in_vain + took, Ok(()));
        }
        if purged > 0 {
            bites_in_vain = 0;
        } else {
            bites_in_vain += 1;
            in_vain += took;
        }
        after = last_id;
        tokio::time::sleep(took * BITE_REST).await;
    }
    (in_vain, Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::MemoryStore;

    /// Without a delivered row each look walks over all that is pending: it must cost little in the long run.
    #[tokio::test]
    async fn what_was_looked_for_in_vain_is_followed_by_a_rest_whether_it_failed_or_not() {
        let (store, metrics) = (MemoryStore::default(), Metrics::default());
        let (in_vain, ended) = pass(&store, Duration::ZERO, &metrics).await;
        assert!(ended.is_ok() && in_vain > Duration::ZERO);
        store.fail_next(StoreError { trouble: Trouble::Contention, sentence: "15 s".to_owned() });
        let (in_vain, ended) = pass(&store, Duration::ZERO, &metrics).await;
        assert!(ended.is_err() && in_vain > Duration::ZERO);
        assert_eq!(rest_after_pass(Duration::ZERO, Duration::from_secs(15)), Duration::from_secs(300));
        assert_eq!(rest_after_pass(Duration::from_secs(10), Duration::ZERO), Duration::from_secs(1));
        assert_eq!(rest_after_pass(Duration::ZERO, Duration::ZERO), PASS_MAX);
    }

    /// Counting a huge backlog again within a second of each time limit would keep a core busy for nothing.
    #[test]
    fn a_count_that_met_its_limit_is_not_repeated_at_once() {
        let rest = |trouble, took| {
            let error = StoreError { trouble, sentence: String::new() };
            rest_after(&error, took, &mut Delays::default())
        };
        assert_eq!(rest(Trouble::Contention, Duration::from_secs(15)), CENSUS_REST.at_most);
        assert!(rest(Trouble::Contention, Duration::from_millis(1)) < Duration::from_secs(1), "a lock");
        assert!(rest(Trouble::Outage, Duration::from_secs(15)) < Duration::from_secs(1), "back soon");
    }
}

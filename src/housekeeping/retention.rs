//! Deleting what has been kept long enough.

use crate::ownership::Holdings;
use crate::retry::WALK_REST;
use crate::store::{Purged, Store, StoreError};
use crate::telemetry::{Instruments, Metrics};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Rows a bite of retention looks at.
const BITE_ROWS: usize = 1000;
/// Bites without an expired row that end a pass: rows that were delivered late lie among older ones.
const BITES_IN_VAIN: u32 = 20;
/// Rest after a bite, in times of its duration.
const BITE_REST: u32 = 4;
/// Longest and shortest pause between two passes of retention.
const PASS_MAX: Duration = Duration::from_secs(60);
const PASS_MIN: Duration = Duration::from_secs(1);

/// Deletes delivered rows after their retention until stopped. A pass that fails begins again later; what is
/// wrong with the database itself is told by the census.
pub async fn purge<S: Store>(
    store: Arc<S>,
    holdings: watch::Receiver<Holdings>,
    retention: Duration,
    Instruments { metrics, pulse, .. }: Instruments,
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
            let pass = pulse.beat_during(pass(&*store, retention, &metrics)).await;
            in_vain = pass.in_vain;
            let was_failing = std::mem::replace(&mut failing, pass.failure.is_some());
            if let Some(StoreError { sentence: reason, .. }) = pass.failure.filter(|_| !was_failing) {
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

/// What became of a pass.
struct Pass {
    /// So long statements have found nothing to delete. Where no delivered row is left, they walk over all that are pending.
    in_vain: Duration,
    failure: Option<StoreError>,
}

/// One pass over the delivered rows in id order. Rows are delivered nearly in id order, so after some
/// bites in which nothing had expired, what lies behind is younger still.
async fn pass<S: Store>(store: &S, retention: Duration, metrics: &Metrics) -> Pass {
    let (mut after, mut bites_in_vain, mut in_vain) = (i64::MIN, 0, Duration::ZERO);
    while bites_in_vain < BITES_IN_VAIN {
        let started = Instant::now();
        let bitten = store.purge(after, BITE_ROWS, retention).await;
        let took = started.elapsed();
        let Purged { looked_at, deleted, last_id } = match bitten {
            Ok(bite) => bite,
            Err(error) => return Pass { in_vain: in_vain + took, failure: Some(error) },
        };
        metrics.purged.inc_by(deleted);
        let is_last = looked_at < BITE_ROWS as u64;
        if is_last || deleted == 0 {
            in_vain += took;
        }
        if is_last {
            break;
        }
        bites_in_vain = if deleted == 0 { bites_in_vain + 1 } else { 0 };
        after = last_id;
        tokio::time::sleep(took * BITE_REST).await;
    }
    Pass { in_vain, failure: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Trouble;
    use crate::store::memory::MemoryStore;

    /// Without a delivered row each look walks over all that is pending: it must cost little in the long run.
    #[tokio::test]
    async fn what_was_looked_for_in_vain_is_followed_by_a_rest_whether_it_failed_or_not() {
        let (store, metrics) = (MemoryStore::default(), Metrics::default());
        let looked = pass(&store, Duration::ZERO, &metrics).await;
        assert!(looked.failure.is_none() && looked.in_vain > Duration::ZERO);
        store.fail_next(StoreError { trouble: Trouble::Contention, sentence: "15 s".to_owned() });
        let failed = pass(&store, Duration::ZERO, &metrics).await;
        assert!(failed.failure.is_some() && failed.in_vain > Duration::ZERO);
        assert_eq!(rest_after_pass(Duration::ZERO, Duration::from_secs(15)), Duration::from_secs(300));
        assert_eq!(rest_after_pass(Duration::from_secs(10), Duration::ZERO), Duration::from_secs(1));
        assert_eq!(rest_after_pass(Duration::ZERO, Duration::ZERO), PASS_MAX);
    }
}

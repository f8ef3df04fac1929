//! Counting for health and metrics.

use crate::retry::{Delays, Rest};
use crate::store::{Census, Store, StoreError, Trouble};
use crate::telemetry::{DatabaseUser, Instruments, Metrics};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// How often rows are counted while counting is quick.
const CENSUS_INTERVAL: Duration = Duration::from_secs(1);
/// A statement that took long is followed by this many times its duration of rest: 5 % of one connection up to 1.5 s, a
/// third at its time limit. Not for longer, so that a server that was frozen while it counted is in sight again soon.
const CENSUS_REST: Rest = Rest { times: 20, at_most: Duration::from_secs(30) };

/// Counts rows until stopped.
pub async fn census<S: Store>(store: Arc<S>, instruments: Instruments, stop: CancellationToken) {
    let Instruments { metrics, board, pulse } = instruments;
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

#[cfg(test)]
mod tests {
    use super::*;

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

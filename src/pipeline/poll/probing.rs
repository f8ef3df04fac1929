//! Routes that refuse every message: one is tried now and then, and its waiting rows are due when it works again. None of
//! it is worth that reading stops: what meets a lock of somebody's comes again later.

use super::reading::LONG_READ;
use super::{Poll, unless_lost};
use crate::pipeline::releases::Bite;
use crate::pipeline::routes::Parking;
use crate::sink::Fault;
use crate::store::{Route, Share, Store, StoreError, Trouble};
use std::sync::Arc;
use std::time::{Duration, Instant};

impl<S: Store> Poll<S> {
    /// A probe ended without saying anything of its route: another may go.
    pub(super) fn end_probe(&mut self, route: Option<Arc<Route>>, probe: bool) {
        if let Some(route) = route.filter(|_| probe) {
            self.routes.probe_released(&route, Instant::now());
        }
    }

    pub(super) fn route_refuses(&mut self, route: &Arc<Route>, fault: Fault, reason: &str, probe: bool) {
        let now = Instant::now();
        // One that takes some and refuses some is not told of each time, but when it stays parked.
        let flaps = self.releases.is_recent(route, now);
        self.releases.postpone(route, now);
        if self.routes.refused(route, fault, probe, now) == Parking::Parked {
            self.releases.end(route, Duration::ZERO, now);
        }
        if !flaps && self.routes.is_to_be_told(route) {
            tracing::warn!(
                exchange = route.exchange,
                routing_key = route.routing_key,
                reason,
                "route parked: it refuses every message; trying one now and then"
            );
        }
    }

    pub(super) fn route_works(&mut self, route: Arc<Route>) {
        if self.routes.delivered(&route) {
            self.releases.begin(route, Instant::now());
        }
    }

    /// Makes some waiting rows of a route that works again due.
    pub(super) async fn release_a_bite(&mut self) -> Result<(), StoreError> {
        let Some(Bite { route, rows }) = self.releases.due(Instant::now()) else { return Ok(()) };
        let begun = Instant::now();
        let released = self.pulse.beat_during(self.store.release(&route, rows)).await;
        let (took, now) = (begun.elapsed(), Instant::now());
        // Of these rows; if it is of the table, the next read meets it, too.
        if let Err(StoreError { trouble: Trouble::Rejected | Trouble::Configuration, sentence }) = &released {
            self.releases.end(&route, took, now);
            tracing::warn!(
                exchange = route.exchange,
                routing_key = route.routing_key,
                reason = sentence,
                "route works again, but its waiting rows cannot be made due; each is sent when its time comes"
            );
            return Ok(());
        }
        match unless_lost(released)? {
            None => self.releases.retry(&route, took, now),
            Some(released) if released == rows as u64 => self.releases.go_on(&route, now),
            Some(_) => {
                self.releases.end(&route, took, now);
                tracing::info!(
                    exchange = route.exchange,
                    routing_key = route.routing_key,
                    "route works again; its waiting rows are due now"
                );
            }
        }
        Ok(())
    }

    /// Sends one waiting row of a parked route that is due for it.
    pub(super) async fn probe(&mut self) -> Result<(), StoreError> {
        let Some(route) = self.routes.take_due_probe(Instant::now()) else { return Ok(()) };
        let in_flight = self.not_wanted(false);
        let leases = self.leases();
        let share = Share { shards: self.holdings.borrow().shards(), leases: &leases };
        let begun = Instant::now();
        let probe = self.store.probe(&route, &in_flight, self.limits.keep_order, share);
        match unless_lost(self.pulse.beat_during(probe).await) {
            // The next one is another row.
            Ok(Some(Some(row))) if self.put_off(&row) => {
                self.routes.probe_released(&route, Instant::now());
            }
            Ok(Some(Some(row))) => {
                self.routes.probe_sent(&route, row.bytes(), Instant::now());
                self.send_probe(row).await;
            }
            Ok(Some(None)) if leases.len() == self.holdings.borrow().leases().len() => {
                self.routes.nothing_waits(&route);
            }
            // Its rows may be in shards that are not read at this moment.
            Ok(Some(None)) => self.routes.probe_released(&route, Instant::now()),
            // They may be behind a lock, or too many to find one among them in time.
            Ok(None) if begun.elapsed() < LONG_READ => self.routes.probe_released(&route, Instant::now()),
            Ok(None) => {
                tracing::warn!(
                    exchange = route.exchange,
                    routing_key = route.routing_key,
                    "no waiting row of a parked route could be found in time; reading those that are due"
                );
                self.routes.unpark(&route, Instant::now());
            }
            Err(error) => {
                self.routes.probe_released(&route, Instant::now());
                return Err(error);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Settings;
    use crate::ownership::Holdings;
    use crate::pipeline::Work;
    use crate::pipeline::poll::tests::{stage, stage_with};
    use crate::store::Row;
    use crate::store::memory::plain_row;

    /// Else each worker's connection would break until the prober knows.
    #[tokio::test]
    async fn a_route_that_breaks_connections_is_tried_apart() {
        for (fault, expected) in [(Fault::Break, true), (Fault::Destination, false)] {
            let mut stage = stage();
            let (poll, row) = (&mut stage.poll, plain_row(1));
            for _ in 0..3 {
                poll.route_refuses(&row.route, fault, "no answer", false);
            }
            poll.send_probe(row).await;
            let prober = poll.prober();
            let work = stage.workers[prober].try_recv().expect("a probe");
            assert_eq!(matches!(work, Work::TryApart(_)), expected, "{work:?}");
        }
    }

    /// That key may be held for as long as somebody's lock.
    #[tokio::test]
    async fn a_route_is_tried_with_another_row_where_the_first_ones_key_is_held() {
        let at_once = Settings { retry_min: Duration::from_millis(1), ..Settings::plain() };
        let (mut stage, key) = (stage_with(&at_once), Arc::<str>::from("k"));
        stage.holdings.send_replace(Holdings::everything(4));
        let first = Row { ordering_key: Some(Arc::clone(&key)), attempts: 1, ..plain_row(1) };
        for _ in 0..3 {
            stage.poll.route_refuses(&first.route, Fault::Unroutable, "no queue", false);
        }
        stage.store.insert(first);
        stage.store.insert(Row { attempts: 1, ..plain_row(2) });
        stage.poll.keys.sent(&key);
        stage.poll.keys.refused(key, 0);
        let tried = async {
            loop {
                stage.poll.probe().await.unwrap();
                let tried = stage.handed_to(stage.poll.prober());
                if !tried.is_empty() {
                    return tried;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        assert_eq!(tokio::time::timeout(Duration::from_secs(10), tried).await, Ok(vec![2]));
    }
}

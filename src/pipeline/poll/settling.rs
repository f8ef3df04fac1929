//! A settled row frees its place, and what became of it is learned.

use super::{InFlight, Poll};
use crate::pipeline::{Ending, Fate, Settled, Work, hand_over};
use crate::sink::Fault;
use crate::store::{Lease, Store};
use std::sync::Arc;

impl<S: Store> Poll<S> {
    pub(super) async fn take_settled(&mut self) {
        while let Ok(settled) = self.settled.try_recv() {
            self.settle_all(settled).await;
        }
    }

    pub(super) async fn settle_or_wait(&mut self, settled: Option<Vec<Settled>>) {
        match settled {
            Some(settled) => self.settle_all(settled).await,
            // Settle is gone; supervision stops us.
            None => std::future::pending().await,
        }
    }

    pub(super) async fn settle_all(&mut self, settled: Vec<Settled>) {
        for settled in settled {
            match settled {
                Settled::Ended { id, fate } => self.settle(id, fate).await,
                Settled::Aside { id, ending } => self.set_aside(id, ending).await,
            }
        }
        self.show_in_flight();
    }

    async fn settle(&mut self, id: i64, fate: Fate) {
        let Some(place) = self.free_place(id) else { return };
        let key = place.key.clone();
        self.learn_fate(id, fate, place);
        if let Some(key) = key {
            self.resume_key(&key).await;
        }
    }

    fn free_place(&mut self, id: i64) -> Option<InFlight> {
        let place = self.in_flight.remove(&id)?;
        self.bytes_in_flight -= place.bytes;
        match place.aside {
            Some(_) => self.aside -= 1,
            None => self.shards.settled(place.lease),
        }
        if let Some(key) = &place.key {
            self.keys.settled(key);
        }
        Some(place)
    }

    /// What it tells of the row's id, route and key.
    fn learn_fate(&mut self, id: i64, fate: Fate, place: InFlight) {
        let InFlight { lease, key, worker, probe, refusing, forgotten, aside, .. } = place;
        // What was marked before a failover may be pending after it, or another row.
        let is_over = matches!(fate, Fate::Delivered { certain: true } | Fate::Dead { certain: true });
        if !is_over || forgotten {
            self.known.remove(id);
        }
        match fate {
            Fate::Delivered { .. } => {
                if let Some(route) = refusing {
                    self.route_works(route);
                }
            }
            Fate::Dead { .. } | Fate::Released => self.end_probe(refusing, probe),
            Fate::Fenced => {
                self.end_probe(refusing, probe);
                self.shards.fenced(lease.shard, worker, key);
            }
            Fate::Waiting { route, reason, fault } => {
                // There was no connection for a probe that might break it.
                let in_vain = probe && fault == Fault::Outage;
                // What stood aside was refused long ago.
                if (fault.blames_destination() || in_vain) && aside.is_none() {
                    self.route_refuses(&route, fault, &reason, probe);
                } else {
                    // The message was refused, which says nothing of its route.
                    self.end_probe(refusing, probe);
                }
                if let Some(key) = key {
                    self.keys.refused(key, worker);
                }
            }
        }
    }

    /// The row keeps its place and is not read again. Its bytes are gone, its shard can be given back, and its route can be
    /// tried by others. Its key goes on, unless it is to be sent again: then only its worker holds the key, until its wait is
    /// written.
    async fn set_aside(&mut self, id: i64, ending: Ending) {
        let Some(row) = self.in_flight.get_mut(&id).filter(|row| row.aside.is_none()) else { return };
        row.aside = Some(ending);
        let (lease, bytes) = (row.lease, std::mem::take(&mut row.bytes));
        let (refusing, probe) = (row.refusing.take(), std::mem::take(&mut row.probe));
        let key = if ending == Ending::Unsent { None } else { row.key.take() };
        self.aside += 1;
        self.bytes_in_flight -= bytes;
        self.shards.settled(lease);
        match refusing {
            Some(route) if ending == Ending::Delivered => self.route_works(route),
            refusing => self.end_probe(refusing, probe),
        }
        if let Some(key) = key {
            self.keys.settled(&key);
            self.resume_key(&key).await;
        }
    }

    /// A shard is given back while rows of it are sent and not marked.
    pub(super) fn tell_repeats(&self, lease: Lease) {
        let repeats = |row: &&InFlight| row.lease == lease && row.aside == Some(Ending::Delivered);
        let rows = self.in_flight.values().filter(repeats).count();
        if rows > 0 {
            self.metrics.possible_duplicates.inc_by(rows as u64);
            tracing::warn!(
                shard = lease.shard,
                rows,
                "a shard is given back with rows that were sent and cannot be marked; who has it next sends them again"
            );
        }
    }

    pub(super) async fn resume_key(&mut self, key: &Arc<str>) {
        for worker in self.keys.take_resumed(key) {
            // The table holds the key back from here on.
            self.resume(worker, Arc::clone(key)).await;
        }
    }

    /// The worker may go on with this key; in vain when it has ended, on a stop.
    pub(super) async fn resume(&mut self, worker: usize, key: Arc<str>) {
        if let Some(worker) = self.workers.get(worker) {
            hand_over(worker, Work::Resume(key)).await;
        }
    }

    pub(super) fn show_in_flight(&self) {
        self.metrics.in_flight.set(self.in_flight.len() as i64);
        self.metrics.in_flight_bytes.set(self.bytes_in_flight as i64);
        self.metrics.unmarked.set(self.aside as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::Holdings;
    use crate::pipeline::poll::Rested;
    use crate::pipeline::poll::tests::stage;
    use crate::store::Row;
    use crate::store::memory::plain_row;
    use std::time::Duration;

    const MARKED: Fate = Fate::Delivered { certain: true };

    /// Its mark may have been made on a server that is lost, and told only now.
    #[tokio::test]
    async fn a_row_that_was_in_flight_when_all_was_forgotten_is_asked_for_again() {
        let mut stage = stage();
        let poll = &mut stage.poll;
        poll.send(vec![plain_row(1), plain_row(2)], 0).await;
        poll.settle(1, MARKED).await;
        assert!(poll.known.contains(1) && poll.known.contains(2));
        poll.forget_what_is_settled();
        assert!(!poll.known.contains(1) && poll.known.contains(2), "it is in memory still");
        poll.settle(2, MARKED).await;
        assert!(!poll.known.contains(2));
        poll.send(vec![plain_row(3)], 0).await;
        poll.settle(3, MARKED).await;
        assert!(poll.known.contains(3), "what was read afterwards is trusted");
    }

    /// After a failover its id may be that of a row which nobody has tried.
    #[tokio::test]
    async fn the_id_of_a_row_that_is_perhaps_not_dead_is_asked_for_again() {
        let mut stage = stage();
        stage.poll.send(vec![plain_row(1), plain_row(2)], 0).await;
        stage.poll.settle(1, Fate::Dead { certain: false }).await;
        stage.poll.settle(2, Fate::Dead { certain: true }).await;
        assert!(!stage.poll.known.contains(1) && stage.poll.known.contains(2));
    }

    /// Its bytes are no longer in memory, and neither its shard nor its key waits for it; only its place is taken.
    #[tokio::test]
    async fn a_row_that_stands_aside_keeps_its_place_and_no_more() {
        let mut stage = stage();
        let (poll, key) = (&mut stage.poll, Arc::<str>::from("k"));
        let (sent, unsent) = (
            Row { ordering_key: Some(Arc::clone(&key)), ..plain_row(1) },
            Row { ordering_key: Some("other".into()), ..plain_row(2) },
        );
        poll.send(vec![sent, unsent], 0).await;
        assert!(!poll.nothing_moves());
        for _ in 0..2 {
            poll.set_aside(1, Ending::Delivered).await;
            poll.set_aside(2, Ending::Unsent).await;
        }
        assert_eq!((poll.in_flight.len(), poll.aside, poll.bytes_in_flight), (2, 2, 0));
        assert!(poll.nothing_moves(), "a row that needs all the bytes may be read");
        assert!(poll.shards.is_empty());
        assert_eq!(poll.keys.in_flight(), 1, "that of the row which is to be sent again");
        assert!(poll.known.contains(1) && poll.known.contains(2), "neither is read again");
        for id in 1..=2 {
            poll.settle(id, MARKED).await;
        }
        assert_eq!((poll.in_flight.len(), poll.aside, poll.bytes_in_flight), (0, 0, 0));
        assert!(poll.shards.is_empty() && poll.keys.in_flight() == 0);
    }

    /// Whether the mark of its probe can be written says nothing of a route.
    #[tokio::test]
    async fn a_probe_that_stands_aside_does_not_leave_its_route_parked() {
        for (ending, parked) in [(Ending::Delivered, 0), (Ending::Unsent, 1)] {
            let mut stage = stage();
            let (poll, row) = (&mut stage.poll, plain_row(1));
            for _ in 0..3 {
                poll.route_refuses(&row.route, Fault::Destination, "full", false);
            }
            let later = std::time::Instant::now() + Duration::from_secs(3600);
            assert!(poll.routes.take_due_probe(later).is_some());
            let prober = poll.prober();
            poll.send(vec![row], prober).await;
            assert!(poll.routes.next_probe().is_none(), "one is on its way");
            poll.set_aside(1, ending).await;
            assert_eq!(poll.routes.parked().len(), parked);
            assert_eq!(poll.routes.next_probe().is_some(), parked == 1, "it is tried again");
        }
    }

    /// It may work since long.
    #[tokio::test]
    async fn refusals_of_rows_that_stood_aside_park_no_route() {
        let mut stage = stage();
        let rows: Vec<_> = (1..=3).map(plain_row).collect();
        stage.poll.send(rows.clone(), 0).await;
        for row in rows {
            let (id, route, reason) = (row.id, row.route, "full".into());
            let refused = Fate::Waiting { route, reason, fault: Fault::Destination };
            stage.poll.set_aside(id, Ending::Unsent).await;
            stage.poll.settle(id, refused).await;
        }
        assert!(stage.poll.in_flight.is_empty() && stage.poll.routes.parked().is_empty());
    }

    /// Right after it had worked it is not told, as one that flaps; but it must not be forgotten.
    #[tokio::test]
    async fn a_route_that_is_parked_right_after_it_worked_is_told_later() {
        let mut stage = stage();
        let (poll, row) = (&mut stage.poll, plain_row(1));
        poll.releases.begin(Arc::clone(&row.route), std::time::Instant::now());
        for _ in 0..3 {
            poll.route_refuses(&row.route, Fault::Destination, "full", false);
        }
        assert_eq!(poll.routes.parked().len(), 1);
        assert!(poll.routes.is_to_be_told(&row.route), "not told yet");
    }

    #[tokio::test]
    async fn shards_that_come_end_a_rest() {
        let mut stage = stage();
        assert_eq!(stage.poll.rest(Duration::from_millis(1)).await, Rested::Enough);
        stage.holdings.send_replace(Holdings::everything(4));
        assert_eq!(stage.poll.rest(Duration::from_secs(3600)).await, Rested::ShardsCame);
        assert!(stage.poll.must_read(std::time::Instant::now()), "not only once: until they are read");
    }
}

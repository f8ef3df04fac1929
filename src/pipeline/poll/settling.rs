//! A settled row frees its place, and what became of it is learned.

use super::{InFlight, Poll};
use crate::pipeline::{Fate, Settled, Work, hand_over};
use crate::store::Store;
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
            self.settle(settled).await;
        }
        self.show_in_flight();
    }

    /// Frees the place of a settled row.
    async fn settle(&mut self, Settled { id, fate }: Settled) {
        if matches!(fate, Fate::Aside) {
            return self.set_aside(id).await;
        }
        let Some(settled) = self.in_flight.remove(&id) else { return };
        let InFlight { bytes, lease, key: key_in_flight, worker, probe, watched, forgotten, aside } = settled;
        self.bytes_in_flight -= bytes;
        if !aside {
            self.shards.settled(lease);
            if let Some(key) = &key_in_flight {
                self.keys.settled(key);
            }
        }
        match fate {
            Fate::Aside => {}
            Fate::Delivered { certain } => {
                // What was marked before a failover may be pending after it, or another row.
                if !certain || forgotten {
                    self.known.remove(id);
                }
                if let Some(route) = watched {
                    self.route_works(route);
                }
            }
            Fate::Dead { certain } => {
                if !certain || forgotten {
                    self.known.remove(id);
                }
                self.end_probe(watched, probe);
            }
            Fate::Released => {
                self.known.remove(id);
                self.end_probe(watched, probe);
            }
            Fate::Fenced { key } => {
                self.known.remove(id);
                self.end_probe(watched, probe);
                self.shards.fenced(lease.shard, worker, key);
            }
            Fate::Waiting { key, route, reason, fault } => {
                self.known.remove(id);
                if fault.blames_destination() {
                    self.route_refuses(&route, &reason, probe);
                } else {
                    // The message was refused, which says nothing of its route.
                    self.end_probe(watched, probe);
                }
                if let Some(key) = key.filter(|_| self.limits.keep_order) {
                    self.keys.refused(key, worker);
                }
            }
        }
        if let Some(key) = key_in_flight {
            self.resume_key(&key).await;
        }
    }

    /// The row keeps its place and is not read again. Its shard can be given back, which costs a repeat, and its key goes on.
    async fn set_aside(&mut self, id: i64) {
        let Some(row) = self.in_flight.get_mut(&id) else { return };
        if std::mem::replace(&mut row.aside, true) {
            return;
        }
        self.shards.settled(row.lease);
        if let Some(key) = row.key.clone() {
            self.keys.settled(&key);
            self.resume_key(&key).await;
        }
    }

    async fn resume_key(&mut self, key: &Arc<str>) {
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
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Settings, Sources};
    use crate::ownership::Holdings;
    use crate::pipeline::poll::{Ends, Rested};
    use crate::sink::SinkState;
    use crate::store::memory::{MemoryStore, plain_row};
    use crate::telemetry::{Board, Metrics, Pulses};
    use std::time::Duration;
    use tokio::sync::{mpsc, watch};
    use tokio_util::sync::CancellationToken;

    /// A stage with one worker and its prober, and what it is connected to.
    struct Stage {
        poll: Poll<MemoryStore>,
        holdings: watch::Sender<Holdings>,
        _workers: Vec<mpsc::Receiver<Work>>,
        _settled: mpsc::Sender<Vec<Settled>>,
        _sink: watch::Sender<SinkState>,
        _drained: mpsc::Receiver<crate::store::Lease>,
    }

    fn stage() -> Stage {
        let env = [("DATABASE_URL", "postgres://unused"), ("AMQP_URL", "amqp://unused")];
        let settings = Settings::resolve(&Sources::from_env(env).unwrap()).unwrap();
        let (workers, received): (Vec<_>, Vec<_>) = (0..2).map(|_| mpsc::channel(10)).unzip();
        let (settled, settled_in) = mpsc::channel(10);
        let (sink, sink_in) = watch::channel(SinkState::Ready);
        let (holdings, holdings_in) = watch::channel(Holdings::none(uuid::Uuid::nil(), 4));
        let (drained, drained_in) = mpsc::channel(10);
        let ends = Ends {
            store: Arc::new(MemoryStore::default()),
            workers,
            settled: settled_in,
            sink: sink_in,
            holdings: holdings_in,
            drained,
        };
        let metrics = Arc::new(Metrics::default());
        let board = Arc::new(Board::new(Arc::clone(&metrics)));
        let pulse = Pulses::default().start("poll");
        let poll = Poll::new(ends, &settings, CancellationToken::new(), board, pulse, metrics);
        Stage { poll, holdings, _workers: received, _settled: settled, _sink: sink, _drained: drained_in }
    }

    const MARKED: Fate = Fate::Delivered { certain: true };

    /// Its mark may have been made on a server that is lost, and told only now.
    #[tokio::test]
    async fn a_row_that_was_in_flight_when_all_was_forgotten_is_asked_for_again() {
        let mut stage = stage();
        let poll = &mut stage.poll;
        poll.send(vec![plain_row(1), plain_row(2)], 0).await;
        poll.settle(Settled { id: 1, fate: MARKED }).await;
        assert!(poll.known.contains(1) && poll.known.contains(2));
        poll.forget_what_is_settled();
        assert!(!poll.known.contains(1) && poll.known.contains(2), "it is in memory still");
        poll.settle(Settled { id: 2, fate: MARKED }).await;
        assert!(!poll.known.contains(2));
        poll.send(vec![plain_row(3)], 0).await;
        poll.settle(Settled { id: 3, fate: MARKED }).await;
        assert!(poll.known.contains(3), "what was read afterwards is trusted");
    }

    /// After a failover its id may be that of a row which nobody has tried.
    #[tokio::test]
    async fn the_id_of_a_row_that_is_perhaps_not_dead_is_asked_for_again() {
        let mut stage = stage();
        stage.poll.send(vec![plain_row(1), plain_row(2)], 0).await;
        stage.poll.settle(Settled { id: 1, fate: Fate::Dead { certain: false } }).await;
        stage.poll.settle(Settled { id: 2, fate: Fate::Dead { certain: true } }).await;
        assert!(!stage.poll.known.contains(1) && stage.poll.known.contains(2));
    }

    /// Right after it had worked it is not told, as one that flaps; but it must not be forgotten.
    #[tokio::test]
    async fn a_route_that_is_parked_right_after_it_worked_is_told_later() {
        let mut stage = stage();
        let (poll, row) = (&mut stage.poll, plain_row(1));
        poll.releases.begin(Arc::clone(&row.route), std::time::Instant::now());
        for _ in 0..3 {
            poll.route_refuses(&row.route, "full", false);
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

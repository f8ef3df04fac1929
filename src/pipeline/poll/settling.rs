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
        let Some(settled) = self.in_flight.remove(&id) else { return };
        let InFlight { bytes, lease, key: key_in_flight, worker, probe, watched, forgotten } = settled;
        self.bytes_in_flight -= bytes;
        self.shards.settled(lease);
        if let Some(key) = &key_in_flight {
            self.keys.settled(key);
        }
        match fate {
            Fate::Delivered { certain } => {
                // What was marked before a failover may be pending after it, or another row.
                if !certain || forgotten {
                    self.known.remove(id);
                }
                if let Some(route) = watched {
                    self.route_works(route);
                }
            }
            Fate::Dead => {
                // Perhaps it was another row's id meanwhile, and that row is not dead.
                self.known.remove(id);
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
            for worker in self.keys.take_resumed(&key) {
                // The table holds the key back from here on.
                self.resume(worker, Arc::clone(&key)).await;
            }
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

//! The consumer: one, in order, and a delivery is acknowledged only when it stands in its ledger on disk.
//!
//! It reconnects by itself. What it had not acknowledged then comes again, marked `redelivered`; the
//! checker tells that from duplicates of the relay (`checker::redelivery`).

use crate::board::Board;
use crate::ledger::{Clock, Delivered, Journal, hash};
use crate::world::World;
use anyhow::{Context, Result};
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable};
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// Most messages with the consumer and not acknowledged.
pub const PREFETCH: u16 = 200;
/// Most deliveries of one sync of the ledger.
const BATCH: usize = 100;
const LOOK: Duration = Duration::from_millis(50);

/// The consumer of a run.
#[derive(Debug)]
pub struct Consumer {
    /// Where it reads.
    pub world: Arc<World>,
    /// What it counts.
    pub board: Arc<Board>,
    /// Its ledger.
    pub journal: Journal,
    /// The clock of the run.
    pub clock: Clock,
}

impl Consumer {
    /// Reads until told to stop; ends with an error only if the ledger fails.
    pub async fn read(self, stop: CancellationToken) -> Result<()> {
        let (mut connection, mut seen) = (0, HashSet::new());
        while !stop.is_cancelled() {
            match self.session(&mut connection, &mut seen, &stop).await {
                Ok(()) | Err(Failure::Broker) => {}
                Err(Failure::Ledger(error)) => return Err(error),
            }
            tokio::select! { () = sleep(4 * LOOK) => {}, () = stop.cancelled() => {} }
        }
        Ok(())
    }

    async fn session(
        &self,
        number: &mut u64,
        seen: &mut HashSet<String>,
        stop: &CancellationToken,
    ) -> Result<(), Failure> {
        let connection = self.world.amqp().await.map_err(|_| Failure::Broker)?;
        let channel = connection.create_channel().await?;
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let options = BasicConsumeOptions::default();
        let consuming = channel.basic_consume(
            self.world.name.as_str().into(),
            "ledger".into(),
            options,
            FieldTable::default(),
        );
        let mut deliveries = consuming.await?;
        *number += 1;
        loop {
            while self.board.paused.load(Relaxed) && !stop.is_cancelled() {
                sleep(LOOK).await;
            }
            let first = tokio::select! {
                next = deliveries.next() => next.ok_or(Failure::Broker)??,
                () = stop.cancelled() => break,
            };
            let mut batch = vec![first];
            while batch.len() < BATCH
                && let Some(Some(next)) = deliveries.next().now_or_never()
            {
                batch.push(next?);
            }
            let lines: Vec<Delivered> = batch.iter().map(|delivery| self.line(*number, delivery)).collect();
            self.journal.append(&lines).await.map_err(Failure::Ledger)?;
            self.count(&lines, seen);
            if let Some(last) = batch.last() {
                last.ack(BasicAckOptions { multiple: true }).await?;
            }
        }
        let _ = connection.close(200, "done".into()).await;
        Ok(())
    }

    /// For the line of progress only; the checker counts from the ledger.
    fn count(&self, lines: &[Delivered], seen: &mut HashSet<String>) {
        for line in lines {
            if seen.insert(line.message_id.clone()) {
                self.board.delivered.fetch_add(1, Relaxed);
            } else if !line.redelivered {
                self.board.duplicates.fetch_add(1, Relaxed);
            }
        }
    }

    fn line(&self, connection: u64, delivery: &Delivery) -> Delivered {
        let properties = &delivery.properties;
        let header =
            |name: &str| properties.headers().as_ref().and_then(|table| table.inner().get(name).cloned());
        Delivered {
            at: self.clock.ms(),
            connection,
            redelivered: delivery.redelivered,
            message_id: properties.message_id().as_ref().map(ToString::to_string).unwrap_or_default(),
            id: match header("x-outbox-id") {
                Some(AMQPValue::LongLongInt(id)) => Some(id),
                _ => None,
            },
            key: match header("x-outbox-key") {
                Some(AMQPValue::LongString(key)) => Some(key.to_string()),
                _ => None,
            },
            routing_key: delivery.routing_key.to_string(),
            hash: hash(&delivery.data),
            persistent: *properties.delivery_mode() == Some(2),
            content_type: properties.content_type().as_ref().map(ToString::to_string),
        }
    }
}

enum Failure {
    Ledger(anyhow::Error),
    Broker,
}

impl From<lapin::Error> for Failure {
    fn from(_: lapin::Error) -> Self {
        Self::Broker
    }
}

/// Waits until the queue is empty and the consumer has not got anything for a while.
pub async fn until_read(world: &World, board: &Board, limit: Duration) -> Result<()> {
    let wait = async {
        loop {
            let before = board.delivered.load(Relaxed) + board.duplicates.load(Relaxed);
            sleep(10 * LOOK).await;
            let quiet = before == board.delivered.load(Relaxed) + board.duplicates.load(Relaxed);
            if quiet && world.queue_depth().await.is_ok_and(|depth| depth == 0) {
                return;
            }
        }
    };
    tokio::time::timeout(limit, wait).await.context("the consumer did not empty its queue")
}

//! F01: `kill -9` at each named point of a row's way. The points are reached from outside, by links that carry in one
//! direction only, so that the binary under test is the one that users run.

use crate::support::proxy::{Link, Proxy};
use crate::support::world::Allowed;
use crate::support::{RelayProcess, World, eventually};
use std::collections::HashSet;

const ROWS: i64 = 100;
/// By default.
const WORKERS: f64 = 4.0;
const ROUNDS: i64 = 3;

/// A relay behind a proxy to each server.
struct Stage {
    world: World,
    broker: Proxy,
    database: Proxy,
    received: Vec<crate::support::checker::Received>,
}

impl Stage {
    async fn new() -> Self {
        let world = World::new().await;
        let broker = Proxy::to(&world.servers().amqp_url).await;
        let database = Proxy::to(&world.database_url).await;
        Self { world, broker, database, received: Vec::new() }
    }

    async fn relay(&self) -> RelayProcess {
        let (amqp, database) =
            (self.broker.url(&self.world.servers().amqp_url), self.database.url(&self.world.database_url));
        let settings = [("AMQP_URL", amqp.as_str()), ("DATABASE_URL", &database), ("OUTBOX_LEASE_TTL", "2s")];
        let relay = self.world.process(&settings).await;
        relay.until_owner().await;
        relay.ready().await;
        relay
    }

    /// A relay whose workers all have their channel and know the exchange, so that a link that carries in one direction
    /// only stops nothing but messages and confirms.
    async fn warm_relay(&mut self) -> RelayProcess {
        let relay = self.relay().await;
        self.write().await;
        self.world.drained().await;
        let warm = self.world.take_messages().await;
        self.received.extend(warm);
        relay
    }

    /// A row for each key, so that one batch of each worker takes them all.
    async fn write(&self) {
        self.world.write(ROWS, ROWS).await;
    }

    /// The broker has them all, whether their confirms come or not.
    async fn until_all_sent(&self) {
        eventually("the broker has all messages", async || i64::from(self.world.queue_depth().await) == ROWS)
            .await;
    }

    async fn marked(&self) -> i64 {
        self.world.delivered().await
    }

    /// Kills the relay where it stands, heals the links, lets another finish. Answers with what arrived before and after.
    async fn kill(&mut self, relay: RelayProcess) -> (usize, usize) {
        relay.kill().await;
        for proxy in [&self.broker, &self.database] {
            // What was under way is lost with its connection.
            proxy.set(Link::Cut);
            eventually("the link is empty", async || proxy.is_idle()).await;
            proxy.set(Link::Pass);
        }
        let before = self.world.take_messages().await;
        let next = self.relay().await;
        self.world.drained().await;
        assert!(next.terminate().await.success());
        let after = self.world.take_messages().await;
        let counts = (before.len(), after.len());
        self.received.extend(before);
        self.received.extend(after);
        counts
    }

    async fn finish(self, duplicates: i64) {
        let allowed = Allowed { duplicates: duplicates as usize, rewinds: true, ..Allowed::default() };
        self.world.finish_with(self.received, allowed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_after_the_read_nothing_was_sent_and_nothing_is_repeated() {
    let mut stage = Stage::new().await;
    for _ in 0..ROUNDS {
        let relay = stage.warm_relay().await;
        stage.broker.set(Link::DeadUp);
        stage.write().await;
        eventually("the rows are read", async || relay.metric("in_flight_messages").await == ROWS as f64)
            .await;
        assert_eq!(stage.kill(relay).await, (0, ROWS as usize));
    }
    stage.finish(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_after_the_send_the_messages_come_once_more() {
    let mut stage = Stage::new().await;
    for _ in 0..ROUNDS {
        let relay = stage.warm_relay().await;
        stage.broker.set(Link::DeadDown);
        stage.write().await;
        stage.until_all_sent().await;
        assert_eq!(stage.kill(relay).await, (ROWS as usize, ROWS as usize));
    }
    stage.finish(ROUNDS * ROWS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_after_the_confirm_the_messages_come_once_more() {
    let mut stage = Stage::new().await;
    for _ in 0..ROUNDS {
        let relay = stage.warm_relay().await;
        stage.broker.set(Link::DeadDown);
        stage.write().await;
        stage.until_all_sent().await;
        let marked = stage.marked().await;
        let batches = async || relay.metric("confirm_duration_seconds_count").await;
        let confirmed = batches().await;
        stage.database.set(Link::DeadUp);
        stage.broker.set(Link::Pass);
        eventually("each worker has its confirms", async || batches().await == confirmed + WORKERS).await;
        assert_eq!(stage.marked().await, marked, "nothing could be marked");
        assert_eq!(stage.kill(relay).await, (ROWS as usize, ROWS as usize));
    }
    stage.finish(ROUNDS * ROWS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_before_it_learns_of_its_commit_nothing_is_repeated() {
    let mut stage = Stage::new().await;
    for _ in 0..ROUNDS {
        let relay = stage.warm_relay().await;
        stage.broker.set(Link::DeadDown);
        stage.write().await;
        stage.until_all_sent().await;
        let before = stage.marked().await;
        stage.database.set(Link::DeadDown);
        stage.broker.set(Link::Pass);
        eventually("marks are committed", async || {
            // Workers finish at different moments; the first commit blocks the others, whose answer never comes.
            stage.marked().await > before
        })
        .await;
        let unmarked = before + ROWS - stage.marked().await;
        let (sent, repeated) = stage.kill(relay).await;
        assert_eq!(sent as i64, ROWS);
        assert_eq!(repeated as i64, unmarked, "exactly what was not marked comes once more");
    }
    let distinct: HashSet<i64> = stage.received.iter().map(|message| message.id).collect();
    let repeated = (stage.received.len() - distinct.len()) as i64;
    stage.finish(repeated).await;
}

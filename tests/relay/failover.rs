//! Promise 6 where a server has others beside it: a standby that takes over, and a cluster of brokers.

use crate::support::process::RelayProcess;
use crate::support::servers::Servers;
use crate::support::url_file::UrlFile;
use crate::support::world::{Allowed, DELIVERED, TRIED, UNDELIVERED};
use crate::support::{World, eventually};
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

/// A world whose database has a standby, and the file that tells the relay where the database is.
struct Pair {
    world: World,
    file: UrlFile,
}

impl Pair {
    async fn new(options: &[&str]) -> Self {
        let world = World::alone().await;
        world.servers().services(&[&["start", "standby", "--fast"], options].concat()).await;
        let file = UrlFile::new(&world.database_url);
        Self { world, file }
    }

    /// This world's database at the standby.
    fn standby_url(&self) -> String {
        let url = self.world.servers().value("STANDBY_URL");
        let (server, _) = url.rsplit_once('/').expect("URL with a database");
        format!("{server}/{}", self.world.name)
    }

    /// A relay that reads in the file where the database is.
    async fn relay(&self, more: &[(&str, &str)]) -> RelayProcess {
        self.world.process_with_file("DATABASE_URL", &self.file, more).await
    }

    /// The primary crashes and the standby takes its place, for the test and for the relay.
    async fn fail_over(&mut self) {
        self.world.servers().control("kill", "postgres").await;
        self.world.servers().control("promote", "standby").await;
        self.world.database_url = self.standby_url();
        self.file.write(&self.world.database_url);
    }

    /// A count at the standby.
    async fn standby_has(&self, sql: &str, expected: i64) {
        eventually(&format!("the standby has {expected} = {sql}"), async || {
            let Ok(mut db) = PgConnection::connect(&self.standby_url()).await else { return false };
            let query = sqlx::query_scalar::<_, i64>(AssertSqlSafe(sql.to_owned()));
            query.fetch_one(&mut db).await.is_ok_and(|found| found == expected)
        })
        .await;
    }
}

/// Every commit is at the standby, so its promotion loses nothing: rows, marks, and what was in flight.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_synchronous_standby_takes_over_without_loss() {
    let mut pair = Pair::new(&["--sync"]).await;
    pair.world.write(20_000, 200).await;
    let relay = pair.relay(&[]).await;
    pair.world.until_at_least_delivered(2_000).await;
    pair.fail_over().await;
    assert!(pair.world.number(UNDELIVERED).await > 0, "it came while rows flowed");
    assert_eq!(pair.world.number("select count(*) from written").await, 20_000, "committed is committed");
    pair.world.write(1_000, 200).await;
    pair.world.drained().await;
    eventually("health is good again", async || relay.get("/health").await.0 == 200).await;
    assert!(relay.terminate().await.success(), "the same process from start to end");
    // What was confirmed and not yet marked stays in memory and is marked at the new primary.
    pair.world.finish(Allowed::default()).await;
}

/// A standby that has fallen behind loses what it did not get, and nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lagging_standby_loses_what_it_did_not_get_and_no_more() {
    let mut pair = Pair::new(&[]).await;
    pair.world.write(1_000, 50).await;
    let relay = pair.relay(&[]).await;
    pair.world.drained().await;
    pair.standby_has(DELIVERED, 1_000).await;
    // While the broker is away nothing is read, so none of the rows that will be lost reaches anybody.
    pair.world.servers().control("stop", "rabbitmq").await;
    eventually("the broker is away", async || relay.get("/health").await.1.contains("\"reason\":\"broker"))
        .await;
    pair.world.write(300, 50).await;
    pair.standby_has("select count(*) from outbox", 1_300).await;
    pair.world.servers().control("detach", "standby").await;
    pair.world.write(500, 50).await;
    let committed = pair.world.number("select count(*) from written").await;
    pair.fail_over().await;
    let kept = pair.world.number("select count(*) from written").await;
    assert_eq!(
        (committed, committed - kept),
        (1_800, 500),
        "lost: the rows written since the standby was detached"
    );
    pair.world.servers().control("start", "rabbitmq").await;
    // These take the ids of lost rows.
    pair.world.write(700, 50).await;
    pair.world.drained().await;
    assert_eq!(pair.world.delivered().await, 2_000);
    assert!(relay.terminate().await.success());
    pair.world.finish(Allowed::default()).await;
}

/// A relay that waits for rows learns of the failover by its watch alone: the next read is at the new primary at once.
/// New rows that take the ids of lost ones are no news by their ids, and are delivered all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failover_that_only_a_watch_has_noticed_hides_no_row() {
    let mut pair = Pair::new(&[]).await;
    pair.world.write(100, 10).await;
    let relay = pair.relay(&[("OUTBOX_SWEEP_INTERVAL", "1h")]).await;
    pair.world.drained().await;
    pair.standby_has(DELIVERED, 100).await;
    pair.world.servers().control("detach", "standby").await;
    pair.world.write(500, 10).await;
    pair.world.drained().await;
    // The new primary is there, and is where the relay will connect, before the old one goes.
    pair.world.servers().control("promote", "standby").await;
    pair.world.database_url = pair.standby_url();
    pair.file.write(&pair.world.database_url);
    pair.world.servers().control("kill", "postgres").await;
    pair.world.write(300, 10).await;
    let shared = pair.world.number("select count(*) from outbox where id between 134 and 600").await;
    assert!(shared > 200, "most take the ids of lost rows, {shared} do");
    pair.world.drained().await;
    assert!(relay.terminate().await.success());
    let received = pair.world.take_messages().await;
    assert_eq!(received.len(), 900, "each once");
    pair.world.abandon();
}

/// Confirmed, not yet marked, and lost with the old primary: a new row that takes the id is not taken for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_with_the_id_of_a_lost_one_is_not_taken_for_it() {
    let mut pair = Pair::new(&[]).await;
    pair.world.write(100, 10).await;
    let relay = pair.relay(&[]).await;
    pair.world.drained().await;
    pair.standby_has(DELIVERED, 100).await;
    pair.world.servers().control("detach", "standby").await;
    // Rows nobody can mark, because somebody holds them: confirmed, they stay in the relay's memory.
    pair.world.sql("insert into outbox (routing_key, payload, available_at) select 'ok.1', '1', clock_timestamp() + interval '1 hour' from generate_series(1, 100)").await;
    let mut holder = pair.world.db().await;
    pair.world
        .sql("update outbox set available_at = clock_timestamp() + interval '5 s' where id > 100")
        .await;
    sqlx::raw_sql("begin; select from outbox where id > 100 for update")
        .execute(&mut holder)
        .await
        .expect("lock");
    eventually("they are sent", async || pair.world.queue_depth().await == 200).await;
    assert_eq!(pair.world.delivered().await, 100, "and not marked");
    pair.world.servers().control("kill", "postgres").await;
    pair.world.servers().control("promote", "standby").await;
    pair.world.database_url = pair.standby_url();
    pair.world
        .sql("insert into outbox (routing_key, payload) select 'ok.2', '2' from generate_series(1, 100)")
        .await;
    let shared = pair
        .world
        .number("select count(*) from outbox where id between 101 and 200 and routing_key = 'ok.2'")
        .await;
    assert!(shared > 0, "some take the ids of lost rows");
    pair.file.write(&pair.world.database_url);
    pair.world.drained().await;
    assert!(relay.terminate().await.success());
    let received: Vec<_> =
        pair.world.take_messages().await.iter().map(|message| message.message_id).collect();
    let query = sqlx::query_scalar("select message_id from outbox where delivered_at is not null");
    let marked: Vec<uuid::Uuid> = query.fetch_all(&mut pair.world.db().await).await.expect("outbox");
    let lost = marked.iter().filter(|id| !received.contains(id)).count();
    assert_eq!(
        lost,
        0,
        "of {} rows marked delivered so many were never sent; {shared} have the id of another",
        marked.len()
    );
    pair.world.abandon();
}

/// Pointed at a standby the relay says so and waits; when that is promoted it goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_is_told_and_waited_for_until_it_is_promoted() {
    let mut pair = Pair::new(&[]).await;
    pair.world.write(1_000, 50).await;
    pair.standby_has("select count(*) from outbox", 1_000).await;
    pair.file.write(&pair.standby_url());
    let relay = pair.relay(&[]).await;
    relay.until_not_ready("read-only standby").await;
    assert_eq!(relay.get("/livez").await.0, 200);
    assert_eq!(pair.world.queue_depth().await, 0, "nothing is sent that could not be marked");
    pair.fail_over().await;
    pair.world.drained().await;
    relay.ready().await;
    assert!(relay.terminate().await.success());
    pair.world.finish(Allowed::default()).await;
}

/// A quorum queue on three nodes, led by the second, in the place of this world's queue.
async fn quorum_queue(world: &World) {
    let connection =
        Connection::connect(&world.servers().value("AMQP_URL_2"), ConnectionProperties::default()).await;
    let connection = connection.expect("second node");
    let channel = connection.create_channel().await.expect("channel");
    let name = world.name.as_str();
    channel.queue_delete(name.into(), QueueDeleteOptions::default()).await.expect("delete");
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(name.into(), durable, arguments).await.expect("quorum queue");
    world.bind("ok.#").await;
}

/// The leader of a quorum queue crashes: another takes over, and no attempt is lost. Then the majority is lost: its
/// rows wait, and all arrive when it is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quorum_queue_that_loses_its_leader_and_then_its_majority_gets_everything() {
    let servers =
        tokio::task::spawn_blocking(|| Servers::start_with(&["--nodes", "3"])).await.expect("servers");
    let world = World::with(servers).await;
    quorum_queue(&world).await;
    let servers = world.servers();
    let amqp = ["AMQP_URL", "AMQP_URL_2", "AMQP_URL_3"].map(|name| servers.value(name)).join(",");

    world.write(20_000, 200).await;
    let relay = world.process(&[("AMQP_URL", &amqp), ("OUTBOX_CONFIRM_TIMEOUT", "10s")]).await;
    world.until_at_least_delivered(2_000).await;
    servers.control("kill", "rabbitmq@2").await;
    world.drained().await;
    assert_eq!(world.number(TRIED).await, 0, "an election costs no attempt");
    assert!(relay.terminate().await.success());
    servers.control("start", "rabbitmq@2").await;

    let relay = world.process(&[("AMQP_URL", &amqp), ("OUTBOX_CONFIRM_TIMEOUT", "1s")]).await;
    relay.ready().await;
    servers.control("kill", "rabbitmq@2").await;
    servers.control("kill", "rabbitmq@3").await;
    world.write(2_000, 200).await;
    world.until_at_least("select count(*) from outbox where attempts > 0 and delivered_at is null", 1).await;
    assert_eq!(relay.get("/livez").await.0, 200);
    assert_eq!(world.number("select count(*) from outbox where dead_at is not null").await, 0);
    servers.control("start", "rabbitmq").await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    world.finish(Allowed { duplicates: 3 * 2000, refusals: true, ..Allowed::default() }).await;
}

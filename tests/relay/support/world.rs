//! One test's world: a database, an exchange and a queue of its own, writers, and a relay in it.
//!
//! The queue is the consumer's ledger: what was delivered lies in it in order until the world is
//! finished. A trigger copies every committed row into table `written`, which is the writers' ledger.
//! [`World::finish`] compares the two with the outbox; dropping a world without finishing it fails.

use super::checker::{Received, check};
use super::endpoint::Endpoint;
use super::process::RelayProcess;
use super::servers::Servers;
use super::url_file::UrlFile;
use super::{DEADLINE, eventually, store};
use futures_util::StreamExt;
use lapin::options::{
    BasicConsumeOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions,
    QueueDeclareOptions, QueueDeleteOptions, QueuePurgeOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, ExchangeKind};
use outbox_relay::config::{Settings, Sources};
use outbox_relay::relay::{Relay, RelayError};
use outbox_relay::sink::{RabbitMq, Sink};
use outbox_relay::store::postgres::{Connector, migrate};
use outbox_relay::store::{LeaseTable, PostgresStore, Store};
use outbox_relay::telemetry::Metrics;
use sqlx::{AssertSqlSafe, Connection as _, Executor, PgConnection};
use std::collections::{BTreeMap, HashSet};
use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use url::Url;

/// Retries and takeovers quick enough for a test.
const QUICK: [(&str, &str); 4] = [
    ("OUTBOX_RETRY_MIN", "20ms"),
    ("OUTBOX_RETRY_MAX", "500ms"),
    ("OUTBOX_LEASE_TTL", "2s"),
    ("OUTBOX_LOG", "info,outbox_relay=debug"),
];

/// Counts rows that are delivered and were kept.
pub const DELIVERED: &str = "select count(*) from outbox where delivered_at is not null";

/// Counts rows that are not delivered: a fault that is to come in the middle of a drain must find some.
pub const UNDELIVERED: &str = "select count(*) from outbox where delivered_at is null";

/// Counts rows that were refused.
pub const TRIED: &str = "select count(*) from outbox where attempts > 0";

/// What a test allows beyond the strictest reading of the promises.
#[derive(Debug, Clone, Copy, Default)]
pub struct Allowed {
    /// Deliveries beyond the first of a row.
    pub duplicates: usize,
    /// The relay was killed: what it had not marked comes once more, from the first such row of a key on.
    /// First deliveries keep their order all the same.
    pub rewinds: bool,
    /// Rows may have attempts: the test makes the broker refuse some.
    pub refusals: bool,
    /// Rows may be dead: the test writes poison.
    pub dead: bool,
    /// Rows may still be pending.
    pub pending: bool,
    /// Keys are not ordered: ordering none, or pipelined with refusals.
    pub disorder: bool,
}

/// A test's world.
#[derive(Debug)]
pub struct World {
    servers: Holder,
    /// The database of this test.
    pub database_url: String,
    /// Exchange and queue of this test; the queue is bound with `ok.#`.
    pub name: String,
    finished: bool,
}

#[derive(Debug)]
enum Holder {
    Shared(&'static Servers),
    Own(Box<Servers>),
}

impl World {
    /// A world on the shared servers.
    pub async fn new() -> Self {
        let servers = tokio::task::spawn_blocking(Servers::shared).await.expect("servers");
        Self::on(Holder::Shared(servers)).await
    }

    /// A world on servers of its own, for tests that break them.
    pub async fn alone() -> Self {
        Self::with(tokio::task::spawn_blocking(Servers::start).await.expect("servers")).await
    }

    /// A world on these servers, which are its own.
    pub async fn with(servers: Servers) -> Self {
        Self::on(Holder::Own(Box::new(servers))).await
    }

    /// A world on servers that `scripts/services` has started, shared ones if these are. Its login is no superuser, as it is on
    /// servers that were given: policies of row-level security hold for it.
    pub async fn on_ours() -> Self {
        let shared = tokio::task::spawn_blocking(Servers::shared).await.expect("servers");
        if shared.are_ours() { Self::new().await } else { Self::alone().await }
    }

    /// A world, and the URL that leads to its database through PgBouncer.
    pub async fn behind_pgbouncer() -> (Self, String) {
        let world = Self::on_ours().await;
        let url = world.pgbouncer_url().await;
        (world, url)
    }

    /// The URL that leads to this world's database through PgBouncer, which is started where it does not run.
    pub async fn pgbouncer_url(&self) -> String {
        self.servers().services(&["start", "pgbouncer"]).await;
        let url = self.servers().value("PGBOUNCER_URL");
        let (base, _) = url.rsplit_once('/').expect("URL with a database");
        format!("{base}/{}", self.name)
    }

    async fn on(servers: Holder) -> Self {
        let name = format!("t_{:016x}", fastrand::u64(..));
        let mut world = Self { servers, database_url: String::new(), name: name.clone(), finished: false };
        let mut admin = PgConnection::connect(&world.servers().database_url).await.expect("database");
        admin.execute(AssertSqlSafe(format!("create database {name}"))).await.expect("create database");
        let (base, _) = world.servers().database_url.rsplit_once('/').expect("URL with a database");
        world.database_url = format!("{base}/{name}");
        world.migrate("outbox").await;
        world.declare().await;
        world.bind("ok.#").await;
        world
    }

    /// The servers under this world.
    pub fn servers(&self) -> &Servers {
        match &self.servers {
            Holder::Shared(servers) => servers,
            Holder::Own(servers) => servers,
        }
    }

    /// Creates an outbox table and the trigger that keeps the writers' ledger.
    pub async fn migrate(&self, table: &str) {
        let pairs = self.pairs(&[("OUTBOX_TABLE", table)]);
        let settings = resolve(&pairs);
        migrate::run(&Connector::new(settings.database, false), &settings.table).await.expect("migrate");
        let sql = format!(
            "create table if not exists written (
                 id bigint, message_id uuid, ordering_key text, routing_key text, body bytea);
             create or replace function keep_written() returns trigger language plpgsql as $$
             begin
                 insert into written values (new.id, new.message_id, new.ordering_key, new.routing_key,
                     case when pg_typeof(new.payload) = 'bytea'::regtype then new.payload::text::bytea
                          else convert_to(new.payload::text, 'UTF8') end);
                 return null;
             end $$;
             create trigger keep_written after insert on {table} for each row execute function keep_written();"
        );
        self.sql(&sql).await;
    }

    /// A connection to this world's database.
    pub async fn db(&self) -> PgConnection {
        let begun = Instant::now();
        loop {
            match PgConnection::connect(&self.database_url).await {
                Ok(connection) => return connection,
                Err(error) => assert!(begun.elapsed() < DEADLINE, "database: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Runs statements.
    pub async fn sql(&self, sql: &str) {
        let done = self.db().await.execute(AssertSqlSafe(sql.to_owned())).await;
        done.unwrap_or_else(|error| panic!("{error} in: {sql}"));
    }

    /// A count, or any other single number.
    pub async fn number(&self, sql: &str) -> i64 {
        let query = sqlx::query_scalar(AssertSqlSafe(sql.to_owned()));
        query.fetch_one(&mut self.db().await).await.unwrap_or_else(|error| panic!("{error} in: {sql}"))
    }

    /// All ids a query finds.
    pub async fn ids(&self, sql: &str) -> HashSet<i64> {
        let query = sqlx::query_scalar(AssertSqlSafe(sql.to_owned()));
        let ids: Vec<i64> = query.fetch_all(&mut self.db().await).await.expect("ids");
        ids.into_iter().collect()
    }

    /// A single text.
    pub async fn text(&self, sql: &str) -> Option<String> {
        let query = sqlx::query_scalar(AssertSqlSafe(sql.to_owned()));
        query.fetch_one(&mut self.db().await).await.unwrap_or_else(|error| panic!("{error} in: {sql}"))
    }

    /// Waits until a count is this.
    pub async fn until(&self, sql: &str, expected: i64) {
        self.until_in(DEADLINE, sql, expected).await;
    }

    /// The same for what takes longer.
    pub async fn until_in(&self, deadline: Duration, sql: &str, expected: i64) {
        self.until_count(deadline, &format!("{expected} = {sql}"), sql, |found| found == expected).await;
    }

    /// Waits until a count has reached this.
    pub async fn until_at_least(&self, sql: &str, expected: i64) {
        self.until_at_least_in(DEADLINE, sql, expected).await;
    }

    /// The same for what takes longer.
    pub async fn until_at_least_in(&self, deadline: Duration, sql: &str, expected: i64) {
        self.until_count(deadline, &format!("at least {expected} = {sql}"), sql, |found| found >= expected)
            .await;
    }

    /// Slow is not stuck: the deadline is for a count that does not move.
    async fn until_count(&self, deadline: Duration, what: &str, sql: &str, reached: impl Fn(i64) -> bool) {
        let started = Instant::now();
        let (mut last, mut moved) = (None, started);
        let mut db = None;
        loop {
            let begun = Instant::now();
            // The server may be away, on purpose.
            if db.is_none() {
                db = PgConnection::connect(&self.database_url).await.ok();
            }
            let found = match &mut db {
                Some(db) => sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).fetch_one(db).await.ok(),
                None => None,
            };
            match found {
                Some(found) if reached(found) => return,
                Some(_) if found != last => (last, moved) = (found, Instant::now()),
                Some(_) => {}
                None => db = None,
            }
            assert!(moved.elapsed() < deadline, "{last:?} for {deadline:?}, waited for: {what}");
            assert!(started.elapsed() < 10 * deadline, "it moves, and never becomes: {what}");
            // Looking must not become the load.
            tokio::time::sleep((begun.elapsed() * 4).max(Duration::from_millis(20))).await;
        }
    }

    /// Rows that are delivered and were kept.
    pub async fn delivered(&self) -> i64 {
        self.number(DELIVERED).await
    }

    /// Waits until so many rows are delivered.
    pub async fn until_delivered(&self, rows: i64) {
        self.until(DELIVERED, rows).await;
    }

    /// Waits until so many rows are delivered, or more.
    pub async fn until_at_least_delivered(&self, rows: i64) {
        self.until_at_least(DELIVERED, rows).await;
    }

    /// Waits until health counts this many dead rows.
    pub async fn until_health_dead(&self, relay: &RunningRelay, dead: u64) {
        eventually("health counts the dead rows", async || relay.health().await.dead == Some(dead)).await;
    }

    /// Runs statements as superuser in the database of this world.
    pub async fn superuser(&self, sql: &str) {
        let url = self.servers().superuser_url.as_deref().unwrap_or(&self.database_url);
        let mut url = Url::parse(url).expect("URL");
        url.set_path(&self.name);
        let mut db = PgConnection::connect(url.as_str()).await.expect("database");
        db.execute(AssertSqlSafe(sql.to_owned())).await.unwrap_or_else(|error| panic!("{error} in: {sql}"));
    }

    /// A login of this world's own, without any right in it: its name, and the URL with it.
    pub async fn login(&self, password: &str) -> (String, Url) {
        let role = format!("{}_role", self.name);
        self.superuser(&format!("create role {role} login password '{password}'")).await;
        let mut url = Url::parse(&self.database_url).expect("URL");
        url.set_username(&role).and_then(|()| url.set_password(Some(password))).expect("URL");
        (role, url)
    }

    /// Gives a role the rights a relay needs, as in `docs/OPERATING.md`.
    pub async fn grant(&self, role: &str) {
        self.sql(&format!(
            "grant select, update, delete on outbox to {role};
             grant select, insert, update, delete on outbox_lease, outbox_replica to {role}"
        ))
        .await;
    }

    /// Waits until all sessions of relays and stores have ended: only then has Postgres been told of all that they have read.
    pub async fn until_sessions_end(&self) {
        let sessions = "select count(*) from pg_stat_activity
                        where application_name = 'outbox-relay' and datname = current_database()";
        self.until(sessions, 0).await;
    }

    /// Waits until no row is pending.
    pub async fn drained(&self) {
        self.until("select count(*) from outbox where delivered_at is null and dead_at is null", 0).await;
    }

    /// Commits `rows` rows over `keys` keys, routed to the queue.
    pub async fn write(&self, rows: i64, keys: i64) {
        self.sql(&format!(
            "insert into outbox (routing_key, ordering_key, payload)
             select 'ok.' || i % 7, 'key ' || i % {keys}, jsonb_build_object('i', i)
             from generate_series(1, {rows}) i"
        ))
        .await;
    }

    /// A connection to the broker.
    pub async fn amqp(&self) -> Connection {
        let begun = Instant::now();
        loop {
            let url = &self.servers().amqp_url;
            match tokio::time::timeout(
                Duration::from_secs(5),
                Connection::connect(url, ConnectionProperties::default()),
            )
            .await
            {
                Ok(Ok(connection)) => return connection,
                error => assert!(begun.elapsed() < DEADLINE, "broker: {error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// A channel, on a connection of its own.
    async fn channel(&self) -> (Connection, Channel) {
        let connection = self.amqp().await;
        let channel = connection.create_channel().await.expect("channel");
        (connection, channel)
    }

    /// Declares exchange and queue of this world.
    pub async fn declare(&self) {
        let (_connection, channel) = self.channel().await;
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let name = self.name.as_str();
        channel
            .exchange_declare(name.into(), ExchangeKind::Topic, durable, FieldTable::default())
            .await
            .expect("exchange");
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(name.into(), durable, FieldTable::default()).await.expect("queue");
    }

    /// Declares another topic exchange that leads to the queue of this world.
    pub async fn declare_other(&self, exchange: &str) {
        let ((_connection, channel), name) = (self.channel().await, self.name.as_str());
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        channel
            .exchange_declare(exchange.into(), ExchangeKind::Topic, durable, FieldTable::default())
            .await
            .expect("exchange");
        let options = QueueBindOptions::default();
        channel
            .queue_bind(name.into(), exchange.into(), "#".into(), options, FieldTable::default())
            .await
            .expect("bind");
    }

    /// Deletes an exchange.
    pub async fn delete_exchange(&self, exchange: &str) {
        let (_connection, channel) = self.channel().await;
        channel.exchange_delete(exchange.into(), ExchangeDeleteOptions::default()).await.expect("delete");
    }

    /// Declares a queue that refuses more than so many messages.
    pub async fn declare_full_queue(&self, queue: &str, length: i64) {
        let (_connection, channel) = self.channel().await;
        let mut arguments = FieldTable::default();
        arguments.insert("x-max-length".into(), AMQPValue::LongLongInt(length));
        arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(queue.into(), durable, arguments).await.expect("queue");
    }

    /// Declares a quorum queue.
    pub async fn declare_quorum_queue(&self, queue: &str) {
        let (_connection, channel) = self.channel().await;
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        channel.queue_declare(queue.into(), durable, arguments).await.expect("queue");
    }

    /// Empties a queue.
    pub async fn purge_queue(&self, queue: &str) {
        let (_connection, channel) = self.channel().await;
        channel.queue_purge(queue.into(), QueuePurgeOptions::default()).await.expect("purge");
    }

    /// Deletes the queue of this world; answers with the messages it held.
    pub async fn delete_queue(&self) -> u32 {
        let (_connection, channel) = self.channel().await;
        channel.queue_delete(self.name.as_str().into(), QueueDeleteOptions::default()).await.expect("delete")
    }

    /// Binds the queue.
    pub async fn bind(&self, pattern: &str) {
        let ((_connection, channel), name) = (self.channel().await, self.name.as_str());
        let options = QueueBindOptions::default();
        channel
            .queue_bind(name.into(), name.into(), pattern.into(), options, FieldTable::default())
            .await
            .expect("bind");
    }

    /// Takes a binding away.
    pub async fn unbind(&self, pattern: &str) {
        let ((_connection, channel), name) = (self.channel().await, self.name.as_str());
        let arguments = FieldTable::default();
        channel.queue_unbind(name.into(), name.into(), pattern.into(), arguments).await.expect("unbind");
    }

    /// Messages lying in the queue.
    pub async fn queue_depth(&self) -> u32 {
        let (_connection, channel) = self.channel().await;
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let queue = channel.queue_declare(self.name.as_str().into(), passive, FieldTable::default()).await;
        queue.expect("queue").message_count()
    }

    /// Takes everything out of the queue, in order.
    pub async fn take_messages(&self) -> Vec<Received> {
        let depth = self.queue_depth().await as usize;
        let (connection, channel) = self.channel().await;
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let consumer =
            channel.basic_consume(self.name.as_str().into(), "ledger".into(), options, FieldTable::default());
        let mut deliveries = consumer.await.expect("consume");
        let mut received = Vec::with_capacity(depth);
        while received.len() < depth {
            let delivery =
                tokio::time::timeout(DEADLINE, deliveries.next()).await.expect("a message in time");
            received.push(Received::new(delivery.expect("subscription").expect("delivery")));
        }
        let _ = connection.close(200, "done".into()).await;
        received
    }

    /// Environment of a relay in this world.
    pub fn pairs(&self, extra: &[(&str, &str)]) -> BTreeMap<String, String> {
        let own = [
            ("DATABASE_URL", self.database_url.as_str()),
            ("AMQP_URL", self.servers().amqp_url.as_str()),
            ("OUTBOX_EXCHANGE", self.name.as_str()),
            ("OUTBOX_HTTP_LISTEN", "127.0.0.1:0"),
        ];
        let all = own.iter().chain(&QUICK).chain(extra);
        all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    /// What a relay in this world reads from and writes to, without the relay.
    pub fn store(&self, extra: &[(&str, &str)]) -> PostgresStore {
        store::postgres(&resolve(&self.pairs(extra)))
    }

    /// A relay inside this process.
    pub async fn relay(&self, extra: &[(&str, &str)]) -> RunningRelay {
        RunningRelay::start(resolve(&self.pairs(extra))).await
    }

    /// A relay that has parked the route `lost.1`; so many rows of it wait for an hour.
    pub async fn relay_with_parked_rows(&self, rows: i64) -> RunningRelay {
        let fill = "insert into outbox (routing_key, payload) select 'lost.1', '{}' from generate_series(1, ";
        self.sql(&format!("{fill}{rows})")).await;
        let relay = self.relay(&[("OUTBOX_RETRY_MAX", "1h"), ("OUTBOX_RETRY_MIN", "1h")]).await;
        eventually("the route is parked", async || relay.health().await.parked_routes == 1).await;
        self.until(TRIED, rows).await;
        relay
    }

    /// A trigger of somebody's, `reject`: before an update of such rows it does something else.
    pub async fn reject_updates(&self, of: &str, instead: &str) {
        self.sql(&format!(
            "create function reject() returns trigger language plpgsql as
             $$ begin if {of} then {instead}; end if; return new; end $$;
             create trigger reject before update on outbox for each row execute function reject()"
        ))
        .await;
    }

    /// A relay as a process of its own.
    pub async fn process(&self, extra: &[(&str, &str)]) -> RelayProcess {
        RelayProcess::start(&self.pairs(extra)).await
    }

    /// The same, with a URL that it reads in a file.
    pub async fn process_with_file(
        &self,
        setting: &str,
        file: &UrlFile,
        extra: &[(&str, &str)],
    ) -> RelayProcess {
        let mut pairs = self.pairs(extra);
        pairs.remove(setting);
        pairs.insert(format!("{setting}_FILE"), file.path().to_owned());
        RelayProcess::start(&pairs).await
    }

    /// Checks the promises against both ledgers and the table; panics with a counter-example.
    pub async fn finish(self, allowed: Allowed) {
        let received = self.take_messages().await;
        self.finish_with(received, allowed).await;
    }

    /// The same, for messages that were taken before.
    pub async fn finish_with(mut self, received: Vec<Received>, allowed: Allowed) {
        self.finished = true;
        check(&mut self.db().await, &received, allowed).await;
    }

    /// For worlds whose queue says nothing, because the test is not about deliveries.
    pub fn abandon(mut self) {
        self.finished = true;
    }
}

impl Drop for World {
    fn drop(&mut self) {
        assert!(
            self.finished || std::thread::panicking(),
            "a world must be finished, so that its promises are checked"
        );
    }
}

/// Settings from an environment.
pub fn resolve(pairs: &BTreeMap<String, String>) -> Settings {
    let pairs = pairs.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    Settings::resolve(&Sources::from_env(pairs).expect("sources")).expect("settings")
}

/// Settings for a relay between a store in memory and a sink of the test.
pub fn without_servers(pairs: &[(&str, &str)]) -> Settings {
    let servers = [("DATABASE_URL", "postgres://unused"), ("AMQP_URL", "amqp://unused")];
    let pairs = servers.iter().chain(pairs);
    resolve(&pairs.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect())
}

/// A relay that runs inside the test's process.
#[derive(Debug)]
pub struct RunningRelay {
    endpoint: Endpoint,
    stop: CancellationToken,
    ended: JoinHandle<Result<(), RelayError>>,
}

impl RunningRelay {
    /// Starts a relay between Postgres and RabbitMQ.
    pub async fn start(settings: Settings) -> Self {
        let metrics = Arc::new(Metrics::default());
        let store = store::postgres(&settings);
        let sink = RabbitMq::connect(settings.amqp.clone(), settings.confirm_timeout, Arc::clone(&metrics));
        Self::spawn(Relay::new(settings, store, sink, metrics)).await
    }

    /// Starts a relay between any store and sink.
    pub async fn between<S: Store + LeaseTable, K: Sink>(settings: Settings, store: S, sink: K) -> Self {
        Self::spawn(Relay::new(settings, store, sink, Arc::default())).await
    }

    /// Runs any relay.
    pub async fn spawn<S: Store + LeaseTable, K: Sink>(relay: Relay<S, K>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen");
        let endpoint = Endpoint { address: listener.local_addr().expect("address") };
        let stop = CancellationToken::new();
        let ended = tokio::spawn(relay.run(listener, stop.clone()));
        Self { endpoint, stop, ended }
    }

    /// Ends it as a crash does: nothing is finished, nothing given back.
    pub async fn crash(self) {
        self.ended.abort();
        assert!(self.ended.await.is_err_and(|error| error.is_cancelled()), "it was running");
    }

    /// Stops it and waits for the end.
    pub async fn stop(self) -> Result<(), RelayError> {
        self.stop.cancel();
        self.ended().await
    }

    /// Waits until it ends by itself.
    pub async fn ended(self) -> Result<(), RelayError> {
        tokio::time::timeout(DEADLINE, self.ended).await.expect("the relay ends").expect("no panic")
    }
}

impl Deref for RunningRelay {
    type Target = Endpoint;

    fn deref(&self) -> &Endpoint {
        &self.endpoint
    }
}

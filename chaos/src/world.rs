//! Where a run takes place: a schema, an exchange and a queue of its own on two servers, and the links
//! by which the relays reach them.
//!
//! On servers of our own the relays have a role and a user of their own, whose passwords and rights can
//! be taken away while writers, consumer and this tool go on.

use crate::proxy::Proxy;
use crate::servers::Servers;
use anyhow::{Context, Result, ensure};
use lapin::options::{
    ExchangeDeclareOptions, ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, ExchangeKind};
use sqlx::{AssertSqlSafe, Connection as _, Executor, PgConnection};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::process::Command;

/// Routing keys begin with one of these; each has a binding of its own.
pub const ROUTES: [&str; 2] = ["a", "b"];
/// The relays' role and user on servers of our own.
pub const RELAY: &str = "relay";
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Beyond any number of reconnects of the consumer: RabbitMQ 4 drops a message after 20 by default.
const DELIVERY_LIMIT: i64 = 1_000_000;

/// A place for a run.
#[derive(Debug)]
pub struct World {
    /// Schema, exchange and queue are called so.
    pub name: String,
    /// The servers.
    pub servers: Servers,
    /// Between relays and broker, unless TLS forbids it.
    pub broker: Option<Proxy>,
    /// Between relays and database, unless TLS forbids it.
    pub database: Option<Proxy>,
    dir: PathBuf,
    quorum: bool,
    logins: Mutex<Logins>,
}

/// The relays' URLs, without the proxies.
#[derive(Debug, Clone)]
struct Logins {
    database: String,
    amqp: String,
}

impl World {
    /// Makes schema, tables, exchange and queue, and the files with the relays' URLs.
    pub async fn make(servers: Servers, relay: &Path, dir: &Path, name: &str, quorum: bool) -> Result<Self> {
        let ours = servers.are_ours();
        let login = |url: &str| with_login(url, RELAY);
        let logins = Logins {
            database: if ours { login(&servers.database_url)? } else { with_port(&servers.database_url)? },
            amqp: if ours { login(&servers.amqp_url)? } else { with_port(&servers.amqp_url)? },
        };
        let plain = |url: &str| !url.starts_with("amqps") && !url.contains("sslmode=verify");
        let broker = if plain(&logins.amqp) { Some(Proxy::to(&logins.amqp).await) } else { None };
        let database = if plain(&logins.database) { Some(Proxy::to(&logins.database).await) } else { None };
        let logins = Mutex::new(logins);
        let world =
            Self { name: name.to_owned(), servers, broker, database, dir: dir.to_owned(), quorum, logins };
        if ours {
            world.prepare_servers().await?;
        }
        world.make_tables(relay).await?;
        world.declare().await?;
        world.write_logins()?;
        Ok(world)
    }

    async fn prepare_servers(&self) -> Result<()> {
        self.superuser("alter system set max_prepared_transactions = 4").await?;
        self.superuser(&format!("create role {RELAY} login password '{RELAY}'")).await?;
        self.servers.control("restart", "postgres").await?;
        self.servers.rabbitmqctl(&["add_user", RELAY, RELAY]).await?;
        self.servers.rabbitmqctl(&["set_permissions", RELAY, ".*", ".*", ".*"]).await.map(drop)
    }

    async fn make_tables(&self, relay: &Path) -> Result<()> {
        let schema = &self.name;
        self.sql(&format!(
            "create schema {schema};
             create table {schema}.chaos_key (key text primary key, seq bigint not null);
             create table {schema}.chaos_written (message_id text primary key, tx bigint not null);"
        ))
        .await?;
        let output = Command::new(relay)
            .arg("migrate")
            .env_clear()
            .env("DATABASE_URL", &self.servers.database_url)
            .env("OUTBOX_TABLE", self.table())
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .output()
            .await
            .with_context(|| format!("{} does not run", relay.display()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "outbox-relay migrate: {}", said.trim());
        if self.servers.are_ours() {
            self.sql(&format!(
                "grant usage on schema {schema} to {RELAY};
                 grant select, insert, update, delete on all tables in schema {schema} to {RELAY};
                 revoke all on {schema}.chaos_key, {schema}.chaos_written from {RELAY};"
            ))
            .await?;
        }
        Ok(())
    }

    /// The outbox, with its schema.
    pub fn table(&self) -> String {
        format!("{}.outbox", self.name)
    }

    /// What every relay has in its environment about this world.
    pub fn relay_env(&self) -> BTreeMap<String, String> {
        let file = |name: &str| self.dir.join(name).display().to_string();
        let pairs = [
            ("DATABASE_URL_FILE", file("database.url")),
            ("AMQP_URL_FILE", file("amqp.url")),
            ("OUTBOX_TABLE", self.table()),
            ("OUTBOX_EXCHANGE", self.name.clone()),
        ];
        pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// Changes a password in a file of the relays.
    pub fn change_login(&self, of_database: bool, password: &str) -> Result<()> {
        {
            let mut logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
            let url = if of_database { &mut logins.database } else { &mut logins.amqp };
            let mut changed = url::Url::parse(url)?;
            changed.set_password(Some(password)).ok().context("a URL without a host")?;
            *url = changed.to_string();
        }
        self.write_logins()
    }

    /// Moved into place, so that a relay never reads half a URL.
    fn write_logins(&self) -> Result<()> {
        use std::os::unix::fs::OpenOptionsExt;
        let logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let led = |proxy: &Option<Proxy>, url: &str| {
            proxy.as_ref().map_or_else(|| url.to_owned(), |proxy| proxy.url(url))
        };
        for (name, url) in [
            ("database.url", led(&self.database, &logins.database)),
            ("amqp.url", led(&self.broker, &logins.amqp)),
        ] {
            let new = self.dir.join(format!("{name}.new"));
            let mut file =
                std::fs::OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new)?;
            std::io::Write::write_all(&mut file, url.as_bytes())?;
            std::fs::rename(new, self.dir.join(name))?;
        }
        Ok(())
    }

    // --- database ---

    /// A connection for writers and this tool, past the proxy.
    pub async fn db(&self) -> Result<PgConnection> {
        connect(&self.servers.database_url).await
    }

    /// Runs statements.
    pub async fn sql(&self, sql: &str) -> Result<()> {
        let done = self.db().await?.execute(AssertSqlSafe(sql.to_owned())).await;
        done.map(drop).with_context(|| format!("in: {sql}"))
    }

    /// A connection as superuser, where the database is ours.
    pub async fn superuser_db(&self) -> Result<PgConnection> {
        connect(self.servers.superuser_url.as_deref().context("no superuser on somebody else's database")?)
            .await
    }

    /// Runs a statement as superuser.
    pub async fn superuser(&self, sql: &str) -> Result<()> {
        let done = self.superuser_db().await?.execute(AssertSqlSafe(sql.to_owned())).await;
        done.map(drop).with_context(|| format!("in: {sql}"))
    }

    // --- broker ---

    /// A connection for the consumer and this tool, past the proxy.
    pub async fn amqp(&self) -> Result<Connection> {
        let connecting = Connection::connect(&self.servers.amqp_url, ConnectionProperties::default());
        let connected = tokio::time::timeout(CONNECT_LIMIT, connecting).await;
        Ok(connected.context("the broker does not answer")??)
    }

    async fn channel(&self) -> Result<(Connection, Channel)> {
        let connection = self.amqp().await?;
        let channel = connection.create_channel().await?;
        Ok((connection, channel))
    }

    /// Declares the exchange, the queue and all bindings; what is there stays.
    pub async fn declare(&self) -> Result<()> {
        let (connection, channel) = self.channel().await?;
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let name = self.name.as_str();
        channel.exchange_declare(name.into(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        let mut arguments = FieldTable::default();
        if self.quorum {
            arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
            arguments.insert("x-delivery-limit".into(), AMQPValue::LongLongInt(DELIVERY_LIMIT));
        }
        channel.queue_declare(name.into(), durable, arguments).await?;
        for route in ROUTES {
            let options = QueueBindOptions::default();
            let pattern = format!("{route}.#");
            let arguments = FieldTable::default();
            channel.queue_bind(name.into(), name.into(), pattern.as_str().into(), options, arguments).await?;
        }
        close(connection).await
    }

    /// Takes the binding of a route away; [`World::declare`] gives it back.
    pub async fn unbind(&self, route: &str) -> Result<()> {
        let (connection, channel) = self.channel().await?;
        let (name, pattern) = (self.name.as_str(), format!("{route}.#"));
        channel
            .queue_unbind(name.into(), name.into(), pattern.as_str().into(), FieldTable::default())
            .await?;
        close(connection).await
    }

    /// Deletes the exchange with its bindings; [`World::declare`] makes it again.
    pub async fn delete_exchange(&self) -> Result<()> {
        let (connection, channel) = self.channel().await?;
        channel.exchange_delete(self.name.as_str().into(), ExchangeDeleteOptions::default()).await?;
        close(connection).await
    }

    /// Messages that lie in the queue and are with nobody.
    pub async fn queue_depth(&self) -> Result<u32> {
        let (connection, channel) = self.channel().await?;
        let passive = QueueDeclareOptions { passive: true, ..Default::default() };
        let queue = channel.queue_declare(self.name.as_str().into(), passive, FieldTable::default()).await?;
        let depth = queue.message_count();
        close(connection).await?;
        Ok(depth)
    }

    /// Deletes everything of this run from servers that belong to somebody else.
    pub async fn leave(&self) -> Result<()> {
        self.sql(&format!("drop schema {} cascade", self.name)).await?;
        let (connection, channel) = self.channel().await?;
        channel.queue_delete(self.name.as_str().into(), QueueDeleteOptions::default()).await?;
        channel.exchange_delete(self.name.as_str().into(), ExchangeDeleteOptions::default()).await?;
        close(connection).await
    }
}

async fn close(connection: Connection) -> Result<()> {
    Ok(connection.close(200, "done".into()).await?)
}

async fn connect(url: &str) -> Result<PgConnection> {
    let connected = tokio::time::timeout(CONNECT_LIMIT, PgConnection::connect(url)).await;
    Ok(connected.context("the database does not answer")??)
}

fn with_login(url: &str, name: &str) -> Result<String> {
    let mut url = url::Url::parse(url)?;
    url.set_username(name).ok().context("a URL without a host")?;
    url.set_password(Some(name)).ok().context("a URL without a host")?;
    Ok(url.to_string())
}

/// The port that a URL leaves to its scheme, written out.
fn with_port(url: &str) -> Result<String> {
    let mut url = url::Url::parse(url).context("not a URL")?;
    let port = match url.scheme() {
        "postgres" | "postgresql" => 5432,
        "amqp" => 5672,
        "amqps" => 5671,
        other => anyhow::bail!("{other}:// is neither postgres:// nor amqp://"),
    };
    if url.port().is_none() {
        url.set_port(Some(port)).ok().context("a URL without a host")?;
    }
    Ok(url.to_string())
}

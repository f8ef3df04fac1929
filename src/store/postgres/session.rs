//! Connections to Postgres: opened on demand, dropped on error, bounded in time.
//!
//! A [`Lane`] is a connection for one kind of work. A call takes its session out and puts it back
//! when all went well; a session whose call failed or was abandoned is dropped, and the next call
//! opens a new one. That makes cancellation safe: nothing half-read is ever reused.

use super::error::{POOLER_REMEDY, classify};
use super::{migrate, schema};
use crate::config::{Endpoint, TableName};
use crate::store::{StoreError, Trouble};
use secrecy::ExposeSecret;
use sqlx::postgres::{PgArguments, PgConnectOptions};
use sqlx::query::Query;
use sqlx::{ConnectOptions, Connection, Executor, PgConnection, Postgres, Row, SqlStr};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::OnceCell;

/// Longest a new connection may take, name resolution and TLS included.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Longest any call may take as seen from here: a little more than the server's own limit, so
/// that a living server answers first and only a silent one runs into this.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(20);

/// Shortest limit of opening a connection, TLS, login and a look at the table included.
const OPEN_LIMIT_MIN: Duration = Duration::from_secs(2);

/// What every transaction of ours runs under. The statement limit bounds what we cost the
/// database, the lock limit how long we queue behind somebody's DDL, and the planner settings keep
/// the poll on its index when statistics are stale; all our statements are meant to use an index.
const SERVER_SETTINGS: [(&str, &str); 8] = [
    ("statement_timeout", "15s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "30s"),
    ("enable_seqscan", "off"),
    ("enable_bitmapscan", "off"),
    ("enable_sort", "off"),
    ("jit", "off"),
    // Counting may take long, and never more than one core.
    ("max_parallel_workers_per_gather", "0"),
];

/// A setting of our own, which no pooler knows and no role has: where it arrives, the session is ours.
const MARK: (&str, &str) = ("outbox_relay.session", "on");

/// How to reach the database.
#[derive(Debug, Clone)]
pub struct Connector {
    endpoint: Endpoint,
    transaction_pooling: bool,
}

impl Connector {
    /// With `transaction_pooling`, each statement brings its own settings inside a transaction and
    /// nothing is prepared under a name, as a pooler in transaction mode needs it.
    pub fn new(endpoint: Endpoint, transaction_pooling: bool) -> Self {
        Self { endpoint, transaction_pooling }
    }

    /// Host, port and database, without the password.
    pub fn describe(&self) -> String {
        self.endpoint.describe()
    }

    /// A connection whose session has these settings, and is ours alone if there are any.
    pub async fn connect(&self, settings: &[(&str, &str)]) -> Result<PgConnection, StoreError> {
        let mut options = self.options()?;
        if !settings.is_empty() {
            options = options.options(settings.iter().copied()).options([MARK]);
        }
        let connect = async {
            let mut connection = PgConnection::connect_with(&options).await?;
            if !settings.is_empty() {
                find_mark(&mut connection).await?;
            }
            Ok(connection)
        };
        match tokio::time::timeout(CONNECT_LIMIT, connect).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(connect_error(&self.describe(), &error)),
            Err(_) => Err(StoreError {
                trouble: Trouble::Outage,
                sentence: format!(
                    "no answer from the database at {} within {} s",
                    self.describe(),
                    CONNECT_LIMIT.as_secs()
                ),
            }),
        }
    }

    fn options(&self) -> Result<PgConnectOptions, StoreError> {
        let configuration = |sentence| StoreError { trouble: Trouble::Configuration, sentence };
        let url = self.endpoint.read().map_err(configuration)?;
        let options = PgConnectOptions::from_str(url.expose_secret())
            .map_err(|_| configuration(format!("the database URL {} is not usable", self.describe())))?;
        // Statements are timed by our own metrics; sqlx would log slow ones with their text.
        Ok(options.application_name("outbox-relay").extra_float_digits(None).disable_statement_logging())
    }

    /// A connection as the relay uses it.
    pub(super) async fn open(&self) -> Result<Session, StoreError> {
        let settings = if self.transaction_pooling { &[][..] } else { &SERVER_SETTINGS };
        let connection = self.connect(settings).await?;
        Ok(Session { connection, transaction_pooling: self.transaction_pooling, spoiled: false })
    }
}

/// Fails behind a pooler that has dropped what came with the connect: without our limits we could do harm, and such a pooler
/// may give each transaction another connection, too.
async fn find_mark(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let (name, value) = MARK;
    let ask = sqlx::AssertSqlSafe(format!("select current_setting('{name}', true)"));
    match connection.fetch_one(sqlx::raw_sql(ask)).await?.try_get::<Option<String>, _>(0)? {
        Some(found) if found == value => Ok(()),
        _ => Err(sqlx::Error::Configuration(
            format!("the settings given at connect did not arrive; {POOLER_REMEDY}").into(),
        )),
    }
}

/// A failed connect as one sentence that names the server.
fn connect_error(server: &str, error: &sqlx::Error) -> StoreError {
    let StoreError { trouble, sentence } = classify(error);
    StoreError { trouble, sentence: format!("cannot connect to the database at {server}: {sentence}") }
}

/// One connection in use.
#[derive(Debug)]
pub(super) struct Session {
    connection: PgConnection,
    transaction_pooling: bool,
    spoiled: bool,
}

impl Session {
    pub(super) fn connection(&mut self) -> &mut PgConnection {
        &mut self.connection
    }

    /// The connection is in the middle of an answer nobody wants: it is closed after this call, which also
    /// ends its transaction.
    pub(super) fn spoil(&mut self) {
        self.spoiled = true;
    }

    /// A statement, prepared under a name only where the session is ours alone.
    pub(super) fn query<'q>(&self, statement: &SqlStr) -> Query<'q, Postgres, PgArguments> {
        sqlx::query(statement.clone()).persistent(!self.transaction_pooling)
    }

    /// Runs `work` as one unit. Behind a pooler even a single statement needs a transaction: only
    /// that keeps one server connection and lets the settings hold for nobody else.
    async fn run<T>(
        &mut self,
        unit: Unit,
        work: impl AsyncFnOnce(&mut Self) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        if unit == Unit::Script {
            return work(self).await;
        }
        if self.transaction_pooling {
            // "Read write" fails at once on a standby.
            let settings = SERVER_SETTINGS.map(|(name, value)| format!("set local {name} = '{value}'"));
            let begin = format!("begin read write; {}", settings.join("; "));
            self.connection.execute(sqlx::AssertSqlSafe(begin)).await?;
        } else if unit == Unit::Transaction {
            self.connection.execute("begin").await?;
        }
        let value = work(self).await?;
        if !self.spoiled && (self.transaction_pooling || unit == Unit::Transaction) {
            self.connection.execute("commit").await?;
        }
        Ok(value)
    }
}

/// How much of a call succeeds or fails together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// A single statement, which is atomic by itself.
    Statement,
    /// Several statements.
    Transaction,
    /// A text that begins and ends its own transaction.
    Script,
}

/// The way to the outbox table: every new connection is checked before it is used.
#[derive(Debug)]
pub(super) struct TableAccess {
    connector: Connector,
    name: TableName,
    /// Migrations run once, at the first connect that works.
    migrate: bool,
    migrated: OnceCell<()>,
}

impl TableAccess {
    pub(super) fn new(connector: Connector, name: TableName, migrate: bool) -> Self {
        Self { connector, name, migrate, migrated: OnceCell::new() }
    }

    /// Once, with a limit of its own: an index on a large table takes longer than any call may.
    async fn migrate(&self) -> Result<(), StoreError> {
        if self.migrate {
            self.migrated.get_or_try_init(|| migrate::run(&self.connector, &self.name)).await?;
        }
        Ok(())
    }

    /// A connection to a primary with a table of the right shape.
    async fn open(&self) -> Result<Session, StoreError> {
        let mut session = self.connector.open().await?;
        let read = async |session: &mut Session| schema::Shape::read(session.connection(), &self.name).await;
        within(CALL_LIMIT, session.run(Unit::Statement, read)).await?.verify(&self.name)?;
        Ok(session)
    }
}

/// A connection for one kind of work.
#[derive(Debug)]
pub(super) struct Lane {
    table: Arc<TableAccess>,
    idle: Mutex<Option<Session>>,
}

impl Lane {
    /// A lane that refuses a table of the wrong shape, and a standby, whenever it connects.
    pub(super) fn new(table: Arc<TableAccess>) -> Self {
        Self { table, idle: Mutex::new(None) }
    }

    /// Runs `work` on this lane's connection. The session comes back for the next call only if all
    /// went well: after an error, a time-out or a cancelled call it is closed by being dropped.
    pub(super) async fn call<T>(
        &self,
        unit: Unit,
        work: impl AsyncFnOnce(&mut Session) -> Result<T, sqlx::Error>,
    ) -> Result<T, StoreError> {
        self.call_within(CALL_LIMIT, unit, work).await
    }

    /// The same, with a limit of its own, for opening a connection and for the call.
    pub(super) async fn call_within<T>(
        &self,
        limit: Duration,
        unit: Unit,
        work: impl AsyncFnOnce(&mut Session) -> Result<T, sqlx::Error>,
    ) -> Result<T, StoreError> {
        self.table.migrate().await.map_err(of_no_row)?;
        let mut session = match tokio::time::timeout(limit.max(OPEN_LIMIT_MIN), self.session()).await {
            Ok(session) => session.map_err(of_no_row)?,
            Err(_) => return Err(silent(limit)),
        };
        let value = within(limit, session.run(unit, work)).await?;
        if !session.spoiled {
            *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = Some(session);
        }
        Ok(value)
    }

    async fn session(&self) -> Result<Session, StoreError> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(session) = idle {
            return Ok(session);
        }
        self.table.open().await
    }
}

/// Runs a call on a session, bounded in time. A server that says nothing is an outage.
pub(super) async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, StoreError> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(classify(&error)),
        Err(_) => Err(silent(limit)),
    }
}

/// Whatever the way to the table rejects, it is not what the call writes.
fn of_no_row(error: StoreError) -> StoreError {
    match error.trouble {
        Trouble::Rejected => StoreError { trouble: Trouble::Configuration, ..error },
        _ => error,
    }
}

fn silent(limit: Duration) -> StoreError {
    let sentence = format!("no answer from the database within {:.0} s", limit.as_secs_f64());
    StoreError { trouble: Trouble::Outage, sentence }
}

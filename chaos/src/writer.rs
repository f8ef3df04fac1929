//! Writers: transactions of many kinds, each written into the ledger before its commit and after it.
//!
//! A row's number within its key is taken from `chaos_key` under the row lock of the key, in the same
//! transaction; so the order of numbers is the order of commits. Keys are locked in alphabetical order,
//! so writers never block each other in a circle. `chaos_written` is filled in the same statement as the
//! outbox: it is the witness for commits whose answer was lost.

use crate::board::Board;
use crate::ledger::{Clock, Journal, Kind, Outcome, WriterLine, WrittenRow, hash};
use crate::world::{ROUTES, World};
use anyhow::{Context, Result};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Postgres, Row, Transaction};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

const KEYS: u32 = 40;
/// Longest a statement may hang on a dead connection before its writer gives it up.
const PATIENCE: Duration = Duration::from_secs(60);
/// A writer that was held up does not catch up on more than this.
const MOST_BEHIND: Duration = Duration::from_secs(1);

/// What all writers of a run share.
#[derive(Debug)]
pub struct Writers {
    /// Where they write.
    pub world: Arc<World>,
    /// What they count.
    pub board: Arc<Board>,
    /// Their ledger.
    pub journal: Journal,
    /// The clock of the run.
    pub clock: Clock,
    /// Number of the next transaction.
    pub next: AtomicU64,
}

/// One writer.
struct Writer {
    shared: Arc<Writers>,
    rng: fastrand::Rng,
    /// Keys that nobody else uses, for transactions that stay open.
    own_keys: Option<String>,
    insert: String,
    bump: String,
}

/// A row to be inserted.
struct Draft {
    key: Option<String>,
    seq: i64,
    delay_ms: i64,
    poison: Option<Poison>,
}

/// Why a row can never be delivered.
#[derive(Clone, Copy)]
enum Poison {
    LongRoutingKey,
    HeadersNoObject,
    HeadersTooLarge,
}

impl Writers {
    /// Writes `rate` rows a second until told to stop; ends with an error only if the ledger fails.
    pub async fn write(
        self: Arc<Self>,
        number: u64,
        seed: u64,
        rate: f64,
        stop: CancellationToken,
    ) -> Result<()> {
        let mut writer = Writer::new(self, number, seed);
        let mut connection = None;
        let mut due = Instant::now();
        while !stop.is_cancelled() {
            let rows = match writer.once(&mut connection).await {
                Ok(rows) => rows,
                Err(Failure::Ledger(error)) => return Err(error),
                Err(Failure::Database) => {
                    connection = None;
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            due += Duration::from_secs_f64(rows as f64 / rate);
            due = due.max(Instant::now() - MOST_BEHIND);
            tokio::select! { () = sleep_until(due) => {}, () = stop.cancelled() => {} }
        }
        Ok(())
    }

    /// The same, with transactions that stay open for seconds.
    pub async fn linger(self: Arc<Self>, number: u64, seed: u64, stop: CancellationToken) -> Result<()> {
        let mut writer = Writer::new(self, number, seed);
        writer.own_keys = Some(format!("long-{number}"));
        let mut connection = None;
        while !stop.is_cancelled() {
            match writer.once(&mut connection).await {
                Ok(_) => {}
                Err(Failure::Ledger(error)) => return Err(error),
                Err(Failure::Database) => connection = None,
            }
            tokio::select! { () = sleep(Duration::from_millis(500)) => {}, () = stop.cancelled() => {} }
        }
        Ok(())
    }
}

/// Only a ledger that cannot be written ends a run; a database that fails is what the run is about.
enum Failure {
    Ledger(anyhow::Error),
    Database,
}

impl From<sqlx::Error> for Failure {
    fn from(_: sqlx::Error) -> Self {
        Self::Database
    }
}

impl Writer {
    fn new(shared: Arc<Writers>, number: u64, seed: u64) -> Self {
        let (schema, table) = (shared.world.name.clone(), shared.world.table());
        let insert = format!(
            "with o as (insert into {table} (message_id, routing_key, ordering_key, payload, headers, available_at)
                        values ($1::uuid, $2, $3, $4::jsonb, $5::jsonb, clock_timestamp() + $6 * interval '1 ms')
                        returning id, payload::text as body),
                  w as (insert into {schema}.chaos_written values ($1, $7))
             select id, body from o"
        );
        let bump = format!(
            "insert into {schema}.chaos_key values ($1, 1)
             on conflict (key) do update set seq = chaos_key.seq + 1 returning seq"
        );
        let rng = fastrand::Rng::with_seed(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Self { shared, rng, own_keys: None, insert, bump }
    }

    /// One transaction; how many rows it wanted to write.
    async fn once(&mut self, connection: &mut Option<PgConnection>) -> Result<usize, Failure> {
        if connection.is_none() {
            let mut fresh = self.shared.world.db().await.map_err(|_| Failure::Database)?;
            fresh.execute("set statement_timeout = '30s'").await?;
            *connection = Some(fresh);
        }
        let Some(db) = connection else { return Err(Failure::Database) };
        match tokio::time::timeout(PATIENCE, self.transact(db)).await {
            Ok(done) => done,
            Err(_) => Err(Failure::Database),
        }
    }

    async fn transact(&mut self, db: &mut PgConnection) -> Result<usize, Failure> {
        let kind = self.kind();
        let tx = self.shared.next.fetch_add(1, Relaxed);
        let mut open = db.begin().await?;
        let rows = self.fill(&mut open, kind, tx).await?;
        let count = rows.len();
        let kept = rows.iter().filter(|row| !row.undone).count() as u64;
        self.log(WriterLine::Intent { tx, at: self.shared.clock.ms(), kind, rows }).await?;
        let (outcome, broken) = if kind == Kind::RolledBack {
            (Outcome::Aborted, open.rollback().await.is_err())
        } else if open.commit().await.is_ok() {
            (Outcome::Committed, false)
        } else {
            (Outcome::Unknown, true)
        };
        self.log(WriterLine::Outcome { tx, at: self.shared.clock.ms(), outcome }).await?;
        match outcome {
            Outcome::Committed => self.shared.board.committed.fetch_add(kept, Relaxed),
            Outcome::Unknown => self.shared.board.unknown.fetch_add(1, Relaxed),
            Outcome::Aborted => 0,
        };
        if broken { Err(Failure::Database) } else { Ok(count) }
    }

    async fn log(&self, line: WriterLine) -> Result<(), Failure> {
        self.shared.journal.append(&[line]).await.map_err(Failure::Ledger)
    }

    fn kind(&mut self) -> Kind {
        if self.own_keys.is_some() {
            return Kind::Long;
        }
        if self.shared.board.poison.load(Relaxed) && self.rng.u8(0..4) == 0 {
            return Kind::Poison;
        }
        match self.rng.u8(0..100) {
            0..50 => Kind::Plain,
            50..62 => Kind::Thinks,
            62..72 => Kind::Savepoint,
            72..80 => Kind::RolledBack,
            80..90 => Kind::SeveralKeys,
            _ => Kind::Keyless,
        }
    }

    /// Everything before the commit.
    async fn fill(
        &mut self,
        open: &mut Transaction<'_, Postgres>,
        kind: Kind,
        tx: u64,
    ) -> Result<Vec<WrittenRow>, Failure> {
        let mut rows = Vec::new();
        match kind {
            Kind::Keyless => {
                for _ in 0..self.rng.u8(1..=4) {
                    let delay_ms = if self.rng.u8(0..5) == 0 { self.rng.i64(200..2_000) } else { 0 };
                    rows.push(
                        self.insert(open, tx, Draft { key: None, seq: 0, delay_ms, poison: None }).await?,
                    );
                }
            }
            Kind::SeveralKeys => {
                let mut keys: Vec<String> = (0..3).map(|_| self.key()).collect();
                keys.sort_unstable();
                keys.dedup();
                for key in keys {
                    rows.push(self.next_of(open, tx, &key, None).await?);
                }
            }
            Kind::Savepoint => {
                let key = self.key();
                rows.push(self.next_of(open, tx, &key, None).await?);
                let mut inner = open.begin().await?;
                for _ in 0..2 {
                    let row = self.next_of(&mut inner, tx, &key, None).await?;
                    rows.push(WrittenRow { undone: true, ..row });
                }
                inner.rollback().await?;
                rows.push(self.next_of(open, tx, &key, None).await?);
            }
            Kind::Poison => {
                let key = self.key();
                let poison = [Poison::LongRoutingKey, Poison::HeadersNoObject, Poison::HeadersTooLarge];
                rows.push(self.next_of(open, tx, &key, None).await?);
                let which = poison[self.rng.usize(0..poison.len())];
                rows.push(self.next_of(open, tx, &key, Some(which)).await?);
                rows.push(self.next_of(open, tx, &key, None).await?);
            }
            Kind::Thinks | Kind::Long => {
                let key = self.own_keys.clone().unwrap_or_else(|| self.key());
                let longest = if kind == Kind::Long { 1_000..4_000 } else { 1..60 };
                let seq = self.bump(open, &key).await?;
                sleep(Duration::from_millis(self.rng.u64(longest.clone()))).await;
                let draft = Draft { key: Some(key.clone()), seq, delay_ms: 0, poison: None };
                rows.push(self.insert(open, tx, draft).await?);
                sleep(Duration::from_millis(self.rng.u64(longest))).await;
                rows.push(self.next_of(open, tx, &key, None).await?);
                if kind == Kind::Long {
                    rows.push(
                        self.insert(open, tx, Draft { key: None, seq: 0, delay_ms: 0, poison: None }).await?,
                    );
                }
            }
            Kind::Plain | Kind::RolledBack => {
                let key = self.key();
                for _ in 0..self.rng.u8(1..=4) {
                    rows.push(self.next_of(open, tx, &key, None).await?);
                }
            }
        }
        Ok(rows)
    }

    /// A tenth of all rows share one hot key.
    fn key(&mut self) -> String {
        match self.rng.u8(0..10) {
            0 => "hot".to_owned(),
            _ => format!("key-{:02}", self.rng.u32(0..KEYS)),
        }
    }

    async fn next_of(
        &mut self,
        db: &mut PgConnection,
        tx: u64,
        key: &str,
        poison: Option<Poison>,
    ) -> Result<WrittenRow, Failure> {
        let seq = self.bump(db, key).await?;
        self.insert(db, tx, Draft { key: Some(key.to_owned()), seq, delay_ms: 0, poison }).await
    }

    async fn bump(&self, db: &mut PgConnection, key: &str) -> Result<i64, Failure> {
        let query = sqlx::query_scalar(AssertSqlSafe(self.bump.clone())).bind(key);
        Ok(query.fetch_one(db).await?)
    }

    async fn insert(&mut self, db: &mut PgConnection, tx: u64, draft: Draft) -> Result<WrittenRow, Failure> {
        let message_id = uuid::Uuid::new_v4().to_string();
        let mut routing_key = format!("{}.{}", ROUTES[self.rng.usize(0..ROUTES.len())], self.rng.u8(0..5));
        let mut headers = format!(r#"{{"tx": {tx}, "source": "chaos"}}"#);
        match draft.poison {
            None => {}
            Some(Poison::LongRoutingKey) => routing_key = format!("a.{}", "x".repeat(300)),
            Some(Poison::HeadersNoObject) => headers = "[1, 2, 3]".to_owned(),
            Some(Poison::HeadersTooLarge) => headers = format!(r#"{{"large": "{}"}}"#, "x".repeat(200_000)),
        }
        let pad =
            if self.rng.u8(0..50) == 0 { self.rng.usize(10_000..40_000) } else { self.rng.usize(0..400) };
        let payload =
            serde_json::json!({ "tx": tx, "key": draft.key, "seq": draft.seq, "pad": "ä".repeat(pad / 2) });
        let query = sqlx::query(AssertSqlSafe(self.insert.clone()))
            .bind(&message_id)
            .bind(&routing_key)
            .bind(&draft.key)
            .bind(payload.to_string())
            .bind(&headers)
            .bind(draft.delay_ms as f64)
            .bind(i64::try_from(tx).unwrap_or(i64::MAX));
        let row = query.fetch_one(db).await?;
        let (id, body): (i64, String) = (row.try_get(0)?, row.try_get(1)?);
        Ok(WrittenRow {
            id,
            message_id,
            key: draft.key,
            seq: draft.seq,
            routing_key,
            hash: hash(body.as_bytes()),
            delay_ms: draft.delay_ms,
            poison: draft.poison.is_some(),
            undone: false,
        })
    }
}

/// The witness: message ids of all rows that were committed.
pub async fn witness(world: &World) -> Result<std::collections::HashSet<String>> {
    let sql = format!("select message_id from {}.chaos_written", world.name);
    let rows = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(&mut world.db().await?).await;
    Ok(rows.context("the witness table")?.into_iter().collect())
}

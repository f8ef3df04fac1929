//! The Postgres store: every statement lives in `store/sql/`, one file each, and is run here by the
//! function of the same name.
//!
//! Five connections, one for each kind of work, so that a slow count never delays a mark or a lease. A
//! connection that failed is dropped and opened again by the next call; no session state is
//! needed, so a pooler in transaction mode works (`OUTBOX_TRANSACTION_POOLING`).

mod answer;
pub mod decode;
mod error;
mod leases;
pub mod migrate;
pub mod preflight;
pub mod schema;
mod session;
mod statements;

pub use session::Connector;

use super::{
    Ask, Bite, Census, Delivered, Horizon, Lease, Read, Route, Row, Settlement, Share, Store, StoreError,
    Watch, Written,
};
use crate::config::Settings;
use decode::Decoder;
use error::Unreached;
use session::{Lane, Session, TableAccess, Unit};
use sqlx::Row as _;
use sqlx::postgres::PgRow;
use statements::Statements;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// Ids looked at for one that was delivered a while ago: bounded, since rows that were deleted may still be walked over.
const LOOK_BACK_IDS: i64 = 10_000;

/// Outbox rows in a Postgres table.
#[derive(Debug)]
pub struct PostgresStore {
    statements: Statements,
    default_exchange: Arc<str>,
    keep_delivered: bool,
    reading: Lane,
    settling: Lane,
    counting: Lane,
    purging: Lane,
    leasing: Lane,
}

impl PostgresStore {
    /// A store that connects on first use, and migrates then if the settings say so.
    pub fn new(connector: Connector, settings: &Settings) -> Self {
        let table = Arc::new(TableAccess::new(connector, settings.table.clone(), settings.migrate));
        Self {
            statements: Statements::new(&settings.table),
            default_exchange: settings.exchange.as_str().into(),
            keep_delivered: settings.keeps_delivered(),
            reading: Lane::new(Arc::clone(&table)),
            settling: Lane::new(Arc::clone(&table)),
            counting: Lane::new(Arc::clone(&table)),
            purging: Lane::new(Arc::clone(&table)),
            leasing: Lane::new(table),
        }
    }

    async fn run_poll(&self, session: &mut Session, ask: &Ask<'_>) -> Result<Read, sqlx::Error> {
        let (first, last): (Vec<i64>, Vec<i64>) = ask.ranges.iter().copied().unzip();
        let (exchanges, keys): (Vec<&str>, Vec<&str>) =
            ask.parked.iter().map(|route| (route.exchange.as_str(), route.routing_key.as_str())).unzip();
        let query = session
            .query(&self.statements.poll)
            .bind(first)
            .bind(last)
            .bind(ask.rows as i64)
            .bind(ask.in_flight)
            .bind(ask.keep_order)
            .bind(ask.share.shards as i32)
            .bind(shards_of(ask.share))
            .bind(exchanges)
            .bind(keys)
            .bind(&*self.default_exchange)
            .bind((!ask.others.shards.is_empty()).then(|| numbers(ask.others.shards.iter().copied())))
            .bind(ask.others.after);
        let answer = query.fetch(session.connection());
        let (read, cut_off) = answer::read(answer, ask, &self.default_exchange).await?;
        if cut_off {
            session.spoil();
        }
        Ok(read)
    }

    async fn run_settle(&self, session: &mut Session, settlement: &Settlement) -> Result<u64, sqlx::Error> {
        let mut marked = 0;
        if !settlement.delivered.is_empty() {
            marked = self.mark_delivered(session, settlement).await?;
        }
        if !settlement.waiting.is_empty() {
            self.mark_waiting(session, settlement).await?;
        }
        if !settlement.dead.is_empty() {
            marked += self.mark_dead(session, settlement).await?;
        }
        Ok(marked)
    }

    async fn run_settle_unlocked(
        &self,
        session: &mut Session,
        settlement: &Settlement,
    ) -> Result<Written, sqlx::Error> {
        let ids: Vec<i64> = settlement.ids().collect();
        let statement = match self.keep_delivered {
            true => &self.statements.locked_to_mark,
            false => &self.statements.locked_to_delete,
        };
        let query = session.query(statement).bind(ids);
        let rows = query.fetch_all(session.connection()).await?;
        let locked = rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<i64>, _>>()?;
        let marked = self.run_settle(session, &settlement.without(&locked)).await?;
        Ok(Written { marked, locked })
    }

    async fn mark_delivered(
        &self,
        session: &mut Session,
        settlement: &Settlement,
    ) -> Result<u64, sqlx::Error> {
        let statement = match self.keep_delivered {
            true => &self.statements.mark_delivered,
            false => &self.statements.delete_delivered,
        };
        let mut rows = settlement.delivered.clone();
        rows.sort_unstable_by_key(|row| row.id);
        let (ids, message_ids): (Vec<i64>, Vec<Uuid>) =
            rows.into_iter().map(|Delivered { id, message_id }| (id, message_id)).unzip();
        let query = session.query(statement).bind(&ids).bind(&message_ids);
        let marked = query.execute(session.connection()).await?.rows_affected();
        // Others may have marked some, or removed them.
        if marked < ids.len() as u64 {
            let query = session.query(&self.statements.unmarked).bind(&ids).bind(&message_ids);
            expect_none_unmarked(&query.fetch_one(session.connection()).await?, ids.len())?;
        }
        Ok(marked)
    }

    async fn mark_waiting(&self, session: &mut Session, settlement: &Settlement) -> Result<(), sqlx::Error> {
        let rows = &settlement.waiting;
        let refused = Refused::of(rows.iter().map(|row| (row.id, row.attempts, row.lease, row.message_id)));
        let query = session
            .query(&self.statements.mark_waiting)
            .bind(&refused.ids)
            .bind(&refused.attempts)
            .bind(rows.iter().map(|row| row.wait.as_secs_f64() * 1000.0).collect::<Vec<_>>())
            .bind(rows.iter().map(|row| storable(&row.reason)).collect::<Vec<_>>())
            .bind(&refused.shards)
            .bind(&refused.epochs)
            .bind(&refused.message_ids);
        let marked = query.execute(session.connection()).await?.rows_affected();
        self.expect_no_unmarked_refusal(session, &refused, marked).await
    }

    async fn mark_dead(&self, session: &mut Session, settlement: &Settlement) -> Result<u64, sqlx::Error> {
        let rows = &settlement.dead;
        let refused = Refused::of(rows.iter().map(|row| (row.id, row.attempts, row.lease, row.message_id)));
        let query = session
            .query(&self.statements.mark_dead)
            .bind(&refused.ids)
            .bind(&refused.attempts)
            .bind(rows.iter().map(|row| storable(&row.reason)).collect::<Vec<_>>())
            .bind(&refused.shards)
            .bind(&refused.epochs)
            .bind(&refused.message_ids);
        let marked = query.execute(session.connection()).await?.rows_affected();
        self.expect_no_unmarked_refusal(session, &refused, marked).await?;
        Ok(marked)
    }

    /// Of those that were not marked, the lease may be another's by now, or the message.
    async fn expect_no_unmarked_refusal(
        &self,
        session: &mut Session,
        refused: &Refused,
        marked: u64,
    ) -> Result<(), sqlx::Error> {
        if marked == refused.ids.len() as u64 {
            return Ok(());
        }
        let query = session
            .query(&self.statements.unmarked_refusals)
            .bind(&refused.ids)
            .bind(&refused.attempts)
            .bind(&refused.shards)
            .bind(&refused.epochs)
            .bind(&refused.message_ids);
        expect_none_unmarked(&query.fetch_one(session.connection()).await?, refused.ids.len())
    }

    async fn run_probe(
        &self,
        session: &mut Session,
        route: &Route,
        in_flight: &[i64],
        keep_order: bool,
        share: Share<'_>,
    ) -> Result<Option<Row>, sqlx::Error> {
        let query = session
            .query(&self.statements.probe)
            .bind(&route.exchange)
            .bind(&route.routing_key)
            .bind(&*self.default_exchange)
            .bind(in_flight)
            .bind(keep_order)
            .bind(share.shards as i32)
            .bind(shards_of(share));
        let row = query.fetch_optional(session.connection()).await?;
        let mut decoder = Decoder::new(share, &self.default_exchange);
        row.map(|row| answer::single(&row, &mut decoder)).transpose()
    }

    async fn run_release(
        &self,
        session: &mut Session,
        route: &Route,
        rows: usize,
    ) -> Result<u64, sqlx::Error> {
        let query = session
            .query(&self.statements.release)
            .bind(&route.exchange)
            .bind(&route.routing_key)
            .bind(&*self.default_exchange)
            .bind(rows as i64);
        Ok(query.execute(session.connection()).await?.rows_affected())
    }

    async fn run_horizon(
        &self,
        session: &mut Session,
        last: i64,
        ranges: &[(i64, i64)],
        in_flight: &[i64],
        ids: usize,
    ) -> Result<Horizon, sqlx::Error> {
        let (first_ids, last_ids): (Vec<i64>, Vec<i64>) = ranges.iter().copied().unzip();
        let query = session
            .query(&self.statements.horizon)
            .bind(last)
            .bind(first_ids)
            .bind(last_ids)
            .bind(in_flight)
            .bind(ids as i64);
        let row = query.fetch_one(session.connection()).await?;
        let number = |name: &str| -> Result<u64, sqlx::Error> {
            row.try_get::<&str, _>(name)?.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))
        };
        Ok(Horizon { xmin: number("xmin")?, next_xid: number("next_xid")?, pending: row.try_get("pending")? })
    }

    async fn run_long_passed(
        &self,
        session: &mut Session,
        below: i64,
        age: Duration,
    ) -> Result<Option<i64>, sqlx::Error> {
        let query = session.query(&self.statements.long_passed);
        let first = below.saturating_sub(LOOK_BACK_IDS);
        let query = query.bind(first).bind(below).bind(age.as_secs_f64());
        let row = query.fetch_optional(session.connection()).await?;
        row.map(|row| row.try_get(0)).transpose()
    }

    async fn run_purge(
        &self,
        session: &mut Session,
        after: i64,
        rows: usize,
        retention: Duration,
    ) -> Result<Bite, sqlx::Error> {
        let query =
            session.query(&self.statements.purge).bind(after).bind(rows as i64).bind(retention.as_secs_f64());
        let row = query.fetch_one(session.connection()).await?;
        Ok(Bite {
            looked_at: row.try_get::<i64, _>("looked_at")? as u64,
            purged: row.try_get::<i64, _>("purged")? as u64,
            last_id: row.try_get::<Option<i64>, _>("last_id")?.unwrap_or(i64::MAX),
        })
    }

    async fn run_census(&self, session: &mut Session) -> Result<Census, sqlx::Error> {
        let row = session.query(&self.statements.census).fetch_one(session.connection()).await?;
        let count = |name: &str| row.try_get::<i64, _>(name).map(|count| count as u64);
        Ok(Census {
            pending: count("pending")?,
            oldest_seconds: row.try_get::<Option<f64>, _>("oldest_seconds")?.unwrap_or(0.0),
            dead: count("dead")?,
            waiting: count("waiting")?,
            blocked_keys: count("blocked_keys")?,
            took_seconds: row.try_get("took_seconds")?,
        })
    }
}

impl Store for PostgresStore {
    async fn poll(&self, ask: Ask<'_>) -> Result<Read, StoreError> {
        self.reading.call(Unit::Statement, async |session| self.run_poll(session, &ask).await).await
    }

    async fn watch(&self, watch: Watch<'_>) -> Result<Option<i64>, StoreError> {
        let script = self.statements.watch(&watch);
        let run = async |session: &mut Session| {
            sqlx::raw_sql(script).fetch_one(session.connection()).await?.try_get("row_id")
        };
        self.reading.call(Unit::Script, run).await
    }

    async fn probe(
        &self,
        route: &Route,
        in_flight: &[i64],
        keep_order: bool,
        share: Share<'_>,
    ) -> Result<Option<Row>, StoreError> {
        let probe =
            async |session: &mut Session| self.run_probe(session, route, in_flight, keep_order, share).await;
        self.reading.call(Unit::Statement, probe).await
    }

    async fn release(&self, route: &Route, rows: usize) -> Result<u64, StoreError> {
        self.reading.call(Unit::Statement, async |session| self.run_release(session, route, rows).await).await
    }

    async fn horizon(
        &self,
        last: i64,
        ranges: &[(i64, i64)],
        in_flight: &[i64],
        ids: usize,
    ) -> Result<Horizon, StoreError> {
        let horizon =
            async |session: &mut Session| self.run_horizon(session, last, ranges, in_flight, ids).await;
        self.reading.call(Unit::Statement, horizon).await
    }

    async fn long_passed(&self, below: i64, age: Duration) -> Result<Option<i64>, StoreError> {
        // What is deleted tells nothing.
        if !self.keep_delivered {
            return Ok(None);
        }
        let long_passed = async |session: &mut Session| self.run_long_passed(session, below, age).await;
        self.reading.call(Unit::Statement, long_passed).await
    }

    async fn settle(&self, settlement: &Settlement, passes_locks: bool) -> Result<Written, StoreError> {
        if passes_locks {
            let settle = async |session: &mut Session| self.run_settle_unlocked(session, settlement).await;
            return self.settling.call(Unit::Transaction, settle).await;
        }
        let kinds =
            [!settlement.delivered.is_empty(), !settlement.waiting.is_empty(), !settlement.dead.is_empty()];
        let unit =
            if kinds.iter().filter(|some| **some).count() > 1 { Unit::Transaction } else { Unit::Statement };
        let settle = async |session: &mut Session| self.run_settle(session, settlement).await;
        Ok(Written { marked: self.settling.call(unit, settle).await?, locked: Vec::new() })
    }

    async fn purge(&self, after: i64, rows: usize, retention: Duration) -> Result<Bite, StoreError> {
        let purge = async |session: &mut Session| self.run_purge(session, after, rows, retention).await;
        self.purging.call(Unit::Statement, purge).await
    }

    async fn census(&self) -> Result<Census, StoreError> {
        self.counting.call(Unit::Statement, async |session| self.run_census(session).await).await
    }
}

/// What refused rows are found by, a list for each parameter.
#[derive(Default)]
struct Refused {
    ids: Vec<i64>,
    attempts: Vec<i32>,
    shards: Vec<i32>,
    epochs: Vec<i64>,
    message_ids: Vec<Uuid>,
}

impl Refused {
    fn of(rows: impl Iterator<Item = (i64, u32, Lease, Uuid)>) -> Self {
        let mut refused = Self::default();
        for (id, count, lease, message_id) in rows {
            refused.ids.push(id);
            refused.attempts.push(attempts(count));
            refused.shards.push(lease.shard as i32);
            refused.epochs.push(lease.epoch);
            refused.message_ids.push(message_id);
        }
        refused
    }
}

/// Rows that stay as they are whatever is written would be sent again and again.
fn expect_none_unmarked(count: &PgRow, of: usize) -> Result<(), sqlx::Error> {
    let unmarked: i64 = count.try_get(0)?;
    if unmarked == 0 {
        return Ok(());
    }
    let sentence = format!(
        "{unmarked} of {of} marks did not reach their rows; look for a trigger, a rule or row-level security on the outbox that keeps this login from changing them"
    );
    Err(sqlx::Error::Configuration(Box::new(Unreached(sentence))))
}

fn attempts(count: u32) -> i32 {
    i32::try_from(count).unwrap_or(i32::MAX)
}

/// The shards to read; null for all, which costs the statement nothing.
fn shards_of(share: Share<'_>) -> Option<Vec<i32>> {
    (!share.is_everything()).then(|| numbers(share.leases.iter().map(|lease| lease.shard)))
}

fn numbers(shards: impl Iterator<Item = u32>) -> Vec<i32> {
    shards.map(|shard| shard as i32).collect()
}

/// Postgres stores no NUL in a text.
fn storable(reason: &str) -> String {
    reason.replace('\0', "\u{fffd}")
}

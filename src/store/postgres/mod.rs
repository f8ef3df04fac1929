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
mod marks;
pub mod migrate;
pub mod preflight;
pub mod schema;
mod session;
mod statements;

pub use session::Connector;

use super::{
    Ask, Census, Horizon, Purged, Read, Route, Row, Settlement, Share, Store, StoreError, Watch, Written,
};
use crate::config::Settings;
use decode::Decoder;
use session::{Lane, Session, TableAccess, Unit};
use sqlx::Row as _;
use statements::Statements;
use std::sync::Arc;
use std::time::Duration;

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
    ) -> Result<Purged, sqlx::Error> {
        let query =
            session.query(&self.statements.purge).bind(after).bind(rows as i64).bind(retention.as_secs_f64());
        let row = query.fetch_one(session.connection()).await?;
        Ok(Purged {
            looked_at: row.try_get::<i64, _>("looked_at")? as u64,
            deleted: row.try_get::<i64, _>("purged")? as u64,
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

    async fn purge(&self, after: i64, rows: usize, retention: Duration) -> Result<Purged, StoreError> {
        let purge = async |session: &mut Session| self.run_purge(session, after, rows, retention).await;
        self.purging.call(Unit::Statement, purge).await
    }

    async fn census(&self) -> Result<Census, StoreError> {
        self.counting.call(Unit::Statement, async |session| self.run_census(session).await).await
    }
}

/// The shards to read; null for all, which costs the statement nothing.
fn shards_of(share: Share<'_>) -> Option<Vec<i32>> {
    (!share.is_everything()).then(|| numbers(share.leases.iter().map(|lease| lease.shard)))
}

fn numbers(shards: impl Iterator<Item = u32>) -> Vec<i32> {
    shards.map(|shard| shard as i32).collect()
}

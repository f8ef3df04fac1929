//! Leases in Postgres: one row per shard, one per living replica.

use super::PostgresStore;
use super::session::{Session, Unit};
use crate::store::StoreError;
use crate::store::leases::{Lease, LeaseTable, Member, Standing};
use sqlx::Row;
use sqlx::postgres::PgRow;
use std::time::Duration;

/// Bounds of a call: a short lease must not make a slow connect impossible, and a connection that hangs must be given
/// up while there is time for another try.
const CALL_LIMIT_MIN: Duration = Duration::from_secs(1);
const CALL_LIMIT_MAX: Duration = Duration::from_secs(10);

impl LeaseTable for PostgresStore {
    async fn look(&self, member: Member) -> Result<Standing, StoreError> {
        let look = async |session: &mut Session| {
            let query = session
                .query(&self.statements.look_at_leases)
                .bind(member.replica)
                .bind(member.shards as i32);
            standing(&query.fetch_one(session.connection()).await?)
        };
        self.leasing.call_within(limit(member), Unit::Statement, look).await
    }

    async fn renew(&self, member: Member, drained: &[Lease]) -> Result<Standing, StoreError> {
        let script = self.statements.renew_leases(member, drained, limit(member));
        let renew = async |session: &mut Session| {
            let rows = sqlx::raw_sql(script).fetch_all(session.connection()).await?;
            // The last statement that answers with rows is the one asked for.
            standing(rows.last().ok_or(sqlx::Error::RowNotFound)?)
        };
        self.leasing.call_within(limit(member), Unit::Script, renew).await
    }

    async fn leave(&self, member: Member) -> Result<(), StoreError> {
        let leave = async |session: &mut Session| {
            let query = session.query(&self.statements.leave_leases).bind(member.replica);
            query.execute(session.connection()).await.map(drop)
        };
        self.leasing.call_within(limit(member), Unit::Statement, leave).await
    }
}

/// A fifth of the lease, for connecting and for the call, each.
fn limit(member: Member) -> Duration {
    (member.lease_time / 5).clamp(CALL_LIMIT_MIN, CALL_LIMIT_MAX)
}

fn standing(row: &PgRow) -> Result<Standing, sqlx::Error> {
    let (shards, epochs): (Vec<i32>, Vec<i64>) = (row.try_get("shards")?, row.try_get("epochs")?);
    let count = |name: &str| row.try_get::<i64, _>(name).map(|count| count as u32);
    Ok(Standing {
        member: row.try_get("member")?,
        replicas: count("replicas")?,
        other_shards: row.try_get::<Option<i32>, _>("other_shards")?.map(|shards| shards as u32),
        quota: count("quota")?,
        free: count("free")?,
        leases: shards
            .into_iter()
            .zip(epochs)
            .map(|(shard, epoch)| Lease { shard: shard as u32, epoch })
            .collect(),
    })
}

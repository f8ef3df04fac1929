//! What became of rows, written to them: delivered, waiting for the next try, dead. A mark that reaches no row without a
//! reason that is known is an error, since its row would be sent again and again.

use super::PostgresStore;
use super::error::Unreached;
use super::session::Session;
use crate::store::{Delivered, Lease, Settlement, Written};
use sqlx::Row as _;
use sqlx::postgres::PgRow;
use uuid::Uuid;

impl PostgresStore {
    pub(super) async fn run_settle(
        &self,
        session: &mut Session,
        settlement: &Settlement,
    ) -> Result<u64, sqlx::Error> {
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

    pub(super) async fn run_settle_unlocked(
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

/// Postgres stores no NUL in a text, and in other encodings than UTF-8 no replacement character.
fn storable(reason: &str) -> String {
    reason.replace(['\0', char::REPLACEMENT_CHARACTER], "?")
}

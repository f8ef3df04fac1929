//! The SQL texts with the table's name put in, made once at start.
//!
//! The only place where SQL is put together at run time, and only from files of this crate, a table name that
//! [`TableName`] has validated and quoted, and values whose types hold no text: numbers and uuids.

use super::schema::{LEASE, REPLICA, WATCH};
use crate::config::TableName;
use crate::store::Watch;
use crate::store::leases::{Lease, Member};
use sqlx::{AssertSqlSafe, SqlSafeStr, SqlStr};
use std::time::Duration;

#[derive(Debug)]
pub(super) struct Statements {
    pub poll: SqlStr,
    pub probe: SqlStr,
    pub release: SqlStr,
    pub horizon: SqlStr,
    pub long_passed: SqlStr,
    pub mark_delivered: SqlStr,
    pub delete_delivered: SqlStr,
    pub unmarked: SqlStr,
    pub unmarked_refusals: SqlStr,
    pub locked_to_mark: SqlStr,
    pub locked_to_delete: SqlStr,
    pub mark_waiting: SqlStr,
    pub mark_dead: SqlStr,
    pub purge: SqlStr,
    pub census: SqlStr,
    pub look_at_leases: SqlStr,
    pub leave_leases: SqlStr,
    renew_leases: String,
    watch: String,
}

impl Statements {
    pub(super) fn new(table: &TableName) -> Self {
        let prepare = |text: &str| AssertSqlSafe(name_tables(text, table)).into_sql_str();
        let parameters = |text: &str| {
            let text = text.replace("{quota}", include_str!("../sql/quota.sql").trim());
            prepare(&text.replace("{me}", "$1::uuid").replace("{shards}", "$2::int"))
        };
        let locked = |lock: &str| prepare(&include_str!("../sql/locked.sql").replace("{lock}", lock));
        let renew = include_str!("../sql/renew_leases.sql");
        let renew = renew.replace("{look}", include_str!("../sql/look_at_leases.sql").trim());
        let renew = renew.replace("{quota}", include_str!("../sql/quota.sql").trim());
        let of_own = |column: &str| format!("case when not {{of_others}} then {column} end");
        let poll = with_content(include_str!("../sql/poll.sql"), of_own);
        Self {
            poll: prepare(&poll),
            probe: prepare(&with_content(include_str!("../sql/probe.sql"), str::to_owned)),
            release: prepare(include_str!("../sql/release.sql")),
            horizon: prepare(include_str!("../sql/horizon.sql")),
            long_passed: prepare(include_str!("../sql/long_passed.sql")),
            mark_delivered: prepare(include_str!("../sql/mark_delivered.sql")),
            delete_delivered: prepare(include_str!("../sql/delete_delivered.sql")),
            unmarked: prepare(include_str!("../sql/unmarked.sql")),
            unmarked_refusals: prepare(include_str!("../sql/unmarked_refusals.sql")),
            locked_to_mark: locked("no key update"),
            locked_to_delete: locked("update"),
            mark_waiting: prepare(include_str!("../sql/mark_waiting.sql")),
            mark_dead: prepare(include_str!("../sql/mark_dead.sql")),
            purge: prepare(include_str!("../sql/purge.sql")),
            census: prepare(include_str!("../sql/census.sql")),
            look_at_leases: parameters(include_str!("../sql/look_at_leases.sql")),
            leave_leases: parameters(include_str!("../sql/leave_leases.sql")),
            renew_leases: name_tables(&renew, table),
            watch: name_tables(include_str!("../sql/watch.sql"), table),
        }
    }

    /// The call that waits, as a text of its own: see there.
    pub(super) fn watch(&self, watch: &Watch<'_>) -> SqlStr {
        let ms = |time: Duration| time.as_millis().to_string();
        let values = [
            ("{noticed}", watch.noticed.to_string()),
            ("{first_ids}", bigints(watch.ranges.iter().map(|(first, _)| *first))),
            ("{last_ids}", bigints(watch.ranges.iter().map(|(_, last)| *last))),
            ("{in_flight}", bigints(watch.in_flight.iter().copied())),
            ("{first_poll_ms}", ms(watch.first_poll)),
            ("{poll_interval_ms}", ms(watch.poll_interval)),
            ("{lasts_ms}", ms(watch.lasts)),
        ];
        fill(&self.watch, values)
    }

    /// The whole renewal as one text: a text of several statements takes no parameters.
    pub(super) fn renew_leases(&self, member: Member, drained: &[Lease], limit: Duration) -> SqlStr {
        let Member { replica, shards, ready, lease_time } = member;
        let values = [
            ("{me}", format!("'{replica}'::uuid")),
            ("{shards}", shards.to_string()),
            ("{ready}", ready.to_string()),
            ("{lease_ms}", lease_time.as_millis().to_string()),
            ("{drained_shards}", bigints(drained.iter().map(|lease| i64::from(lease.shard)))),
            ("{drained_epochs}", bigints(drained.iter().map(|lease| lease.epoch))),
            ("{limit_ms}", limit.as_millis().to_string()),
        ];
        fill(&self.renew_leases, values)
    }
}

/// Numbers as a literal.
fn bigints(numbers: impl Iterator<Item = i64>) -> String {
    let list = numbers.map(|number| number.to_string()).collect::<Vec<_>>().join(",");
    format!("'{{{list}}}'::bigint[]")
}

/// Puts values, which hold no text, in the places of their names.
fn fill<const N: usize>(text: &str, values: [(&str, String); N]) -> SqlStr {
    let fill = |text: String, (name, value): (&str, String)| text.replace(name, &value);
    AssertSqlSafe(values.into_iter().fold(text.to_owned(), fill)).into_sql_str()
}

/// Puts the columns of a row in, those of any size in this manner.
fn with_content(text: &str, manner: impl Fn(&str) -> String) -> String {
    let columns = include_str!("../sql/columns.sql").trim();
    let columns =
        columns.replace("{payload}", &manner("o.payload")).replace("{headers}", &manner("o.headers"));
    text.replace("{columns}", &columns)
}

/// Puts shared parts and names of tables in.
fn name_tables(text: &str, table: &TableName) -> String {
    let lease = table.with_suffix(LEASE);
    let literal = format!("'{}'", lease.replace('\'', "''"));
    text.replace("{of_others}", include_str!("../sql/of_others.sql").trim())
        .replace("{shard}", include_str!("../sql/shard.sql").trim())
        .replace("{not_in_flight}", include_str!("../sql/not_in_flight.sql").trim())
        .replace("{sent}", include_str!("../sql/sent.sql").trim())
        .replace("{refused}", include_str!("../sql/refused.sql").trim())
        .replace("{in_turn}", include_str!("../sql/in_turn.sql").trim())
        .replace("{outbox}", &table.quoted())
        .replace("{lease_name}", &literal)
        .replace("{lease}", &lease)
        .replace("{replica}", &table.with_suffix(REPLICA))
        .replace("{watch}", &table.with_suffix(WATCH))
}

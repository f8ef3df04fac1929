//! The SQL texts with the table's name put in, made once at start.
//!
//! The only place where SQL is put together at run time, and only from files of this crate and a
//! table name that [`TableName`] has validated and quoted.

use crate::config::TableName;
use sqlx::{AssertSqlSafe, SqlSafeStr, SqlStr};

#[derive(Debug)]
pub(super) struct Statements {
    pub poll: SqlStr,
    pub probe: SqlStr,
    pub release: SqlStr,
    pub horizon: SqlStr,
    pub mark_delivered: SqlStr,
    pub delete_delivered: SqlStr,
    pub mark_waiting: SqlStr,
    pub mark_dead: SqlStr,
    pub purge: SqlStr,
    pub census: SqlStr,
}

impl Statements {
    pub(super) fn new(table: &TableName) -> Self {
        let outbox = table.quoted();
        let prepare = |text: &str| {
            let text = text.replace("{columns}", include_str!("../sql/columns.sql").trim());
            let text = text.replace("{in_turn}", include_str!("../sql/in_turn.sql").trim());
            AssertSqlSafe(text.replace("{outbox}", &outbox)).into_sql_str()
        };
        Self {
            poll: prepare(include_str!("../sql/poll.sql")),
            probe: prepare(include_str!("../sql/probe.sql")),
            release: prepare(include_str!("../sql/release.sql")),
            horizon: prepare(include_str!("../sql/horizon.sql")),
            mark_delivered: prepare(include_str!("../sql/mark_delivered.sql")),
            delete_delivered: prepare(include_str!("../sql/delete_delivered.sql")),
            mark_waiting: prepare(include_str!("../sql/mark_waiting.sql")),
            mark_dead: prepare(include_str!("../sql/mark_dead.sql")),
            purge: prepare(include_str!("../sql/purge.sql")),
            census: prepare(include_str!("../sql/census.sql")),
        }
    }
}

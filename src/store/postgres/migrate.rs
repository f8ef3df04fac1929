//! Migrations: the outbox table and its indexes, applied in order and recorded in a table of our own
//! (`outbox_migrations`), never in sqlx's default, which the application may use itself.
//!
//! sqlx takes an advisory lock for the whole run, so two processes that migrate at once do no
//! harm. Statements are written to be repeatable, for tables that a DBA created by hand.

use super::session::Connector;
use super::{error::classify, schema::Shape};
use crate::config::TableName;
use crate::store::{StoreError, Trouble};
use sqlx::migrate::{Migration, MigrationType, Migrator};
use sqlx::{AssertSqlSafe, SqlSafeStr};
use std::time::Duration;

/// Every migration: version, description, text.
const MIGRATIONS: [(i64, &str, &str); 3] = [
    (1, "outbox", include_str!("../../../migrations/0001_outbox.sql")),
    (2, "leases", include_str!("../../../migrations/0002_leases.sql")),
    (3, "watch", include_str!("../../../migrations/0003_watch.sql")),
];

/// Locks are waited for this long at most, so that a migration never queues the application behind itself.
const LOCK_LIMIT: (&str, &str) = ("lock_timeout", "5s");
/// Of the session, which the advisory lock needs for itself anyway.
const LIMITS: [(&str, &str); 2] = [LOCK_LIMIT, ("statement_timeout", "115s")];

/// Longest all of it may take as seen from here, should the server fall silent.
const RUN_LIMIT: Duration = Duration::from_secs(120);

/// The SQL of all migrations for this table, for DBAs who apply it themselves.
pub fn print(table: &TableName) -> String {
    let (lock_timeout, limit) = LOCK_LIMIT;
    let texts = MIGRATIONS.map(|(version, name, text)| {
        let sql = render(text, table);
        format!(
            "-- Migration {version:04}: {name}\nbegin;\nset local {lock_timeout} = '{limit}';\n\n{sql}\ncommit;\n"
        )
    });
    texts.join("\n")
}

/// Applies what is missing, then checks that the table is as the relay needs it.
pub async fn run(connector: &Connector, table: &TableName) -> Result<(), StoreError> {
    match tokio::time::timeout(RUN_LIMIT, apply(connector, table)).await {
        Ok(result) => result,
        Err(_) => {
            let sentence = format!("migrating table {table} took longer than {} s", RUN_LIMIT.as_secs());
            Err(StoreError { trouble: Trouble::Outage, sentence })
        }
    }
}

async fn apply(connector: &Connector, table: &TableName) -> Result<(), StoreError> {
    let mut connection = connector.connect(&LIMITS).await?;
    let migrations = MIGRATIONS.map(|(version, name, text)| {
        let sql = AssertSqlSafe(render(text, table)).into_sql_str();
        Migration::new(version, name.into(), MigrationType::Simple, sql, false)
    });
    let mut migrator = Migrator::with_migrations(migrations.to_vec());
    migrator.dangerous_set_table_name(table.with_suffix("_migrations"));
    migrator.run_direct(None, &mut connection, false).await.map_err(|error| explain(&error, table))?;
    let shape = Shape::read(&mut connection, table).await.map_err(|error| classify(&error))?;
    shape.verify(table)
}

fn explain(error: &sqlx::migrate::MigrateError, table: &TableName) -> StoreError {
    use sqlx::migrate::MigrateError;
    let configuration = |sentence: String| StoreError { trouble: Trouble::Configuration, sentence };
    match error {
        MigrateError::Execute(cause) | MigrateError::ExecuteMigration(cause, _) => {
            let StoreError { trouble, sentence } = classify(cause);
            let sentence = format!("cannot migrate table {table}: {sentence}");
            // An index on a table as large as this takes as long the next time.
            if is_cancelled(cause) {
                return configuration(format!(
                    "{sentence}; apply what `outbox-relay migrate --print` prints, which has no time limit"
                ));
            }
            StoreError { trouble, sentence }
        }
        MigrateError::VersionMissing(version) => configuration(format!(
            "table {table} was migrated by a newer outbox-relay (version {version}); use that one"
        )),
        MigrateError::VersionMismatch(version) => configuration(format!(
            "migration {version} of table {table} was applied in another wording; compare it with `outbox-relay migrate --print`"
        )),
        other => configuration(format!("cannot migrate table {table}: {other}")),
    }
}

/// By its time limit, or by an operator.
fn is_cancelled(cause: &sqlx::Error) -> bool {
    cause.as_database_error().is_some_and(|error| error.code().as_deref() == Some("57014"))
}

fn render(text: &str, table: &TableName) -> String {
    let text = text.replace("{outbox}", &table.quoted()).replace("{body}", &body_quote(table));
    let text = fill(text, "{outbox:", |suffix| table.with_suffix(suffix));
    fill(text, "{index:", |suffix| table.index(suffix))
}

/// What a procedure's body is quoted with: nothing that a name in it holds.
fn body_quote(table: &TableName) -> String {
    let mut quote = "$body$".to_owned();
    while table.quoted().contains(&quote) {
        quote.insert_str(1, "the_");
    }
    quote
}

/// Puts a name in place of every `{kind:_suffix}`.
fn fill(mut text: String, opening: &str, name: impl Fn(&str) -> String) -> String {
    while let Some(start) = text.find(opening) {
        let Some(length) = text[start..].find('}') else { break };
        let filled = name(&text[start + opening.len()..start + length]);
        text.replace_range(start..=start + length, &filled);
    }
    text
}

//! What `check` looks at in the database.

use super::error::{POOLER_REMEDY, classify};
use super::schema::{LEASE, REPLICA, Shape, WATCH};
use super::session::{CALL_LIMIT, Connector, within};
use crate::config::{Settings, TableName};
use crate::preflight::Finding;
use crate::store::StoreError;
use sqlx::postgres::PgRow;
use sqlx::{Executor, PgConnection, Row};

/// Looks at the server, the table, its sequence, indexes and grants.
pub async fn check(settings: &Settings) -> Vec<Finding> {
    let connected = "database connection and login";
    let connector = Connector::new(settings.database.clone(), settings.transaction_pooling);
    let mut session = match connector.open().await {
        Ok(session) => session,
        Err(StoreError { mut sentence, .. }) => {
            if !sentence.ends_with(POOLER_REMEDY) {
                sentence.push_str("; check DATABASE_URL, that the server runs, and the login");
            }
            return vec![Finding::new(connected, Err(sentence))];
        }
    };
    let mut findings = vec![Finding::new(connected, Ok(()))];
    match within(CALL_LIMIT, look(session.connection(), settings)).await {
        Ok(more) => findings.extend(more),
        Err(error) => findings.push(Finding::new(format!("table {}", settings.table), Err(error.sentence))),
    }
    findings
}

/// One transaction: only that keeps a pooler from changing the server's connection.
async fn look(connection: &mut PgConnection, settings: &Settings) -> Result<Vec<Finding>, sqlx::Error> {
    connection.execute("begin read only").await?;
    let findings = table(connection, settings).await;
    // Also after a failed question: a pooler keeps the server's connection for the next one.
    let ended = connection.execute("rollback").await;
    findings.and_then(|findings| ended.map(|_| findings))
}

async fn table(connection: &mut PgConnection, settings: &Settings) -> Result<Vec<Finding>, sqlx::Error> {
    let table = &settings.table;
    let shape = Shape::read(connection, table).await?;
    let standby = "this is a read-only standby; name the primary in DATABASE_URL".to_owned();
    let faults = shape.faults(table);
    let mut findings = vec![
        Finding::new("database is a primary", if shape.standby { Err(standby) } else { Ok(()) }),
        Finding::new(
            format!("table {table} with its columns"),
            if faults.is_empty() { Ok(()) } else { Err(faults.join("; ")) },
        ),
    ];
    if shape.present {
        let query = sqlx::query(include_str!("../sql/preflight.sql")).persistent(false);
        let query = query.bind(table.quoted()).bind(ownership(table).to_vec()).bind(table.with_suffix(WATCH));
        match query.fetch_one(connection).await {
            Ok(row) => findings.extend(details(&row, table, settings.long_poll)?),
            // A table of another make may not even have the columns that are asked about.
            Err(error) => findings.push(Finding::new("indexes and grants", Err(classify(&error).sentence))),
        }
    }
    Ok(findings)
}

/// The tables that say which replica publishes what.
fn ownership(table: &TableName) -> [String; 2] {
    [table.with_suffix(LEASE), table.with_suffix(REPLICA)]
}

fn details(row: &PgRow, table: &TableName, long_poll: bool) -> Result<Vec<Finding>, sqlx::Error> {
    let (login, cache): (String, i64) = (row.try_get("login")?, row.try_get("sequence_cache")?);
    let (owners, watch) = (ownership(table).join(", "), table.with_suffix(WATCH));
    let table = table.quoted();
    let cached = format!(
        "its cache is {cache}, so ids do not follow commits; run: alter table {table} alter column id set cache 1"
    );
    let mut findings = vec![Finding::new(
        "sequence of id gives ids one by one",
        if cache == 1 { Ok(()) } else { Err(cached) },
    )];
    let indexes = [
        ("index for the poll", "pending_index"),
        ("index for waiting rows", "waiting_index"),
        ("index for dead rows", "dead_index"),
    ];
    for (what, column) in indexes {
        let missing = "it is missing or not valid; run `outbox-relay migrate`".to_owned();
        findings.push(Finding::new(what, row.try_get::<bool, _>(column)?.then_some(()).ok_or(missing)));
    }
    for (right, column) in [("select", "may_select"), ("update", "may_update"), ("delete", "may_delete")] {
        let missing =
            format!("it is missing; run as owner of the table: grant {right} on {table} to \"{login}\"");
        let granted = row.try_get::<bool, _>(column)?;
        findings.push(Finding::new(format!("grant to {right}"), granted.then_some(()).ok_or(missing)));
    }
    let missing = format!(
        "some are missing; run as their owner: grant select, insert, update, delete on {owners} to \"{login}\""
    );
    findings.push(Finding::new(
        "grants for ownership",
        row.try_get::<bool, _>("may_own")?.then_some(()).ok_or(missing),
    ));
    if long_poll {
        let missing = format!(
            "it is missing or may not be called, so rows are polled; run `outbox-relay migrate`, or as its owner: grant execute on procedure {watch} to \"{login}\""
        );
        let may = row.try_get::<bool, _>("may_watch")?;
        findings.push(Finding::new("procedure for long polling", may.then_some(()).ok_or(missing)));
    }
    Ok(findings)
}

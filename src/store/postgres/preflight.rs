//! What `check` looks at in the database.

use super::error::classify;
use super::schema::Shape;
use crate::cli::Finding;
use crate::config::Settings;
use sqlx::{PgConnection, Row};

/// Looks at the server, the table, its sequence, indexes and grants.
pub async fn check(mut connection: PgConnection, settings: &Settings) -> Vec<Finding> {
    let mut findings = vec![("database connection and login".to_owned(), Ok(()))];
    let table = &settings.table;
    let shape = match Shape::read(&mut connection, table).await {
        Ok(shape) => shape,
        Err(error) => {
            findings.push((format!("table {table}"), Err(classify(&error).sentence)));
            return findings;
        }
    };
    let primary = if shape.standby {
        Err("this is a read-only standby; name the primary in DATABASE_URL".to_owned())
    } else {
        Ok(())
    };
    findings.push(("database is a primary".to_owned(), primary));
    let faults = shape.faults(table);
    let columns = if faults.is_empty() { Ok(()) } else { Err(faults.join("; ")) };
    findings.push((format!("table {table} with its columns"), columns));
    if shape.present {
        match details(&mut connection, settings).await {
            Ok(details) => findings.extend(details),
            Err(error) => findings.push((format!("table {table}"), Err(classify(&error).sentence))),
        }
    }
    findings
}

async fn details(connection: &mut PgConnection, settings: &Settings) -> Result<Vec<Finding>, sqlx::Error> {
    let table = &settings.table;
    let query = sqlx::query(include_str!("../sql/preflight.sql")).persistent(false);
    let row = query.bind(table.quoted()).fetch_one(connection).await?;
    let login: String = row.try_get("login")?;
    let cache: i64 = row.try_get("sequence_cache")?;
    let mut findings = vec![(
        "sequence of id gives ids one by one".to_owned(),
        match cache {
            1 => Ok(()),
            _ => Err(format!(
                "its cache is {cache}, so ids do not follow commits; run: alter table {} alter column id set cache 1",
                table.quoted()
            )),
        },
    )];
    for (what, column) in [
        ("index for the poll", "pending_index"),
        ("index for waiting rows", "waiting_index"),
        ("index for dead rows", "dead_index"),
    ] {
        let found = row.try_get::<bool, _>(column)?;
        let missing = || Err("it is missing or not valid; run `outbox-relay migrate`".to_owned());
        findings.push((what.to_owned(), if found { Ok(()) } else { missing() }));
    }
    for right in ["select", "update", "delete"] {
        let granted = row.try_get::<bool, _>(format!("may_{right}").as_str())?;
        let missing = || {
            Err(format!(
                "it is missing; run as owner of the table: grant {right} on {} to \"{login}\"",
                table.quoted()
            ))
        };
        findings.push((format!("grant to {right}"), if granted { Ok(()) } else { missing() }));
    }
    Ok(findings)
}

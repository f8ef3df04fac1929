//! Does the table look as the relay needs it? Asked at each connect and by `check`.

use crate::config::TableName;
use crate::store::{StoreError, Trouble};
use sqlx::{PgConnection, Row};

/// Columns and the types each may have. `payload` is sent byte by byte, so any of these will do.
const COLUMNS: [(&str, &[&str]); 14] = [
    ("id", &["bigint"]),
    ("message_id", &["uuid"]),
    ("exchange", TEXT),
    ("routing_key", TEXT),
    ("ordering_key", TEXT),
    ("payload", &["jsonb", "json", "text", "bytea", "character varying"]),
    ("content_type", TEXT),
    ("headers", &["jsonb", "json", "text"]),
    ("created_at", &["timestamp with time zone"]),
    ("available_at", &["timestamp with time zone"]),
    ("attempts", &["integer"]),
    ("last_error", &["text"]),
    ("delivered_at", &["timestamp with time zone"]),
    ("dead_at", &["timestamp with time zone"]),
];
/// Suffixes of the tables of ownership.
pub(super) const LEASE: &str = "_lease";
pub(super) const REPLICA: &str = "_replica";
/// Suffix of the procedure that waits for rows.
pub(super) const WATCH: &str = "_watch";

const TEXT: &[&str] = &["text", "character varying"];

/// A table as the catalogue describes it.
#[derive(Debug, Clone, Default)]
pub struct Shape {
    /// The table exists and the login may see it.
    pub present: bool,
    /// The server is a read-only standby.
    pub standby: bool,
    /// The tables of ownership exist.
    pub owned: bool,
    /// Column names with their types.
    pub columns: Vec<(String, String)>,
}

impl Shape {
    /// Reads the catalogue.
    pub async fn read(connection: &mut PgConnection, table: &TableName) -> Result<Self, sqlx::Error> {
        let row = sqlx::query(include_str!("../sql/schema.sql"))
            .persistent(false)
            .bind(table.quoted())
            .bind(table.with_suffix(LEASE))
            .bind(table.with_suffix(REPLICA))
            .fetch_one(connection)
            .await?;
        let names: Vec<String> = row.try_get("columns")?;
        let types: Vec<String> = row.try_get("types")?;
        Ok(Self {
            present: row.try_get("present")?,
            standby: row.try_get("standby")?,
            owned: row.try_get("owned")?,
            columns: names.into_iter().zip(types).collect(),
        })
    }

    /// Refuses a table the relay cannot work with, in one sentence with the remedy.
    pub fn verify(&self, table: &TableName) -> Result<(), StoreError> {
        if self.standby {
            let sentence = "the database is a read-only standby; waiting for the primary".to_owned();
            return Err(StoreError { trouble: Trouble::Outage, sentence });
        }
        match self.faults(table) {
            faults if faults.is_empty() => Ok(()),
            faults => Err(StoreError { trouble: Trouble::Configuration, sentence: faults.join("; ") }),
        }
    }

    /// Everything that is wrong with the table.
    pub fn faults(&self, table: &TableName) -> Vec<String> {
        if !self.present {
            return vec![format!(
                "table {table} does not exist; run `outbox-relay migrate` or set OUTBOX_TABLE"
            )];
        }
        let missing: Vec<&str> =
            COLUMNS.iter().filter(|(name, _)| self.type_of(name).is_none()).map(|(name, _)| *name).collect();
        let mut faults = Vec::new();
        if !missing.is_empty() {
            faults.push(format!(
                "table {table} lacks {} {}; it is older than this relay or of another make: run `outbox-relay migrate`, or see `outbox-relay migrate --print`",
                if missing.len() == 1 { "column" } else { "columns" },
                missing.join(", ")
            ));
        }
        if !self.owned {
            faults.push(format!(
                "table {table}{LEASE} or {table}{REPLICA} is missing; run `outbox-relay migrate`, or see `outbox-relay migrate --print`"
            ));
        }
        for (name, allowed) in COLUMNS {
            if let Some(found) = self.type_of(name).filter(|found| !allowed.contains(found)) {
                faults.push(format!(
                    "column {name} of table {table} is {found}, expected {}; alter its type",
                    allowed.join(" or ")
                ));
            }
        }
        faults
    }

    fn type_of(&self, column: &str) -> Option<&str> {
        self.columns.iter().find(|(name, _)| name == column).map(|(_, kind)| kind.as_str())
    }
}

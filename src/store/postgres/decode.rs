//! Rows off the wire. Reads the bytes as Postgres sent them: no text is parsed, no JSON is built.
//!
//! A row is taken only while the budget of bytes has room; the rest of the answer is given up together with
//! its connection, so memory is bounded by the budget and one row, and no snapshot is held on the server.

use crate::store::{Ask, Lease, Read, Route, Row, Share};
use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use sqlx::postgres::{PgRow, PgValue, PgValueRef};
use sqlx::{Row as _, TypeInfo, Value, ValueRef};
use std::sync::Arc;
use uuid::Uuid;

/// From here on a payload keeps its slice of the network buffer instead of being copied.
const COPY_LIMIT_BYTES: usize = 16 * 1024;
/// Microseconds from 1970 to 2000, where Postgres begins to count.
const EPOCH_MICROS: i64 = 946_684_800_000_000;

pub(super) async fn read(
    mut answer: impl Stream<Item = Result<PgRow, sqlx::Error>> + Unpin,
    ask: &Ask<'_>,
    default_exchange: &Arc<str>,
) -> Result<Read, sqlx::Error> {
    let mut read = Read::default();
    let mut bytes = 0;
    while let Some(raw) = answer.try_next().await? {
        let row = row(&raw, ask.share, default_exchange)?;
        bytes += row.bytes();
        let first_of_all = ask.room_for_any && read.rows.is_empty();
        if bytes > ask.bytes && !first_of_all {
            (read.more, read.cut_off) = (true, true);
            break;
        }
        read.rows.push(row);
    }
    read.more |= read.rows.len() >= ask.rows;
    Ok(read)
}

/// One row, columns in the order of `sql/columns.sql`.
pub(super) fn row(raw: &PgRow, share: Share<'_>, default_exchange: &Arc<str>) -> Result<Row, sqlx::Error> {
    let mut defects = Vec::new();
    let exchange = text(raw, 2, &mut defects)?.unwrap_or_else(|| default_exchange.to_string());
    let routing_key = required(raw, 3, &mut defects)?;
    Ok(Row {
        id: integer(raw, 0)?,
        message_id: Uuid::from_slice(bytes_of(&raw.try_get_raw(1)?)?).unwrap_or_default(),
        route: Arc::new(Route { exchange, routing_key }),
        ordering_key: text(raw, 4, &mut defects)?.map(Into::into),
        payload: body(&raw.try_get_raw(5)?, &mut defects)?,
        content_type: required(raw, 6, &mut defects)?,
        headers: required(raw, 7, &mut defects)?,
        created_at_micros: integer(raw, 8)?.saturating_add(EPOCH_MICROS),
        attempts: u32::try_from(integer(raw, 9)?).unwrap_or(0),
        lease: lease(raw, share)?,
        defect: (!defects.is_empty()).then(|| defects.join("; ")),
    })
}

/// A row of a shard that was not asked for is a defect of the statement, and gets an epoch that nobody holds.
fn lease(raw: &PgRow, share: Share<'_>) -> Result<Lease, sqlx::Error> {
    let shard = integer(raw, 10)? as u32;
    Ok(share.lease(shard).unwrap_or(Lease { shard, epoch: -1 }))
}

fn required(raw: &PgRow, column: usize, defects: &mut Vec<String>) -> Result<String, sqlx::Error> {
    let value = text(raw, column, defects)?;
    if value.is_none() {
        defects.push(format!("column {} is null", column_name(column)));
    }
    Ok(value.unwrap_or_default())
}

fn text(raw: &PgRow, column: usize, defects: &mut Vec<String>) -> Result<Option<String>, sqlx::Error> {
    let value = raw.try_get_raw(column)?;
    if value.is_null() {
        return Ok(None);
    }
    let content = content(&value)?;
    Ok(Some(String::from_utf8(content.to_vec()).unwrap_or_else(|_| {
        defects.push(format!("column {} is not UTF-8", column_name(column)));
        String::new()
    })))
}

fn body(value: &PgValueRef<'_>, defects: &mut Vec<String>) -> Result<Bytes, sqlx::Error> {
    if value.is_null() {
        defects.push("column payload is null".to_owned());
        return Ok(Bytes::new());
    }
    let content = content(value)?;
    if content.len() < COPY_LIMIT_BYTES {
        return Ok(Bytes::copy_from_slice(content));
    }
    let skipped = bytes_of(value)?.len() - content.len();
    Ok(Bytes::from_owner(Owned(ValueRef::to_owned(value))).slice(skipped..))
}

/// A value's bytes without the version byte that binary `jsonb` begins with.
fn content<'r>(value: &PgValueRef<'r>) -> Result<&'r [u8], sqlx::Error> {
    let bytes = bytes_of(value)?;
    match value.type_info().name() {
        "JSONB" => Ok(bytes.get(1..).unwrap_or_default()),
        _ => Ok(bytes),
    }
}

fn bytes_of<'r>(value: &PgValueRef<'r>) -> Result<&'r [u8], sqlx::Error> {
    value.as_bytes().map_err(sqlx::Error::Decode)
}

/// `bigint`, `integer` and `timestamptz` are big-endian integers on the wire.
fn integer(raw: &PgRow, column: usize) -> Result<i64, sqlx::Error> {
    let value = raw.try_get_raw(column)?;
    let bytes = bytes_of(&value)?;
    let wide = |bytes: [u8; 8]| i64::from_be_bytes(bytes);
    let narrow = |bytes: [u8; 4]| i64::from(i32::from_be_bytes(bytes));
    bytes
        .try_into()
        .map(wide)
        .or_else(|_| bytes.try_into().map(narrow))
        .map_err(|_| sqlx::Error::Decode(format!("column {} is not an integer", column_name(column)).into()))
}

fn column_name(column: usize) -> &'static str {
    let names = include_str!("../sql/columns.sql").trim();
    names.split(", ").nth(column).map_or("?", |name| name.trim_start_matches("o."))
}

/// A value that keeps its own slice of the network buffer.
struct Owned(PgValue);

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        self.0.as_ref().as_bytes().unwrap_or_default()
    }
}

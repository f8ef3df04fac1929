//! The answer to a poll, row by row, as Postgres sends it.
//!
//! A row is taken only while the budget of bytes has room; the rest of the answer is given up together with
//! its connection, so memory is bounded by the budget and one row, and no snapshot is held on the server.

use super::decode::{COLUMNS, Column, Decoder, Wire, of_others};
use crate::store::{Ask, Read, Row};
use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use sqlx::postgres::{PgRow, PgValue, PgValueRef};
use sqlx::{Row as _, TypeInfo, Value, ValueRef};

/// From here on a payload keeps its slice of the network buffer instead of being copied.
const COPY_LIMIT_BYTES: usize = 16 * 1024;

/// The rows, and whether the answer was cut off at the budget of bytes, so that its connection still carries the rest.
pub(super) async fn read(
    mut answer: impl Stream<Item = Result<PgRow, sqlx::Error>> + Unpin,
    ask: &Ask<'_>,
    default_exchange: &str,
) -> Result<(Read, bool), sqlx::Error> {
    let (mut read, mut cut_off) = (Read::default(), false);
    let mut bytes = 0;
    let mut decoder = Decoder::new(ask.share, default_exchange);
    while let Some(raw) = answer.try_next().await? {
        let wire = wire(&raw)?;
        if let Some(id) = of_others(&wire, ask.others).map_err(not_of_its_type)? {
            read.passed.push(id);
            continue;
        }
        let row = row(&raw, &wire, &mut decoder)?;
        bytes += row.bytes();
        let first_of_all = ask.room_for_any && read.rows.is_empty();
        if bytes > ask.bytes && !first_of_all {
            (read.more, cut_off) = (true, true);
            break;
        }
        read.rows.push(row);
    }
    read.more |= read.rows.len() + read.passed.len() >= ask.rows;
    Ok((read, cut_off))
}

/// A row that is not passed.
pub(super) fn single(raw: &PgRow, decoder: &mut Decoder<'_>) -> Result<Row, sqlx::Error> {
    row(raw, &wire(raw)?, decoder)
}

/// Columns in the order of `sql/columns.sql`.
fn wire(raw: &PgRow) -> Result<Wire<'_>, sqlx::Error> {
    let mut wire: Wire<'_> = [None; COLUMNS];
    for (place, bytes) in wire.iter_mut().enumerate() {
        let value = raw.try_get_raw(place)?;
        if !value.is_null() {
            let start = version_bytes(&value, place);
            *bytes = Some(bytes_of(&value)?.get(start..).unwrap_or_default());
        }
    }
    Ok(wire)
}

fn row(raw: &PgRow, wire: &Wire<'_>, decoder: &mut Decoder<'_>) -> Result<Row, sqlx::Error> {
    let payload = match wire[Column::Payload as usize] {
        Some(content) if content.len() >= COPY_LIMIT_BYTES => {
            let value = raw.try_get_raw(Column::Payload as usize)?;
            let start = version_bytes(&value, Column::Payload as usize);
            Bytes::from_owner(Owned(ValueRef::to_owned(&value))).slice(start..)
        }
        content => Bytes::copy_from_slice(content.unwrap_or_default()),
    };
    decoder.row(wire, payload).map_err(not_of_its_type)
}

fn not_of_its_type(error: String) -> sqlx::Error {
    sqlx::Error::Decode(error.into())
}

/// Binary `jsonb` begins with a version byte; the text of the document follows.
fn version_bytes(value: &PgValueRef<'_>, place: usize) -> usize {
    // No other column is one, and looking is not free.
    let may_be = place == Column::Payload as usize || place == Column::Headers as usize;
    usize::from(may_be && value.type_info().name() == "JSONB")
}

fn bytes_of<'r>(value: &PgValueRef<'r>) -> Result<&'r [u8], sqlx::Error> {
    value.as_bytes().map_err(sqlx::Error::Decode)
}

/// A value that keeps its own slice of the network buffer.
struct Owned(PgValue);

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        self.0.as_ref().as_bytes().unwrap_or_default()
    }
}

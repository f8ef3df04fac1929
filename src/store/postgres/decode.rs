//! Rows off the wire. Reads the bytes as Postgres sent them: no text is parsed, no JSON is built.

use crate::store::{Lease, Others, Route, Row, Share};
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::Arc;
use uuid::Uuid;

/// Microseconds from 1970 to 2000, where Postgres begins to count.
const EPOCH_MICROS: i64 = 946_684_800_000_000;

/// Columns of `sql/columns.sql`, in their order.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "each is named as its column")]
pub enum Column {
    Id,
    MessageId,
    Exchange,
    RoutingKey,
    OrderingKey,
    Payload,
    ContentType,
    Headers,
    CreatedAt,
    Attempts,
    Shard,
}

/// How many there are.
pub const COLUMNS: usize = Column::Shard as usize + 1;

/// A row's values in Postgres's binary format; `None` is null.
pub type Wire<'r> = [Option<&'r [u8]>; COLUMNS];

/// Makes rows of one answer.
#[derive(Debug)]
pub struct Decoder<'a> {
    share: Share<'a>,
    default_exchange: &'a str,
    /// Rows that go the same way share their route. By routing key; few keys are used with more than one exchange.
    routes: HashMap<String, Vec<Arc<Route>>>,
    /// Those of the last row: mostly they are the same for all.
    content_type: Arc<str>,
    headers: Arc<str>,
}

impl<'a> Decoder<'a> {
    /// For an answer to a question about this share.
    pub fn new(share: Share<'a>, default_exchange: &'a str) -> Self {
        Self { share, default_exchange, routes: HashMap::new(), content_type: "".into(), headers: "".into() }
    }

    /// One row. What is wrong with its texts makes it a row with a defect; an error is a column that is not of its type.
    pub fn row(&mut self, wire: &Wire<'_>, payload: Bytes) -> Result<Row, String> {
        let mut defects = Vec::new();
        let exchange = text(wire, Column::Exchange, &mut defects).unwrap_or(self.default_exchange);
        let route = self.route(exchange, required(wire, Column::RoutingKey, &mut defects));
        let ordering_key = text(wire, Column::OrderingKey, &mut defects).map(Into::into);
        if wire[Column::Payload as usize].is_none() {
            defects.push(is_null(Column::Payload));
        }
        let content_type = shared(&mut self.content_type, required(wire, Column::ContentType, &mut defects));
        let headers = shared(&mut self.headers, required(wire, Column::Headers, &mut defects));
        Ok(Row {
            id: integer(wire, Column::Id)?,
            message_id: uuid(wire, Column::MessageId)?,
            route,
            ordering_key,
            payload,
            content_type,
            headers,
            created_at_micros: integer(wire, Column::CreatedAt)?.saturating_add(EPOCH_MICROS),
            attempts: u32::try_from(integer(wire, Column::Attempts)?).unwrap_or(0),
            lease: self.lease(shard(wire)?),
            defect: (!defects.is_empty()).then(|| defects.join("; ")),
        })
    }

    fn route(&mut self, exchange: &str, routing_key: &str) -> Arc<Route> {
        let known = self.routes.get(routing_key).map_or(&[][..], Vec::as_slice);
        if let Some(route) = known.iter().find(|route| route.exchange == exchange) {
            return Arc::clone(route);
        }
        let (exchange, routing_key) = (exchange.to_owned(), routing_key.to_owned());
        let route = Arc::new(Route { exchange, routing_key: routing_key.clone() });
        self.routes.entry(routing_key).or_default().push(Arc::clone(&route));
        route
    }

    /// A row of a shard that was not asked for is a defect of the statement, and gets an epoch that nobody holds.
    fn lease(&self, shard: u32) -> Lease {
        self.share.lease(shard).unwrap_or(Lease { shard, epoch: -1 })
    }
}

/// The id of a row of others. Nothing else is read of it: what is wrong with it is for its owner to find.
pub fn of_others(wire: &Wire<'_>, others: Others<'_>) -> Result<Option<i64>, String> {
    if others.shards.is_empty() {
        return Ok(None);
    }
    let (id, shard) = (integer(wire, Column::Id)?, shard(wire)?);
    Ok(others.include(id, shard).then_some(id))
}

/// The last text again, if it is the same.
fn shared(last: &mut Arc<str>, text: &str) -> Arc<str> {
    if **last != *text {
        *last = text.into();
    }
    Arc::clone(last)
}

fn shard(wire: &Wire<'_>) -> Result<u32, String> {
    Ok(integer(wire, Column::Shard)? as u32)
}

fn bytes<'r>(wire: &Wire<'r>, column: Column) -> &'r [u8] {
    wire[column as usize].unwrap_or_default()
}

fn required<'r>(wire: &Wire<'r>, column: Column, defects: &mut Vec<String>) -> &'r str {
    text(wire, column, defects).unwrap_or_else(|| {
        defects.push(is_null(column));
        ""
    })
}

fn text<'r>(wire: &Wire<'r>, column: Column, defects: &mut Vec<String>) -> Option<&'r str> {
    let text = std::str::from_utf8(wire[column as usize]?).unwrap_or_else(|_| {
        defects.push(format!("column {} is not UTF-8", name(column)));
        ""
    });
    Some(text)
}

/// Not a defect: a row is marked by its `message_id` too, so without one it could never be.
fn uuid(wire: &Wire<'_>, column: Column) -> Result<Uuid, String> {
    Uuid::from_slice(bytes(wire, column)).map_err(|_| format!("column {} is not a uuid", name(column)))
}

/// `bigint`, `integer` and `timestamptz` are big-endian integers on the wire.
fn integer(wire: &Wire<'_>, column: Column) -> Result<i64, String> {
    let bytes = bytes(wire, column);
    let wide = |bytes: [u8; 8]| i64::from_be_bytes(bytes);
    let narrow = |bytes: [u8; 4]| i64::from(i32::from_be_bytes(bytes));
    let number = bytes.try_into().map(wide).or_else(|_| bytes.try_into().map(narrow));
    number.map_err(|_| format!("column {} is not an integer", name(column)))
}

fn is_null(column: Column) -> String {
    format!("column {} is null", name(column))
}

fn name(column: Column) -> &'static str {
    let names = include_str!("../sql/columns.sql").trim();
    let name = names.split(", ").nth(column as usize).unwrap_or("?");
    name.trim_start_matches("o.").trim_matches(['{', '}'])
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASES: [Lease; 1] = [Lease { shard: 0, epoch: 7 }];

    fn decoded(change: impl FnOnce(&mut Wire<'static>)) -> Result<Row, String> {
        let mut wire: Wire<'static> = [
            Some(&[0, 0, 0, 0, 0, 0, 1, 0]),
            Some(&[9; 16]),
            None,
            Some(b"orders"),
            Some(b"key"),
            Some(b"{}"),
            Some(b"text/plain"),
            Some(b"{}"),
            Some(&[0; 8]),
            Some(&[0, 0, 0, 2]),
            Some(&[0, 0, 0, 0]),
        ];
        change(&mut wire);
        Decoder::new(Share { shards: 1, leases: &LEASES }, "default").row(&wire, Bytes::from_static(b"{}"))
    }

    #[test]
    fn a_row_is_read_as_it_was_written() {
        let row = decoded(|_| ()).expect("a row");
        assert_eq!((row.id, row.attempts, row.lease), (256, 2, LEASES[0]));
        assert_eq!((row.message_id, row.created_at_micros), (Uuid::from_bytes([9; 16]), EPOCH_MICROS));
        assert_eq!((row.route.exchange.as_str(), row.route.routing_key.as_str()), ("default", "orders"));
        assert_eq!((row.ordering_key.as_deref(), &*row.content_type), (Some("key"), "text/plain"));
        assert_eq!(row.defect, None);
    }

    #[test]
    fn names_are_those_of_the_statement() {
        assert_eq!((name(Column::Id), name(Column::Attempts)), ("id", "attempts"));
        assert!(name(Column::Shard).ends_with("shard"));
    }

    #[test]
    fn texts_that_cannot_be_read_are_defects_and_wrong_types_are_errors() {
        let row = decoded(|wire| {
            wire[Column::RoutingKey as usize] = None;
            wire[Column::Headers as usize] = Some(&[0xff]);
        });
        assert_eq!(
            row.expect("a row").defect.as_deref(),
            Some("column routing_key is null; column headers is not UTF-8")
        );
        let error = decoded(|wire| wire[Column::Attempts as usize] = Some(&[1])).expect_err("an error");
        assert_eq!(error, "column attempts is not an integer");
        let error = decoded(|wire| wire[Column::MessageId as usize] = None).expect_err("an error");
        assert_eq!(error, "column message_id is not a uuid");
    }

    #[test]
    fn rows_that_go_the_same_way_share_their_route() {
        let mut decoder = Decoder::new(Share { shards: 1, leases: &LEASES }, "default");
        let [first, other, again] = ["a", "b", "a"].map(|exchange| decoder.route(exchange, "key"));
        assert!(Arc::ptr_eq(&first, &again) && !Arc::ptr_eq(&first, &other));
        assert_eq!(other.exchange, "b");
    }
}

//! A row as an AMQP message: properties, headers, and everything that can be wrong with them.
//!
//! What the protocol cannot carry is refused here, before any contact with the broker: lapin
//! panics on names over 255 bytes and wedges the connection on headers larger than a frame.

use crate::mutants::mutant;
use crate::store::Row;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldArray, FieldTable, ShortString};
use serde_json::Value;

/// AMQP `delivery_mode` of a message that survives a restart of the broker.
const PERSISTENT: u8 = 2;
/// Bytes of a content header frame besides the headers and the content type: frame (8), class,
/// weight, size and flags (14), message id, timestamp, delivery mode, length bytes; rounded up.
const HEADER_FRAME_OVERHEAD: usize = 128;
/// Deepest nesting of header values; RabbitMQ's own headers need three.
const NESTING_MAX: usize = 16;

/// What a writer without headers has; the column's default.
const NO_HEADERS: &str = "{}";

/// Header with the row's id; returned messages are told apart by it.
pub const ID_HEADER: &str = "x-outbox-id";
const KEY_HEADER: &str = "x-outbox-key";
const ATTEMPT_HEADER: &str = "x-outbox-attempt";

/// A message ready to be published; the body stays with the row.
#[derive(Debug)]
pub struct Message {
    /// Exchange.
    pub exchange: ShortString,
    /// Routing key.
    pub routing_key: ShortString,
    /// Everything else.
    pub properties: BasicProperties,
}

/// Makes a message, or says why there can be none.
pub fn compose(row: &Row, frame_max: usize) -> Result<Message, String> {
    if let Some(defect) = &row.defect {
        return Err(defect.clone());
    }
    let headers = headers(row)?;
    let content_type = name("content_type", &row.content_type)?;
    let size = table_size(&headers) + row.content_type.len() + HEADER_FRAME_OVERHEAD;
    if size > frame_max {
        return Err(format!("headers take {size} bytes, more than the broker's frame of {frame_max}"));
    }
    let message_id = match mutant!("new-message-id-on-retry") && row.attempts > 0 {
        true => uuid::Uuid::new_v4(),
        false => row.message_id,
    };
    let mut properties = BasicProperties::default()
        .with_message_id(message_id.to_string().into())
        .with_delivery_mode(PERSISTENT)
        .with_content_type(content_type)
        .with_headers(headers);
    if let Ok(seconds) = u64::try_from(row.created_at_micros / 1_000_000) {
        properties = properties.with_timestamp(seconds);
    }
    Ok(Message {
        exchange: name("exchange", &row.route.exchange)?,
        routing_key: name("routing_key", &row.route.routing_key)?,
        properties,
    })
}

fn name(column: &str, text: &str) -> Result<ShortString, String> {
    ShortString::try_new(text).map_err(|_| format!("{column} is {} bytes long, AMQP allows 255", text.len()))
}

fn headers(row: &Row) -> Result<FieldTable, String> {
    let mut table = match &*row.headers {
        NO_HEADERS => FieldTable::default(),
        text => parsed(text)?,
    };
    let mut ours = |name: &str, value| {
        table.insert(name.into(), value);
    };
    ours(ID_HEADER, AMQPValue::LongLongInt(row.id));
    if let Some(key) = &row.ordering_key {
        ours(KEY_HEADER, AMQPValue::LongString(key.as_bytes().into()));
    }
    if row.attempts > 0 {
        ours(ATTEMPT_HEADER, AMQPValue::LongLongInt(i64::from(row.attempts) + 1));
    }
    Ok(table)
}

fn parsed(headers: &str) -> Result<FieldTable, String> {
    match serde_json::from_str(headers) {
        Ok(Value::Object(fields)) => field_table(fields, 0),
        Ok(other) => Err(format!("headers are {}, expected a JSON object", kind(&other))),
        Err(error) => Err(format!("headers are not JSON: {error}")),
    }
}

fn field_table(fields: serde_json::Map<String, Value>, depth: usize) -> Result<FieldTable, String> {
    let mut table = FieldTable::default();
    for (key, value) in fields {
        let value = field(value, depth).map_err(|error| format!("header {}: {error}", excerpt(&key)))?;
        let key = ShortString::try_new(key.as_str()).map_err(|_| {
            format!("header name {} is {} bytes long, AMQP allows 255", excerpt(&key), key.len())
        })?;
        table.insert(key, value);
    }
    Ok(table)
}

fn field(value: Value, depth: usize) -> Result<AMQPValue, String> {
    if depth > NESTING_MAX {
        return Err(format!("nested deeper than {NESTING_MAX}"));
    }
    Ok(match value {
        Value::Null => AMQPValue::Void,
        Value::Bool(flag) => AMQPValue::Boolean(flag),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => AMQPValue::LongLongInt(integer),
            (None, Some(float)) if number.is_f64() => AMQPValue::Double(float),
            _ => return Err(format!("{number} does not fit into 64 bits; write it as a string")),
        },
        Value::String(text) => AMQPValue::LongString(text.into()),
        Value::Array(items) => {
            let items = items.into_iter().map(|item| field(item, depth + 1));
            AMQPValue::FieldArray(FieldArray::from(items.collect::<Result<Vec<_>, _>>()?))
        }
        Value::Object(fields) => AMQPValue::FieldTable(field_table(fields, depth + 1)?),
    })
}

/// Bytes of a table on the wire, without its own length.
fn table_size(table: &FieldTable) -> usize {
    table.inner().iter().map(|(key, value)| 1 + key.as_str().len() + value_size(value)).sum()
}

/// Bytes of a value with its type; only the kinds that [`field`] makes.
fn value_size(value: &AMQPValue) -> usize {
    1 + match value {
        AMQPValue::Boolean(_) => 1,
        AMQPValue::LongLongInt(_) | AMQPValue::Double(_) => 8,
        AMQPValue::LongString(text) => 4 + text.len(),
        AMQPValue::FieldArray(items) => 4 + items.as_slice().iter().map(value_size).sum::<usize>(),
        AMQPValue::FieldTable(table) => 4 + table_size(table),
        _ => 0,
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// The beginning of a name that may be very long.
fn excerpt(text: &str) -> String {
    let mut shown: String = text.chars().take(40).collect();
    if shown.len() < text.len() {
        // In ASCII, as all that is stored: the database may know no other dots.
        shown.push_str("...");
    }
    format!("{shown:?}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Route;
    use crate::store::memory::plain_row;
    use std::sync::Arc;

    fn row(headers: &str) -> Row {
        Row {
            ordering_key: Some("k".into()),
            content_type: "application/json".into(),
            headers: headers.into(),
            created_at_micros: 1_700_000_000_000_000,
            ..plain_row(7)
        }
    }

    #[test]
    fn a_message_carries_what_the_contract_says() {
        let message = compose(&row(r#"{"traceparent": "00-a", "n": 1}"#), 131_072).expect("valid");
        let properties = &message.properties;
        assert_eq!(properties.delivery_mode(), &Some(2));
        assert_eq!(properties.timestamp(), &Some(1_700_000_000));
        let headers = properties.headers().as_ref().expect("headers").inner();
        assert_eq!(headers.get("x-outbox-id"), Some(&AMQPValue::LongLongInt(7)));
        assert_eq!(headers.get("x-outbox-key"), Some(&AMQPValue::LongString("k".into())));
        assert_eq!(headers.get("traceparent"), Some(&AMQPValue::LongString("00-a".into())));
        assert!(!headers.contains_key("x-outbox-attempt"));
        let retried = compose(&Row { attempts: 2, ..row("{}") }, 131_072).expect("valid");
        let headers = retried.properties.headers().as_ref().expect("headers").inner();
        assert_eq!(headers.get("x-outbox-attempt"), Some(&AMQPValue::LongLongInt(3)));
    }

    #[test]
    fn what_amqp_cannot_carry_is_refused_with_a_reason() {
        let refusals = [
            (row("[1]"), "headers are an array, expected a JSON object"),
            (row("null"), "headers are null, expected a JSON object"),
            (row(r#"{"n": 18446744073709551615}"#), "header \"n\": 18446744073709551615 does not fit"),
            (row(r#"{"n": -123456789012345678901}"#), "header \"n\": -123456789012345678901 does not fit"),
            (row(r#"{"n": 1e999}"#), "header \"n\": 1e+999 does not fit"),
            (
                row(&format!(r#"{{"h": "{}"}}"#, "x".repeat(200_000))),
                "more than the broker's frame of 131072",
            ),
            (row(&format!(r#"{{"{}": 1}}"#, "x".repeat(256))), "256 bytes long, AMQP allows 255"),
            (Row { content_type: "x".repeat(256).into(), ..row("{}") }, "content_type is 256 bytes long"),
        ];
        for (row, expected) in refusals {
            let reason = compose(&row, 131_072).expect_err("refused");
            assert!(reason.contains(expected), "{reason:?} lacks {expected:?}");
        }
        let long = Row {
            route: Arc::new(Route { exchange: String::new(), routing_key: "r".repeat(300) }),
            ..row("{}")
        };
        assert_eq!(
            compose(&long, 131_072).expect_err("refused"),
            "routing_key is 300 bytes long, AMQP allows 255"
        );
    }
}

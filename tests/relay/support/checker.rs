//! The promises, checked on three ledgers: what writers committed (`written`), what lay in the queue, and
//! what the outbox says. Numbers are those of the invariants in `docs/ARCHITECTURE.md`.

use super::world::Allowed;
use lapin::message::Delivery;
use lapin::types::AMQPValue;
use sqlx::{PgConnection, Row};
use std::collections::{HashMap, HashSet};
use uuid::Uuid;

/// A message as a consumer got it.
#[derive(Debug, Clone)]
pub struct Received {
    pub id: i64,
    pub message_id: Uuid,
    pub routing_key: String,
    pub body: Vec<u8>,
    pub delivery_mode: Option<u8>,
    pub content_type: Option<String>,
    pub timestamp: Option<u64>,
    pub headers: HashMap<String, AMQPValue>,
}

impl Received {
    pub fn new(delivery: Delivery) -> Self {
        let properties = &delivery.properties;
        let headers: HashMap<String, AMQPValue> = properties
            .headers()
            .iter()
            .flat_map(|table| table.inner().iter().map(|(name, value)| (name.to_string(), value.clone())))
            .collect();
        let id = match headers.get("x-outbox-id") {
            Some(AMQPValue::LongLongInt(id)) => *id,
            other => panic!("x-outbox-id is {other:?}"),
        };
        let message_id = properties.message_id().as_ref().expect("message_id").as_str();
        Self {
            id,
            message_id: message_id.parse().expect("a uuid"),
            routing_key: delivery.routing_key.to_string(),
            delivery_mode: *properties.delivery_mode(),
            content_type: properties.content_type().as_ref().map(ToString::to_string),
            timestamp: *properties.timestamp(),
            headers,
            body: delivery.data,
        }
    }
}

struct Written {
    message_id: Uuid,
    ordering_key: Option<String>,
    routing_key: String,
    body: Vec<u8>,
}

struct Kept {
    delivered: bool,
    dead: bool,
    attempts: i32,
}

/// Panics with the first counter-example.
pub async fn check(db: &mut PgConnection, received: &[Received], allowed: Allowed) {
    let written = written(db).await;
    let kept = kept(db).await;
    let mut deliveries: HashMap<i64, usize> = HashMap::new();
    let mut last_of_key: HashMap<&str, i64> = HashMap::new();
    for message in received {
        let id = message.id;
        let Some(row) = written.get(&id) else { panic!("phantom: message {id} was never committed") };
        assert_eq!(message.message_id, row.message_id, "message_id of row {id} changed");
        assert_eq!(message.routing_key, row.routing_key, "routing key of row {id} changed");
        assert!(message.body == row.body, "body of row {id} changed");
        assert_eq!(message.delivery_mode, Some(2), "message {id} is not persistent");
        let count = deliveries.entry(id).or_default();
        *count += 1;
        let rewound = allowed.rewinds && *count > 1;
        if let Some(key) = row.ordering_key.as_deref().filter(|_| !allowed.disorder && !rewound) {
            let last = last_of_key.entry(key).or_insert(i64::MIN);
            assert!(id >= *last, "order of key {key:?}: {id} came after {last}");
            *last = id;
        }
    }
    let seen: HashSet<i64> = deliveries.keys().copied().collect();
    for id in written.keys() {
        match kept.get(id) {
            Some(Kept { delivered: true, .. }) => {
                assert!(seen.contains(id), "row {id} is marked delivered and was not received");
            }
            Some(Kept { dead: true, .. }) => {
                assert!(allowed.dead, "row {id} is dead");
                assert!(!seen.contains(id), "row {id} is dead and was received");
            }
            Some(_) => assert!(allowed.pending, "row {id} is still pending"),
            None => assert!(seen.contains(id), "row {id} was deleted and not received"),
        }
    }
    if !allowed.refusals {
        let burned = kept.iter().find(|(_, row)| row.attempts > 0 && !row.dead);
        assert!(burned.is_none(), "row {} has lost an attempt", burned.map_or(0, |(id, _)| *id));
    }
    let duplicates: usize = deliveries.values().map(|count| count - 1).sum();
    assert!(duplicates <= allowed.duplicates, "{duplicates} duplicates, allowed are {}", allowed.duplicates);
}

async fn written(db: &mut PgConnection) -> HashMap<i64, Written> {
    let rows = sqlx::query("select id, message_id, ordering_key, routing_key, body from written");
    let rows = rows.fetch_all(db).await.expect("written");
    let read = |row: sqlx::postgres::PgRow| {
        let written = Written {
            message_id: row.get("message_id"),
            ordering_key: row.get("ordering_key"),
            routing_key: row.get("routing_key"),
            body: row.get("body"),
        };
        (row.get("id"), written)
    };
    rows.into_iter().map(read).collect()
}

async fn kept(db: &mut PgConnection) -> HashMap<i64, Kept> {
    let rows = sqlx::query("select id, delivered_at is not null, dead_at is not null, attempts from outbox");
    let rows = rows.fetch_all(db).await.expect("outbox");
    let read = |row: sqlx::postgres::PgRow| {
        (row.get(0), Kept { delivered: row.get(1), dead: row.get(2), attempts: row.get(3) })
    };
    rows.into_iter().map(read).collect()
}

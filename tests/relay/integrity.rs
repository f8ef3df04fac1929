//! Promise 3: bytes, headers, ids and routing arrive as written, and messages are persistent.

use crate::support::World;
use crate::support::checker::Received;
use crate::support::world::Allowed;
use lapin::types::AMQPValue;

async fn delivered_as_written(payload_type: &str, extra: &[(&str, &str)]) {
    let world = World::new().await;
    world
        .sql(&format!(
            "alter table outbox alter column payload type {payload_type} using payload::text::{payload_type}"
        ))
        .await;
    let relay = world.relay(extra).await;
    let payload = match payload_type {
        "bytea" => "decode(md5(i::text), 'hex')".to_owned(),
        _ => format!("('{{\"ä\" :  \"' || repeat('x', i * 37) || '\"}}')::{payload_type}"),
    };
    world
        .sql(&format!(
            "insert into outbox (routing_key, ordering_key, payload, content_type, headers, created_at)
             select 'ok.' || i, 'k' || i % 3, {payload}, 'text/x-' || i,
                    jsonb_build_object('traceparent', '00-' || i, 'n', i, 'flag', true, 'none', null, 'half', 0.5),
                    to_timestamp(1700000000 + i)
             from generate_series(1, 50) i"
        ))
        .await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    let received = world.take_messages().await;
    world.finish_with(received.clone(), Allowed::default()).await;
    assert_eq!(received.len(), 50, "{payload_type}");
    received.iter().for_each(has_its_properties);
}

fn has_its_properties(message: &Received) {
    let i = message.id;
    assert_eq!(message.content_type.as_deref(), Some(format!("text/x-{i}").as_str()));
    assert_eq!(message.timestamp, Some(1_700_000_000 + i as u64));
    let header = |name: &str| message.headers.get(name).cloned();
    assert_eq!(header("traceparent"), Some(AMQPValue::LongString(format!("00-{i}").into())));
    assert_eq!(header("n"), Some(AMQPValue::LongLongInt(i)));
    assert_eq!(header("flag"), Some(AMQPValue::Boolean(true)));
    assert_eq!(header("none"), Some(AMQPValue::Void));
    assert_eq!(header("half"), Some(AMQPValue::Double(0.5)));
    assert_eq!(header("x-outbox-key"), Some(AMQPValue::LongString(format!("k{}", i % 3).into())));
    assert_eq!(header("x-outbox-attempt"), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_payload_type_and_every_property_arrives() {
    for payload_type in ["jsonb", "json", "text", "bytea", "varchar"] {
        delivered_as_written(payload_type, &[]).await;
    }
}

/// With the setting for poolers in transaction mode, which keep no session state.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_without_any_session_state() {
    delivered_as_written("jsonb", &[("OUTBOX_TRANSACTION_POOLING", "true")]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_qualified_table_of_another_name_works() {
    let world = World::new().await;
    world.sql("create schema \"Billing x\"").await;
    world.migrate("\"Billing x\".events").await;
    let relay = world.relay(&[("OUTBOX_TABLE", "\"Billing x\".events")]).await;
    world.sql("insert into \"Billing x\".events (routing_key, payload) values ('ok.1', '{\"a\": 1}')").await;
    world.until("select count(*) from \"Billing x\".events where delivered_at is not null", 1).await;
    relay.stop().await.expect("clean stop");
    let received = world.take_messages().await;
    assert_eq!(received.len(), 1);
    assert_eq!(received[0].body, b"{\"a\": 1}");
    world.abandon();
}

/// A row may name its own exchange; one without a name goes to the configured one, which may be RabbitMQ's
/// default exchange.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_goes_to_the_exchange_it_names() {
    let world = World::new().await;
    let relay = world.relay(&[("OUTBOX_EXCHANGE", "")]).await;
    let name = world.name.clone();
    world
        .sql(&format!(
            "insert into outbox (exchange, routing_key, payload) values
             ('{name}', 'ok.named', '1'), (null, '{name}', '2'), ('', '{name}', '3')"
        ))
        .await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn times_that_are_no_times_hurt_nobody() {
    let world = World::new().await;
    let relay = world.relay(&[]).await;
    world
        .sql(
            "insert into outbox (routing_key, payload, created_at) values
             ('ok.1', '1', 'infinity'), ('ok.2', '2', '-infinity'), ('ok.3', '3', '0044-03-15 BC')",
        )
        .await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

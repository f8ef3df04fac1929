//! Declares an exchange and a queue, and prints what arrives, one JSON object a line. For the demo,
//! and to look at a relay's messages while developing:
//!
//! ```text
//! AMQP_URL=amqp://localhost/%2f cargo run --example consume -- --exchange demo --queue demo --bind 'order.#'
//! ```

use anyhow::{Context, bail};
use clap::{Arg, ArgAction, Command, value_parser};
use futures_util::StreamExt;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Channel, Connection, ConnectionProperties, ExchangeKind};
use serde_json::{Value, json};
use std::io::Write;
use std::time::Duration;

fn command() -> Command {
    Command::new("consume")
        .about("Declares an exchange and a queue and prints what arrives; AMQP_URL says where")
        .arg(Arg::new("exchange").long("exchange").required(true).help("Durable topic exchange to declare"))
        .arg(Arg::new("queue").long("queue").required(true).help("Durable queue to declare and read"))
        .arg(
            Arg::new("bind")
                .long("bind")
                .action(ArgAction::Append)
                .help("Binding pattern, may be given several times"),
        )
        .arg(
            Arg::new("count")
                .long("count")
                .value_parser(value_parser!(u64))
                .help("End after this many messages"),
        )
        .arg(
            Arg::new("timeout")
                .long("timeout")
                .default_value("20s")
                .value_parser(humantime::parse_duration)
                .help("End, with an error if fewer than --count came, after this long"),
        )
        .arg(
            Arg::new("declare-only")
                .long("declare-only")
                .action(ArgAction::SetTrue)
                .help("Declare and read nothing"),
        )
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let matches = command().get_matches();
    let text = |name: &str| matches.get_one::<String>(name).cloned().unwrap_or_default();
    let url = std::env::var("AMQP_URL").context("AMQP_URL is not set")?;
    let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    let bindings = matches.get_many::<String>("bind").into_iter().flatten();
    declare(&channel, &text("exchange"), &text("queue"), bindings).await?;
    if !matches.get_flag("declare-only") {
        let timeout = *matches.get_one::<Duration>("timeout").context("timeout")?;
        let wanted = matches.get_one::<u64>("count").copied();
        let mut seen = 0;
        let queue = text("queue");
        let reading = read(&channel, &queue, wanted, &mut seen);
        let in_time = tokio::time::timeout(timeout, reading).await;
        match (in_time, wanted) {
            (Ok(result), _) => result?,
            (Err(_), Some(wanted)) => bail!("{seen} of {wanted} messages came within {timeout:?}"),
            (Err(_), None) => {}
        }
    }
    connection.close(200, "done".into()).await?;
    Ok(())
}

async fn declare(
    channel: &Channel,
    exchange: &str,
    queue: &str,
    bindings: impl Iterator<Item = &String>,
) -> lapin::Result<()> {
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    channel.exchange_declare(exchange.into(), ExchangeKind::Topic, durable, FieldTable::default()).await?;
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.into(), durable, FieldTable::default()).await?;
    for binding in bindings {
        let options = QueueBindOptions::default();
        channel
            .queue_bind(
                queue.into(),
                exchange.into(),
                binding.as_str().into(),
                options,
                FieldTable::default(),
            )
            .await?;
    }
    Ok(())
}

async fn read(channel: &Channel, queue: &str, wanted: Option<u64>, seen: &mut u64) -> anyhow::Result<()> {
    let options = BasicConsumeOptions::default();
    let mut deliveries =
        channel.basic_consume(queue.into(), "consume".into(), options, FieldTable::default()).await?;
    let mut out = std::io::stdout();
    while wanted.is_none_or(|wanted| *seen < wanted) {
        let delivery = deliveries.next().await.context("the broker ended the subscription")??;
        let properties = &delivery.properties;
        let headers = properties.headers().as_ref().map(|headers| {
            headers
                .inner()
                .iter()
                .map(|(key, value)| (key.to_string(), plain(value)))
                .collect::<serde_json::Map<_, _>>()
        });
        let body = serde_json::from_slice(&delivery.data)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&delivery.data).into_owned()));
        let line = json!({
            "routing_key": delivery.routing_key.as_str(),
            "message_id": properties.message_id().as_ref().map(|id| id.as_str()),
            "headers": headers,
            "body": body,
        });
        writeln!(out, "{line}")?;
        delivery.ack(BasicAckOptions::default()).await?;
        *seen += 1;
    }
    Ok(())
}

fn plain(value: &AMQPValue) -> Value {
    match value {
        AMQPValue::Boolean(flag) => json!(flag),
        AMQPValue::LongLongInt(number) => json!(number),
        AMQPValue::Double(number) => json!(number),
        AMQPValue::LongString(text) => json!(String::from_utf8_lossy(text.as_bytes())),
        AMQPValue::Void => Value::Null,
        other => json!(format!("{other:?}")),
    }
}

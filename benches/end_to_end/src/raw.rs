//! The raw publisher: persistent, mandatory messages with confirms from this process to the broker, and no database. Their
//! properties are those of the relay's messages.
//!
//! The same AMQP client as the relay's, at its best: a sliding window of unconfirmed messages on each of some channels.
//! It runs as a process of its own, so that its processor time can be told from everything else's.

use anyhow::{Context, Result, ensure};
use clap::ArgMatches;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, TryFutureExt};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use outbox_relay_chaos::usage::usage;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context as Task, Poll, Waker};
use std::time::Instant;

/// How the raw publisher sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Connections.
    pub connections: usize,
    /// Channels of each connection.
    pub channels: usize,
    /// Unconfirmed messages on each at a time.
    pub window: usize,
}

/// One of these is the ceiling.
pub const SHAPES: [Shape; 6] = [
    Shape { connections: 1, channels: 1, window: 250 },
    Shape { connections: 1, channels: 1, window: 1000 },
    Shape { connections: 1, channels: 4, window: 50 },
    Shape { connections: 1, channels: 4, window: 250 },
    Shape { connections: 1, channels: 4, window: 1000 },
    Shape { connections: 2, channels: 2, window: 250 },
];

/// What it prints.
#[derive(Debug, Serialize, Deserialize)]
pub struct Done {
    /// From its start to the last confirm.
    pub seconds: f64,
    /// Of this process.
    pub cpu_seconds: f64,
    /// Of this process.
    pub peak_rss_mib: f64,
}

impl Done {
    /// What this process has taken since then.
    pub fn since(begun: Instant) -> Result<Self> {
        let seconds = begun.elapsed().as_secs_f64();
        let usage = usage(std::process::id()).context("no /proc")?;
        Ok(Self { seconds, cpu_seconds: usage.cpu_seconds, peak_rss_mib: usage.peak_rss_mib() })
    }
}

/// `bench raw`: publishes, prints what it took, and ends.
pub async fn main(matches: &ArgMatches) -> Result<()> {
    let begun = Instant::now();
    let text = |name: &str| matches.get_one::<String>(name).cloned().unwrap_or_default();
    let number = |name: &str| matches.get_one::<usize>(name).copied().unwrap_or_default();
    let shape =
        Shape { connections: number("connections"), channels: number("channels"), window: number("window") };
    publish(&text("amqp-url"), text("exchange"), number("messages"), number("bytes"), shape).await?;
    println!("{}", serde_json::to_string(&Done::since(begun)?)?);
    Ok(())
}

async fn publish(url: &str, exchange: String, messages: usize, bytes: usize, shape: Shape) -> Result<()> {
    let payload: Arc<[u8]> = vec![b'x'; bytes].into();
    let share = messages.div_ceil(shape.connections * shape.channels);
    let (mut connections, mut tasks) = (Vec::new(), Vec::new());
    for _ in 0..shape.connections {
        let connection = Connection::connect(url, ConnectionProperties::default()).await?;
        for _ in 0..shape.channels {
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            tasks.push(tokio::spawn(send(
                channel,
                exchange.clone(),
                Arc::clone(&payload),
                share,
                shape.window,
            )));
        }
        connections.push(connection);
    }
    // A channel that is dropped while its connection closes makes lapin fail the connection.
    let mut open = Vec::new();
    for task in tasks {
        open.push(task.await??);
    }
    for connection in connections {
        connection.close(200, "done".into()).await?;
    }
    Ok(())
}

/// As far as it gets now.
pub fn poll_for_nobody<T>(answer: &mut BoxFuture<'_, T>) -> Poll<T> {
    answer.poll_unpin(&mut Task::from_waker(Waker::noop()))
}

/// An ack, and no return.
pub fn is_ack(answer: lapin::Result<Confirmation>) -> Result<()> {
    ensure!(matches!(answer?, Confirmation::Ack(None)), "a message was refused or returned");
    Ok(())
}

/// What no queue takes comes back.
pub const MANDATORY: BasicPublishOptions = BasicPublishOptions { mandatory: true, immediate: false };

/// Of a message in the middle of a drain.
pub fn usual_properties() -> BasicProperties {
    properties(1_000_000, Some("key 1000"), "00000000-0000-0000-0000-000000000000")
}

/// As large as those of the relay's messages.
pub fn properties(id: i64, key: Option<&str>, message_id: &str) -> BasicProperties {
    let mut headers = FieldTable::default();
    headers.insert("x-outbox-id".into(), AMQPValue::LongLongInt(id));
    if let Some(key) = key {
        headers.insert("x-outbox-key".into(), AMQPValue::LongString(key.into()));
    }
    BasicProperties::default()
        .with_delivery_mode(2)
        .with_content_type("application/json".into())
        .with_message_id(message_id.into())
        .with_timestamp(1_700_000_000)
        .with_headers(headers)
}

async fn send(
    channel: Channel,
    exchange: String,
    payload: Arc<[u8]>,
    messages: usize,
    window: usize,
) -> Result<Channel> {
    let properties = usual_properties();
    let publish = || {
        let sent = channel.basic_publish(
            exchange.as_str().into(),
            "bench".into(),
            MANDATORY,
            &payload,
            properties.clone(),
        );
        sent.and_then(|confirm| confirm).boxed()
    };
    let mut open = VecDeque::with_capacity(window);
    let mut left = messages;
    while left > 0 || !open.is_empty() {
        // All at once, so that frames share writes; that they have left wakes nobody.
        let free = window.saturating_sub(open.len()).min(left);
        left -= free;
        for _ in 0..free {
            let mut answer = publish();
            match poll_for_nobody(&mut answer) {
                Poll::Ready(answer) => is_ack(answer)?,
                Poll::Pending => open.push_back(answer),
            }
        }
        // In the order of sending, which is that of the answers: a wake-up for many of them.
        if let Some(oldest) = open.pop_front() {
            is_ack(oldest.await)?;
        }
        while let Some(mut next) = open.pop_front() {
            match poll_for_nobody(&mut next) {
                Poll::Ready(answer) => is_ack(answer)?,
                Poll::Pending => {
                    open.push_front(next);
                    break;
                }
            }
        }
    }
    drop(open);
    Ok(channel)
}

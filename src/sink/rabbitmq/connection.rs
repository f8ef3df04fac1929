//! A connection to the broker, with all its channels.
//!
//! lapin closes a channel in the background when its last handle is dropped. Where that meets the closing of the
//! connection, the connection fails instead of ending in order: the broker logs an error, and the close may never be
//! answered. So a handle of each channel is kept here until the connection is closed. A channel that is to go before
//! that is given up with [`BrokerConnection::abandon`].

use lapin::{Channel, Connection};
use std::ops::Deref;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Longest the closing of the connection may take.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// Longest the closing of a channel may take.
const CHANNEL_CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// A connection that ends in order.
#[derive(Debug)]
pub(super) struct BrokerConnection {
    connection: Connection,
    channels: Mutex<Vec<Channel>>,
}

impl BrokerConnection {
    pub(super) fn new(connection: Connection) -> Self {
        Self { connection, channels: Mutex::default() }
    }

    /// A new channel.
    pub(super) async fn create_channel(&self) -> lapin::Result<Channel> {
        let channel = self.connection.create_channel().await?;
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        channels.retain(|channel| channel.status().connected());
        channels.push(channel.clone());
        Ok(channel)
    }

    /// Gives up a channel whose state is not known. Closed in the background, because a close can hang as long as the
    /// connection is blocked.
    pub(super) fn abandon(&self, channel: Channel) {
        tokio::spawn(tokio::time::timeout(CHANNEL_CLOSE_LIMIT, async move {
            let _ = channel.close(200, "abandoned".into()).await;
        }));
    }

    /// Ends it, and its channels with it.
    pub(super) async fn close(&self, reason: &'static str) {
        let _ = tokio::time::timeout(CLOSE_LIMIT, self.connection.close(200, reason.into())).await;
    }
}

impl Deref for BrokerConnection {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

//! Exchanges that break the connection when the broker is asked for them. RabbitMQ cuts the text of a refusal after 252
//! bytes; where that is within a character, the answer is no UTF-8, and the client ends the connection.
//!
//! Known to all workers and kept when there is another connection: else each would find out anew, again and again.

use super::connection::BrokerConnection;
use crate::retry::Backoff;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

/// Connections in a row that may break before the exchange is blamed: an outage breaks some, too.
const BREAKS_BLAME_EXCHANGE: u32 = 3;
/// Until it is asked for again.
const REST: Backoff = Backoff { min: Duration::from_secs(1), max: Duration::from_secs(300) };
/// Exchanges remembered at most; with more, what is known is forgotten.
const EXCHANGES_MAX: usize = 1024;

/// What is known.
#[derive(Debug, Clone, Default)]
pub(super) struct Breaks(Arc<Mutex<HashMap<String, Broken>>>);

#[derive(Debug)]
struct Broken {
    connections: u32,
    /// The last of them: it breaks once, for all who have asked.
    last: Weak<BrokerConnection>,
    ask_again: Instant,
}

impl Breaks {
    /// A connection has broken before the answer. One that was not shown to work when this exchange was asked for says nothing.
    pub(super) fn note(&self, exchange: &str, connection: &Arc<BrokerConnection>) {
        let mut all = self.all();
        if all.len() >= EXCHANGES_MAX && !all.contains_key(exchange) {
            all.clear();
        }
        let nothing = || Broken { connections: 0, last: Weak::new(), ask_again: Instant::now() };
        let broken = all.entry(exchange.to_owned()).or_insert_with(nothing);
        if std::ptr::eq(broken.last.as_ptr(), Arc::as_ptr(connection)) {
            return;
        }
        broken.connections = broken.connections.saturating_add(1);
        broken.last = Arc::downgrade(connection);
        if broken.connections >= BREAKS_BLAME_EXCHANGE {
            let rest = REST.delay(broken.connections - BREAKS_BLAME_EXCHANGE);
            broken.ask_again = Instant::now() + rest;
        }
    }

    /// There was an answer.
    pub(super) fn answered(&self, exchange: &str) {
        self.all().remove(exchange);
    }

    /// It has broken a connection, so the next is to be shown to work before it is asked for.
    pub(super) fn is_suspect(&self, exchange: &str) -> bool {
        self.all().contains_key(exchange)
    }

    /// Why it is not asked for now.
    pub(super) fn refusal(&self, exchange: &str) -> Option<String> {
        let all = self.all();
        let broken = all.get(exchange).filter(|broken| Instant::now() < broken.ask_again)?;
        let times = broken.connections;
        Some(format!(
            "the connection breaks when the broker is asked for exchange {exchange:?} ({times} times); create it, or give it a shorter name"
        ))
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Broken>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

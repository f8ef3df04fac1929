//! Exchanges that break the connection when the broker is asked for them. RabbitMQ cuts the text of a refusal after 252
//! bytes; where that is within a character, the answer is no UTF-8, and the client ends the connection.
//!
//! An exchange that was asked for when the connection of all workers broke is asked for on a worker's own connection only,
//! until there is an answer. What is known is the same for all workers, whatever the connection.

use super::exchanges::ASK_LIMIT;
use crate::retry::{BREAK_BACKOFF, BREAKS_BLAME, Backoff};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between questions for an exchange that is to blame.
const REST: Backoff = Backoff { min: Duration::from_secs(15), max: Duration::from_secs(300) };
/// Without a connection that nobody else uses nothing can be learned of an exchange, and an outage may have been all.
const SUSPECTED_FOR: Duration = Duration::from_secs(60);
/// Exchanges remembered at most; for another, one is forgotten.
const EXCHANGES_MAX: usize = 1024;

/// What is known.
#[derive(Debug, Clone, Default)]
pub(super) struct Breaks(Arc<Mutex<HashMap<String, Broken>>>);

#[derive(Debug)]
struct Broken {
    /// Connections that broke under this question alone.
    connections: u32,
    /// The last time, or when it was suspected.
    asked_at: Instant,
    ask_again: Instant,
}

/// What is to be done about an exchange that nothing else is known of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asking {
    /// The usual way.
    Anywhere,
    /// On a connection that nobody else uses.
    Apart,
    /// Not yet.
    Later,
    /// Not for long: it is to blame, for this reason.
    Blamed(String),
}

impl Breaks {
    /// The connection of all workers has broken before the answer. Whatever it was, the next question is harmless.
    pub(super) fn suspect(&self, exchange: &str) {
        self.change(exchange, |broken| broken.asked_at = Instant::now());
    }

    /// A connection has broken that nothing else was sent on.
    pub(super) fn blame(&self, exchange: &str, now: Instant) {
        self.change(exchange, |broken| {
            broken.connections = broken.connections.saturating_add(1);
            let pause = match broken.connections.checked_sub(BREAKS_BLAME) {
                None => BREAK_BACKOFF.delay(broken.connections - 1),
                Some(since) => REST.delay(since),
            };
            (broken.asked_at, broken.ask_again) = (now, now + pause);
        });
    }

    /// There was an answer.
    pub(super) fn answered(&self, exchange: &str) {
        self.all().remove(exchange);
    }

    /// What is to be done by one that has a connection of its own, or not. Of those that have, one asks at a time: what
    /// breaks all of them is one break.
    pub(super) fn asking(&self, exchange: &str, apart: bool, now: Instant) -> Asking {
        match self.all().get_mut(exchange) {
            None => Asking::Anywhere,
            Some(Broken { connections: ..BREAKS_BLAME, asked_at, .. })
                if now >= *asked_at + SUSPECTED_FOR =>
            {
                Asking::Anywhere
            }
            Some(broken) if now >= broken.ask_again => {
                if apart {
                    broken.ask_again = now + ASK_LIMIT;
                }
                Asking::Apart
            }
            Some(Broken { connections: ..BREAKS_BLAME, .. }) => Asking::Later,
            Some(Broken { connections, .. }) => Asking::Blamed(format!(
                "the connection breaks when the broker is asked for exchange {exchange:?} ({connections} times); create it, or give it a shorter name"
            )),
        }
    }

    fn change(&self, exchange: &str, change: impl FnOnce(&mut Broken)) {
        let mut all = self.all();
        if all.len() >= EXCHANGES_MAX
            && !all.contains_key(exchange)
            && let Some(any) = all.keys().next().cloned()
        {
            all.remove(&any);
        }
        let nothing = || {
            let now = Instant::now();
            Broken { connections: 0, asked_at: now, ask_again: now }
        };
        change(all.entry(exchange.to_owned()).or_insert_with(nothing));
    }

    fn all(&self) -> MutexGuard<'_, HashMap<String, Broken>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exchange_is_to_blame_when_its_question_breaks_one_connection_after_the_other() {
        let (breaks, mut now) = (Breaks::default(), Instant::now());
        assert_eq!(breaks.asking("x", false, now), Asking::Anywhere);
        breaks.suspect("x");
        assert_eq!(breaks.asking("x", false, now + SUSPECTED_FOR / 2), Asking::Apart);
        assert_eq!(breaks.asking("x", false, now + SUSPECTED_FOR * 2), Asking::Anywhere, "nobody could ask");
        for number in 1..=BREAKS_BLAME {
            now += BREAK_BACKOFF.max;
            assert_eq!(breaks.asking("x", true, now), Asking::Apart);
            assert_ne!(breaks.asking("x", true, now), Asking::Apart, "one at a time");
            breaks.blame("x", now);
            let blamed = matches!(breaks.asking("x", true, now), Asking::Blamed(_));
            assert_eq!(blamed, number == BREAKS_BLAME, "after {number}");
            let later = breaks.asking("x", false, now + SUSPECTED_FOR);
            assert_eq!(later == Asking::Anywhere, !blamed, "nobody could ask any more");
        }
        assert_eq!(breaks.asking("x", true, now + REST.max), Asking::Apart, "it may be there by now");
        breaks.answered("x");
        assert_eq!(breaks.asking("x", true, now), Asking::Anywhere);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let breaks = Breaks::default();
        for number in 0..2 * EXCHANGES_MAX {
            breaks.suspect(&number.to_string());
        }
        assert_eq!(breaks.all().len(), EXCHANGES_MAX);
    }
}

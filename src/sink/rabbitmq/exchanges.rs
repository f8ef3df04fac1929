//! Which exchanges may be published to.
//!
//! Publishing to a missing or forbidden exchange closes the channel and takes every message in
//! flight on it along. So each exchange is asked for first, on a channel of its own, and the answer
//! is kept for a while. An exchange that has refused a publish is tried again with one message alone.

use super::breaks::{Asking, Breaks};
use super::classify::{is_forced, reply_code, sentence};
use super::connection::BrokerConnection;
use lapin::options::ExchangeDeclareOptions;
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, ExchangeKind};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long "exists" is believed. A deletion within this time costs one closed channel.
const KNOWN_FOR: Duration = Duration::from_secs(10);
/// How long a refusal is believed.
const REFUSED_FOR: Duration = Duration::from_secs(1);
/// Exchanges remembered at most; with more, all are asked for again.
const ANSWERS_MAX: usize = 1024;
/// Longest a question may take.
pub(super) const ASK_LIMIT: Duration = Duration::from_secs(5);

/// May this exchange be published to?
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Access {
    /// Yes, in company of others.
    Open,
    /// It refused lately; one message alone may try.
    OneTry,
    /// No, and why.
    Refused(String),
    /// Asking may break the connection: not on one that others use, and not all the time.
    AtRisk,
}

#[derive(Debug)]
struct Answer {
    at: Instant,
    refused: Option<String>,
    /// The refusal was about a publish, so that asking does not clear it.
    by_publish: bool,
}

/// The answers of one worker.
#[derive(Debug)]
pub(super) struct Exchanges {
    answers: HashMap<String, Answer>,
    channel: Option<Channel>,
    /// Nobody else uses the connection.
    apart: bool,
    breaks: Breaks,
}

impl Exchanges {
    /// Nothing is known but what they did to connections.
    pub(super) fn new(apart: bool, breaks: Breaks) -> Self {
        Self { answers: HashMap::new(), channel: None, apart, breaks }
    }

    /// What is known, asking the broker where nothing is. `Err`: the connection is not usable.
    pub(super) async fn access(
        &mut self,
        connection: &Arc<BrokerConnection>,
        exchange: &str,
    ) -> Result<Access, String> {
        match self.answers.get(exchange) {
            Some(Answer { at, refused: Some(reason), .. }) if at.elapsed() < REFUSED_FOR => {
                Ok(Access::Refused(reason.clone()))
            }
            Some(Answer { at, refused: None, .. }) if at.elapsed() < KNOWN_FOR => Ok(Access::Open),
            Some(Answer { by_publish: true, .. }) => Ok(Access::OneTry),
            // The default exchange exists always and cannot be declared.
            _ if exchange.is_empty() => Ok(Access::Open),
            _ => match self.breaks.asking(exchange, self.apart, Instant::now()) {
                Asking::Blamed(reason) => Ok(Access::Refused(reason)),
                Asking::Anywhere => self.ask(connection, exchange).await,
                Asking::Apart if self.apart => self.ask(connection, exchange).await,
                Asking::Apart | Asking::Later => Ok(Access::AtRisk),
            },
        }
    }

    /// A publish to it went through. Called for every message, so it allocates only for news.
    pub(super) fn accepted(&mut self, exchange: &str) {
        match self.answers.get_mut(exchange) {
            Some(answer) => *answer = Answer { at: Instant::now(), refused: None, by_publish: false },
            None => self.note(exchange, None, false),
        }
    }

    /// A publish to it closed the channel.
    pub(super) fn refused(&mut self, exchange: &str, reason: String) {
        self.note(exchange, Some(reason), true);
    }

    fn note(&mut self, exchange: &str, refused: Option<String>, by_publish: bool) {
        if self.answers.len() >= ANSWERS_MAX {
            self.answers.clear();
        }
        self.answers.insert(exchange.to_owned(), Answer { at: Instant::now(), refused, by_publish });
    }

    /// Another connection: nothing is known.
    pub(super) fn forget(&mut self) {
        *self = Self::new(self.apart, self.breaks.clone());
    }

    async fn ask(&mut self, connection: &Arc<BrokerConnection>, exchange: &str) -> Result<Access, String> {
        let answer = match tokio::time::timeout(ASK_LIMIT, self.exists(connection, exchange)).await {
            Ok(answer) => answer,
            Err(_) => {
                if let Some(channel) = self.channel.take() {
                    connection.abandon(channel);
                }
                return Err("no answer from the broker".to_owned());
            }
        };
        let refused = match answer {
            Ok(()) => None,
            Err(error) => {
                self.channel = None;
                if !matches!(reply_code(&error), Some(403 | 404)) {
                    return Err(sentence(&error));
                }
                Some(sentence(&error))
            }
        };
        self.breaks.answered(exchange);
        let access = refused.clone().map_or(Access::Open, Access::Refused);
        self.note(exchange, refused, false);
        Ok(access)
    }

    async fn exists(&mut self, connection: &Arc<BrokerConnection>, exchange: &str) -> lapin::Result<()> {
        let channel = match &self.channel {
            Some(channel) => channel,
            None => self.channel.insert(connection.create_channel().await?),
        };
        let answer = declare_passively(channel, exchange).await;
        if let Err(error) = &answer
            && !connection.status().connected()
            && !is_forced(error)
        {
            match self.apart {
                true => self.breaks.blame(exchange, Instant::now()),
                false => self.breaks.suspect(exchange),
            }
        }
        answer
    }
}

/// Asks for an exchange without creating it; 404 closes the channel.
pub(super) async fn declare_passively(channel: &Channel, exchange: &str) -> lapin::Result<()> {
    let options = ExchangeDeclareOptions { passive: true, ..Default::default() };
    let name = ShortString::try_new(exchange).unwrap_or_default();
    channel.exchange_declare(name, ExchangeKind::Direct, options, FieldTable::default()).await
}

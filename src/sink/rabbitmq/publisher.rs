//! A worker's channel: a batch out, *all* confirms in, and only then the verdicts.
//!
//! The barrier is needed because lapin hands a returned message to whichever confirm completes
//! next. Once every confirm of the channel has completed, every return has been handed out, and
//! the returned messages are known by their `x-outbox-id`. If the channel broke before that, an ack
//! may speak of a message whose return was handed to nobody: as soon as one return was seen in a
//! broken batch, its acks are [`Fault::Unknown`].

use super::breaks::Breaks;
use super::classify::{
    Blamed, Evidence, fault_of_close, is_forced, is_loss, names, names_exchange, sentence, size_limit,
};
use super::confirms::{Answer, Answers, ChannelState, Ended, OnItsWay, gather};
use super::connection::BrokerConnection;
use super::exchanges::{Access, Exchanges};
use super::message::{Message, compose};
use super::rounds::Rounds;
use super::way::Way;
use crate::mutants::mutant;
use crate::ownership::{BatchPermit, Permit};
use crate::sink::{Fault, Publisher, Refusal, SinkState, Verdict};
use crate::store::{Route, Row};
use futures_util::{FutureExt, TryFutureExt};
use lapin::Channel;
use lapin::message::BasicReturnMessage;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Longest the opening of a channel may take.
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// Frame size when the broker sets no limit; RabbitMQ's default.
const FRAME_MAX_BYTES: usize = 131_072;
/// A channel that is nacked is made anew when it is older than this. A quorum queue that was full and whose limit was
/// taken away goes on refusing the channels it has told to stop (rabbitmq-server issue 12206).
const NACKED_CHANNEL_AGE: Duration = Duration::from_secs(2);
/// A worker's way to RabbitMQ.
#[derive(Debug)]
pub struct RabbitPublisher {
    way: Way,
    state: watch::Receiver<SinkState>,
    confirm_timeout: Duration,
    channel: Option<Open>,
    exchanges: Exchanges,
    /// The connection that `exchanges` and `message_size_max` were learned from.
    learned_from: Weak<BrokerConnection>,
    /// The broker's limit, once it has told us.
    message_size_max: Option<usize>,
}

/// A channel in confirm mode and the connection it belongs to.
#[derive(Debug, Clone)]
struct Open {
    channel: Channel,
    connection: Arc<BrokerConnection>,
    opened_at: Instant,
}

/// Messages that go out together.
struct Round<'a> {
    batch: &'a [Row],
    /// Which rows of the batch.
    places: &'a [usize],
    permit: &'a BatchPermit<'a>,
}

impl<'a> Round<'a> {
    fn rows(&self) -> impl Iterator<Item = (usize, &'a Row)> {
        self.places.iter().map(|place| (*place, &self.batch[*place]))
    }
}

impl RabbitPublisher {
    pub(super) fn new(
        way: Way,
        state: watch::Receiver<SinkState>,
        confirm_timeout: Duration,
        breaks: Breaks,
    ) -> Self {
        let exchanges = Exchanges::new(way.is_own(), breaks);
        let learned_from = Weak::new();
        Self { way, state, confirm_timeout, channel: None, exchanges, learned_from, message_size_max: None }
    }

    /// The channel, opened anew after a loss.
    async fn open(&mut self) -> Result<Open, String> {
        let connection = self.way.connection().await?;
        if let Some(open) = &self.channel
            && open.channel.status().connected()
            && Arc::ptr_eq(&open.connection, &connection)
        {
            return Ok(open.clone());
        }
        self.channel = None;
        if self.learned_from.upgrade().is_none_or(|known| !Arc::ptr_eq(&known, &connection)) {
            self.exchanges.forget();
            self.message_size_max = None;
            self.learned_from = Arc::downgrade(&connection);
        }
        let silence = "the broker opens no channel";
        let channel = match tokio::time::timeout(OPEN_LIMIT, connection.create_channel()).await {
            Ok(channel) => channel.map_err(|error| sentence(&error))?,
            Err(_) => return Err(silence.to_owned()),
        };
        let select = channel.confirm_select(ConfirmSelectOptions::default());
        let refused = match tokio::time::timeout(OPEN_LIMIT, select).await {
            Ok(Ok(())) => {
                let open = Open { channel, connection, opened_at: Instant::now() };
                return Ok(self.channel.insert(open).clone());
            }
            Ok(Err(error)) => sentence(&error),
            Err(_) => silence.to_owned(),
        };
        connection.abandon(channel);
        Err(refused)
    }

    fn abandon_channel(&mut self) {
        if let Some(open) = self.channel.take() {
            open.connection.abandon(open.channel);
        }
    }

    fn check(&self, row: &Row, frame_max: usize) -> Result<Message, Refusal> {
        let hopeless = |reason| Refusal::new(Fault::Hopeless, reason);
        if let Some(limit) = self.message_size_max.filter(|limit| row.payload.len() > *limit) {
            let size = row.payload.len();
            return Err(hopeless(format!(
                "the payload has {size} bytes, the broker's max_message_size is {limit}"
            )));
        }
        compose(row, frame_max).map_err(hopeless)
    }

    /// Sorts the rows that have a message into rounds, but for those whose exchange refuses them or is asked for elsewhere.
    async fn rounds(
        &mut self,
        connection: &Arc<BrokerConnection>,
        batch: &[Row],
        messages: &[Option<Message>],
        verdicts: &mut [Option<Verdict>],
    ) -> Result<Vec<Vec<usize>>, String> {
        let (mut rounds, mut behind) = (Rounds::default(), HashSet::new());
        let sendable = batch.iter().zip(messages).enumerate().filter(|(_, (_, message))| message.is_some());
        for (place, (row, _)) in sendable {
            let (exchange, key) = (row.route.exchange.as_str(), row.ordering_key.as_deref());
            if key.is_some_and(|key| behind.contains(key)) {
                verdicts[place] = Some(Err(Refusal::new(Fault::Outage, "not sent: behind one of its key")));
                continue;
            }
            match self.exchanges.access(connection, exchange).await? {
                Access::Open => rounds.add(place, exchange, key, false),
                Access::OneTry => rounds.add(place, exchange, key, true),
                Access::Refused(reason) => {
                    verdicts[place] = Some(Err(Refusal::new(Fault::Destination, reason)));
                }
                Access::AtRisk => {
                    let reason = "not sent: the connection broke when the broker was asked for its exchange";
                    verdicts[place] = Some(Err(Refusal::new(Fault::Risk, reason)));
                    behind.extend(key);
                }
            }
        }
        Ok(rounds.into_rounds())
    }

    /// One round: out, all confirms in, verdicts.
    async fn send(
        &mut self,
        open: &Open,
        round: &Round<'_>,
        messages: &mut [Option<Message>],
        verdicts: &mut [Option<Verdict>],
        give_up: &CancellationToken,
    ) {
        let mut answers = Answers::of(round.places.len());
        let on_their_way = hand_over(open, round, messages, &mut answers);
        let blocked = || open.connection.status().blocked() || !self.state.borrow().is_ready();
        let channel_state = || match open.channel.status().connected() {
            false => ChannelState::Lost,
            true if blocked() => ChannelState::Blocked,
            true => ChannelState::Open,
        };
        let ended = gather(on_their_way, &mut answers, self.confirm_timeout, channel_state, give_up).await;
        if ended != Ended::Complete {
            self.abandon_channel();
        }
        let Answers { by_slot, returned } = answers;
        let nacked = by_slot.iter().any(|answer| matches!(answer, Some(Answer::Nack)));
        if nacked && open.opened_at.elapsed() >= NACKED_CHANNEL_AGE {
            self.abandon_channel();
        }
        let failed = |answer: &Option<Answer>| matches!(answer, Some(Answer::Error(_)) | None);
        let broken = ended != Ended::Complete || by_slot.iter().any(failed);
        let evidence = evidence(open, self.way.is_own(), round, &by_slot);
        let lost = if evidence.broke { Fault::Break } else { Fault::Unknown };
        for ((place, row), answer) in round.rows().zip(by_slot) {
            let none = if ended == Ended::Lost { Answer::Lost } else { Answer::Silence };
            let verdict = match answer.unwrap_or(none) {
                _ if returned.contains_key(&row.id) && !mutant!("ignore-returns") => {
                    Err(unroutable(row, &returned[&row.id]))
                }
                Answer::Ack if broken && !returned.is_empty() => {
                    let reason = "confirmed, but the channel broke before all returns were seen";
                    Err(Refusal::new(Fault::Unknown, reason))
                }
                Answer::Ack => Ok(()),
                Answer::Nack => Err(refused_by_queue(row)),
                Answer::NotSent(refusal) => Err(refusal),
                Answer::Error(error) => Err(self.learn(&error, row, evidence)),
                Answer::Lost => Err(Refusal::new(lost, "the connection was lost before the confirm")),
                Answer::Silence => Err(Refusal::new(Fault::Silence, "no confirm from the broker in time")),
            };
            if verdict.is_ok() {
                self.exchanges.accepted(&row.route.exchange);
            }
            verdicts[place] = Some(verdict);
        }
    }

    /// What the closing of the channel says of this message, remembered for the next batch.
    fn learn(&mut self, error: &lapin::Error, row: &Row, evidence: Evidence) -> Refusal {
        let (text, exchange) = (sentence(error), row.route.exchange.as_str());
        let fault = fault_of_close(error, blamed(row), evidence);
        if fault == Fault::Destination && names_exchange(&text, exchange) {
            self.exchanges.refused(exchange, text.clone());
        }
        if let Some(limit) = size_limit(error, &text) {
            self.message_size_max = Some(limit);
        }
        Refusal::new(fault, text)
    }
}

impl Publisher for RabbitPublisher {
    async fn publish(&mut self, batch: &[Row], permit: &Permit, give_up: &CancellationToken) -> Vec<Verdict> {
        let verdicts = self.publish_all(batch, permit, give_up).await;
        self.way.rest();
        verdicts
    }
}

impl RabbitPublisher {
    async fn publish_all(
        &mut self,
        batch: &[Row],
        permit: &Permit,
        give_up: &CancellationToken,
    ) -> Vec<Verdict> {
        let mut verdicts: Vec<Option<Verdict>> = batch.iter().map(|_| None).collect();
        let open = match self.open().await {
            Ok(open) => open,
            Err(reason) => return vec![Err(Refusal::new(Fault::Outage, reason)); batch.len()],
        };
        let frame_max = match open.connection.configuration().frame_max() {
            0 => FRAME_MAX_BYTES,
            frame_max => frame_max as usize,
        };
        let mut messages: Vec<Option<Message>> = Vec::with_capacity(batch.len());
        for (row, verdict) in batch.iter().zip(&mut verdicts) {
            messages.push(match self.check(row, frame_max) {
                Ok(message) => Some(message),
                Err(refusal) => {
                    *verdict = Some(Err(refusal));
                    None
                }
            });
        }
        let rounds = match self.rounds(&open.connection, batch, &messages, &mut verdicts).await {
            Ok(rounds) => rounds,
            Err(reason) => return vec![Err(Refusal::new(Fault::Outage, reason)); batch.len()],
        };
        let permit = permit.for_batch();
        for places in rounds.iter().filter(|places| !places.is_empty()) {
            // A round after one that broke the channel, or gave it up, is left for the next batch.
            if self.channel.is_some() && open.channel.status().connected() {
                let round = Round { batch, places, permit: &permit };
                self.send(&open, &round, &mut messages, &mut verdicts, give_up).await;
            }
        }
        let not_sent = || Err(Refusal::new(Fault::Outage, "not sent: the channel was lost"));
        verdicts.into_iter().map(|verdict| verdict.unwrap_or_else(not_sent)).collect()
    }
}

fn blamed(row: &Row) -> Blamed<'_> {
    let Route { exchange, routing_key } = &*row.route;
    Blamed { exchange, routing_key, payload_len: row.payload.len() }
}

/// What all the answers of a round say together.
fn evidence(open: &Open, apart: bool, round: &Round<'_>, by_slot: &[Option<Answer>]) -> Evidence {
    let errors = || {
        by_slot.iter().zip(round.rows()).filter_map(|(answer, (_, row))| match answer {
            Some(Answer::Error(error)) => Some((error, row)),
            _ => None,
        })
    };
    // What had not left yet may fail before the connection counts as lost.
    let lost = !open.connection.status().connected() || errors().any(|(error, _)| is_loss(error));
    Evidence {
        alone: round.places.len() == 1,
        named: errors().any(|(error, row)| names(&sentence(error), blamed(row))),
        apart,
        broke: lost && !errors().any(|(error, _)| is_forced(error)),
    }
}

/// Hands the messages of a round over to the connection, in order. The first poll is what queues the frames, so messages
/// leave in the order of the batch and share writes; that they have left wakes nobody.
fn hand_over<'a>(
    open: &'a Open,
    round: &Round<'a>,
    messages: &mut [Option<Message>],
    answers: &mut Answers,
) -> VecDeque<OnItsWay<'a>> {
    let mut nobody = Context::from_waker(Waker::noop());
    let mut on_their_way = VecDeque::with_capacity(round.places.len());
    for (slot, (place, row)) in round.rows().enumerate() {
        // A row has one turn in one of the rounds.
        let Some(Message { exchange, routing_key, properties }) = messages[place].take() else { continue };
        // Here, right before the frames are handed over, and nowhere earlier.
        if !round.permit.allows(row) {
            answers.by_slot[slot] = Some(Answer::NotSent(Refusal::without_lease()));
            continue;
        }
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let publish = open.channel.basic_publish(exchange, routing_key, options, &row.payload, properties);
        // Not an async block, which would hold the sending twice: 2 KB a message.
        let mut answer = publish.and_then(|confirm| confirm).boxed();
        match answer.poll_unpin(&mut nobody) {
            Poll::Ready(answer) => answers.take(slot, answer),
            Poll::Pending => on_their_way.push_back((slot, answer)),
        }
    }
    on_their_way
}

fn unroutable(row: &Row, message: &BasicReturnMessage) -> Refusal {
    let (code, text) = (message.reply_code, message.reply_text.as_str());
    let fault = if code == 312 { Fault::Unroutable } else { Fault::Destination };
    let exchange = match row.route.exchange.as_str() {
        "" => "the default exchange".to_owned(),
        name => format!("exchange {name:?}"),
    };
    Refusal::new(
        fault,
        format!("no queue takes routing key {:?} from {exchange} ({code} {text})", row.route.routing_key),
    )
}

fn refused_by_queue(row: &Row) -> Refusal {
    let reason = format!(
        "a queue behind routing key {:?} refused it (basic.nack: full or failing)",
        row.route.routing_key
    );
    Refusal::new(Fault::Destination, reason)
}

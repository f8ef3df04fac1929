//! One worker's channel: a batch out, *all* confirms in, and only then the verdicts.
//!
//! The barrier is needed because lapin hands a returned message to whichever confirm completes
//! next. Once every confirm of the channel has completed, every return has been handed out, and
//! the returned messages are known by their `x-outbox-id`. If the channel broke before that, an ack
//! may speak of a message whose return was handed to nobody: as soon as one return was seen in a
//! broken batch, its acks are [`Fault::Unknown`].

use super::classify::{Blamed, fault_of_close, names_exchange, sentence, size_limit};
use super::connection::BrokerConnection;
use super::exchanges::{Access, Exchanges};
use super::message::{ID_HEADER, Message, compose};
use super::rounds::Rounds;
use crate::mutants::mutant;
use crate::ownership::{BatchPermit, Permit};
use crate::sink::{Fault, Publisher, Refusal, SinkState, Verdict};
use crate::store::Row;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use lapin::message::BasicReturnMessage;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::AMQPValue;
use lapin::{Channel, Confirmation};
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// Longest the opening of a channel may take.
const OPEN_LIMIT: Duration = Duration::from_secs(5);
/// Frame size when the broker sets no limit; RabbitMQ's default.
const FRAME_MAX_BYTES: usize = 131_072;
/// How often a waiting batch looks at the state of the connection.
const LOOK: Duration = Duration::from_millis(100);
/// A channel that is nacked is made anew when it is older than this. A quorum queue that was full and whose limit was
/// taken away goes on refusing the channels it has told to stop (rabbitmq-server issue 12206).
const NACKED_CHANNEL_AGE: Duration = Duration::from_secs(2);
/// How long a batch waits for its confirms to fail by themselves after the channel was lost.
const LOST_LIMIT: Duration = Duration::from_secs(2);

/// A worker's way to RabbitMQ.
#[derive(Debug)]
pub struct RabbitPublisher {
    connection: watch::Receiver<Option<Arc<BrokerConnection>>>,
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

/// What came back for one message.
enum Answer {
    Ack,
    Nack,
    Error(lapin::Error),
    NotSent(Refusal),
    Lost,
    Silence,
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

/// A message that was handed over, with its slot in the round; ends with the broker's answer.
type OnItsWay<'a> = (usize, BoxFuture<'a, lapin::Result<Confirmation>>);

/// What has come back for a round.
#[derive(Default)]
struct Answers {
    by_slot: Vec<Option<Answer>>,
    /// Returned messages by row id; not necessarily of the confirm they came with.
    returned: HashMap<i64, BasicReturnMessage>,
}

impl Answers {
    fn take(&mut self, slot: usize, answer: lapin::Result<Confirmation>) {
        let (answer, message) = match answer {
            Ok(Confirmation::Ack(message)) => (Answer::Ack, message),
            Ok(Confirmation::Nack(message)) => (Answer::Nack, message),
            // The channel was not in confirm mode after all; nothing is known.
            Ok(Confirmation::NotRequested) => (Answer::Lost, None),
            Err(error) => (Answer::Error(error), None),
        };
        self.by_slot[slot] = Some(answer);
        if let Some(message) = message
            && let Some(id) = outbox_id(&message)
        {
            self.returned.insert(id, message);
        }
    }

    /// Takes whatever has come in; whether anything had. In passes, until one finds nothing: a return comes with any confirm
    /// that was completed before its own, and that one may have been passed by before it was there.
    fn take_all(&mut self, on_their_way: &mut VecDeque<OnItsWay<'_>>) -> bool {
        let (mut nobody, at_first) = (Context::from_waker(Waker::noop()), on_their_way.len());
        loop {
            let before = on_their_way.len();
            on_their_way.retain_mut(|(slot, answer)| match answer.poll_unpin(&mut nobody) {
                Poll::Ready(answer) => {
                    self.take(*slot, answer);
                    false
                }
                Poll::Pending => true,
            });
            if on_their_way.len() == before {
                return before < at_first;
            }
        }
    }
}

/// How the channel stands while its answers are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Open,
    /// The broker takes nothing for now.
    Blocked,
    Lost,
}

/// How the waiting for a batch's confirms ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// All are in, or have failed.
    Complete,
    /// The channel is gone or the relay out of time, and some never came.
    Lost,
    /// The confirm time-out.
    TimedOut,
}

impl RabbitPublisher {
    pub(super) fn new(
        connection: watch::Receiver<Option<Arc<BrokerConnection>>>,
        state: watch::Receiver<SinkState>,
        confirm_timeout: Duration,
    ) -> Self {
        let exchanges = Exchanges::default();
        let learned_from = Weak::new();
        Self {
            connection,
            state,
            confirm_timeout,
            channel: None,
            exchanges,
            learned_from,
            message_size_max: None,
        }
    }

    /// The channel, opened anew after a loss.
    async fn open(&mut self) -> Result<Open, String> {
        let connection = self.connection.borrow().clone().ok_or("not connected")?;
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

    /// Sorts the rows that have a message into rounds.
    async fn rounds(
        &mut self,
        connection: &BrokerConnection,
        batch: &[Row],
        messages: &[Option<Message>],
        verdicts: &mut [Option<Verdict>],
    ) -> Result<Vec<Vec<usize>>, String> {
        let mut rounds = Rounds::default();
        let sendable = batch.iter().zip(messages).enumerate().filter(|(_, (_, message))| message.is_some());
        for (place, (row, _)) in sendable {
            let (exchange, key) = (row.route.exchange.as_str(), row.ordering_key.as_deref());
            match self.exchanges.access(connection, exchange).await? {
                Access::Open => rounds.add(place, exchange, key, false),
                Access::OneTry => rounds.add(place, exchange, key, true),
                Access::Refused(reason) => {
                    verdicts[place] = Some(Err(Refusal::new(Fault::Destination, reason)));
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
        let mut answers =
            Answers { by_slot: round.places.iter().map(|_| None).collect(), ..Answers::default() };
        let on_their_way = hand_over(open, round, messages, &mut answers);
        let link = || match (open.channel.status().connected(), self.state.borrow().is_ready()) {
            (false, _) => Link::Lost,
            (true, true) => Link::Open,
            (true, false) => Link::Blocked,
        };
        let ended = gather(on_their_way, &mut answers, self.confirm_timeout, link, give_up).await;
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
                Answer::Error(error) => Err(self.learn(&error, row, round.places.len() == 1)),
                Answer::Lost => Err(Refusal::new(Fault::Unknown, "the channel was lost before the confirm")),
                Answer::Silence => Err(Refusal::new(Fault::Silence, "no confirm from the broker in time")),
            };
            if verdict.is_ok() {
                self.exchanges.accepted(&row.route.exchange);
            }
            verdicts[place] = Some(verdict);
        }
    }

    /// What the closing of the channel says of this message, remembered for the next batch.
    fn learn(&mut self, error: &lapin::Error, row: &Row, alone: bool) -> Refusal {
        let (text, exchange) = (sentence(error), row.route.exchange.as_str());
        let blamed = Blamed { exchange, routing_key: &row.route.routing_key, payload_len: row.payload.len() };
        let fault = fault_of_close(error, blamed, alone);
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

/// Gathers answers until all are in or no more can be hoped for. One after the other, in the order of sending: all
/// are needed, so nobody is woken for one that came before its turn. What came out of turn is looked for now and then.
async fn gather(
    mut on_their_way: VecDeque<OnItsWay<'_>>,
    answers: &mut Answers,
    confirm_timeout: Duration,
    link: impl Fn() -> Link,
    give_up: &CancellationToken,
) -> Ended {
    let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK, LOOK);
    // After the process was frozen one look is made up for, not all: the answers may be there already.
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut waited, mut lost_for) = (Duration::ZERO, Duration::ZERO);
    while let Some((slot, answer)) = on_their_way.front_mut() {
        tokio::select! {
            biased;
            // 1. Answers first: a confirm that is in must never be given up.
            it = answer => {
                answers.take(*slot, it);
                on_their_way.pop_front();
                waited = Duration::ZERO;
            }
            // 2. The clock of the time-out: any answer is a sign of life, and it stands still while the broker blocks us.
            _ = look.tick() => {
                let some = answers.take_all(&mut on_their_way);
                match link() {
                    Link::Lost => lost_for += LOOK,
                    Link::Open if some => waited = Duration::ZERO,
                    Link::Open => waited += LOOK,
                    Link::Blocked => {}
                }
                if on_their_way.is_empty() {
                    break;
                }
                if lost_for > LOST_LIMIT || give_up.is_cancelled() {
                    return Ended::Lost;
                }
                if waited > confirm_timeout {
                    return Ended::TimedOut;
                }
            }
        }
    }
    Ended::Complete
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
        let mut answer = async { publish.await?.await }.boxed();
        match answer.poll_unpin(&mut nobody) {
            Poll::Ready(answer) => answers.take(slot, answer),
            Poll::Pending => on_their_way.push_back((slot, answer)),
        }
    }
    on_their_way
}

fn outbox_id(message: &BasicReturnMessage) -> Option<i64> {
    match message.properties.headers().as_ref()?.inner().get(ID_HEADER)? {
        AMQPValue::LongLongInt(id) => Some(*id),
        _ => None,
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::{pending, poll_fn, ready};

    /// The confirm with the return is there only after it was passed by: it counts all the same, or the message that was
    /// returned would count as delivered by its own confirm.
    #[test]
    fn what_comes_in_while_answers_are_taken_counts() {
        let mut asked = 0;
        let late = poll_fn(move |_| {
            asked += 1;
            if asked > 2 { Poll::Ready(Ok(Confirmation::Nack(None))) } else { Poll::Pending }
        });
        let at_once = |_| ready(Ok(Confirmation::Ack(None))).boxed();
        let mut on_their_way: VecDeque<OnItsWay<'_>> =
            [(0, late.boxed()), (1, at_once(())), (2, pending().boxed()), (3, at_once(()))].into();
        let by_slot = (0..4).map(|_| None).collect();
        let mut answers = Answers { by_slot, ..Answers::default() };
        // A look while it is not there, as that of the waiting worker.
        assert!(on_their_way[0].1.poll_unpin(&mut Context::from_waker(Waker::noop())).is_pending());
        assert!(answers.take_all(&mut on_their_way));
        assert_eq!(on_their_way.iter().map(|(slot, _)| *slot).collect::<Vec<_>>(), [2]);
        assert!(matches!(answers.by_slot[0], Some(Answer::Nack)));
        assert!(matches!(answers.by_slot[1..], [Some(Answer::Ack), None, Some(Answer::Ack)]));
        assert!(!answers.take_all(&mut on_their_way), "nothing more");
    }

    fn round_of(
        answers: Vec<BoxFuture<'static, lapin::Result<Confirmation>>>,
    ) -> (VecDeque<OnItsWay<'static>>, Answers) {
        let by_slot = answers.iter().map(|_| None).collect();
        (answers.into_iter().enumerate().collect(), Answers { by_slot, ..Answers::default() })
    }

    /// Those behind it are answered at once: the time-out of the first begins there, not when it is looked at last.
    #[tokio::test(start_paused = true)]
    async fn one_silent_message_is_waited_for_no_longer_than_the_time_out() {
        let soon = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            Ok(Confirmation::Ack(None))
        };
        let (on_their_way, mut answers) = round_of(vec![pending().boxed(), soon.boxed()]);
        let (begun, timeout) = (tokio::time::Instant::now(), Duration::from_secs(30));
        let ended =
            gather(on_their_way, &mut answers, timeout, || Link::Open, &CancellationToken::new()).await;
        assert_eq!(ended, Ended::TimedOut);
        assert!(matches!(answers.by_slot[..], [None, Some(Answer::Ack)]));
        let waited = begun.elapsed();
        assert!(waited >= timeout && waited < timeout + Duration::from_secs(1), "{waited:?}");
    }

    /// A slow answer is an answer: each one begins the time-out anew, whatever its place in the batch.
    #[tokio::test(start_paused = true)]
    async fn answers_behind_a_late_one_are_a_sign_of_life() {
        let after = |seconds| async move {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            Ok(Confirmation::Ack(None))
        };
        let (on_their_way, mut answers) =
            round_of([70, 20, 40, 60].map(|seconds| after(seconds).boxed()).into());
        let timeout = Duration::from_secs(30);
        let ended =
            gather(on_their_way, &mut answers, timeout, || Link::Open, &CancellationToken::new()).await;
        assert_eq!(ended, Ended::Complete);
        assert!(answers.by_slot.iter().all(|answer| matches!(answer, Some(Answer::Ack))));
    }

    #[tokio::test(start_paused = true)]
    async fn a_blocked_connection_is_no_silence_and_a_lost_one_is_given_up_soon() {
        let gathered = async |link, give_up: &CancellationToken| {
            let (on_their_way, mut answers) = round_of(vec![pending().boxed()]);
            let timeout = Duration::from_secs(30);
            let waiting = gather(on_their_way, &mut answers, timeout, || link, give_up);
            tokio::time::timeout(Duration::from_secs(3600), waiting).await.ok()
        };
        let give_up = CancellationToken::new();
        assert_eq!(gathered(Link::Blocked, &give_up).await, None);
        assert_eq!(gathered(Link::Lost, &give_up).await, Some(Ended::Lost));
        give_up.cancel();
        assert_eq!(gathered(Link::Blocked, &give_up).await, Some(Ended::Lost));
    }
}

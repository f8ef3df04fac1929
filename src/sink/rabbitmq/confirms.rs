//! The answers to what was handed to a channel: taken in one by one, gathered until all are in or no more can be hoped for.

use super::message::ID_HEADER;
use crate::sink::Refusal;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use lapin::Confirmation;
use lapin::message::BasicReturnMessage;
use lapin::types::AMQPValue;
use std::collections::{HashMap, VecDeque};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

/// How often a waiting batch looks at the state of the connection.
const LOOK: Duration = Duration::from_millis(100);
/// How long a batch waits for its confirms to fail by themselves after the channel was lost.
const LOST_LIMIT: Duration = Duration::from_secs(2);

/// What came back for one message.
pub(super) enum Answer {
    Ack,
    Nack,
    Error(lapin::Error),
    NotSent(Refusal),
    Lost,
    Silence,
}

/// A message that was handed over, with its slot in the round; ends with the broker's answer.
pub(super) type OnItsWay<'a> = (usize, BoxFuture<'a, lapin::Result<Confirmation>>);

/// What has come back for a round.
pub(super) struct Answers {
    pub by_slot: Vec<Option<Answer>>,
    /// Returned messages by row id; not necessarily of the confirm they came with.
    pub returned: HashMap<i64, BasicReturnMessage>,
}

impl Answers {
    /// None yet, for so many messages.
    pub fn of(messages: usize) -> Self {
        Self { by_slot: (0..messages).map(|_| None).collect(), returned: HashMap::new() }
    }

    pub fn take(&mut self, slot: usize, answer: lapin::Result<Confirmation>) {
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
pub(super) enum ChannelState {
    Open,
    /// The broker takes nothing for now.
    Blocked,
    Lost,
}

/// How the waiting for a batch's confirms ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// All are in, or have failed.
    Complete,
    /// The channel is gone or the relay out of time, and some never came.
    Lost,
    /// The confirm time-out.
    TimedOut,
}

/// Gathers answers until all are in or no more can be hoped for. The last one is waited for, since all are needed and it
/// mostly comes last: nobody is woken for those before it. What else has come is taken with it, and looked for now and then.
pub(super) async fn gather(
    mut on_their_way: VecDeque<OnItsWay<'_>>,
    answers: &mut Answers,
    confirm_timeout: Duration,
    channel_state: impl Fn() -> ChannelState,
    give_up: &CancellationToken,
) -> Ended {
    let mut look = tokio::time::interval_at(tokio::time::Instant::now() + LOOK, LOOK);
    // After the process was frozen one look is made up for, not all: the answers may be there already.
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut waited, mut lost_for) = (Duration::ZERO, Duration::ZERO);
    while let Some((slot, answer)) = on_their_way.back_mut() {
        tokio::select! {
            biased;
            // 1. Answers first: a confirm that is in must never be given up.
            it = answer => {
                answers.take(*slot, it);
                on_their_way.pop_back();
                answers.take_all(&mut on_their_way);
                waited = Duration::ZERO;
            }
            // 2. The clock of the time-out: any answer is a sign of life, and it stands still while the broker blocks us.
            _ = look.tick() => {
                let some = answers.take_all(&mut on_their_way);
                match channel_state() {
                    ChannelState::Lost => lost_for += LOOK,
                    ChannelState::Open if some => waited = Duration::ZERO,
                    ChannelState::Open => waited += LOOK,
                    ChannelState::Blocked => {}
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

fn outbox_id(message: &BasicReturnMessage) -> Option<i64> {
    match message.properties.headers().as_ref()?.inner().get(ID_HEADER)? {
        AMQPValue::LongLongInt(id) => Some(*id),
        _ => None,
    }
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
        let mut answers = Answers::of(4);
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
        let none = Answers::of(answers.len());
        (answers.into_iter().enumerate().collect(), none)
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
            gather(on_their_way, &mut answers, timeout, || ChannelState::Open, &CancellationToken::new())
                .await;
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
            gather(on_their_way, &mut answers, timeout, || ChannelState::Open, &CancellationToken::new())
                .await;
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
        assert_eq!(gathered(ChannelState::Blocked, &give_up).await, None);
        assert_eq!(gathered(ChannelState::Lost, &give_up).await, Some(Ended::Lost));
        give_up.cancel();
        assert_eq!(gathered(ChannelState::Blocked, &give_up).await, Some(Ended::Lost));
    }
}

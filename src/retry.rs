//! Every failure's consequence, in one `match`; and how long waits are.
//!
//! The table behind it is `docs/ARCHITECTURE.md`, "Failures".

use crate::config::{Settings, Unroutable};
use crate::mutants::mutant;
use crate::sink::Fault;
use crate::store::{StoreError, Trouble};
use backon::{BackoffBuilder, ExponentialBuilder};
use std::time::Duration;

/// Confirm time-outs in a row on one route before the route itself is blamed.
pub const SILENCES_BLAME_ROUTE: u32 = 3;
/// Times a message may be the only one on a channel that closes before it is blamed. More than
/// one, because a connection that breaks hits the innocent too.
pub const STRIKES_BLAME_MESSAGE: u32 = 3;
/// Connections that may break with a message on its way before it has one of its own. An outage breaks one, and ends the
/// next time that there is a connection.
pub const BREAKS_SUSPECT: u32 = 3;
/// Connections of its own that a message, or a question for an exchange, may break before it is blamed: with the pauses
/// between them a minute, since a link may be so bad for a while that it breaks under large messages only.
pub const BREAKS_BLAME: u32 = 8;

/// What the relay does with a row that was not delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Keep it in memory and send it again, in order; no attempt is counted.
    Resend,
    /// The same, but in a batch of its own, to find a culprit.
    ResendAlone,
    /// And on a connection of its own.
    ResendApart,
    /// Count an attempt and let it wait in the table.
    Wait,
    /// Never send it again.
    Dead,
    /// Count it as delivered.
    Accept,
    /// Give it back to the table untouched, together with what follows it.
    GiveBack,
}

/// What is decided by settings.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// What becomes of a message no queue takes.
    pub unroutable: Unroutable,
    /// Attempts a message gets when its own content is refused.
    pub max_attempts: u32,
    /// First wait.
    pub retry_min: Duration,
    /// Longest wait.
    pub retry_max: Duration,
}

/// What is known about a row besides the fault.
#[derive(Debug, Clone, Copy, Default)]
pub struct History {
    /// Attempts counted before this one.
    pub attempts: u32,
    /// Confirm time-outs in a row on its route, this one included.
    pub silences: u32,
    /// Times it was alone when it was refused in words that name nobody, this one included.
    pub strikes: u32,
    /// Connections that broke with it on its way, or could not be had for it alone, this one included.
    pub breaks: u32,
}

impl Policy {
    /// The policy in the settings.
    pub fn new(settings: &Settings) -> Self {
        Self {
            unroutable: settings.unroutable,
            max_attempts: settings.max_attempts,
            retry_min: settings.retry_min,
            retry_max: settings.retry_max,
        }
    }

    /// The one decision about a failed publish.
    pub fn decide(&self, fault: Fault, history: History) -> Decision {
        match fault {
            Fault::Outage | Fault::Unknown | Fault::Break if mutant!("dead-letter-on-outage") => {
                Decision::Dead
            }
            Fault::Outage | Fault::Unknown | Fault::Break if mutant!("count-outages") => Decision::Wait,
            Fault::Outage | Fault::Break | Fault::Risk if history.breaks >= BREAKS_SUSPECT + BREAKS_BLAME => {
                // A server that dies of every message looks the same from here, so it is never fatal.
                Decision::Wait
            }
            Fault::Outage | Fault::Unknown => Decision::Resend,
            Fault::Break if history.breaks < BREAKS_SUSPECT => Decision::Resend,
            Fault::Break | Fault::Risk => Decision::ResendApart,
            Fault::Fenced => Decision::GiveBack,
            Fault::Silence if history.silences < SILENCES_BLAME_ROUTE => Decision::Resend,
            Fault::Suspect => Decision::ResendAlone,
            Fault::Unroutable => match self.unroutable {
                Unroutable::Wait => Decision::Wait,
                Unroutable::Dead => Decision::Dead,
                Unroutable::Accept => Decision::Accept,
            },
            Fault::Silence | Fault::Destination => Decision::Wait,
            Fault::Message if history.strikes < STRIKES_BLAME_MESSAGE => Decision::ResendAlone,
            Fault::Message if history.attempts + 1 < self.max_attempts => Decision::Wait,
            Fault::Message | Fault::Hopeless => Decision::Dead,
        }
    }

    /// How long a row waits after this many attempts: doubling, with jitter, never above the maximum.
    pub fn wait(&self, attempts: u32) -> Duration {
        let backoff = Backoff { min: self.retry_min, max: self.retry_max };
        backoff.delay(attempts.saturating_sub(1))
    }
}

/// Bounds of an exponential back-off with jitter.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// First delay.
    pub min: Duration,
    /// Longest delay.
    pub max: Duration,
}

/// Rest in proportion to what something took, so that whatever is slow has a bounded share of its connection.
#[derive(Debug, Clone, Copy)]
pub struct Rest {
    /// So many times its duration.
    pub times: u32,
    /// The longest: an outage, or a process that was frozen, may be part of what it took.
    pub at_most: Duration,
}

impl Rest {
    /// After something that took so long.
    pub fn after(self, took: Duration) -> Duration {
        (took * self.times).min(self.at_most)
    }
}

/// After walking over what somebody's transaction keeps in the index: 5 % of one connection.
pub const WALK_REST: Rest = Rest { times: 20, at_most: Duration::from_secs(600) };

/// Reconnects after an outage: quick at first, since most are a restart.
pub const OUTAGE_BACKOFF: Backoff = Backoff { min: Duration::from_millis(50), max: Duration::from_secs(15) };
/// Tries after a refused login, a missing schema: somebody has to act first.
pub const CONFIGURATION_BACKOFF: Backoff =
    Backoff { min: Duration::from_secs(1), max: Duration::from_secs(15) };
/// Tries of a message that breaks connections.
pub const BREAK_BACKOFF: Backoff = Backoff { min: Duration::from_secs(1), max: Duration::from_secs(15) };
/// Statements that lost a race.
pub const CONTENTION_BACKOFF: Backoff =
    Backoff { min: Duration::from_millis(10), max: Duration::from_secs(1) };

/// Watches that failed: what they lack is not there soon, and reads do without.
pub const WATCH_BACKOFF: Backoff = Backoff { min: Duration::from_secs(1), max: Duration::from_secs(60) };

impl Backoff {
    /// The delay after so many before it. backon's jitter adds up to the delay itself, so it is capped after.
    pub fn delay(self, before: u32) -> Duration {
        let delays = ExponentialBuilder::default()
            .with_min_delay(self.min)
            .with_max_delay(self.max)
            .with_factor(2.0)
            .without_max_times()
            .with_jitter();
        // Twice the one before each time: from 1 ms, the shortest setting, 1 day, the longest, is reached after 27.
        delays.build().nth(before.min(32) as usize).map_or(self.max, |delay| delay.min(self.max))
    }
}

/// Pauses between tries of a call to the store, by what kind of trouble it is.
#[derive(Debug, Default)]
pub struct Delays {
    trouble: Option<Trouble>,
    /// In a row, of this kind.
    tries: u32,
}

impl Delays {
    /// The pause after this error.
    pub fn next(&mut self, error: &StoreError) -> Duration {
        let backoff = match error.trouble {
            Trouble::Outage => OUTAGE_BACKOFF,
            Trouble::Contention => CONTENTION_BACKOFF,
            Trouble::Configuration | Trouble::Rejected => CONFIGURATION_BACKOFF,
        };
        if self.trouble.replace(error.trouble) != Some(error.trouble) {
            self.tries = 0;
        }
        self.tries = self.tries.saturating_add(1);
        backoff.delay(self.tries - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: Policy = Policy {
        unroutable: Unroutable::Wait,
        max_attempts: 3,
        retry_min: Duration::from_millis(200),
        retry_max: Duration::from_secs(300),
    };

    fn after(attempts: u32) -> History {
        History { attempts, silences: 1, strikes: STRIKES_BLAME_MESSAGE, breaks: 1 }
    }

    #[test]
    fn an_outage_never_costs_an_attempt() {
        for fault in [Fault::Outage, Fault::Unknown, Fault::Silence] {
            assert_eq!(POLICY.decide(fault, after(1000)), Decision::Resend, "{fault:?}");
        }
    }

    #[test]
    fn what_breaks_connections_is_sent_apart_and_then_waits_and_is_never_dead() {
        let decide = |breaks| POLICY.decide(Fault::Break, History { breaks, ..after(1000) });
        assert_eq!(decide(BREAKS_SUSPECT - 1), Decision::Resend);
        assert_eq!(decide(BREAKS_SUSPECT), Decision::ResendApart);
        assert_eq!(decide(BREAKS_SUSPECT + BREAKS_BLAME - 1), Decision::ResendApart);
        assert_eq!(decide(BREAKS_SUSPECT + BREAKS_BLAME), Decision::Wait);
        // The shared connection is there meanwhile, so it is no outage.
        let for_nothing = History { breaks: BREAKS_SUSPECT + BREAKS_BLAME, ..after(0) };
        assert_eq!(POLICY.decide(Fault::Outage, for_nothing), Decision::Wait);
        let pauses = (0..BREAKS_BLAME - 1).map(|before| BREAK_BACKOFF.delay(before));
        assert!(pauses.sum::<Duration>() >= Duration::from_secs(60), "a link may be bad for so long");
    }

    #[test]
    fn a_destination_is_never_fatal() {
        let silent = History { silences: SILENCES_BLAME_ROUTE, ..after(1000) };
        assert_eq!(POLICY.decide(Fault::Destination, after(1000)), Decision::Wait);
        assert_eq!(POLICY.decide(Fault::Unroutable, after(1000)), Decision::Wait);
        assert_eq!(POLICY.decide(Fault::Silence, silent), Decision::Wait);
    }

    #[test]
    fn a_message_has_bounded_attempts() {
        assert_eq!(POLICY.decide(Fault::Message, History { strikes: 1, ..after(0) }), Decision::ResendAlone);
        assert_eq!(POLICY.decide(Fault::Message, after(1)), Decision::Wait);
        assert_eq!(POLICY.decide(Fault::Message, after(2)), Decision::Dead);
        assert_eq!(POLICY.decide(Fault::Hopeless, after(0)), Decision::Dead);
    }

    #[test]
    fn the_unroutable_setting_decides() {
        let with = |unroutable| Policy { unroutable, ..POLICY }.decide(Fault::Unroutable, after(0));
        assert_eq!(with(Unroutable::Wait), Decision::Wait);
        assert_eq!(with(Unroutable::Dead), Decision::Dead);
        assert_eq!(with(Unroutable::Accept), Decision::Accept);
    }

    #[test]
    fn waits_double_and_stay_within_bounds() {
        for attempts in 1..=100 {
            let wait = POLICY.wait(attempts);
            let doubled = POLICY.retry_min.saturating_mul(1 << (attempts - 1).min(20));
            assert!(wait >= doubled.min(POLICY.retry_max), "attempt {attempts}: {wait:?}");
            assert!(wait <= POLICY.retry_max, "attempt {attempts}: {wait:?}");
        }
    }
}

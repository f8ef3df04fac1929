//! The sink seam: where messages go, and what an answer means.
//!
//! Obligations of every implementation, checked by `tests/relay/contract_sink.rs`:
//!
//! 1. [`Publisher::publish`] gives one verdict per row, in the order of the rows.
//! 2. `Ok` means confirmed *and* routed: some queue has taken the message.
//! 3. Rows of one key go out in the order of the batch.
//! 4. A refusal says whose fault it is ([`Fault`]); where that is not known it is [`Fault::Unknown`],
//!    never `Ok`.
//! 5. The permit is asked for each row right before it is sent, after everything that may take time. Without it
//!    neither the row nor what follows it in the batch is sent: [`Fault::Fenced`].
//! 6. An unreachable server is no refusal: [`SinkState`] says it, and `publish` answers
//!    [`Fault::Outage`] for what was not sent.

pub mod null;
pub mod rabbitmq;

pub use rabbitmq::RabbitMq;

use crate::ownership::Permit;
use crate::store::Row;
use std::future::Future;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// One answer for one row: confirmed and routed, or why not.
pub type Verdict = Result<(), Refusal>;

/// Why a row was not delivered this time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Whose fault it is; decides what happens next.
    pub fault: Fault,
    /// One sentence for a person.
    pub reason: String,
}

impl Refusal {
    /// A refusal with its sentence.
    pub fn new(fault: Fault, reason: impl Into<String>) -> Self {
        Self { fault, reason: reason.into() }
    }

    /// The permit did not allow it.
    pub fn without_lease() -> Self {
        Self::new(Fault::Fenced, "not sent: the lease of its shard is not in force")
    }
}

/// Whose fault a refusal is. What follows from each is decided in [`crate::retry`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Not sent: the server cannot be used now.
    Outage,
    /// Not sent: the permit was refused.
    Fenced,
    /// Sent, and the connection or channel was lost before the answer.
    Unknown,
    /// Sent, and before the answer the whole connection broke, which a message may be the reason of: where the server or
    /// something on the way stumbles over it.
    Break,
    /// Not sent, since the connection may break; to be sent on one that nobody else uses.
    Risk,
    /// Sent, and no answer within the confirm time-out.
    Silence,
    /// The server closed the channel over one message of the batch and did not say which.
    Suspect,
    /// The server took it and no queue did.
    Unroutable,
    /// This exchange or queue refuses now: missing, not allowed, full.
    Destination,
    /// The server refuses this very message.
    Message,
    /// This very message can never be sent.
    Hopeless,
}

impl Fault {
    /// It may speak of where the message goes, not only of the message.
    pub fn blames_destination(self) -> bool {
        matches!(self, Self::Unroutable | Self::Destination | Self::Silence | Self::Break)
    }
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Away {
    /// Login, vhost or certificate: somebody has to change something.
    pub configuration: bool,
    /// One sentence for a person.
    pub reason: String,
}

impl Away {
    /// It comes back by itself.
    pub fn outage(reason: impl Into<String>) -> Self {
        Self { configuration: false, reason: reason.into() }
    }

    /// Somebody has to change something.
    pub fn configuration(reason: impl Into<String>) -> Self {
        Self { configuration: true, reason: reason.into() }
    }
}

/// Whether messages can be sent now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SinkState {
    /// Not connected, and why.
    Away(Away),
    /// Connected.
    Ready,
    /// Connected, and the server asks us not to send.
    Blocked {
        /// What the server says.
        reason: String,
    },
}

impl SinkState {
    /// Messages can be sent.
    pub fn is_ready(&self) -> bool {
        matches!(self, Self::Ready)
    }
}

/// A place messages can be sent to. See the module text for the obligations.
pub trait Sink: Send + Sync + 'static {
    /// What a worker publishes with.
    type Publisher: Publisher;

    /// A publisher for one worker, with a channel of its own.
    fn publisher(&self) -> Self::Publisher;

    /// The same with a connection of its own, made when it is used: what breaks it harms nobody else, and was alone on it
    /// if it was alone in its batch.
    fn publisher_apart(&self) -> Self::Publisher;

    /// Whether messages can be sent; changes are announced.
    fn state(&self) -> watch::Receiver<SinkState>;

    /// Ends the connection in an orderly way. Called after all publishers are done.
    fn close(&self) -> impl Future<Output = ()> + Send;
}

/// One worker's way to a sink.
pub trait Publisher: Send + 'static {
    /// Sends what the permit allows of a batch and awaits every answer, or until `give_up` is cancelled: then what has no answer
    /// is [`Fault::Unknown`]. Not cancel-safe: a batch that is dropped may have been delivered.
    fn publish(
        &mut self,
        batch: &[Row],
        permit: &Permit,
        give_up: &CancellationToken,
    ) -> impl Future<Output = Vec<Verdict>> + Send;
}

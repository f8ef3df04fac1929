//! The connection to the broker: kept up for as long as the relay runs, watched, announced.
//!
//! lapin's own recovery stays off: whatever was in flight is unknown after a loss anyway, and a
//! fresh connection is simpler to reason about. Every wait here has an end, because `connect` can
//! hang for ever on a silent peer.

use super::classify::{is_configuration, sentence};
use super::connection::BrokerConnection;
use super::tls;
use crate::config::{
    Broker,
    broker::TlsFiles,
    endpoint::{redact, urls},
};
use crate::retry::{CONFIGURATION_BACKOFF, OUTAGE_BACKOFF};
use crate::sink::{Away, SinkState};
use crate::telemetry::{Metrics, Peer};
use futures_util::StreamExt;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties, Event, runtime::default_runtime};
use secrecy::{ExposeSecret, SecretString};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Longest a connect may take, TLS and login included.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// A silent peer is noticed after twice this; see RabbitMQ's documentation on heartbeats.
const HEARTBEAT_SECONDS: u16 = 10;
/// How often the connection is looked at besides its events.
const LOOK: Duration = Duration::from_millis(100);

type Connected = Option<Arc<BrokerConnection>>;

/// The task that owns the connection.
pub(super) struct Link {
    broker: Broker,
    metrics: Arc<Metrics>,
    stop: CancellationToken,
    state: watch::Sender<SinkState>,
    connection: watch::Sender<Connected>,
    /// Which of several addresses is tried next.
    turn: usize,
    /// The last connect got no answer at all.
    suspicious: bool,
}

impl Link {
    pub(super) fn new(
        broker: Broker,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> (Self, watch::Receiver<SinkState>, watch::Receiver<Connected>) {
        let (state, state_seen) = watch::channel(SinkState::Away(Away::outage("not connected yet")));
        let (connection, connection_seen) = watch::channel(None);
        (
            Self { broker, metrics, stop, state, connection, turn: 0, suspicious: false },
            state_seen,
            connection_seen,
        )
    }

    /// Connects, watches, connects again, until it is stopped.
    pub(super) async fn run(mut self) {
        let stop = self.stop.clone();
        let _ = stop.run_until_cancelled(self.keep_up()).await;
        let connection = self.connection.send_replace(None);
        if let Some(connection) = connection {
            connection.close("stopping").await;
        }
    }

    async fn keep_up(&mut self) {
        let mut was_up = false;
        loop {
            let connection = self.connect_until_up().await;
            if std::mem::replace(&mut was_up, true) {
                self.metrics.reconnected(Peer::Broker);
            }
            tracing::info!(server = %self.broker.endpoint.describe(), "connected to the broker");
            self.connection.send_replace(Some(Arc::clone(&connection)));
            self.state.send_replace(SinkState::Ready);
            let reason = self.watch(&connection).await;
            tracing::warn!(reason, "lost the broker");
            self.state.send_replace(SinkState::Away(Away::outage(reason)));
            self.connection.send_replace(None);
        }
    }

    async fn connect_until_up(&mut self) -> Arc<BrokerConnection> {
        let (mut outages, mut refusals) = (0_u32, 0_u32);
        loop {
            let away = match self.connect_once().await {
                Ok(connection) => return Arc::new(connection),
                Err(away) => away,
            };
            let (backoff, tries) = match away.configuration {
                true => (CONFIGURATION_BACKOFF, &mut refusals),
                false => (OUTAGE_BACKOFF, &mut outages),
            };
            self.announce_away(away);
            tokio::time::sleep(backoff.delay(*tries)).await;
            *tries = tries.saturating_add(1);
        }
    }

    /// Tells a reason once, not at each try.
    fn announce_away(&self, away: Away) {
        let Away { reason, configuration } = &away;
        if !matches!(&*self.state.borrow(), SinkState::Away(told) if *told == away) {
            tracing::warn!(reason, configuration, "cannot reach the broker; retrying");
        }
        self.state.send_replace(SinkState::Away(away));
    }

    async fn connect_once(&mut self) -> Result<BrokerConnection, Away> {
        let secret = self.broker.endpoint.read().map_err(Away::configuration)?;
        let urls = urls(&secret);
        let url = SecretString::from(urls[self.turn % urls.len()].to_owned());
        self.turn = self.turn.wrapping_add(1);
        if self.suspicious {
            knock(&url).await?;
        }
        let begun = Instant::now();
        let result = connect(&url, &self.broker.tls).await;
        self.suspicious = result.is_err() && begun.elapsed() >= CONNECT_LIMIT;
        result
    }

    /// Returns when the connection is lost, with the reason.
    async fn watch(&self, connection: &Connection) -> String {
        let mut events = connection.events_listener();
        let mut look = tokio::time::interval(LOOK);
        let mut last_look = Instant::now();
        let mut blocked_because = String::new();
        let mut last_error = "the connection was closed".to_owned();
        loop {
            tokio::select! {
                biased;
                // 1. What the broker says; the reason of a block comes only this way.
                event = events.next() => match event {
                    // Errors of single channels come this way too; only the status tells them apart.
                    Some(Event::Error(error)) => last_error = sentence(&error),
                    Some(Event::ConnectionBlocked(reason)) => blocked_because = reason,
                    Some(_) => {}
                    None => return "the connection ended".to_owned(),
                },
                // 2. What the connection is, should an event be missed.
                _ = look.tick() => {}
            }
            let status = connection.status();
            if !status.connected() {
                return last_error;
            }
            self.announce_block(status.blocked(), &blocked_because, last_look.elapsed());
            last_look = Instant::now();
        }
    }

    fn announce_block(&self, blocked: bool, reason: &str, since_last_look: Duration) {
        let was_blocked = !self.state.borrow().is_ready();
        if was_blocked && blocked {
            self.metrics.broker_blocked_seconds.inc_by(since_last_look.as_secs_f64());
        }
        match (was_blocked, blocked) {
            (false, true) => {
                tracing::warn!(reason, "the broker asks publishers to stop; waiting");
                self.state.send_replace(SinkState::Blocked { reason: reason.to_owned() });
            }
            (true, false) => {
                tracing::info!("the broker accepts messages again");
                self.state.send_replace(SinkState::Ready);
            }
            _ => {}
        }
    }
}

/// However the link ends, nobody may believe it up: workers then end, and supervision notices.
impl Drop for Link {
    fn drop(&mut self) {
        let reason = "the connection's keeper has ended";
        self.state.send_replace(SinkState::Away(Away::outage(reason)));
        self.connection.send_replace(None);
    }
}

/// One connection to one address, or why there is none.
pub(super) async fn connect(url: &SecretString, tls: &TlsFiles) -> Result<BrokerConnection, Away> {
    let server = redact(url);
    let away = |configuration, reason: String| Away {
        configuration,
        reason: format!("cannot connect to the broker at {server}: {reason}"),
    };
    let uri = address(url).map_err(|reason| away(true, reason))?;
    let tls = tls::config(tls).map_err(|reason| away(true, reason))?;
    let properties = ConnectionProperties::default().with_connection_name("outbox-relay".into());
    let runtime = default_runtime().map_err(|error| away(false, error.to_string()))?;
    let connecting = Connection::connect_uri_with_config(uri, properties, tls, runtime);
    match tokio::time::timeout(CONNECT_LIMIT, connecting).await {
        Ok(Ok(connection)) => Ok(BrokerConnection::new(connection)),
        Ok(Err(error)) => Err(away(is_configuration(&error), sentence(&error))),
        Err(_) => Err(away(false, format!("{} (a missing vhost can look like this too)", no_answer()))),
    }
}

/// Asks for a first byte before lapin connects. A connect that lapin is left alone with keeps its thread and
/// socket until the peer closes, so while a peer is silent only this socket is opened, and closed again.
async fn knock(url: &SecretString) -> Result<(), Away> {
    let server = redact(url);
    let away = |reason: String| Away::outage(format!("cannot connect to the broker at {server}: {reason}"));
    let uri = address(url).map_err(away)?;
    let plain = uri.scheme == AMQPScheme::AMQP;
    let knocking = async {
        let mut stream = TcpStream::connect((uri.authority.host.as_str(), uri.authority.port)).await?;
        if plain {
            stream.write_all(b"AMQP\x00\x00\x09\x01").await?;
            stream.read_u8().await?;
        }
        Ok::<_, std::io::Error>(())
    };
    match tokio::time::timeout(CONNECT_LIMIT, knocking).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(away(error.to_string())),
        Err(_) => Err(away(no_answer())),
    }
}

fn no_answer() -> String {
    format!("no answer within {} s", CONNECT_LIMIT.as_secs())
}

/// Parses an AMQP URL. lapin would silently make `localhost` of an IPv6 address.
fn address(url: &SecretString) -> Result<AMQPUri, String> {
    let mut uri: AMQPUri = url.expose_secret().parse().map_err(|_| "the URL is not usable".to_owned())?;
    if let Ok(parsed) = url::Url::parse(url.expose_secret())
        && let Some(url::Host::Ipv6(host)) = parsed.host()
    {
        uri.authority.host = host.to_string();
    }
    uri.query.heartbeat.get_or_insert(HEARTBEAT_SECONDS);
    uri.query.connection_timeout.get_or_insert(CONNECT_LIMIT.as_millis() as u64);
    Ok(uri)
}

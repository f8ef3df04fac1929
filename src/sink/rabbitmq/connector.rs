//! One connection to the broker: to which of its addresses, and how long that may take. Every wait here has an end, because
//! lapin's connect can hang for ever on a silent peer.

use super::classify::{is_configuration, sentence};
use super::connection::BrokerConnection;
use super::tls;
use crate::config::{
    Broker,
    broker::TlsFiles,
    endpoint::{redact, urls},
};
use crate::sink::Away;
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{Connection, ConnectionProperties, runtime::default_runtime};
use secrecy::{ExposeSecret, SecretString};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longest a connect may take, TLS and login included.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// A silent peer is noticed after twice this; see RabbitMQ's documentation on heartbeats.
const HEARTBEAT_SECONDS: u16 = 10;

/// What makes connections.
#[derive(Debug)]
pub(super) struct Connector {
    broker: Broker,
    /// Which of several addresses is tried next.
    turn: usize,
    /// How many there were the last time.
    addresses: usize,
    /// The last connect got no answer at all.
    suspicious: bool,
}

impl Connector {
    pub(super) fn new(broker: Broker) -> Self {
        Self { broker, turn: 0, addresses: 1, suspicious: false }
    }

    /// The addresses, without secrets.
    pub(super) fn describe(&self) -> String {
        self.broker.endpoint.describe()
    }

    /// How many addresses there are.
    pub(super) fn addresses(&self) -> usize {
        self.addresses
    }

    /// The next connection goes to the next address.
    pub(super) fn turn(&mut self) {
        self.turn = self.turn.wrapping_add(1);
    }

    /// A connection, or why there is none; then the next address has its turn.
    pub(super) async fn connect(&mut self) -> Result<BrokerConnection, Away> {
        let secret = self.broker.endpoint.read().map_err(Away::configuration)?;
        let urls = urls(&secret);
        self.addresses = urls.len();
        let url = SecretString::from(urls[self.turn % urls.len()].to_owned());
        let result = self.connect_to(&url).await;
        if result.is_err() {
            self.turn();
        }
        result
    }

    async fn connect_to(&mut self, url: &SecretString) -> Result<BrokerConnection, Away> {
        if self.suspicious {
            knock(url).await?;
        }
        let begun = Instant::now();
        let result = connect(url, &self.broker.tls).await;
        self.suspicious = result.is_err() && begun.elapsed() >= CONNECT_LIMIT;
        result
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

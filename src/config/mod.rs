//! Settings: read from flag, environment and file, checked once, then plain values.
//!
//! Nothing here connects to anything. Every refusal is one sentence that names the setting as the
//! user wrote it, the value, and what is allowed. Secrets are never repeated.

pub mod broker;
pub mod catalog;
pub mod endpoint;
pub mod sources;
pub mod table;
mod units;

pub use broker::Broker;
pub use endpoint::Endpoint;
pub use sources::Sources;
pub use table::TableName;

use broker::TlsFiles;
use catalog::by_key;
use secrecy::SecretString;
use sources::Given;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// How the messages of one ordering key may overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ordering {
    /// One unconfirmed message per key.
    Strict,
    /// Many, in order unless the broker refuses one of them.
    Pipelined,
    /// Keys are ignored.
    None,
}

/// What becomes of a message that no queue takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unroutable {
    /// Stays pending and is tried again until a binding appears.
    Wait,
    /// Dead at once.
    Dead,
    /// Counts as delivered: publish/subscribe without subscribers.
    Accept,
}

/// Shape of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
    /// Pretty on a terminal, JSON otherwise.
    Auto,
}

/// Where and how logs go.
#[derive(Debug, Clone)]
pub struct LogSettings {
    /// Tracing directives.
    pub directives: String,
    /// Shape of a line.
    pub format: LogFormat,
    /// Second output besides stderr.
    pub file: Option<PathBuf>,
}

/// All settings, checked.
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "each field is described in config/catalog.rs, under its own name")]
pub struct Settings {
    pub database: Endpoint,
    pub amqp: Broker,
    pub transaction_pooling: bool,
    pub table: TableName,
    pub exchange: String,
    pub retention: Duration,
    pub migrate: bool,
    pub batch_size: usize,
    pub workers: usize,
    pub max_in_flight: usize,
    pub max_in_flight_bytes: usize,
    pub ordering: Ordering,
    pub poll_interval: Duration,
    pub long_poll: bool,
    pub sweep_interval: Duration,
    pub retry_min: Duration,
    pub retry_max: Duration,
    pub max_attempts: u32,
    pub unroutable: Unroutable,
    pub confirm_timeout: Duration,
    pub shards: usize,
    pub lease_ttl: Duration,
    pub http_listen: SocketAddr,
    pub shutdown_grace: Duration,
    pub log: LogSettings,
}

/// Why settings were refused; exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A value that is not allowed.
    #[error("{name} is {value:?}: {expected}")]
    Value {
        /// The setting as the user wrote it.
        name: String,
        /// The value given.
        value: String,
        /// What is allowed.
        expected: String,
    },
    /// A secret that is not allowed; the value is not repeated.
    #[error("{0} is not usable: {1}")]
    Secret(String, String),
    /// A required setting that nobody gave.
    #[error("{0} is not set: {1}")]
    Missing(&'static str, &'static str),
    /// A name that no setting has.
    #[error("{0} is not a setting{1}")]
    Unknown(String, String),
    /// Settings that exclude each other.
    #[error("{0}")]
    Combination(String),
    /// A settings file that cannot be read.
    #[error("cannot use the settings file {0}: {1}")]
    File(String, String),
}

impl ConfigError {
    fn value(name: &str, value: &str, expected: &str) -> Self {
        Self::Value { name: name.to_owned(), value: value.to_owned(), expected: expected.to_owned() }
    }

    fn unknown(name: &str, known: impl Iterator<Item = &'static str>) -> Self {
        let bare = name.split(' ').next().unwrap_or(name);
        let nearest = known.map(|candidate| (strsim::levenshtein(bare, candidate), candidate)).min();
        let hint = match nearest {
            Some((distance, candidate)) if distance <= 3 => format!("; did you mean {candidate}?"),
            _ => "; `outbox-relay run --help` lists them".to_owned(),
        };
        Self::Unknown(name.to_owned(), hint)
    }
}

impl Settings {
    /// Delivered rows are marked and stay for a while; if not, they are deleted at once.
    pub fn keeps_delivered(&self) -> bool {
        !self.retention.is_zero()
    }

    /// The defaults, with servers that nobody connects to.
    #[cfg(test)]
    pub fn plain() -> Self {
        let servers = [("DATABASE_URL", "postgres://unused"), ("AMQP_URL", "amqp://unused")];
        Sources::from_env(servers).and_then(|sources| Self::resolve(&sources)).expect("valid")
    }

    /// Checks every setting on its own, then those that depend on each other.
    pub fn resolve(sources: &Sources) -> Result<Self, ConfigError> {
        let settings = Self {
            database: database(sources)?,
            amqp: broker(sources)?,
            transaction_pooling: units::boolean(&given(sources, "transaction_pooling"))?,
            table: table(sources)?,
            exchange: exchange(sources)?,
            retention: units::duration(&given(sources, "retention"), Duration::ZERO..=3650 * DAY)?,
            migrate: units::boolean(&given(sources, "migrate"))?,
            batch_size: units::count(&given(sources, "batch_size"), 1..=10_000)?,
            workers: units::count(&given(sources, "workers"), 1..=64)?,
            max_in_flight: units::count(&given(sources, "max_in_flight"), 1..=1_000_000)?,
            max_in_flight_bytes: units::bytes(&given(sources, "max_in_flight_bytes"), 64 << 10..=64 << 30)?,
            ordering: units::choice(
                &given(sources, "ordering"),
                &[("strict", Ordering::Strict), ("pipelined", Ordering::Pipelined), ("none", Ordering::None)],
            )?,
            poll_interval: units::duration(&given(sources, "poll_interval"), MILLISECOND..=MINUTE)?,
            long_poll: units::boolean(&given(sources, "long_poll"))?,
            sweep_interval: units::duration(&given(sources, "sweep_interval"), SECOND..=DAY)?,
            retry_min: units::duration(&given(sources, "retry_min"), MILLISECOND..=DAY)?,
            retry_max: units::duration(&given(sources, "retry_max"), MILLISECOND..=DAY)?,
            max_attempts: units::count(&given(sources, "max_attempts"), 1..=1_000_000)? as u32,
            unroutable: units::choice(
                &given(sources, "unroutable"),
                &[("wait", Unroutable::Wait), ("dead", Unroutable::Dead), ("accept", Unroutable::Accept)],
            )?,
            confirm_timeout: units::duration(&given(sources, "confirm_timeout"), 100 * MILLISECOND..=DAY)?,
            shards: units::count(&given(sources, "shards"), 1..=1024)?,
            lease_ttl: units::duration(&given(sources, "lease_ttl"), SECOND..=10 * MINUTE)?,
            http_listen: address(sources)?,
            shutdown_grace: units::duration(&given(sources, "shutdown_grace"), Duration::ZERO..=60 * MINUTE)?,
            log: log(sources)?,
        };
        settings.check_combinations()?;
        Ok(settings)
    }

    fn check_combinations(&self) -> Result<(), ConfigError> {
        let refuse = |sentence: String| Err(ConfigError::Combination(sentence));
        if self.retry_min > self.retry_max {
            let (min, max) =
                (humantime::format_duration(self.retry_min), humantime::format_duration(self.retry_max));
            return refuse(format!(
                "OUTBOX_RETRY_MIN is {min} and OUTBOX_RETRY_MAX is {max}: the first must not be longer"
            ));
        }
        if self.migrate && self.transaction_pooling {
            return refuse(
                "OUTBOX_MIGRATE and OUTBOX_TRANSACTION_POOLING are both true: migrations need a session of their own; run `outbox-relay migrate` with a direct DATABASE_URL"
                    .to_owned(),
            );
        }
        if self.batch_size > self.max_in_flight {
            let (batch, window) = (self.batch_size, self.max_in_flight);
            return refuse(format!(
                "OUTBOX_BATCH_SIZE is {batch} and OUTBOX_MAX_IN_FLIGHT is {window}: a batch must fit into the window"
            ));
        }
        if self.workers > self.max_in_flight {
            let (workers, window) = (self.workers, self.max_in_flight);
            return refuse(format!(
                "OUTBOX_WORKERS is {workers} and OUTBOX_MAX_IN_FLIGHT is {window}: each worker needs a row to work on"
            ));
        }
        Ok(())
    }
}

fn log(sources: &Sources) -> Result<LogSettings, ConfigError> {
    let directives = given(sources, "log");
    if let Err(error) = tracing_subscriber::EnvFilter::builder().parse(&directives.text) {
        let expected = format!("expected a level (error, warn, info, debug, trace) or directives ({error})");
        return Err(ConfigError::value(&directives.name, &directives.text, &expected));
    }
    Ok(LogSettings {
        directives: directives.text,
        format: units::choice(
            &given(sources, "log_format"),
            &[("pretty", LogFormat::Pretty), ("json", LogFormat::Json), ("auto", LogFormat::Auto)],
        )?,
        file: sources.explicit(setting("log_file")).map(|given| PathBuf::from(given.text)),
    })
}

/// Address of the health endpoint.
pub fn address(sources: &Sources) -> Result<SocketAddr, ConfigError> {
    let given = given(sources, "http_listen");
    given.text.trim().parse().map_err(|_| {
        ConfigError::value(
            &given.name,
            &given.text,
            "expected an address and a port, such as 127.0.0.1:8080 or [::1]:8080",
        )
    })
}

/// The outbox table's name.
pub fn table(sources: &Sources) -> Result<TableName, ConfigError> {
    let given = given(sources, "table");
    TableName::parse(&given.text).map_err(|expected| ConfigError::value(&given.name, &given.text, &expected))
}

/// The database alone, for `migrate`.
pub fn database(sources: &Sources) -> Result<Endpoint, ConfigError> {
    endpoint(sources, "database_url", "database_url_file", &["postgres", "postgresql"])
}

fn exchange(sources: &Sources) -> Result<String, ConfigError> {
    let given = given(sources, "exchange");
    if given.text.len() > 255 {
        return Err(ConfigError::value(&given.name, &given.text, "expected a name of at most 255 bytes"));
    }
    Ok(given.text)
}

fn endpoint(
    sources: &Sources,
    key: &'static str,
    file_key: &'static str,
    schemes: &[&str],
) -> Result<Endpoint, ConfigError> {
    let (text, file) = (sources.explicit(setting(key)), sources.explicit(setting(file_key)));
    match (text, file) {
        (Some(text), Some(file)) => Err(ConfigError::Combination(format!(
            "{} and {} are both set: give one of them",
            text.name, file.name
        ))),
        (Some(text), None) => {
            let secret = SecretString::from(text.text);
            endpoint::check_url(&text.name, &secret, schemes)?;
            Ok(Endpoint::Text(secret))
        }
        (None, Some(file)) => {
            let endpoint = Endpoint::File(PathBuf::from(file.text));
            let secret = endpoint.read().map_err(|error| ConfigError::Secret(file.name.clone(), error))?;
            endpoint::check_url(&file.name, &secret, schemes)?;
            Ok(endpoint)
        }
        (None, None) => Err(ConfigError::Missing(setting(key).env, setting(key).help)),
    }
}

fn broker(sources: &Sources) -> Result<Broker, ConfigError> {
    let endpoint = endpoint(sources, "amqp_url", "amqp_url_file", &["amqp", "amqps"])?;
    let file = |key| sources.explicit(setting(key)).map(|given| PathBuf::from(given.text));
    let client = match (file("amqp_client_cert_file"), file("amqp_client_key_file")) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        _ => {
            let sentence =
                "AMQP_CLIENT_CERT_FILE and AMQP_CLIENT_KEY_FILE belong together: give both or none";
            return Err(ConfigError::Combination(sentence.to_owned()));
        }
    };
    let tls = TlsFiles { ca: file("amqp_ca_file"), client };
    tls.read()
        .map_err(|problem| ConfigError::Combination(format!("certificates for AMQP_URL: {problem}")))?;
    if endpoint.read().is_ok_and(|secret| tls.are_idle(&secret)) {
        let sentence = "AMQP_CA_FILE or AMQP_CLIENT_CERT_FILE is set and AMQP_URL is plain text: write amqps://, or leave them out";
        return Err(ConfigError::Combination(sentence.to_owned()));
    }
    Ok(Broker { endpoint, tls })
}

fn given(sources: &Sources, key: &str) -> Given {
    let absent = || Given { text: String::new(), name: setting(key).env.to_owned() };
    sources.get(setting(key)).unwrap_or_else(absent)
}

fn setting(key: &str) -> &'static catalog::Setting {
    by_key(key).expect("every key used here is in the catalogue")
}

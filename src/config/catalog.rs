//! The one list of settings: names, defaults and help.
//!
//! Flags, environment variables, file keys and `--help` come from here. The table in `docs/OPERATING.md` is written by
//! hand; a test compares its names and defaults with these.

/// One setting, known under three names: `--batch-size`, `OUTBOX_BATCH_SIZE`, `batch_size`.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// Key in `outbox-relay.toml`; the flag is the same with dashes.
    pub key: &'static str,
    /// Environment variable.
    pub env: &'static str,
    /// Default as a user would write it; `None`: required, or off when absent.
    pub default: Option<&'static str>,
    /// What kind of value it takes, shown in `--help`.
    pub takes: &'static str,
    /// One line of help.
    pub help: &'static str,
    /// Help heading.
    pub group: &'static str,
}

const fn setting(
    group: &'static str,
    key: &'static str,
    env: &'static str,
    default: Option<&'static str>,
    takes: &'static str,
    help: &'static str,
) -> Setting {
    Setting { key, env, default, takes, help, group }
}

const SERVERS: &str = "Servers";
const TABLE: &str = "Table and messages";
const FLOW: &str = "Flow";
const FAILURES: &str = "Failures";
const PROCESS: &str = "Process";

/// Every setting, in the order of `--help`.
pub const SETTINGS: &[Setting] = &[
    setting(
        SERVERS,
        "database_url",
        "DATABASE_URL",
        None,
        "URL",
        "Postgres, as postgres://user:password@host:port/database",
    ),
    setting(
        SERVERS,
        "database_url_file",
        "DATABASE_URL_FILE",
        None,
        "FILE",
        "File that holds the database URL; read again at each connect",
    ),
    setting(
        SERVERS,
        "amqp_url",
        "AMQP_URL",
        None,
        "URL",
        "RabbitMQ, as amqp://user:password@host:port/vhost (%2f is the vhost /); several, separated by commas, are tried in turn",
    ),
    setting(
        SERVERS,
        "amqp_url_file",
        "AMQP_URL_FILE",
        None,
        "FILE",
        "File that holds the broker URL; read again at each connect",
    ),
    setting(
        SERVERS,
        "amqp_ca_file",
        "AMQP_CA_FILE",
        None,
        "FILE",
        "Certificates (PEM) that amqps:// trusts besides the system's; read again at each connect",
    ),
    setting(
        SERVERS,
        "amqp_client_cert_file",
        "AMQP_CLIENT_CERT_FILE",
        None,
        "FILE",
        "The relay's own certificate (PEM) for a broker that asks for one; read again at each connect",
    ),
    setting(
        SERVERS,
        "amqp_client_key_file",
        "AMQP_CLIENT_KEY_FILE",
        None,
        "FILE",
        "Key (PEM, without a password) of that certificate",
    ),
    setting(
        SERVERS,
        "transaction_pooling",
        "OUTBOX_TRANSACTION_POOLING",
        Some("false"),
        "BOOL",
        "The database URL leads to a pooler in transaction mode (PgBouncer): keep no state in the session",
    ),
    setting(TABLE, "table", "OUTBOX_TABLE", Some("outbox"), "NAME", "Outbox table, may be schema-qualified"),
    setting(
        TABLE,
        "exchange",
        "OUTBOX_EXCHANGE",
        Some(""),
        "NAME",
        "Exchange for rows that name none; empty is RabbitMQ's default exchange",
    ),
    setting(
        TABLE,
        "retention",
        "OUTBOX_RETENTION",
        Some("7d"),
        "DURATION",
        "How long delivered rows stay in the table; 0 deletes them instead of marking them",
    ),
    setting(
        TABLE,
        "migrate",
        "OUTBOX_MIGRATE",
        Some("false"),
        "BOOL",
        "Let `run` apply migrations before it starts",
    ),
    setting(
        FLOW,
        "batch_size",
        "OUTBOX_BATCH_SIZE",
        Some("250"),
        "ROWS",
        "Messages a worker publishes before it awaits their confirms",
    ),
    setting(
        FLOW,
        "workers",
        "OUTBOX_WORKERS",
        Some("4"),
        "COUNT",
        "Publishing workers, one AMQP channel each",
    ),
    setting(
        FLOW,
        "max_in_flight",
        "OUTBOX_MAX_IN_FLIGHT",
        Some("2000"),
        "ROWS",
        "Rows in memory at most; the bound of duplicates after a crash",
    ),
    setting(
        FLOW,
        "max_in_flight_bytes",
        "OUTBOX_MAX_IN_FLIGHT_BYTES",
        Some("64MiB"),
        "BYTES",
        "Bytes of rows in memory at most; a larger single row passes alone",
    ),
    setting(
        FLOW,
        "ordering",
        "OUTBOX_ORDERING",
        Some("strict"),
        "MODE",
        "strict: one unconfirmed message per key; pipelined: many, in order unless the broker refuses one; none: keys are ignored",
    ),
    setting(
        FLOW,
        "poll_interval",
        "OUTBOX_POLL_INTERVAL",
        Some("100ms"),
        "DURATION",
        "Longest pause between looks for due rows when the table is quiet",
    ),
    setting(
        FLOW,
        "long_poll",
        "OUTBOX_LONG_POLL",
        Some("true"),
        "BOOL",
        "Let a quiet database watch for new rows by itself; they are noticed within 10 ms",
    ),
    setting(
        FLOW,
        "sweep_interval",
        "OUTBOX_SWEEP_INTERVAL",
        Some("30s"),
        "DURATION",
        "How often all up to the largest id read is asked for again, for ids allocated long before their commit",
    ),
    setting(
        FAILURES,
        "retry_min",
        "OUTBOX_RETRY_MIN",
        Some("200ms"),
        "DURATION",
        "First wait of a refused row; doubles with each attempt, with jitter",
    ),
    setting(
        FAILURES,
        "retry_max",
        "OUTBOX_RETRY_MAX",
        Some("5m"),
        "DURATION",
        "Longest wait of a refused row",
    ),
    setting(
        FAILURES,
        "max_attempts",
        "OUTBOX_MAX_ATTEMPTS",
        Some("10"),
        "COUNT",
        "Attempts after which a row whose own content is refused is dead; destinations are retried as long as it takes",
    ),
    setting(
        FAILURES,
        "unroutable",
        "OUTBOX_UNROUTABLE",
        Some("wait"),
        "ACTION",
        "A message no queue takes: wait for a binding, dead, or accept as delivered",
    ),
    setting(
        FAILURES,
        "confirm_timeout",
        "OUTBOX_CONFIRM_TIMEOUT",
        Some("30s"),
        "DURATION",
        "How long a batch may go without any answer; the clock stands still while the broker blocks us",
    ),
    setting(
        FAILURES,
        "shards",
        "OUTBOX_SHARDS",
        Some("16"),
        "COUNT",
        "Shards that replicas share; the same for all that run at once",
    ),
    setting(
        FAILURES,
        "lease_ttl",
        "OUTBOX_LEASE_TTL",
        Some("10s"),
        "DURATION",
        "How long the keys of a replica that crashed may wait for another",
    ),
    setting(
        PROCESS,
        "http_listen",
        "OUTBOX_HTTP_LISTEN",
        Some("127.0.0.1:8080"),
        "ADDRESS",
        "Address of /livez, /readyz, /health and /metrics",
    ),
    setting(
        PROCESS,
        "shutdown_grace",
        "OUTBOX_SHUTDOWN_GRACE",
        Some("25s"),
        "DURATION",
        "Time a stop may take before unconfirmed work is left for the next start",
    ),
    setting(
        PROCESS,
        "log",
        "OUTBOX_LOG",
        Some("info"),
        "DIRECTIVES",
        "Log level, or tracing directives such as info,outbox_relay::pipeline=debug",
    ),
    setting(
        PROCESS,
        "log_format",
        "OUTBOX_LOG_FORMAT",
        Some("auto"),
        "FORMAT",
        "pretty, json, or auto: pretty on a terminal, json otherwise",
    ),
    setting(
        PROCESS,
        "log_file",
        "OUTBOX_LOG_FILE",
        None,
        "FILE",
        "Write logs to this file too; lines that the disk is too slow for are dropped and counted",
    ),
];

/// The setting with this file key.
pub fn by_key(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.key == key)
}

impl Setting {
    /// `--batch-size`.
    pub fn flag(&self) -> String {
        format!("--{}", self.long())
    }

    /// `batch-size`.
    pub fn long(&self) -> String {
        self.key.replace('_', "-")
    }
}

//! Real Postgres and RabbitMQ servers, started by `scripts/services` through the chaos tool's [`Servers`].
//!
//! Most tests share one pair; a test that breaks servers has a pair of its own. `TEST_DATABASE_URL`
//! and `TEST_AMQP_URL` name servers that already run, for the shared pair. A server that cannot be
//! had fails the test.
//!
//! [`Servers`]: outbox_relay_chaos::servers::Servers

use outbox_relay_chaos::servers;
use std::ops::Deref;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// A pair of servers whose failures fail the test.
#[derive(Debug)]
pub struct Servers(servers::Servers);

static SHARED: OnceLock<Servers> = OnceLock::new();
static COUNT: AtomicU32 = AtomicU32::new(0);

impl Servers {
    /// The pair that all harmless tests share.
    pub fn shared() -> &'static Self {
        SHARED.get_or_init(|| {
            let given = |name: &str| std::env::var(name).ok().filter(|url| !url.is_empty());
            match (given("TEST_DATABASE_URL"), given("TEST_AMQP_URL")) {
                (Some(database_url), Some(amqp_url)) => Self(servers::Servers::given(database_url, amqp_url)),
                (None, None) => Self::start(),
                _ => panic!("set both TEST_DATABASE_URL and TEST_AMQP_URL, or neither"),
            }
        })
    }

    /// A pair of one's own.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// A pair of one's own, with more options of `scripts/services start`.
    pub fn start_with(options: &[&str]) -> Self {
        let number = COUNT.fetch_add(1, Relaxed);
        // A process of the same id may have left its own.
        let unlike = fastrand::u16(..);
        let dir = root().join(format!("target/test-servers/{}-{number}-{unlike:x}", std::process::id()));
        let started = servers::Servers::start_with(&root().join("scripts/services"), &dir, options);
        Self(started.unwrap_or_else(|error| panic!("{error:#}")))
    }

    /// A value in DIR/env.
    pub fn value(&self, name: &str) -> String {
        self.0.value(name).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// `scripts/services ARGS` on these servers.
    pub async fn services(&self, args: &[&str]) {
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        self.0.run(args).await.unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// `scripts/services COMMAND SERVER` on this pair: stop, start, kill, pause, resume.
    pub async fn control(&self, command: &str, server: &str) {
        self.0.control(command, server).await.unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// `rabbitmqctl ARGS` on this pair.
    pub async fn rabbitmqctl(&self, args: &[&str]) {
        self.0.rabbitmqctl(args).await.unwrap_or_else(|error| panic!("{error:#}"));
    }
}

impl Deref for Servers {
    type Target = servers::Servers;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

/// The repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

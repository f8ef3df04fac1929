//! What the tests stand on: real servers, a world per test, a relay to run in it, and a check of the
//! promises when the world is finished.
//!
//! Nothing here sleeps in the hope that something has happened: waiting is on a condition with a
//! deadline ([`eventually`]).

pub mod certificates;
pub mod checker;
pub mod endpoint;
pub mod process;
pub mod proxy;
pub mod scripted;
pub mod servers;
pub mod store;
pub mod url_file;
pub mod world;

pub use process::RelayProcess;
pub use world::World;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Longest a condition may take to come true before a test has failed. Generous: the machine may be
/// busy, and a condition that holds is noticed at once.
pub const DEADLINE: Duration = Duration::from_secs(90);

/// For replicas of which none may lose its shards: with the usual time here one that the machine stops for two seconds does.
pub const PATIENT: [(&str, &str); 1] = [("OUTBOX_LEASE_TTL", "10s")];

/// Statements that a policy with `pg_sleep` keeps waiting. A quiet relay sleeps there, too, in the procedure that watches.
pub const SLEEPS: &str = "select count(*) from pg_stat_activity
    where wait_event = 'PgSleep' and datname = current_database() and query not like '%call %'";

/// Waits until the condition holds. Panics at the deadline with what was waited for.
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !condition().await {
        assert!(begun.elapsed() < DEADLINE, "waited {DEADLINE:?} in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Random numbers with a seed that is printed, so that a failure can be repeated with `TEST_SEED`. For each name others.
pub fn rng(name: &str) -> fastrand::Rng {
    static SEED: LazyLock<u64> = LazyLock::new(|| {
        let given = std::env::var("TEST_SEED").ok();
        let number = |text: String| text.parse().unwrap_or_else(|_| panic!("TEST_SEED is no number: {text}"));
        given.map_or_else(|| fastrand::u64(..), number)
    });
    eprintln!("{name}: TEST_SEED={}", *SEED);
    // Without keys of its own, and so the same each time.
    let mut hasher = DefaultHasher::new();
    (*SEED, name).hash(&mut hasher);
    fastrand::Rng::with_seed(hasher.finish())
}

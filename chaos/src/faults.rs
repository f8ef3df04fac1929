//! The faults, as data: what each one is called, needs, disturbs and excuses.
//!
//! Ids are those of the project's fault matrix. F11 (queue deleted), F12 (three nodes), F15 (failover)
//! and F19 (load shapes) are tests of their own; F21 is all of these at random, with overlaps.

use serde::Serialize;
use std::ops::RangeInclusive;

/// A fault. How it is carried out is in [`crate::inject`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[allow(missing_docs, reason = "FAULTS describes each in a sentence")]
pub enum Fault {
    RelayKilled,
    RollingRestart,
    RelayFrozen,
    BrokerKilled,
    BrokerFrozen,
    BrokerRestarted,
    MemoryAlarm,
    DiskAlarm,
    BrokerLinkCut,
    BrokerLinkClosed,
    BrokerLinkCutInside,
    BrokerLinkSilent,
    BrokerLinkDeadUp,
    BrokerLinkDeadDown,
    BrokerLinkThrottled,
    BrokerLinkDelayed,
    ExchangeDeleted,
    WriteRevoked,
    BindingRemoved,
    Poison,
    QueueFull,
    BackendsTerminated,
    DatabaseKilled,
    DatabaseRestarted,
    DatabaseFrozen,
    DatabaseLinkCut,
    DatabaseLinkSilent,
    DatabaseLinkDeadDown,
    DatabaseLinkDelayed,
    LongTransaction,
    PreparedTransaction,
    IdleReader,
    TableLocked,
    DiskFull,
    ReplicasComeAndGo,
    DatabasePassword,
    BrokerPassword,
    PermissionsRemoved,
}

/// What must be in our hands for a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Needs {
    /// The relays, and an ordinary login to both servers.
    Nothing,
    /// A proxy between relay and broker: no `amqps`, whose certificate names another host.
    BrokerProxy,
    /// A proxy between relay and database: no `sslmode=verify-full`.
    DatabaseProxy,
    /// Servers of our own.
    Servers,
    /// Servers of our own, and the right to mount a file system for the database.
    Disk,
    /// More than one replica.
    Replicas,
}

/// What a fault disturbs; two that disturb the same are never on at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Part {
    Relays,
    Broker,
    Database,
    Writers,
}

/// What is known of a fault before it happens.
#[derive(Debug, Clone, Serialize)]
pub struct Spec {
    /// The fault.
    #[serde(skip)]
    pub fault: Fault,
    /// Its id in the fault matrix.
    pub id: &'static str,
    /// Its own name.
    pub name: &'static str,
    /// What happens.
    pub about: &'static str,
    /// What it needs.
    pub needs: Needs,
    /// What it disturbs.
    pub part: Part,
    /// How long it lasts, in milliseconds.
    #[serde(skip)]
    pub lasts: RangeInclusive<u64>,
    /// Outcomes may become unknown, so messages may be sent again.
    pub duplicates: Duplicates,
    /// The broker refuses messages, which costs attempts.
    pub refuses: bool,
}

/// May a fault cause duplicates?
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Duplicates {
    /// No.
    No,
    /// A window of rows in flight for every relay that was hit.
    Window,
    /// Only with several replicas: another one may take over before the first has marked its rows.
    TakeOver,
}

use Duplicates::{No, TakeOver, Window};
use Needs::{BrokerProxy, DatabaseProxy, Disk, Nothing, Replicas, Servers};
use Part::{Broker, Database, Relays, Writers};

/// All faults.
#[rustfmt::skip]
pub const FAULTS: &[Spec] = &[
    spec(Fault::RelayKilled, "F01", "relay-killed", Nothing, Relays, 500..=3_000, Window, TAKES,
        "kill -9 of a relay at random, started again a little later"),
    spec(Fault::RollingRestart, "F02", "rolling-restart", Nothing, Relays, 0..=500, No, TAKES,
        "SIGTERM and start, one relay after the other"),
    spec(Fault::RelayFrozen, "F03", "relay-frozen", Nothing, Relays, 3_000..=8_000, Window, TAKES,
        "SIGSTOP beyond the lease, then SIGCONT"),
    spec(Fault::BrokerKilled, "F04", "broker-killed", Servers, Broker, 0..=3_000, Window, TAKES,
        "kill -9 of the broker, started again"),
    spec(Fault::BrokerFrozen, "F04", "broker-frozen", Servers, Broker, 5_000..=12_000, Window, TAKES,
        "SIGSTOP of the broker, then SIGCONT"),
    spec(Fault::BrokerRestarted, "F04", "broker-restarted", Servers, Broker, 0..=3_000, Window, TAKES,
        "rabbitmqctl stop_app, start_app"),
    spec(Fault::MemoryAlarm, "F05", "memory-alarm", Servers, Broker, 3_000..=6_000, No, TAKES,
        "memory limit 0: publishers are blocked"),
    spec(Fault::DiskAlarm, "F05", "disk-alarm", Servers, Broker, 3_000..=6_000, No, TAKES,
        "free disk limit above the disk: publishers are blocked"),
    spec(Fault::BrokerLinkCut, "F06", "broker-link-cut", BrokerProxy, Broker, 200..=3_000, Window, TAKES,
        "connections to the broker are reset"),
    spec(Fault::BrokerLinkClosed, "F06", "broker-link-closed", BrokerProxy, Broker, 200..=3_000, Window, TAKES,
        "connections to the broker are ended in order"),
    spec(Fault::BrokerLinkCutInside, "F06", "broker-link-cut-inside", BrokerProxy, Broker, 1_000..=4_000, Window, TAKES,
        "reset after a random number of bytes, inside a frame, again and again"),
    spec(Fault::BrokerLinkSilent, "F06", "broker-link-silent", BrokerProxy, Broker, 3_000..=8_000, Window, TAKES,
        "black hole: nothing goes through, nothing ends"),
    spec(Fault::BrokerLinkDeadUp, "F06", "broker-link-dead-up", BrokerProxy, Broker, 3_000..=8_000, Window, TAKES,
        "nothing reaches the broker, its words arrive"),
    spec(Fault::BrokerLinkDeadDown, "F06", "broker-link-dead-down", BrokerProxy, Broker, 3_000..=8_000, Window, TAKES,
        "messages reach the broker, no confirm comes back"),
    spec(Fault::BrokerLinkThrottled, "F06", "broker-link-throttled", BrokerProxy, Broker, 3_000..=6_000, No, TAKES,
        "20 kB a second to the broker"),
    spec(Fault::BrokerLinkDelayed, "F06", "broker-link-delayed", BrokerProxy, Broker, 3_000..=6_000, No, TAKES,
        "200 ms for each piece to and from the broker"),
    spec(Fault::ExchangeDeleted, "F07", "exchange-deleted", Nothing, Broker, 1_000..=4_000, Window, REFUSES,
        "the exchange is deleted, and made again with its bindings"),
    spec(Fault::WriteRevoked, "F07", "write-revoked", Servers, Broker, 1_000..=4_000, Window, REFUSES,
        "the relay's user may not write, then may again"),
    spec(Fault::BindingRemoved, "F08", "binding-removed", Nothing, Broker, 1_000..=5_000, No, REFUSES,
        "one of two bindings is removed, then restored"),
    spec(Fault::Poison, "F09", "poison", Nothing, Writers, 2_000..=5_000, No, TAKES,
        "rows that can never be delivered, among good ones"),
    spec(Fault::QueueFull, "F10", "queue-full", Servers, Broker, 3_000..=6_000, No, REFUSES,
        "queue full with reject-publish and nobody reading, then drained"),
    spec(Fault::BackendsTerminated, "F13", "backends-terminated", Servers, Database, 3_000..=6_000, TakeOver, TAKES,
        "20 database connections a second are terminated, writers' too"),
    spec(Fault::DatabaseKilled, "F13", "database-killed", Servers, Database, 0..=2_000, TakeOver, TAKES,
        "kill -9 of the postmaster and its children, started again"),
    spec(Fault::DatabaseRestarted, "F13", "database-restarted", Servers, Database, 0..=1_000, TakeOver, TAKES,
        "orderly restart of the database"),
    spec(Fault::DatabaseFrozen, "F13", "database-frozen", Servers, Database, 4_000..=12_000, TakeOver, TAKES,
        "SIGSTOP of the database, then SIGCONT"),
    spec(Fault::DatabaseLinkCut, "F14", "database-link-cut", DatabaseProxy, Database, 200..=3_000, TakeOver, TAKES,
        "connections to the database are reset"),
    spec(Fault::DatabaseLinkSilent, "F14", "database-link-silent", DatabaseProxy, Database, 3_000..=8_000, TakeOver, TAKES,
        "black hole to the database"),
    spec(Fault::DatabaseLinkDeadDown, "F14", "database-link-dead-down", DatabaseProxy, Database, 3_000..=8_000, TakeOver, TAKES,
        "statements reach the database, answers do not come back"),
    spec(Fault::DatabaseLinkDelayed, "F14", "database-link-delayed", DatabaseProxy, Database, 3_000..=6_000, TakeOver, TAKES,
        "200 ms for each piece to and from the database"),
    spec(Fault::LongTransaction, "F16", "long-transaction", Nothing, Writers, 5_000..=20_000, No, TAKES,
        "a write transaction stays open"),
    spec(Fault::PreparedTransaction, "F16", "prepared-transaction", Servers, Writers, 5_000..=20_000, No, TAKES,
        "a prepared transaction stays open, then is rolled back"),
    spec(Fault::IdleReader, "F16", "idle-reader", Nothing, Writers, 5_000..=20_000, No, TAKES,
        "a reader idles in a transaction with an old snapshot"),
    spec(Fault::TableLocked, "F17", "table-locked", Nothing, Database, 5_000..=5_000, TakeOver, TAKES,
        "lock table outbox in access exclusive mode"),
    spec(Fault::DiskFull, "F17", "disk-full", Disk, Database, 2_000..=6_000, TakeOver, TAKES,
        "the database's file system is full, which may also end the server, then has room again"),
    spec(Fault::ReplicasComeAndGo, "F18", "replicas-come-and-go", Replicas, Relays, 4_000..=10_000, No, TAKES,
        "replicas stopped and started at random, up to five"),
    spec(Fault::DatabasePassword, "F20", "database-password", Servers, Database, 500..=3_000, TakeOver, TAKES,
        "the relay's database password is changed, its file a little later"),
    spec(Fault::BrokerPassword, "F20", "broker-password", Servers, Broker, 500..=3_000, Window, TAKES,
        "the relay's broker password is changed and its connections closed, the file follows"),
    spec(Fault::PermissionsRemoved, "F20", "permissions-removed", Servers, Broker, 1_000..=4_000, Window, REFUSES,
        "the relay's permissions on the vhost are removed, then given back"),
];

const REFUSES: bool = true;
const TAKES: bool = false;

#[allow(clippy::too_many_arguments, reason = "a line of the table")]
const fn spec(
    fault: Fault,
    id: &'static str,
    name: &'static str,
    needs: Needs,
    part: Part,
    lasts: RangeInclusive<u64>,
    duplicates: Duplicates,
    refuses: bool,
    about: &'static str,
) -> Spec {
    Spec { fault, id, name, about, needs, part, lasts, duplicates, refuses }
}

/// Everything at random, with overlaps.
pub const EVERYTHING: &str = "F21";

impl Fault {
    /// What is known of it.
    ///
    /// # Panics
    ///
    /// If it is missing in [`FAULTS`], which a test excludes.
    pub fn spec(self) -> &'static Spec {
        FAULTS.iter().find(|spec| spec.fault == self).expect("every fault is in the table")
    }
}

/// What a run has.
#[derive(Debug, Clone, Copy)]
pub struct Means {
    /// Servers of our own.
    pub servers: bool,
    /// A file system for the database.
    pub disk: bool,
    /// A proxy to the broker.
    pub broker_proxy: bool,
    /// A proxy to the database.
    pub database_proxy: bool,
    /// More than one replica.
    pub replicas: bool,
}

impl Needs {
    /// Whether a run can do it.
    pub fn are_met(self, means: Means) -> bool {
        match self {
            Nothing => true,
            BrokerProxy => means.broker_proxy,
            DatabaseProxy => means.database_proxy,
            Servers => means.servers,
            Disk => means.disk,
            Replicas => means.replicas,
        }
    }

    /// Why it is left out.
    pub fn sentence(self) -> &'static str {
        match self {
            Nothing => "needs nothing",
            BrokerProxy => "needs a broker without TLS",
            DatabaseProxy => "needs a database without sslmode=verify-full",
            Servers => "needs servers of its own",
            Disk => "needs servers of its own, the right to mount a file system, and memory for it",
            Replicas => "needs --replicas 2 or more",
        }
    }
}

/// The faults named by ids or names, separated by commas, and whether they may overlap.
pub fn select(words: &str) -> Result<(Vec<Fault>, bool), String> {
    let (mut chosen, mut overlap) = (Vec::new(), false);
    for word in words.split(',').map(str::trim).filter(|word| !word.is_empty()) {
        let before = chosen.len();
        let everything = word.eq_ignore_ascii_case(EVERYTHING);
        overlap |= everything;
        let named = |spec: &&Spec| everything || word.eq_ignore_ascii_case(spec.id) || word == spec.name;
        chosen.extend(FAULTS.iter().filter(named).map(|spec| spec.fault));
        if chosen.len() == before {
            return Err(format!("no fault is called '{word}': --list shows them all"));
        }
    }
    chosen.sort_unstable();
    chosen.dedup();
    if chosen.is_empty() {
        Err("name at least one fault: --list shows them all".to_owned())
    } else {
        Ok((chosen, overlap))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn the_table_is_in_order_and_complete() {
        let last = Fault::PermissionsRemoved as usize;
        for (place, spec) in FAULTS.iter().enumerate() {
            assert_eq!(spec.fault as usize, place, "{} stands at the wrong place", spec.name);
        }
        assert_eq!(FAULTS.len(), last + 1, "a fault is missing in the table");
        let names: HashSet<_> = FAULTS.iter().map(|spec| spec.name).collect();
        assert_eq!(names.len(), FAULTS.len(), "a name is used twice");
    }

    #[test]
    fn faults_are_chosen_by_id_or_name() {
        let (chosen, overlap) = select("F04, poison").unwrap();
        assert_eq!(chosen, [Fault::BrokerKilled, Fault::BrokerFrozen, Fault::BrokerRestarted, Fault::Poison]);
        assert!(!overlap);
        let (all, overlap) = select("f21").unwrap();
        assert_eq!((all.len(), overlap), (FAULTS.len(), true));
        assert!(select("F99").unwrap_err().contains("F99"));
        assert!(select("").is_err());
    }
}

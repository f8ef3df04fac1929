//! The promises of `docs/GUARANTEES.md`, each a module, against real Postgres and RabbitMQ.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    reason = "a test that fails panics; the lints know only functions marked as tests, not their helpers"
)]

mod support;

mod bounded_duplicates;
mod bounded_resources;
mod clean_stop;
mod containers;
mod contract_leases;
mod contract_sink;
mod contract_store;
mod crash_points;
mod failover;
mod faults;
mod harmless_to_the_database;
mod integrity;
mod key_order;
mod least_privilege;
mod migrations;
mod no_loss;
mod no_phantom;
mod one_owner;
mod outages;
mod poison;
mod pooler;
mod promptness;
mod secrets;
mod settings;
mod stale_statistics;
mod tls;
mod visible_truth;

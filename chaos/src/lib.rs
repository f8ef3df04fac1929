//! The outside judge of outbox-relay: a ledger oracle and a tool that does harm on purpose.
//!
//! It knows the contract and nothing else: the table, the settings, the AMQP message and HTTP. It shares no
//! code with the relay, so a mistake there cannot hide a mistake here.
//!
//! ```text
//!  writers ──▶ Postgres ◀── relays ──▶ RabbitMQ ──▶ consumer
//!     │            ▲           ▲           ▲            │
//!     ▼            └─────── faults ────────┘            ▼
//!  ledger (fsync)              from a seed           ledger (fsync)
//!     └───────────────────▶ checker ◀───────────────────┘
//! ```
//!
//! - [`ledger`]: what is written down, and how it gets to disk
//! - [`writer`], [`consumer`]: the two ends
//! - [`faults`], [`schedule`], [`inject`]: which, when, how
//! - [`servers`], [`proxy`], [`world`], [`relays`]: what they are done to
//! - [`usage`], [`observations`], [`checker`]: what else was seen, and the judgement
//! - [`run`], [`report`], [`cli`]: a run from its options to its report

pub mod board;
pub mod checker;
pub mod cli;
pub mod consumer;
pub mod faults;
pub mod inject;
pub mod ledger;
pub mod observations;
pub mod proxy;
pub mod relays;
pub mod report;
pub mod run;
pub mod sampler;
pub mod schedule;
pub mod servers;
pub mod usage;
pub mod world;
pub mod writer;

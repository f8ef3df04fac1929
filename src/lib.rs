//! outbox-relay publishes the rows of a Postgres outbox table to RabbitMQ.
//!
//! **Delivered means confirmed and routed.** A row is marked only after the broker has confirmed its
//! message and not returned it.
//!
//! The modules in the order the data goes:
//!
//! - [`config`]: settings from flags, environment and file.
//! - [`store`]: where rows are read from and their ends written to; Postgres, and a twin in memory.
//! - [`pipeline`]: poll, publish, settle, and the channels between them.
//! - [`ownership`]: which replica publishes which keys.
//! - [`sink`]: where messages go and what an answer means; RabbitMQ, and a null sink for benches.
//! - [`retry`]: what follows from each failure, in one `match`.
//! - [`housekeeping`]: counting and retention, beside the flow.
//! - [`relay`]: the assembly; starts, watches and stops everything.
//! - [`preflight`]: findings of `check`.
//! - [`http`]: health and metrics endpoints.
//! - [`telemetry`]: logs, metrics, liveness.
//! - [`allocator`]: one setting of the C library's memory.
//! - [`cli`]: commands of the binary.

pub mod allocator;
pub mod cli;
pub mod config;
pub mod housekeeping;
pub mod http;
mod mutants;
pub mod ownership;
pub mod pipeline;
pub mod preflight;
pub mod relay;
pub mod retry;
pub mod sink;
pub mod store;
pub mod telemetry;

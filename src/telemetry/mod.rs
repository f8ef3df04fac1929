//! What users see of a running relay: logs, metrics, and the board behind the health endpoints.

mod board;
pub mod logs;
mod metrics;
mod pulse;

pub use board::{Board, Database, DatabaseUser};
pub use metrics::{LeaseChange, Metrics, Peer};
pub use pulse::{Pulse, Pulses};

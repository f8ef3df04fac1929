//! What users see of a running relay: logs, metrics, and the board behind the health endpoints.

mod board;
pub mod logs;
mod metrics;
mod pulse;

pub use board::{Board, Database, DatabaseUser};
pub use metrics::{LeaseChange, Metrics, Peer};
pub use pulse::{Pulse, Pulses};

use std::sync::Arc;

/// What a relay is seen by.
#[derive(Debug, Clone)]
pub struct Telemetry {
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// What health tells.
    pub board: Arc<Board>,
    /// Whether all its loops live.
    pub pulses: Pulses,
}

/// What one loop is seen by.
#[derive(Debug)]
pub struct Instruments {
    /// The relay's.
    pub metrics: Arc<Metrics>,
    /// The relay's.
    pub board: Arc<Board>,
    /// The loop's own.
    pub pulse: Pulse,
}

impl Telemetry {
    /// Nothing is told yet.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { board: Arc::new(Board::new(Arc::clone(&metrics))), metrics, pulses: Pulses::default() }
    }

    /// For a new loop.
    pub fn of(&self, name: &'static str) -> Instruments {
        let (metrics, board) = (Arc::clone(&self.metrics), Arc::clone(&self.board));
        Instruments { metrics, board, pulse: self.pulses.start(name) }
    }
}

#[cfg(test)]
impl Instruments {
    /// Of a loop that nobody looks at.
    pub fn unseen() -> Self {
        Telemetry::new(Arc::default()).of("unseen")
    }
}

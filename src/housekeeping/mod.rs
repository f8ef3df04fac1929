//! What runs beside the flow: counting for health and metrics, and deleting what has been kept long enough. Both are gentle:
//! a connection each, short statements, and rest in proportion to what the last ones took.

mod census;
mod retention;

pub use census::census;
pub use retention::purge;

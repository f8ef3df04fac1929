//! The TCP proxy between the relay and a server; it lives with the chaos tool.

pub use outbox_relay_chaos::proxy::{Link, Proxy};

//! Routes that refuse: parked after a few refusals in a row, probed with one real message, released
//! when one goes through.
//!
//! A parked route costs one message per probe however many rows wait for it. New rows of a parked
//! route are still tried once each, so that every waiting row carries its own reason. Owned by `poll`.

use crate::retry::Backoff;
use crate::store::Route;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Refusals in a row that park a route.
const PARK_AFTER: u32 = 3;
/// Routes remembered at most. Beyond, rows of further routes wait on their own, each with its back-off.
const ROUTES_MAX: usize = 1024;
/// Longest pause between two probes of a route, so that a new binding is noticed soon.
const PROBE_MAX: Duration = Duration::from_secs(5);

/// Routes that have refused a message since their last success.
#[derive(Debug)]
pub struct Routes {
    refusing: HashMap<Arc<Route>, Refusing>,
    probe: Backoff,
}

#[derive(Debug)]
struct Refusing {
    refusals: u32,
    probes: u32,
    next_probe: Instant,
    probing: bool,
}

impl Refusing {
    fn parked(&self) -> bool {
        self.refusals >= PARK_AFTER
    }
}

/// What a refusal did to its route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parking {
    /// Parked by this one.
    Parked,
    /// As before.
    Unchanged,
}

impl Routes {
    /// Probes begin after `retry_min` and come at least every five seconds, sooner if `retry_max` is shorter.
    pub fn new(retry_min: Duration, retry_max: Duration) -> Self {
        let max = retry_max.min(PROBE_MAX);
        Self { refusing: HashMap::new(), probe: Backoff { min: retry_min.min(max), max } }
    }

    /// A message was refused by its destination.
    pub fn refused(&mut self, route: &Arc<Route>, now: Instant) -> Parking {
        if !self.refusing.contains_key(route) && self.refusing.len() >= ROUTES_MAX {
            return Parking::Unchanged;
        }
        let probe = self.probe;
        let state = self.refusing.entry(Arc::clone(route)).or_insert(Refusing {
            refusals: 0,
            probes: 0,
            next_probe: now,
            probing: false,
        });
        let was_parked = state.parked();
        state.refusals = state.refusals.saturating_add(1);
        if state.probing || !was_parked {
            state.probes = if state.probing { state.probes.saturating_add(1) } else { 0 };
            state.probing = false;
            state.next_probe = now + probe.delays().nth(state.probes.min(32) as usize).unwrap_or(probe.max);
        }
        if state.parked() && !was_parked { Parking::Parked } else { Parking::Unchanged }
    }

    /// A message went through. True if its route had refused before and its waiting rows are to be
    /// released.
    pub fn delivered(&mut self, route: &Route) -> bool {
        self.refusing.remove(route).is_some()
    }

    /// A probe found no row to send: nothing waits there any more.
    pub fn nothing_waits(&mut self, route: &Route) {
        self.refusing.remove(route);
    }

    /// A probe came back unsent; another may go.
    pub fn probe_released(&mut self, route: &Route, now: Instant) {
        if let Some(state) = self.refusing.get_mut(route) {
            state.probing = false;
            state.next_probe = now + self.probe.min;
        }
    }

    /// The route has refused lately, so that its successes are worth watching.
    pub fn watches(&self, route: &Route) -> bool {
        !self.refusing.is_empty() && self.refusing.contains_key(route)
    }

    /// Routes whose refused rows are not to be read.
    pub fn parked(&self) -> Vec<Arc<Route>> {
        self.refusing.iter().filter(|(_, state)| state.parked()).map(|(route, _)| Arc::clone(route)).collect()
    }

    /// How many routes are parked.
    pub fn parked_count(&self) -> usize {
        self.refusing.values().filter(|state| state.parked()).count()
    }

    /// Takes a route that is due for a probe and notes that one is on its way.
    pub fn take_due_probe(&mut self, now: Instant) -> Option<Arc<Route>> {
        let due = |state: &Refusing| state.parked() && !state.probing && state.next_probe <= now;
        let (route, state) = self.refusing.iter_mut().find(|(_, state)| due(state))?;
        state.probing = true;
        Some(Arc::clone(route))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route() -> Arc<Route> {
        Arc::new(Route { exchange: "x".to_owned(), routing_key: "k".to_owned() })
    }

    #[test]
    fn a_route_is_parked_probed_and_released() {
        let (mut routes, route, now) =
            (Routes::new(Duration::from_millis(10), Duration::from_secs(60)), route(), Instant::now());
        assert_eq!(routes.refused(&route, now), Parking::Unchanged);
        assert_eq!(routes.refused(&route, now), Parking::Unchanged);
        assert_eq!(routes.refused(&route, now), Parking::Parked);
        assert_eq!(routes.refused(&route, now), Parking::Unchanged);
        assert_eq!(routes.parked(), [Arc::clone(&route)]);
        assert_eq!(routes.take_due_probe(now), None, "the first probe waits");
        let later = now + PROBE_MAX;
        assert_eq!(routes.take_due_probe(later), Some(Arc::clone(&route)));
        assert_eq!(routes.take_due_probe(later), None, "one probe at a time");
        routes.refused(&route, later);
        assert_eq!(routes.take_due_probe(later), None, "a refused probe waits again");
        assert_eq!(routes.take_due_probe(later + PROBE_MAX), Some(Arc::clone(&route)));
        assert!(routes.delivered(&route));
        assert!(routes.parked().is_empty());
    }

    #[test]
    fn probes_come_at_least_every_five_seconds() {
        let (mut routes, route, mut now) =
            (Routes::new(Duration::from_secs(1), Duration::from_secs(3600)), route(), Instant::now());
        for _ in 0..PARK_AFTER {
            routes.refused(&route, now);
        }
        for _ in 0..50 {
            now += PROBE_MAX;
            assert!(routes.take_due_probe(now).is_some());
            routes.refused(&route, now);
        }
    }

    #[test]
    fn a_success_in_between_starts_the_count_anew() {
        let (mut routes, route, now) =
            (Routes::new(Duration::from_millis(10), Duration::from_secs(60)), route(), Instant::now());
        for _ in 0..10 {
            routes.refused(&route, now);
            routes.refused(&route, now);
            routes.delivered(&route);
        }
        assert!(routes.parked().is_empty());
    }
}

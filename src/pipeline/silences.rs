//! Routes that give no answers, as one worker counts them: confirm time-outs in a row.

use crate::retry::SILENCES_BLAME_ROUTE;
use crate::store::Route;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

/// Routes counted at once; of more, those of longest ago are forgotten.
const ROUTES_MAX: usize = 1024;

/// What is counted.
#[derive(Debug, Default)]
pub struct Silences(HashMap<Arc<Route>, Silence>);

#[derive(Debug, Clone, Copy)]
struct Silence {
    count: u32,
    last: Instant,
}

impl Silences {
    /// So often in a row.
    pub fn of(&self, route: &Route) -> u32 {
        self.0.get(route).map_or(0, |silence| silence.count)
    }

    /// The route itself is to blame.
    pub fn is_silent(&self, route: &Route) -> bool {
        !self.0.is_empty() && self.of(route) >= SILENCES_BLAME_ROUTE
    }

    /// A confirm time-out. Where rows of a route went to another replica or to the prober, what became of it is not learned
    /// here, so old ones are no hindrance for new ones.
    pub fn count(&mut self, route: &Arc<Route>, now: Instant) {
        if self.0.len() >= ROUTES_MAX
            && !self.0.contains_key(route)
            && let Some(longest_ago) = self.longest_ago()
        {
            self.0.remove(&longest_ago);
        }
        let silence = self.0.entry(Arc::clone(route)).or_insert(Silence { count: 0, last: now });
        *silence = Silence { count: silence.count.saturating_add(1), last: now };
    }

    /// An answer, be it a refusal.
    pub fn answered(&mut self, route: &Route) {
        if !self.0.is_empty() {
            self.0.remove(route);
        }
    }

    fn longest_ago(&self) -> Option<Arc<Route>> {
        self.0.iter().min_by_key(|(_, silence)| silence.last).map(|(route, _)| Arc::clone(route))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn numbered(number: usize) -> Arc<Route> {
        Arc::new(Route { exchange: "x".to_owned(), routing_key: number.to_string() })
    }

    #[test]
    fn new_silent_routes_are_counted_whatever_was_left_of_old_ones() {
        let (mut silences, now) = (Silences::default(), Instant::now());
        for number in 0..ROUTES_MAX {
            silences.count(&numbered(number), now + Duration::from_millis(number as u64));
        }
        let later = now + Duration::from_secs(60);
        for _ in 0..SILENCES_BLAME_ROUTE {
            assert!(!silences.is_silent(&numbered(ROUTES_MAX)));
            silences.count(&numbered(ROUTES_MAX), later);
        }
        assert!(silences.is_silent(&numbered(ROUTES_MAX)));
        assert_eq!((silences.of(&numbered(0)), silences.of(&numbered(1))), (0, 1), "the oldest is forgotten");
        silences.answered(&numbered(ROUTES_MAX));
        assert!(!silences.is_silent(&numbered(ROUTES_MAX)));
    }
}

//! Waiting rows of routes that work again: they are made due, in bites.
//!
//! A full queue takes a message whenever its consumer does, and refuses the next one. Were all that wait for it made due at
//! each message that it takes, their back-offs would mean nothing. So a release begins with few and doubles (slow start), waits
//! until its route has not refused for a while, ends when the route is parked again, and the next one of the same route comes
//! a while later. Owned by `poll`.

use super::routes::ROUTES_MAX;
use crate::retry::WALK_REST;
use crate::store::Route;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// From a refusal, or from the end of a release, to the next release of the same route.
const PAUSE: Duration = Duration::from_secs(5);
/// From a failure to the next try.
const RETRY: Duration = Duration::from_secs(1);
/// Rows of the first statement of a release, and of the largest.
const BITES: (usize, usize) = (16, 1024);
/// From one bite to the next as long as they grow: by then the broker has said what it thinks of the last one.
const BITE_PAUSE: Duration = Duration::from_millis(50);

/// Routes that work again, and those that did a moment ago.
#[derive(Debug, Default)]
pub struct Releases {
    routes: HashMap<Arc<Route>, Release>,
}

#[derive(Debug)]
struct Release {
    /// Rows may wait for it.
    wanted: bool,
    /// Not before.
    due: Instant,
    /// Rows of the next bite.
    bite: usize,
}

impl Release {
    fn new(wanted: bool, due: Instant) -> Self {
        Self { wanted, due, bite: BITES.0 }
    }
}

/// What is to be made due now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bite {
    /// Rows of this route.
    pub route: Arc<Route>,
    /// So many at most.
    pub rows: usize,
}

impl Releases {
    /// A route that had refused takes messages.
    pub fn begin(&mut self, route: Arc<Route>, now: Instant) {
        if let Some(release) = self.routes.get_mut(&route) {
            release.wanted = true;
            return;
        }
        if self.routes.len() >= ROUTES_MAX {
            self.routes.retain(|_, release| release.wanted || release.due > now);
        }
        if self.routes.len() < ROUTES_MAX {
            self.routes.insert(route, Release::new(true, now));
        }
    }

    /// A route refuses; perhaps a message that was sent before it worked again.
    pub fn postpone(&mut self, route: &Route, now: Instant) {
        if let Some(release) = self.wanted(route) {
            *release = Release::new(true, now + PAUSE);
        }
    }

    /// Nothing waits for it any more, after a statement that took so long; or it refuses every message, and will be told when
    /// one goes through.
    pub fn end(&mut self, route: &Route, took: Duration, now: Instant) {
        if let Some(release) = self.wanted(route) {
            *release = Release::new(false, now + PAUSE.max(WALK_REST.after(took)));
        }
    }

    /// It worked a moment ago, or seemed to.
    pub fn is_recent(&self, route: &Route, now: Instant) -> bool {
        self.routes.get(route).is_some_and(|release| release.due > now)
    }

    /// There were as many as that: more may wait.
    pub fn go_on(&mut self, route: &Route, now: Instant) {
        if let Some(release) = self.wanted(route) {
            let grows = release.bite < BITES.1;
            release.due = if grows { now + BITE_PAUSE } else { now };
            release.bite = (release.bite * 2).min(BITES.1);
        }
    }

    /// It could not be done now, and that took so long.
    pub fn retry(&mut self, route: &Route, took: Duration, now: Instant) {
        if let Some(release) = self.wanted(route) {
            release.due = now + RETRY.max(WALK_REST.after(took));
        }
    }

    fn wanted(&mut self, route: &Route) -> Option<&mut Release> {
        self.routes.get_mut(route).filter(|release| release.wanted)
    }

    /// When the next one is due.
    pub fn next_due(&self) -> Option<Instant> {
        self.routes.values().filter(|release| release.wanted).map(|release| release.due).min()
    }

    /// The one that has been due for longest.
    pub fn due(&self, now: Instant) -> Option<Bite> {
        let wanted = self.routes.iter().filter(|(_, release)| release.wanted && release.due <= now);
        let (route, release) = wanted.min_by_key(|(_, release)| release.due)?;
        Some(Bite { route: Arc::clone(route), rows: release.bite })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(name: &str) -> Arc<Route> {
        Arc::new(Route { exchange: String::new(), routing_key: name.to_owned() })
    }

    fn due(releases: &Releases, now: Instant) -> Option<Arc<Route>> {
        releases.due(now).map(|bite| bite.route)
    }

    #[test]
    fn a_release_begins_with_few_and_begins_again_when_its_route_refuses() {
        let (mut releases, route, mut now) = (Releases::default(), route("a"), Instant::now());
        releases.begin(Arc::clone(&route), now);
        let mut rows = Vec::new();
        for _ in 0..9 {
            let bite = releases.due(now).expect("a bite");
            rows.push(bite.rows);
            releases.go_on(&route, now);
            now += BITE_PAUSE;
        }
        assert_eq!(rows, [16, 32, 64, 128, 256, 512, 1024, 1024, 1024]);
        releases.go_on(&route, now);
        assert!(releases.due(now).is_some(), "a large bite needs no pause");
        releases.postpone(&route, now);
        assert_eq!(releases.due(now), None);
        assert_eq!(releases.due(now + PAUSE).map(|bite| bite.rows), Some(16));
    }

    #[test]
    fn a_release_goes_on_until_nothing_waits() {
        let (mut releases, a, b, now) = (Releases::default(), route("a"), route("b"), Instant::now());
        releases.begin(Arc::clone(&a), now);
        let later = now + Duration::from_millis(1);
        releases.begin(Arc::clone(&b), later);
        assert_eq!(due(&releases, later), Some(Arc::clone(&a)));
        releases.go_on(&a, later);
        assert_eq!(due(&releases, now + RETRY), Some(Arc::clone(&b)), "each has its turn");
        releases.retry(&b, Duration::ZERO, now + RETRY);
        assert_eq!(due(&releases, now + RETRY), Some(Arc::clone(&a)));
        releases.end(&a, Duration::ZERO, now + RETRY);
        assert_eq!(due(&releases, now + RETRY), None);
        assert_eq!(releases.next_due(), Some(now + RETRY + RETRY));
    }

    #[test]
    fn a_route_that_takes_some_and_refuses_some_is_released_when_it_has_not_refused_for_a_while() {
        let (mut releases, route, mut now) = (Releases::default(), route("a"), Instant::now());
        for _ in 0..100 {
            releases.begin(Arc::clone(&route), now);
            releases.postpone(&route, now);
            now += Duration::from_millis(100);
            assert_eq!(due(&releases, now), None);
        }
        assert_eq!(due(&releases, now + PAUSE), Some(Arc::clone(&route)));
    }

    #[test]
    fn the_next_release_of_a_route_comes_a_while_after_the_last_one() {
        let (mut releases, route, now) = (Releases::default(), route("a"), Instant::now());
        releases.begin(Arc::clone(&route), now);
        releases.end(&route, Duration::ZERO, now);
        assert_eq!(releases.next_due(), None);
        releases.begin(Arc::clone(&route), now);
        assert_eq!((due(&releases, now), releases.next_due()), (None, Some(now + PAUSE)));
    }

    #[test]
    fn routes_are_forgotten_when_there_are_many() {
        let (mut releases, now) = (Releases::default(), Instant::now());
        for number in 0..ROUTES_MAX {
            releases.begin(route(&number.to_string()), now);
        }
        releases.begin(route("one more"), now);
        assert_eq!(releases.routes.len(), ROUTES_MAX);
        assert!(!releases.routes.contains_key(&route("one more")), "all are wanted");
        (0..10).for_each(|number| releases.end(&route(&number.to_string()), Duration::ZERO, now));
        releases.begin(route("one more"), now + PAUSE);
        assert_eq!(releases.routes.len(), ROUTES_MAX - 9);
    }

    #[test]
    fn what_takes_long_is_followed_by_a_longer_rest() {
        let (mut releases, route, now) = (Releases::default(), route("a"), Instant::now());
        releases.begin(Arc::clone(&route), now);
        releases.retry(&route, Duration::from_secs(15), now);
        assert_eq!(releases.next_due(), Some(now + Duration::from_secs(300)));
        releases.end(&route, Duration::from_secs(1), now);
        releases.begin(Arc::clone(&route), now);
        assert_eq!(releases.next_due(), Some(now + Duration::from_secs(20)));
    }

    #[test]
    fn a_release_of_long_ago_puts_nothing_off() {
        let (mut releases, route, now) = (Releases::default(), route("a"), Instant::now());
        releases.begin(Arc::clone(&route), now);
        assert!(!releases.is_recent(&route, now));
        releases.end(&route, Duration::ZERO, now);
        assert!(releases.is_recent(&route, now));
        let later = now + 2 * PAUSE;
        releases.postpone(&route, later);
        releases.end(&route, Duration::ZERO, later);
        assert!(!releases.is_recent(&route, later));
        releases.begin(Arc::clone(&route), later);
        assert_eq!(due(&releases, later), Some(route));
    }
}

//! Routes that refuse: parked after a few refusals in a row, probed with one real message, released
//! when one goes through.
//!
//! A parked route costs one message per probe however many rows wait for it. New rows of a parked
//! route are still tried once each, so that every waiting row carries its own reason. Owned by `poll`.
//!
//! A route that gives no answer costs a whole confirm time-out per probe, and keeps the probe's shard from being handed
//! over meanwhile. So such routes are tried one after the other, each with a long rest, and others do not pay for that.

use crate::config::Settings;
use crate::retry::{Backoff, Rest};
use crate::sink::Fault;
use crate::store::Route;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Refusals in a row that park a route.
const PARK_AFTER: u32 = 3;
/// Routes remembered at most. Beyond, rows of further routes wait on their own, each with its back-off.
pub(super) const ROUTES_MAX: usize = 1024;
/// Longest pause between two probes of a route, so that a new binding is noticed soon.
const PROBE_MAX: Duration = Duration::from_secs(5);
/// The part of all places, and of all bytes, that probes may take: those without an answer keep theirs for long.
const PROBES_PART: usize = 4;
/// A probe is followed by this many times its duration of rest: that of its statement, which may have walked over much, or
/// all the time without an answer.
const PROBE_REST: Rest = Rest { times: 10, at_most: Duration::from_secs(300) };

/// Routes that have refused a message since their last success.
#[derive(Debug)]
pub struct Routes {
    refusing: HashMap<Arc<Route>, Refusing>,
    probe: Backoff,
    probes_max: usize,
    probe_bytes_max: usize,
}

#[derive(Debug)]
struct Refusing {
    refusals: u32,
    /// The log has it.
    told: bool,
    /// Why it refused last.
    fault: Fault,
    probes: u32,
    next_probe: Instant,
    /// On its way.
    probe: Option<Probe>,
}

#[derive(Debug)]
struct Probe {
    since: Instant,
    /// Its statement took so long, if it is over.
    read_in: Option<Duration>,
    bytes: usize,
}

impl Refusing {
    fn new(fault: Fault, now: Instant) -> Self {
        Self { refusals: 0, told: false, fault, probes: 0, next_probe: now, probe: None }
    }

    /// No answer came.
    fn silent(&self) -> bool {
        self.fault == Fault::Silence
    }

    /// The connection broke.
    fn breaks(&self) -> bool {
        self.fault == Fault::Break
    }

    fn parked(&self) -> bool {
        self.refusals >= PARK_AFTER
    }

    fn waits_for_probe(&self) -> bool {
        self.parked() && self.probe.is_none()
    }

    /// The rest that a probe which ends now is followed by. What it waited for others is not its own time.
    fn end_probe(&mut self, now: Instant) -> Duration {
        let took = self.probe.take().map_or(Duration::ZERO, |probe| {
            probe.read_in.filter(|_| !self.silent()).unwrap_or_else(|| now - probe.since)
        });
        PROBE_REST.after(took)
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
    pub fn new(settings: &Settings) -> Self {
        let max = settings.retry_max.min(PROBE_MAX);
        let probe = Backoff { min: settings.retry_min.min(max), max };
        let part = |of: usize| (of / PROBES_PART).max(1);
        let (probes_max, probe_bytes_max) =
            (part(settings.max_in_flight), part(settings.max_in_flight_bytes));
        Self { refusing: HashMap::new(), probe, probes_max, probe_bytes_max }
    }

    /// A message was refused by its destination; `probe` says that it was sent to try the route.
    pub fn refused(&mut self, route: &Arc<Route>, fault: Fault, probe: bool, now: Instant) -> Parking {
        if !self.has_room_for(route) {
            return Parking::Unchanged;
        }
        let backoff = self.probe;
        let state = self.refusing.entry(Arc::clone(route)).or_insert_with(|| Refusing::new(fault, now));
        let was_parked = state.parked();
        state.refusals = state.refusals.saturating_add(1);
        state.fault = fault;
        if probe {
            state.probes = state.probes.saturating_add(1);
            state.next_probe = now + backoff.delay(state.probes).max(state.end_probe(now));
        }
        if was_parked || !state.parked() {
            return Parking::Unchanged;
        }
        state.next_probe = state.next_probe.max(now + backoff.delay(0));
        Parking::Parked
    }

    /// Where there is none, routes with a refusal or two are forgotten: their rows may be gone, or at another replica.
    fn has_room_for(&mut self, route: &Route) -> bool {
        if self.refusing.contains_key(route) {
            return true;
        }
        if self.refusing.len() >= ROUTES_MAX {
            self.refusing.retain(|_, state| state.parked() || state.probe.is_some());
        }
        self.refusing.len() < ROUTES_MAX
    }

    /// The route is parked and the log has it not yet; from now on it has.
    pub fn is_to_be_told(&mut self, route: &Route) -> bool {
        let parked = self.refusing.get_mut(route).filter(|state| state.parked());
        parked.is_some_and(|state| !std::mem::replace(&mut state.told, true))
    }

    /// A message went through. True if its route had refused before and its waiting rows are to be
    /// released.
    pub fn delivered(&mut self, route: &Route) -> bool {
        let was = self.refusing.remove(route);
        // One row that broke connections, among others that do not: its own wait is right for it.
        was.is_some_and(|state| !state.breaks() || state.parked())
    }

    /// A probe found no row to send: nothing waits there any more.
    pub fn nothing_waits(&mut self, route: &Route) {
        self.refusing.remove(route);
    }

    /// A probe came back unsent; another may go.
    pub fn probe_released(&mut self, route: &Route, now: Instant) {
        if let Some(state) = self.refusing.get_mut(route) {
            state.next_probe = now + self.probe.min.max(state.end_probe(now));
        }
    }

    /// Its rows are read as all others, until it refuses some again: there are too many of them to find one to try, so it would
    /// stay parked although it works. A probe is followed by the same rest as always.
    pub fn unpark(&mut self, route: &Route, now: Instant) {
        self.probe_released(route, now);
        if let Some(state) = self.refusing.get_mut(route) {
            state.refusals = 0;
        }
    }

    /// All of them, but for those that are being tried.
    pub fn unpark_all(&mut self, now: Instant) {
        for state in self.refusing.values_mut().filter(|state| state.waits_for_probe()) {
            state.refusals = 0;
            state.next_probe = state.next_probe.max(now);
        }
    }

    /// The route has refused since it last worked, so that a success is news.
    pub fn refused_lately(&self, route: &Route) -> bool {
        !self.refusing.is_empty() && self.refusing.contains_key(route)
    }

    /// Routes whose refused rows are not to be read.
    pub fn parked(&self) -> Vec<Arc<Route>> {
        self.refusing.iter().filter(|(_, state)| state.parked()).map(|(route, _)| Arc::clone(route)).collect()
    }

    /// When the next route is due for a probe, if none is on its way there and not too many are elsewhere.
    pub fn next_probe(&self) -> Option<Instant> {
        self.next_to_probe().map(|(_, state)| state.next_probe)
    }

    /// Takes the route that has been due for a probe for longest and notes that one is on its way.
    pub fn take_due_probe(&mut self, now: Instant) -> Option<Arc<Route>> {
        let (route, _) = self.next_to_probe().filter(|(_, state)| state.next_probe <= now)?;
        let route = Arc::clone(route);
        let state = self.refusing.get_mut(&route)?;
        state.probe = Some(Probe { since: now, read_in: None, bytes: 0 });
        Some(route)
    }

    /// Its messages break connections.
    pub fn breaks(&self, route: &Route) -> bool {
        self.refusing.get(route).is_some_and(Refusing::breaks)
    }

    /// The probe that was taken is so large.
    pub fn probe_sent(&mut self, route: &Route, bytes: usize, now: Instant) {
        if let Some(probe) = self.refusing.get_mut(route).and_then(|state| state.probe.as_mut()) {
            (probe.bytes, probe.read_in) = (bytes, Some(now - probe.since));
        }
    }

    fn next_to_probe(&self) -> Option<(&Arc<Route>, &Refusing)> {
        if !self.may_probe() {
            return None;
        }
        let one_is_silent = self.refusing.values().any(|state| state.silent() && state.probe.is_some());
        let in_turn = |state: &Refusing| state.waits_for_probe() && !(state.silent() && one_is_silent);
        let waiting = self.refusing.iter().filter(|(_, state)| in_turn(state));
        waiting.min_by_key(|(_, state)| state.next_probe)
    }

    fn may_probe(&self) -> bool {
        let on_their_way = || self.refusing.values().filter_map(|state| state.probe.as_ref());
        let bytes: usize = on_their_way().map(|probe| probe.bytes).sum();
        on_their_way().count() < self.probes_max && bytes < self.probe_bytes_max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes_of(retry_min: Duration, retry_max: Duration, max_in_flight: usize) -> Routes {
        let settings = Settings::plain();
        Routes::new(&Settings { retry_min, retry_max, max_in_flight, max_in_flight_bytes: 1000, ..settings })
    }

    fn numbered(number: usize) -> Arc<Route> {
        Arc::new(Route { exchange: "x".to_owned(), routing_key: number.to_string() })
    }

    fn park(routes: &mut Routes, route: &Arc<Route>, fault: Fault, now: Instant) {
        for _ in 0..PARK_AFTER {
            routes.refused(route, fault, false, now);
        }
    }

    #[test]
    fn a_route_is_parked_probed_and_released() {
        let (mut routes, route, now) = (
            routes_of(Duration::from_millis(10), Duration::from_secs(60), 2000),
            numbered(1),
            Instant::now(),
        );
        assert_eq!(routes.refused(&route, Fault::Unroutable, false, now), Parking::Unchanged);
        assert_eq!(routes.refused(&route, Fault::Unroutable, false, now), Parking::Unchanged);
        assert!(!routes.is_to_be_told(&route), "not parked yet");
        assert_eq!(routes.refused(&route, Fault::Unroutable, false, now), Parking::Parked);
        assert_eq!(routes.refused(&route, Fault::Unroutable, false, now), Parking::Unchanged);
        assert_eq!(routes.parked(), [Arc::clone(&route)]);
        assert!(
            routes.is_to_be_told(&route) && !routes.is_to_be_told(&route),
            "once, and when somebody tells it"
        );
        assert_eq!(routes.take_due_probe(now), None, "the first probe waits");
        assert!(routes.next_probe().is_some_and(|at| at > now));
        let later = now + PROBE_MAX;
        assert_eq!(routes.take_due_probe(later), Some(Arc::clone(&route)));
        assert_eq!(routes.take_due_probe(later), None, "one probe at a time");
        assert_eq!(routes.next_probe(), None);
        routes.refused(&route, Fault::Unroutable, false, later);
        assert_eq!(routes.take_due_probe(later + PROBE_MAX), None, "only its own end ends a probe");
        routes.refused(&route, Fault::Unroutable, true, later);
        assert_eq!(routes.take_due_probe(later), None, "a refused probe waits again");
        assert_eq!(routes.take_due_probe(later + PROBE_MAX), Some(Arc::clone(&route)));
        assert!(routes.delivered(&route));
        assert!(routes.parked().is_empty());
    }

    #[test]
    fn probes_come_at_least_every_five_seconds() {
        let (mut routes, route, mut now) =
            (routes_of(Duration::from_secs(1), Duration::from_secs(3600), 2000), numbered(1), Instant::now());
        park(&mut routes, &route, Fault::Unroutable, now);
        for _ in 0..50 {
            now += PROBE_MAX;
            assert!(routes.take_due_probe(now).is_some());
            routes.refused(&route, Fault::Unroutable, true, now);
        }
    }

    #[test]
    fn a_probe_without_an_answer_is_followed_by_a_longer_rest_of_bounded_length() {
        let (mut routes, route, now) = (
            routes_of(Duration::from_millis(10), Duration::from_secs(60), 2000),
            numbered(1),
            Instant::now(),
        );
        park(&mut routes, &route, Fault::Silence, now);
        let sent = now + PROBE_MAX;
        assert!(routes.take_due_probe(sent).is_some());
        routes.probe_sent(&route, 1, sent);
        let answered = sent + Duration::from_secs(30);
        routes.refused(&route, Fault::Silence, true, answered);
        assert!(routes.take_due_probe(answered + Duration::from_secs(299)).is_none());
        let sent = answered + Duration::from_secs(300);
        assert!(routes.take_due_probe(sent).is_some());
        let answered = sent + Duration::from_secs(3600);
        routes.refused(&route, Fault::Silence, true, answered);
        assert!(routes.take_due_probe(answered + PROBE_REST.at_most).is_some());
    }

    /// Its answer came at once; only its turn was late, behind a probe of a silent route.
    #[test]
    fn a_probe_that_waited_for_its_turn_is_followed_by_the_next_as_soon_as_ever() {
        let (mut routes, route, now) = (
            routes_of(Duration::from_millis(10), Duration::from_secs(60), 2000),
            numbered(1),
            Instant::now(),
        );
        park(&mut routes, &route, Fault::Unroutable, now);
        let mut sent = now + PROBE_MAX;
        for _ in 0..2 {
            assert!(routes.take_due_probe(sent).is_some());
            routes.probe_sent(&route, 1, sent + Duration::from_millis(100));
            let answered = sent + Duration::from_secs(30);
            routes.refused(&route, Fault::Unroutable, true, answered);
            assert!(
                routes.take_due_probe(answered + Duration::from_millis(999)).is_none(),
                "ten times its statement"
            );
            sent = answered + PROBE_MAX;
        }
        assert!(routes.take_due_probe(sent).is_some());
        routes.probe_sent(&route, 1, sent);
        routes.probe_released(&route, sent + Duration::from_secs(30));
        assert!(routes.take_due_probe(sent + Duration::from_secs(31)).is_some());
    }

    /// Each keeps its shard for a whole time-out, and so would those that wait behind it.
    #[test]
    fn silent_routes_are_probed_one_after_the_other_and_others_beside_them() {
        let (mut routes, now) =
            (routes_of(Duration::from_millis(10), Duration::from_secs(60), 2000), Instant::now());
        let all = [
            (numbered(1), Fault::Silence),
            (numbered(2), Fault::Silence),
            (numbered(3), Fault::Unroutable),
            (numbered(4), Fault::Unroutable),
        ];
        for (route, fault) in &all {
            park(&mut routes, route, *fault, now);
        }
        let later = now + PROBE_MAX;
        let taken: Vec<_> = std::iter::from_fn(|| routes.take_due_probe(later)).collect();
        let silent: Vec<_> = all[..2].iter().filter(|(route, _)| taken.contains(route)).collect();
        assert_eq!((taken.len(), silent.len()), (3, 1));
        assert_eq!(routes.next_probe(), None, "nothing to wake up for");
        routes.refused(&silent[0].0, Fault::Silence, true, later);
        let other = routes.take_due_probe(later).expect("the other");
        assert!(all[..2].iter().any(|(route, _)| *route == other) && other != silent[0].0);
    }

    /// Whatever order the table of routes has.
    #[test]
    fn an_unparked_route_is_parked_by_further_refusals_and_rests_as_before() {
        let (mut routes, route, now) = (
            routes_of(Duration::from_millis(10), Duration::from_secs(60), 2000),
            numbered(1),
            Instant::now(),
        );
        park(&mut routes, &route, Fault::Unroutable, now);
        assert!(routes.is_to_be_told(&route));
        let tried = now + PROBE_MAX;
        assert!(routes.take_due_probe(tried).is_some());
        let failed = tried + Duration::from_secs(15);
        routes.unpark(&route, failed);
        assert!(routes.parked().is_empty() && routes.next_probe().is_none());
        assert!(routes.refused_lately(&route), "its success is news");
        park(&mut routes, &route, Fault::Unroutable, failed);
        assert_eq!(routes.parked(), [Arc::clone(&route)]);
        assert!(!routes.is_to_be_told(&route), "once");
        assert_eq!(routes.next_probe(), Some(failed + Duration::from_secs(150)));
        routes.unpark_all(failed);
        assert!(routes.parked().is_empty());
    }

    #[test]
    fn every_parked_route_is_probed_in_its_turn() {
        let (mut routes, mut now) =
            (routes_of(Duration::from_millis(10), Duration::from_secs(60), 2000), Instant::now());
        let all: Vec<_> = (0..50).map(numbered).collect();
        for route in &all {
            park(&mut routes, route, Fault::Unroutable, now);
        }
        now += PROBE_MAX;
        // Slower than routes become due again.
        let mut probed = std::collections::HashSet::new();
        for _ in 0..2 * all.len() {
            let route = routes.take_due_probe(now).expect("one is due");
            routes.refused(&route, Fault::Unroutable, true, now);
            probed.insert(route);
            now += PROBE_MAX / 10;
        }
        assert_eq!(probed.len(), all.len());
    }

    #[test]
    fn probes_without_an_answer_take_a_part_of_the_places() {
        let (mut routes, now) =
            (routes_of(Duration::from_millis(10), Duration::from_secs(60), 8), Instant::now());
        for n in 0..5 {
            let route = numbered(n);
            park(&mut routes, &route, Fault::Unroutable, now);
        }
        let later = now + PROBE_MAX;
        let first = routes.take_due_probe(later).expect("one is due");
        assert!(routes.take_due_probe(later).is_some() && routes.take_due_probe(later).is_none());
        assert_eq!(routes.next_probe(), None, "nothing to wake up for");
        routes.refused(&first, Fault::Unroutable, true, later);
        assert!(routes.take_due_probe(later).is_some());
    }

    #[test]
    fn a_bounded_number_of_routes_is_remembered() {
        let (mut routes, now) =
            (routes_of(Duration::from_millis(10), Duration::from_secs(60), 2000), Instant::now());
        for n in 0..ROUTES_MAX {
            routes.refused(&numbered(n), Fault::Unroutable, false, now);
        }
        park(&mut routes, &numbered(ROUTES_MAX), Fault::Unroutable, now);
        assert_eq!(
            routes.parked(),
            [numbered(ROUTES_MAX)],
            "what was refused once, and never again, takes no place"
        );
        for n in 0..ROUTES_MAX + 10 {
            park(&mut routes, &numbered(n), Fault::Unroutable, now);
        }
        assert_eq!(routes.refusing.len(), ROUTES_MAX);
        assert!(routes.parked().contains(&numbered(0)));
    }

    #[test]
    fn a_success_in_between_starts_the_count_anew() {
        let (mut routes, route, now) = (
            routes_of(Duration::from_millis(10), Duration::from_secs(60), 2000),
            numbered(1),
            Instant::now(),
        );
        for _ in 0..10 {
            routes.refused(&route, Fault::Unroutable, false, now);
            routes.refused(&route, Fault::Unroutable, false, now);
            routes.delivered(&route);
        }
        assert!(routes.parked().is_empty());
    }

    /// Few large ones would leave no room for the rows of routes that work.
    #[test]
    fn probes_take_a_part_of_the_bytes() {
        let (mut routes, now) =
            (routes_of(Duration::from_millis(10), Duration::from_secs(60), 2000), Instant::now());
        for number in 0..5 {
            park(&mut routes, &numbered(number), Fault::Unroutable, now);
        }
        let later = now + Duration::from_secs(60);
        let first = routes.take_due_probe(later).expect("one");
        routes.probe_sent(&first, 200, later);
        let second = routes.take_due_probe(later).expect("room for a second");
        routes.probe_sent(&second, 9000, later);
        assert_eq!(routes.take_due_probe(later), None, "a quarter is taken");
        assert_eq!(routes.next_probe(), None, "nor is one waited for");
        routes.refused(&second, Fault::Unroutable, true, later);
        assert!(routes.take_due_probe(later).is_some(), "it has ended");
    }
}

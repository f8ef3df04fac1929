//! Routes whose messages cost more than themselves, as one worker knows them: those that give no answers, so that each costs
//! a whole confirm time-out, and those under whose messages connections break.

use super::queue::Suspicion;
use crate::retry::{BREAKS_BLAME, SILENCES_BLAME_ROUTE};
use crate::sink::{Fault, Refusal};
use crate::store::{Route, Row};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Routes remembered at once; of more, those of longest ago are forgotten.
const ROUTES_MAX: usize = 1024;
/// Rows of a route that were blamed for broken connections, and none delivered between them, before others are sent seldom.
const ROWS_BLAME_ROUTE: u32 = 3;
/// As often as this.
const SELDOM: Duration = Duration::from_secs(1);

/// What is known.
#[derive(Debug, Default)]
pub struct Troubled(HashMap<Arc<Route>, Trouble>);

#[derive(Debug, Clone, Copy)]
struct Trouble {
    /// Confirm time-outs in a row.
    silences: u32,
    /// A message of it has broken a connection of its own.
    breaks: bool,
    /// Rows in a row that were blamed for that.
    blamed: u32,
    /// When one of these was counted last.
    last: Instant,
    next_try: Instant,
}

/// How a row that came is sent.
#[derive(Debug, PartialEq, Eq)]
pub enum Sending {
    /// With all others.
    Together,
    /// By itself.
    Alone(Suspicion),
    /// Not now.
    NotNow(Refusal),
}

impl Trouble {
    fn new(now: Instant) -> Self {
        Self { silences: 0, breaks: false, blamed: 0, last: now, next_try: now }
    }

    fn is_silent(&self) -> bool {
        self.silences >= SILENCES_BLAME_ROUTE
    }

    fn is_lethal(&self) -> bool {
        self.blamed >= ROWS_BLAME_ROUTE
    }

    /// Why a row is not sent.
    fn refusal(&self) -> Refusal {
        match self.is_lethal() {
            true => Refusal::new(
                Fault::Break,
                "not sent: connections have broken each time a message of this route was on its way",
            ),
            false => Refusal::new(Fault::Silence, "not sent: this route has given no confirms lately"),
        }
    }
}

impl Troubled {
    /// Confirm time-outs in a row.
    pub fn silences(&self, route: &Route) -> u32 {
        self.0.get(route).map_or(0, |trouble| trouble.silences)
    }

    /// How a row is sent that came now. Of a silent route new rows are not, of one that breaks connections few; those that
    /// have waited are tried.
    pub fn sending(&mut self, row: &Row, now: Instant) -> Sending {
        if self.0.is_empty() {
            return Sending::Together;
        }
        let Some(trouble) = self.0.get_mut(&row.route) else { return Sending::Together };
        let is_new = row.attempts == 0;
        if trouble.is_lethal() {
            if is_new && now < trouble.next_try {
                return Sending::NotNow(trouble.refusal());
            }
            trouble.next_try = now + SELDOM;
            return Sending::Alone(Suspicion::apart(now, BREAKS_BLAME - 1));
        }
        if trouble.is_silent() {
            return match is_new {
                true => Sending::NotNow(trouble.refusal()),
                false => Sending::Alone(Suspicion { alone: Some(now), ..Suspicion::default() }),
            };
        }
        if trouble.breaks { Sending::Alone(Suspicion::apart(now, 0)) } else { Sending::Together }
    }

    /// Since this row was to be sent alone, its route has shown that this is in vain.
    pub fn is_in_vain(&self, route: &Route, since: Instant) -> Option<Refusal> {
        let trouble = self.0.get(route).filter(|trouble| trouble.is_silent() || trouble.is_lethal())?;
        (trouble.last > since).then(|| trouble.refusal())
    }

    /// A confirm time-out.
    pub fn count_silence(&mut self, route: &Arc<Route>, now: Instant) {
        let trouble = self.trouble(route, now);
        (trouble.silences, trouble.last) = (trouble.silences.saturating_add(1), now);
    }

    /// A message has broken a connection of its own. Whether that is news.
    pub fn count_break(&mut self, route: &Arc<Route>, now: Instant) -> bool {
        !std::mem::replace(&mut self.trouble(route, now).breaks, true)
    }

    /// There is no connection for what may break it, so that nothing more can be learned: only what did is kept off the others'.
    pub fn forget_break(&mut self, route: &Route) {
        if let Some(trouble) = self.0.get_mut(route) {
            trouble.breaks = false;
        }
    }

    /// A row is to blame for broken connections. Whether that was known of its route.
    pub fn count_blame(&mut self, route: &Arc<Route>, now: Instant) -> bool {
        let trouble = self.trouble(route, now);
        let known = trouble.is_lethal();
        (trouble.blamed, trouble.last) = (trouble.blamed.saturating_add(1), now);
        known
    }

    /// An answer, be it a refusal.
    pub fn answered(&mut self, route: &Route) {
        if !self.0.is_empty() {
            self.0.remove(route);
        }
    }

    /// Where rows of a route went to another replica or to the prober, what became of it is not learned here, so what was
    /// known long ago is no hindrance for what is new.
    fn trouble(&mut self, route: &Arc<Route>, now: Instant) -> &mut Trouble {
        if self.0.len() >= ROUTES_MAX
            && !self.0.contains_key(route)
            && let Some(longest_ago) = self.longest_ago()
        {
            self.0.remove(&longest_ago);
        }
        self.0.entry(Arc::clone(route)).or_insert_with(|| Trouble::new(now))
    }

    fn longest_ago(&self) -> Option<Arc<Route>> {
        self.0.iter().min_by_key(|(_, trouble)| trouble.last).map(|(route, _)| Arc::clone(route))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::plain_row;

    fn numbered(number: usize) -> Arc<Route> {
        Arc::new(Route { exchange: "x".to_owned(), routing_key: number.to_string() })
    }

    fn of(route: &Arc<Route>, attempts: u32) -> Row {
        Row { route: Arc::clone(route), attempts, ..plain_row(1) }
    }

    fn is_silent(troubled: &mut Troubled, route: &Arc<Route>, now: Instant) -> bool {
        matches!(troubled.sending(&of(route, 0), now), Sending::NotNow(Refusal { fault: Fault::Silence, .. }))
    }

    #[test]
    fn new_silent_routes_are_counted_whatever_was_left_of_old_ones() {
        let (mut troubled, now) = (Troubled::default(), Instant::now());
        for number in 0..ROUTES_MAX {
            troubled.count_silence(&numbered(number), now + Duration::from_millis(number as u64));
        }
        let (later, route) = (now + Duration::from_secs(60), numbered(ROUTES_MAX));
        for _ in 0..SILENCES_BLAME_ROUTE {
            assert!(!is_silent(&mut troubled, &route, later));
            troubled.count_silence(&route, later);
        }
        assert!(is_silent(&mut troubled, &route, later));
        let kept = (troubled.silences(&numbered(0)), troubled.silences(&numbered(1)));
        assert_eq!(kept, (0, 1), "the oldest is forgotten");
        troubled.answered(&route);
        assert!(!is_silent(&mut troubled, &route, later));
    }

    /// They came before it was known, and each would cost its worker a time-out.
    #[test]
    fn what_came_before_a_silent_route_was_silent_again_is_not_sent() {
        let (mut troubled, route, now) = (Troubled::default(), numbered(1), Instant::now());
        for _ in 0..SILENCES_BLAME_ROUTE {
            troubled.count_silence(&route, now);
        }
        let came = now + SELDOM;
        let probe = Suspicion { alone: Some(came), ..Suspicion::default() };
        assert_eq!(troubled.sending(&of(&route, 1), came), Sending::Alone(probe));
        assert_eq!(troubled.is_in_vain(&route, came), None);
        troubled.count_silence(&route, came + SELDOM);
        assert!(troubled.is_in_vain(&route, came).is_some());
        troubled.answered(&route);
        assert_eq!(troubled.is_in_vain(&route, came), None);
    }

    #[test]
    fn a_route_that_breaks_connections_is_tried_apart_then_seldom_and_works_with_one_answer() {
        let (mut troubled, route, now) = (Troubled::default(), numbered(1), Instant::now());
        let (row, later) = (of(&route, 0), now + SELDOM);
        let apart = |now, breaks| Sending::Alone(Suspicion::apart(now, breaks));
        assert!(troubled.count_break(&route, now) && !troubled.count_break(&route, now));
        for _ in 0..ROWS_BLAME_ROUTE {
            assert_eq!(troubled.sending(&row, now), apart(now, 0), "the next may be harmless");
            troubled.count_blame(&route, now);
        }
        let one_try = BREAKS_BLAME - 1;
        assert_eq!(troubled.sending(&row, now), apart(now, one_try));
        let not_now = troubled.sending(&row, now);
        assert!(matches!(not_now, Sending::NotNow(Refusal { fault: Fault::Break, .. })), "{not_now:?}");
        assert_eq!(troubled.sending(&row, later), apart(later, one_try));
        let waited = of(&route, 1);
        assert_eq!(troubled.sending(&waited, later), apart(later, one_try), "it may work since");
        troubled.answered(&route);
        assert_eq!(troubled.sending(&row, now), Sending::Together);
        assert!(troubled.count_break(&route, now));
        troubled.forget_break(&route);
        assert_eq!(troubled.sending(&row, now), Sending::Together, "no connection can be had to try it");
    }
}

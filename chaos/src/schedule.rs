//! When which fault happens: made from the seed before the run begins, so the same seed gives the same
//! schedule. What servers and clocks make of it is not repeated.

use crate::faults::Fault;
use serde::{Serialize, Serializer};
use std::fmt;
use std::ops::RangeInclusive;

/// Quiet time before the first fault, so that the rate without faults is seen.
const FIRST: u64 = 3_000;
/// Quiet time between faults, in milliseconds.
pub const PAUSE: RangeInclusive<u64> = 1_500..=5_000;
/// One in so many faults begins while the one before is on, where overlaps are allowed.
const OVERLAP: u32 = 3;

/// One fault to come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Event {
    /// Milliseconds after the start of the phase of faults.
    pub at: u64,
    /// How long it lasts; what must be done for it (a start of a server) comes on top.
    pub lasts: u64,
    /// Which.
    #[serde(serialize_with = "by_name")]
    pub fault: Fault,
    /// For choices within the fault, such as which replica.
    pub pick: u64,
}

fn by_name<S: Serializer>(fault: &Fault, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(fault.spec().name)
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (spec, seconds) = (self.fault.spec(), |ms: u64| ms as f64 / 1000.0);
        write!(f, "{:7.1} s  {}  {:<24}{:5.1} s", seconds(self.at), spec.id, spec.name, seconds(self.lasts))
    }
}

/// The schedule of a run of `length` milliseconds; faults last `stretch` times longer than the table says. Ids take turns in random order, and so do the faults of an id, so even a
/// short run sees many different ones.
pub fn schedule(seed: u64, faults: &[Fault], overlap: bool, stretch: f64, length: u64) -> Vec<Event> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut bags = Bags::new(faults);
    let mut events: Vec<Event> = Vec::new();
    let mut at = FIRST;
    while !faults.is_empty() {
        let fault = bags.draw(&mut rng);
        let lasts = (rng.u64(fault.spec().lasts.clone()) as f64 * stretch) as u64;
        let early = overlap && rng.u32(0..OVERLAP) == 0;
        if let Some(before) = events.last().filter(|_| early) {
            let sooner = before.at + before.lasts / 2;
            let mut on = events.iter().filter(|event| event.at + event.lasts >= sooner);
            at = if on.all(|event| may_overlap(event.fault, fault)) { sooner } else { at };
        }
        if at + lasts > length {
            break;
        }
        events.push(Event { at, lasts, fault, pick: rng.u64(..) });
        let over = events.iter().map(|event| event.at + event.lasts).max().unwrap_or(at);
        at = over + rng.u64(PAUSE);
    }
    events
}

fn may_overlap(a: Fault, b: Fault) -> bool {
    a.spec().part != b.spec().part
}

/// A bag of ids, and per id a bag of its faults; an empty bag is filled again.
struct Bags {
    ids: Vec<(&'static str, Vec<Fault>)>,
    next_ids: Vec<usize>,
    next_faults: Vec<Vec<Fault>>,
}

impl Bags {
    fn new(faults: &[Fault]) -> Self {
        let mut ids: Vec<(&'static str, Vec<Fault>)> = Vec::new();
        for fault in faults {
            let id = fault.spec().id;
            match ids.iter_mut().find(|(known, _)| *known == id) {
                Some((_, members)) => members.push(*fault),
                None => ids.push((id, vec![*fault])),
            }
        }
        let next_faults = vec![Vec::new(); ids.len()];
        Self { ids, next_ids: Vec::new(), next_faults }
    }

    fn draw(&mut self, rng: &mut fastrand::Rng) -> Fault {
        if self.next_ids.is_empty() {
            self.next_ids = (0..self.ids.len()).collect();
            rng.shuffle(&mut self.next_ids);
        }
        let place = self.next_ids.pop().expect("just filled");
        let bag = &mut self.next_faults[place];
        if bag.is_empty() {
            bag.clone_from(&self.ids[place].1);
            rng.shuffle(bag);
        }
        bag.pop().expect("just filled")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::{FAULTS, select};
    use std::collections::HashSet;

    fn all() -> Vec<Fault> {
        FAULTS.iter().map(|spec| spec.fault).collect()
    }

    #[test]
    fn the_same_seed_gives_the_same_schedule() {
        let made = schedule(7, &all(), true, 1.0, 600_000);
        assert_eq!(made, schedule(7, &all(), true, 1.0, 600_000));
        assert_ne!(made, schedule(8, &all(), true, 1.0, 600_000));
        assert!(made.len() > 30, "only {} events in ten minutes", made.len());
    }

    #[test]
    fn every_fault_gets_its_turn() {
        let (faults, _) = select("F01,F04,F06").unwrap();
        let made = schedule(3, &faults, false, 1.0, 600_000);
        let seen: HashSet<Fault> = made.iter().map(|event| event.fault).collect();
        assert_eq!(seen.len(), faults.len());
    }

    #[test]
    fn stretched_faults_last_longer() {
        let longest = |stretch| {
            let made = schedule(3, &[Fault::RelayFrozen], false, stretch, 600_000);
            made.iter().map(|event| event.lasts).max().unwrap_or(0)
        };
        assert!((3_000..=8_000).contains(&longest(1.0)));
        assert!((15_000..=40_000).contains(&longest(5.0)));
    }

    #[test]
    fn faults_end_in_time_and_disturb_different_parts_if_they_overlap() {
        for seed in 0..50 {
            let alone = schedule(seed, &all(), false, 1.0, 300_000);
            assert!(alone.windows(2).all(|pair| pair[0].at + pair[0].lasts < pair[1].at));
            let made = schedule(seed, &all(), true, 1.0, 300_000);
            assert!(made.iter().all(|event| event.at + event.lasts <= 300_000));
            for (place, event) in made.iter().enumerate() {
                for other in &made[..place] {
                    let apart = other.at + other.lasts < event.at;
                    assert!(apart || may_overlap(other.fault, event.fault), "{other} and {event}");
                }
            }
        }
    }
}

//! Which deliveries are the first of their message, which are the relay's duplicates, and which come
//! only from the consumer's own lost connection.
//!
//! **The rule.** A delivery is put down to redelivery if, and only if, all of this holds:
//!
//! 1. the broker marks it `redelivered`;
//! 2. the same message stands in the ledger from the connection just before this one, and
//! 3. there among the last `prefetch` deliveries, since no more can have been unacknowledged;
//! 4. that earlier delivery has not yet excused another one.
//!
//! So within one connection of the consumer nothing is excused. A real duplicate can only hide if it was
//! itself handed out, never logged, and requeued while the consumer lost its connection: at most `prefetch`
//! for each lost connection, and every excused delivery is counted in the report. Order cannot hide at all,
//! since it is judged by first deliveries.

use crate::ledger::Delivered;
use std::collections::{HashMap, HashSet};

/// Deliveries by what they are.
#[derive(Debug)]
pub struct Sorted<'a> {
    /// The first delivery of each message, in order.
    pub firsts: Vec<&'a Delivered>,
    /// Duplicates of the relay, in order.
    pub repeats: Vec<&'a Delivered>,
    /// Deliveries put down to redelivery.
    pub redeliveries: usize,
    /// Firsts and repeats, in order; true: a repeat.
    pub all: Vec<(&'a Delivered, bool)>,
    /// Message ids that were delivered.
    pub ids: HashSet<&'a str>,
}

impl<'a> Sorted<'a> {
    /// Sorts a consumer's ledger.
    pub fn new(delivered: &'a [Delivered], prefetch: usize) -> Self {
        let mut sorted = Self {
            firsts: Vec::new(),
            repeats: Vec::new(),
            redeliveries: 0,
            all: Vec::new(),
            ids: HashSet::new(),
        };
        let mut excuses: HashMap<&str, usize> = HashMap::new();
        // Where the connection of this delivery begins in the ledger.
        let mut began = 0;
        for (place, delivery) in delivered.iter().enumerate() {
            if place > 0 && delivered[place - 1].connection != delivery.connection {
                let before = &delivered[began..place];
                excuses.clear();
                for earlier in &before[before.len().saturating_sub(prefetch)..] {
                    *excuses.entry(&earlier.message_id).or_default() += 1;
                }
                began = place;
            }
            sorted.take(delivery, &mut excuses);
        }
        sorted
    }

    fn take(&mut self, delivery: &'a Delivered, excuses: &mut HashMap<&str, usize>) {
        let id = delivery.message_id.as_str();
        if self.ids.insert(id) {
            self.firsts.push(delivery);
            self.all.push((delivery, false));
            return;
        }
        match excuses.get_mut(id).filter(|left| delivery.redelivered && **left > 0) {
            Some(left) => {
                *left -= 1;
                self.redeliveries += 1;
            }
            None => {
                self.repeats.push(delivery);
                self.all.push((delivery, true));
            }
        }
    }
}

//! Invariants about order and repeats: I4, I5.

use super::deliveries::name;
use super::{Case, Verdict};
use crate::ledger::Delivered;
use std::collections::HashMap;

const ORDER: &str = "first deliveries of a key strictly increase";

impl Case<'_> {
    /// Key and number of a delivery, by its row.
    fn place(&self, message: &Delivered) -> Option<(&str, i64)> {
        let row = self.rows.get(message.message_id.as_str())?;
        Some((row.row.key.as_deref()?, row.row.seq))
    }

    pub(super) fn order_is_kept(&self) -> Verdict {
        let ordering = self.seen().setting.ordering.as_str();
        let refuses = self.seen().faults.iter().any(|fault| fault.refuses);
        if ordering == "none" || (ordering == "pipelined" && refuses) {
            return Verdict::not_seen("I4", ORDER, &format!("not promised with {ordering} in this run"));
        }
        let strictly = self.windows() == 0;
        let mut last: HashMap<&str, (i64, &Delivered)> = HashMap::new();
        let (mut inversions, mut first) = (0, None);
        for (message, repeat) in &self.sorted.all {
            let Some((key, number)) = self.place(message).filter(|_| strictly || !repeat) else { continue };
            if let Some((before, other)) = last.get(key).filter(|(before, _)| *before >= number) {
                inversions += 1;
                first.get_or_insert_with(|| {
                    format!(
                        "key {key}: number {number} (row {:?}) came after {before} (row {:?})",
                        message.id, other.id
                    )
                });
            }
            let newest = last.entry(key).or_insert((number, message));
            if number > newest.0 {
                *newest = (number, message);
            }
        }
        let scope =
            if strictly { "all deliveries, since no fault may repeat any" } else { "first deliveries" };
        let figures = format!(
            "{} keys, {inversions} inversions, {} rewinds; judged: {scope}",
            last.len(),
            self.rewinds()
        );
        Verdict::of("I4", ORDER, figures, first)
    }

    /// How often a key went back to a number it had passed.
    pub(super) fn rewinds(&self) -> usize {
        let mut last: HashMap<&str, i64> = HashMap::new();
        let mut rewinds = 0;
        for (message, _) in &self.sorted.all {
            let Some((key, number)) = self.place(message) else { continue };
            if last.insert(key, number).is_some_and(|before| number < before) {
                rewinds += 1;
            }
        }
        rewinds
    }

    pub(super) fn duplicates_are_bounded(&self) -> Verdict {
        let windows = self.windows();
        let bound = windows * self.seen().setting.max_in_flight;
        let repeats = &self.sorted.repeats;
        let first = repeats.first().filter(|_| repeats.len() as u64 > bound).map(|message| {
            let row =
                self.rows.get(message.message_id.as_str()).map_or_else(|| message.message_id.clone(), name);
            format!("{row} came again {} ms into the run", message.at)
        });
        let figures = format!(
            "{} duplicates, bound {bound} ({windows} windows of {}); {} put down to the consumer's own reconnects",
            repeats.len(),
            self.seen().setting.max_in_flight,
            self.sorted.redeliveries
        );
        Verdict::of("I5", "duplicates ≤ relays hit × rows in flight", figures, first)
    }
}

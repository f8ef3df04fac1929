//! Invariants about which messages came: L0, I1, I2, I3, I6, I9.

use super::{Case, Row, Verdict};
use crate::ledger::{Delivered, Outcome};

impl Case<'_> {
    /// A judge whose ledgers contradict the database must not judge.
    pub(super) fn ledgers_agree(&self) -> Verdict {
        let witness = &self.evidence.witness;
        let lost = self.committed().into_iter().find(|row| !witness.contains(&row.row.message_id));
        let lost = lost.map(|row| format!("the database has lost {}, which it had committed", name(row)));
        let mut uncommitted =
            witness.iter().filter(|id| self.rows.get(id.as_str()).is_none_or(|row| !row.committed));
        let extra = uncommitted.next().map(|id| format!("message {id} is committed, and no ledger says so"));
        let unknown = self.outcomes.values().filter(|(_, outcome)| *outcome == Outcome::Unknown).count();
        let figures = format!(
            "{} rows committed by the ledger, {} in the witness table, {unknown} unknown commits resolved by it",
            self.committed().len(),
            witness.len()
        );
        Verdict::of("L0", "writers' ledger and database agree", figures, lost.or(extra))
    }

    pub(super) fn nothing_is_lost(&self) -> Verdict {
        let (mut consumed, mut dead, mut pending) = (0, 0, 0);
        let mut missing = Vec::new();
        for row in self.committed() {
            let id = row.row.message_id.as_str();
            let kept = self.table.get(id);
            if self.sorted.ids.contains(id) {
                consumed += 1;
            } else if kept.is_some_and(|kept| kept.dead) {
                dead += 1;
            } else if kept.is_some_and(|kept| !kept.delivered) {
                pending += 1;
            } else {
                missing.push(row);
            }
        }
        let allowed: u64 = self.seen().faults.iter().map(|fault| fault.counted_loss).sum();
        let figures = format!(
            "{consumed} consumed, {dead} dead, {pending} pending, {} lost ({allowed} allowed)",
            missing.len()
        );
        let broken = missing.len() as u64 > allowed;
        let first = missing.first().filter(|_| broken).map(|row| {
            let kept = self.table.get(row.row.message_id.as_str());
            let state = kept.map_or("is gone from the table", |_| "is marked delivered");
            format!("{} {state} and was never consumed", name(row))
        });
        Verdict::of("I1", "committed ⊆ consumed ∪ dead ∪ pending", figures, first)
    }

    pub(super) fn nothing_is_invented(&self) -> Verdict {
        let invented = |message: &&&Delivered| {
            self.rows.get(message.message_id.as_str()).is_none_or(|row| !row.committed)
        };
        let phantoms: Vec<_> = self.sorted.firsts.iter().filter(invented).collect();
        let first = phantoms.first().map(|message| match self.rows.get(message.message_id.as_str()) {
            None => format!("message {} was never written", message.message_id),
            Some(row) if row.row.undone => format!("{} was taken back to a savepoint", name(row)),
            Some(row) => format!("{} was rolled back", name(row)),
        });
        let taken_back = self.rows.values().filter(|row| !row.committed).count();
        let figures = format!(
            "{} messages consumed, {taken_back} rows rolled back, {} phantoms",
            self.sorted.firsts.len(),
            phantoms.len()
        );
        Verdict::of("I2", "consumed ⊆ committed", figures, first)
    }

    pub(super) fn nothing_is_changed(&self) -> Verdict {
        let deliveries = &self.evidence.delivered;
        let mut compared = 0;
        let mut first = None;
        for message in deliveries {
            let Some(row) = self.rows.get(message.message_id.as_str()) else { continue };
            compared += 1;
            if first.is_none() {
                first = difference(row, message);
            }
        }
        let figures = format!("{compared} deliveries compared with their rows");
        Verdict::of("I3", "body and properties equal, persistent", figures, first)
    }

    pub(super) fn outages_cost_nothing(&self) -> Verdict {
        let refusals = self.seen().faults.iter().any(|fault| fault.refuses);
        let (mut with_attempts, mut poison_dead, mut poison) = (0, 0, 0);
        let mut first = None;
        let mut say = |sentence: String| {
            first.get_or_insert(sentence);
        };
        for row in self.committed() {
            let id = row.row.message_id.as_str();
            let kept = self.table.get(id);
            let reason = kept.and_then(|kept| kept.last_error.as_deref()).unwrap_or("no reason");
            if row.row.poison {
                poison += 1;
                if self.sorted.ids.contains(id) {
                    say(format!("{} can never be delivered and was consumed", name(row)));
                } else if kept.is_some_and(|kept| kept.dead) {
                    poison_dead += 1;
                } else {
                    say(format!("{} can never be delivered and is not dead", name(row)));
                }
            } else if kept.is_some_and(|kept| kept.dead) {
                say(format!("{} is dead: {reason}", name(row)));
            } else if let Some(kept) = kept.filter(|kept| kept.attempts > 0) {
                with_attempts += 1;
                if !refusals {
                    say(format!("{} has {} attempts: {reason}", name(row), kept.attempts));
                }
            }
        }
        let refused = if refusals { "faults that refuse were on" } else { "none allowed" };
        let figures = format!(
            "{with_attempts} rows with attempts ({refused}), {poison_dead} of {poison} poison rows dead"
        );
        Verdict::of("I6", "no attempt and no dead row from an outage", figures, first)
    }

    pub(super) fn marks_are_true(&self) -> Verdict {
        let marked = self.evidence.table.iter().filter(|row| row.delivered);
        let untrue =
            |row: &&crate::observations::TableRow| !self.sorted.ids.contains(row.message_id.as_str());
        let wrong: Vec<_> = marked.clone().filter(untrue).collect();
        let allowed: u64 = self.seen().faults.iter().map(|fault| fault.counted_loss).sum();
        let broken = wrong.len() as u64 > allowed;
        let first = wrong.first().filter(|_| broken);
        let first = first.map(|row| format!("row {} is marked delivered and was never consumed", row.id));
        let figures = format!("{} rows marked, {} of them not consumed", marked.count(), wrong.len());
        Verdict::of("I9", "nothing is marked that was not confirmed and routed", figures, first)
    }
}

fn difference(row: &Row<'_>, message: &Delivered) -> Option<String> {
    let differs = [
        ("body", message.hash != row.row.hash),
        ("x-outbox-id", message.id != Some(row.row.id)),
        ("x-outbox-key", message.key != row.row.key),
        ("routing key", message.routing_key != row.row.routing_key),
        ("content_type", message.content_type.as_deref() != Some("application/json")),
        ("delivery_mode", !message.persistent),
    ];
    let (what, _) = differs.into_iter().find(|(_, differs)| *differs)?;
    Some(format!("{what} of {} differs from its row", name(row)))
}

/// A row for people.
pub(super) fn name(row: &Row<'_>) -> String {
    let key =
        row.row.key.as_ref().map_or_else(String::new, |key| format!(" (key {key}, number {})", row.row.seq));
    format!("row {}{key} of transaction {} ({:?})", row.row.id, row.tx, row.kind)
}

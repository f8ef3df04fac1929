//! The judge: a pure function from ledgers, final table and observations to verdicts: twelve invariants, and that the ledgers agree.
//!
//! Each invariant gives its figures and, if it is broken, the first counter-example. The words of the
//! invariants are the project's (I1 to I12); what cannot be seen from outside is said to be so.
//!
//! # Order and rewinds (I4)
//!
//! First deliveries of a key strictly increase, always. A relay that was killed, or lost its lease, sends
//! again in order what it had not marked: the key rewinds (48, 88, 48, 88), which is a bounded duplicate
//! (I5) and no inversion. Where no fault may cause duplicates, repeats must not be out of order either.
//!
//! # Redelivery is not duplication
//!
//! See [`redelivery`].

mod deliveries;
mod order;
mod recovery;
pub mod redelivery;
mod running;
#[cfg(test)]
mod tests;

use crate::ledger::{Delivered, Kind, Outcome, WriterLine, WrittenRow};
use crate::observations::{Observations, TableRow};
pub use recovery::{Recovery, Summary};
use redelivery::Sorted;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Everything there is to judge a run by.
#[derive(Debug, Clone)]
pub struct Evidence {
    /// The writers' ledger.
    pub written: Vec<WriterLine>,
    /// Message ids in the witness table.
    pub witness: HashSet<String>,
    /// The consumer's ledger.
    pub delivered: Vec<Delivered>,
    /// The outbox at the end.
    pub table: Vec<TableRow>,
    /// What else was seen.
    pub seen: Observations,
}

/// How an invariant came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It held.
    Held,
    /// It was broken.
    Broken,
    /// This run could not show it.
    NotSeen,
}

/// An invariant and how it came out.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// I1 to I12, or L0 for the ledgers themselves.
    pub id: &'static str,
    /// What must hold.
    pub says: &'static str,
    /// Did it?
    pub state: State,
    /// What was counted.
    pub figures: String,
    /// The first case in which it did not hold.
    pub counter_example: Option<String>,
}

impl Verdict {
    fn of(id: &'static str, says: &'static str, figures: String, counter_example: Option<String>) -> Self {
        let state = if counter_example.is_none() { State::Held } else { State::Broken };
        Self { id, says, state, figures, counter_example }
    }

    fn not_seen(id: &'static str, says: &'static str, why: &str) -> Self {
        Self { id, says, state: State::NotSeen, figures: why.to_owned(), counter_example: None }
    }
}

/// Counts of a whole run.
#[derive(Debug, Clone, Default, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Totals {
    pub transactions: BTreeMap<String, usize>,
    pub committed_rows: usize,
    pub aborted_rows: usize,
    pub unknown_transactions: usize,
    pub unknown_that_committed: usize,
    pub deliveries: usize,
    pub messages: usize,
    pub duplicates: usize,
    pub redeliveries: usize,
    pub rewinds: usize,
    pub consumer_connections: u64,
}

/// The judgement of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Judgement {
    /// One for each invariant.
    pub verdicts: Vec<Verdict>,
    /// One for each fault that happened.
    pub recoveries: Vec<Recovery>,
    /// One for each name among them.
    pub summaries: Vec<Summary>,
    /// Counts.
    pub totals: Totals,
}

impl Judgement {
    /// No invariant was broken.
    pub fn all_held(&self) -> bool {
        self.verdicts.iter().all(|verdict| verdict.state != State::Broken)
    }
}

/// A row that a writer has inserted, and what became of its transaction.
struct Row<'a> {
    row: &'a WrittenRow,
    tx: u64,
    kind: Kind,
    /// Not before.
    ended: u64,
    committed: bool,
}

/// The ledgers, put in order for all invariants to look at.
struct Case<'a> {
    evidence: &'a Evidence,
    rows: HashMap<&'a str, Row<'a>>,
    table: HashMap<&'a str, &'a TableRow>,
    sorted: Sorted<'a>,
    outcomes: HashMap<u64, (u64, Outcome)>,
}

/// Judges a run.
pub fn judge(evidence: &Evidence) -> Judgement {
    let case = Case::new(evidence);
    let verdicts = vec![
        case.ledgers_agree(),
        case.nothing_is_lost(),
        case.nothing_is_invented(),
        case.nothing_is_changed(),
        case.order_is_kept(),
        case.duplicates_are_bounded(),
        case.outages_cost_nothing(),
        case.everything_drains(),
        case.one_owner(),
        case.marks_are_true(),
        case.resources_are_bounded(),
        case.health_tells_the_truth(),
        case.stops_are_clean(),
    ];
    let recoveries = case.recoveries();
    let summaries = recovery::summaries(&recoveries);
    Judgement { verdicts, recoveries, summaries, totals: case.totals() }
}

impl<'a> Case<'a> {
    fn new(evidence: &'a Evidence) -> Self {
        let outcome = |line: &WriterLine| match line {
            WriterLine::Outcome { tx, at, outcome } => Some((*tx, (*at, *outcome))),
            WriterLine::Intent { .. } => None,
        };
        let outcomes: HashMap<u64, (u64, Outcome)> = evidence.written.iter().filter_map(outcome).collect();
        let mut rows = HashMap::new();
        for line in &evidence.written {
            let WriterLine::Intent { tx, at, kind, rows: written } = line else { continue };
            // A writer that was stopped between its two lines does not know either.
            let (ended, outcome) = outcomes.get(tx).copied().unwrap_or((*at, Outcome::Unknown));
            for row in written {
                let committed = match outcome {
                    Outcome::Committed => !row.undone,
                    Outcome::Aborted => false,
                    Outcome::Unknown => !row.undone && evidence.witness.contains(&row.message_id),
                };
                rows.insert(row.message_id.as_str(), Row { row, tx: *tx, kind: *kind, ended, committed });
            }
        }
        let table = evidence.table.iter().map(|row| (row.message_id.as_str(), row)).collect();
        let sorted = Sorted::new(&evidence.delivered, evidence.seen.setting.prefetch);
        Self { evidence, rows, table, sorted, outcomes }
    }

    fn seen(&self) -> &'a Observations {
        &self.evidence.seen
    }

    /// Rows of committed transactions, in order of their ids.
    fn committed(&self) -> Vec<&Row<'a>> {
        let mut rows: Vec<_> = self.rows.values().filter(|row| row.committed).collect();
        rows.sort_unstable_by_key(|row| row.row.id);
        rows
    }

    /// Windows of rows in flight that may have been sent twice.
    fn windows(&self) -> u64 {
        let of_faults: u64 = self.seen().faults.iter().map(|fault| fault.windows).sum();
        let of_stops = self.seen().stops.iter().filter(|stop| stop.disturbed || stop.code != Some(0)).count();
        of_faults + of_stops as u64
    }

    fn totals(&self) -> Totals {
        let mut transactions = BTreeMap::new();
        let unknown =
            |tx: &u64| self.outcomes.get(tx).is_none_or(|(_, outcome)| *outcome == Outcome::Unknown);
        let mut unknown_txs = HashSet::new();
        for line in &self.evidence.written {
            let WriterLine::Intent { tx, kind, .. } = line else { continue };
            *transactions.entry(format!("{kind:?}")).or_insert(0) += 1;
            if unknown(tx) {
                unknown_txs.insert(*tx);
            }
        }
        let survived: HashSet<u64> = self
            .rows
            .values()
            .filter(|row| row.committed && unknown_txs.contains(&row.tx))
            .map(|row| row.tx)
            .collect();
        let committed_rows = self.rows.values().filter(|row| row.committed).count();
        Totals {
            transactions,
            committed_rows,
            aborted_rows: self.rows.len() - committed_rows,
            unknown_transactions: unknown_txs.len(),
            unknown_that_committed: survived.len(),
            deliveries: self.evidence.delivered.len(),
            messages: self.sorted.firsts.len(),
            duplicates: self.sorted.repeats.len(),
            redeliveries: self.sorted.redeliveries,
            rewinds: self.rewinds(),
            consumer_connections: self.evidence.delivered.last().map_or(0, |last| last.connection),
        }
    }
}

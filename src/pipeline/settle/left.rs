//! Rows that cannot be written while others can: somebody has them locked, or the database rejects what is written of them
//! (a constraint, a trigger, a limit of an index). They keep their places and are tried again; all others go on.

use super::settlement;
use crate::mutants::mutant;
use crate::pipeline::{End, Ending, Outcome};
use crate::retry::Delays;
use crate::store::{Dead, Settlement, StoreError, Trouble, Waiting};
use std::collections::HashSet;
use std::sync::Arc;
use tokio::time::Instant;

/// Statements that may fail in search of the rows that are rejected; each costs a connection. Enough for two among two
/// thousand; where everything is rejected, it is not looked for.
pub(super) const REJECTIONS_MAX: u32 = 24;

/// Outcomes that are written together, with what is written of them.
#[derive(Debug)]
pub(super) struct Part {
    pub outcomes: Vec<Outcome>,
    pub settlement: Settlement,
    /// A refused row whose wait was rejected: it is written as dead.
    became_dead: bool,
}

impl Part {
    pub(super) fn new(outcomes: Vec<Outcome>) -> Self {
        Self { settlement: settlement(&outcomes), outcomes, became_dead: false }
    }

    /// The row that is dead because its wait was rejected.
    pub(super) fn became_dead(&self) -> Option<&Dead> {
        self.settlement.dead.first().filter(|_| self.became_dead)
    }

    /// A row that cannot wait must not be sent again and again. Its key is held by its worker as that of a row that waits, and
    /// goes on like one.
    fn into_death(self, error: &StoreError) -> Result<Self, Self> {
        let waits = self.settlement.waiting.first().filter(|_| !self.became_dead);
        let Some(&Waiting { id, message_id, lease, attempts, ref reason, .. }) = waits else {
            return Err(self);
        };
        let reason = format!("{reason}; dead because its wait cannot be written: {}", error.sentence);
        let dead = vec![Dead { id, message_id, lease, attempts, reason }];
        Ok(Self { settlement: Settlement { dead, ..Settlement::default() }, became_dead: true, ..self })
    }
}

/// Rows of one kind, and when they are tried again.
#[derive(Default)]
struct Group {
    rows: Vec<Outcome>,
    due: Option<Instant>,
    delays: Delays,
    /// The log has it.
    logged: bool,
}

impl Group {
    fn take(&mut self) -> Vec<Outcome> {
        self.due = None;
        std::mem::take(&mut self.rows)
    }

    fn take_due(&mut self) -> Vec<Outcome> {
        if self.due.is_some_and(|due| due <= Instant::now()) { self.take() } else { Vec::new() }
    }

    /// After a round of writing, which may have taken them and put them back.
    fn rest(&mut self, reason: Option<&StoreError>) {
        let Some(reason) = reason else {
            if self.logged {
                tracing::info!("rows are marked that could not be marked with the others");
            }
            return *self = Self::default();
        };
        if !std::mem::replace(&mut self.logged, true) {
            tracing::warn!(reason = reason.sentence, "rows cannot be marked with the others; retrying");
        }
        if self.due.is_none() {
            self.due = Some(Instant::now() + self.delays.next(reason));
        }
    }
}

/// Those rows.
#[derive(Default)]
pub(super) struct Left {
    /// Somebody has locked them, or they are behind one that is.
    locked: Group,
    /// The database rejects what is written of them, or of rows among them that were not found.
    rejected: Group,
    /// Those of them that were found: to be written by themselves, so that they fail no others again.
    rejected_alone: Vec<i64>,
    /// The last row that was rejected, and why.
    rejection: Option<(i64, StoreError)>,
    /// What poll has not been told yet.
    news: Vec<(i64, Ending)>,
    /// What it has been told.
    told: HashSet<i64>,
    /// Somebody has locked rows, so others are not to be kept waiting for them.
    pub passes_locks: bool,
}

impl Left {
    /// When some are to be tried again; `None`: there are none.
    pub(super) fn due(&self) -> Option<Instant> {
        self.locked.due.into_iter().chain(self.rejected.due).min()
    }

    /// Those for which it is time, as they are to be written together: what was found is kept apart.
    pub(super) fn take_due(&mut self) -> [Vec<Outcome>; 3] {
        let (mut others, mut found) = (self.rejected.take_due(), Vec::new());
        if !others.is_empty() {
            let alone: HashSet<i64> = self.rejected_alone.drain(..).collect();
            (found, others) = others.into_iter().partition(|outcome| alone.contains(&outcome.id));
        }
        // What is locked comes last: rows behind one that is rejected are among it.
        [others, found, self.locked.take_due()]
    }

    /// All of them.
    pub(super) fn take(&mut self) -> Vec<Outcome> {
        let mut outcomes = self.locked.take();
        outcomes.extend(self.rejected.take());
        outcomes
    }

    /// Rows that have come to stand aside, each once.
    pub(super) fn take_news(&mut self) -> Vec<(i64, Ending)> {
        std::mem::take(&mut self.news)
    }

    fn note(&mut self, outcomes: &[Outcome]) {
        let told = &mut self.told;
        let news = outcomes.iter().filter(|outcome| told.insert(outcome.id));
        self.news.extend(news.map(|outcome| (outcome.id, ending_of(outcome))));
    }

    fn rows(&self) -> impl Iterator<Item = &Outcome> {
        self.locked.rows.iter().chain(&self.rejected.rows)
    }

    /// Keeps what is locked, and what was given back behind a locked row of its key: in the table nothing holds that back yet,
    /// so it would be read again at once. Returns the others.
    pub(super) fn keep_locked(&mut self, outcomes: Vec<Outcome>, locked: &[i64]) -> Vec<Outcome> {
        if locked.is_empty() && self.is_empty() {
            return outcomes;
        }
        let locked: HashSet<i64> = locked.iter().copied().collect();
        let (kept, others): (Vec<Outcome>, Vec<Outcome>) =
            outcomes.into_iter().partition(|outcome| locked.contains(&outcome.id));
        self.note(&kept);
        self.locked.rows.extend(kept);
        let waiting: HashSet<Arc<str>> = self.rows().filter_map(waits_of).collect();
        let behind = |outcome: &Outcome| {
            let waits = matches!(&outcome.end, End::Released { key: Some(key) } if waiting.contains(key));
            waits && !mutant!("read-behind-locks")
        };
        let (behind, others): (Vec<Outcome>, Vec<Outcome>) = others.into_iter().partition(behind);
        self.note(&behind);
        self.locked.rows.extend(behind);
        others
    }

    /// What is to be tried instead of a part that was rejected: its halves; of a single row that was refused, its death. Else
    /// the row is left.
    pub(super) fn reject(&mut self, part: Part, error: &StoreError, rejections: u32, parts: &mut Vec<Part>) {
        let searching = rejections <= REJECTIONS_MAX;
        let left = match part.outcomes.len() {
            2.. if searching => {
                let mut first = part.outcomes;
                let second = first.split_off(first.len() / 2);
                parts.extend([Part::new(second), Part::new(first)]);
                return;
            }
            1 => match part.into_death(error) {
                Ok(dead) => return parts.push(dead),
                Err(part) => part,
            },
            _ => part,
        };
        if let [outcome] = &left.outcomes[..] {
            self.rejected_alone.push(outcome.id);
        }
        let id = left.outcomes.first().map_or(0, |outcome| outcome.id);
        self.rejection = Some((id, error.clone()));
        self.note(&left.outcomes);
        self.rejected.rows.extend(left.outcomes);
    }

    fn is_empty(&self) -> bool {
        self.locked.rows.is_empty() && self.rejected.rows.is_empty()
    }

    /// After a round of writing: when those that are left are tried again. Answers with why some were rejected.
    pub(super) fn rest(&mut self) -> Option<StoreError> {
        let (locked, rejected) = (self.why_locked(), self.why_rejected());
        self.locked.rest(locked.as_ref());
        self.rejected.rest(rejected.as_ref());
        self.passes_locks &= locked.is_some();
        if !self.told.is_empty() {
            let left: HashSet<i64> = self.rows().map(|outcome| outcome.id).collect();
            self.told.retain(|id| left.contains(id));
        }
        rejected
    }

    /// Why there are any.
    pub(super) fn reason(&self) -> Option<StoreError> {
        self.why_rejected().or_else(|| self.why_locked())
    }

    fn why_locked(&self) -> Option<StoreError> {
        let rows = &self.locked.rows;
        let is_locked = |outcome: &&Outcome| !matches!(outcome.end, End::Released { .. });
        let (first, why) = match rows.iter().find(is_locked) {
            Some(first) => (first, "another transaction has it locked"),
            None => (rows.first()?, "an earlier row of its key cannot be marked"),
        };
        let sentence = format!("{} rows cannot be marked, id {} for one: {why}", rows.len(), first.id);
        Some(StoreError { trouble: Trouble::Contention, sentence })
    }

    fn why_rejected(&self) -> Option<StoreError> {
        let (id, error) = self.rejection.as_ref().filter(|_| !self.rejected.rows.is_empty())?;
        let rows = self.rejected.rows.len();
        let sentence = format!("{rows} rows cannot be marked, id {id} for one: {}", error.sentence);
        Some(StoreError { trouble: error.trouble, sentence })
    }
}

fn ending_of(outcome: &Outcome) -> Ending {
    match outcome.end {
        End::Delivered { .. } => Ending::Delivered,
        End::Dead { .. } => Ending::Dead,
        End::Wait { .. } | End::Released { .. } | End::Fenced => Ending::Unsent,
    }
}

fn waits_of(outcome: &Outcome) -> Option<Arc<str>> {
    match &outcome.end {
        End::Wait { key, .. } => key.clone(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::settle::tests::{delivered, released, wait};
    use std::collections::BTreeSet;

    fn error() -> StoreError {
        StoreError { trouble: Trouble::Rejected, sentence: "no".to_owned() }
    }

    /// Writes to a database that rejects whatever holds one of these; the ids that were written, and how often it failed.
    fn write(left: &mut Left, outcomes: Vec<Outcome>, bad: impl Fn(&Part) -> bool) -> (BTreeSet<i64>, u32) {
        let (mut parts, mut written, mut rejections) = (vec![Part::new(outcomes)], BTreeSet::new(), 0);
        while let Some(part) = parts.pop() {
            if bad(&part) {
                rejections += 1;
                left.reject(part, &error(), rejections, &mut parts);
            } else {
                written.extend(part.outcomes.iter().map(|outcome| outcome.id));
            }
        }
        (written, rejections)
    }

    fn ids(left: &Left) -> Vec<i64> {
        left.locked.rows.iter().chain(&left.rejected.rows).map(|outcome| outcome.id).collect()
    }

    #[test]
    fn two_rows_that_are_rejected_are_found_among_two_thousand() {
        for bad in [[0, 1], [999, 1000], [0, 1999], [3, 1234]] {
            let mut left = Left::default();
            let holds = |part: &Part| part.outcomes.iter().any(|outcome| bad.contains(&outcome.id));
            let (written, rejections) = write(&mut left, (0..2000).map(delivered).collect(), holds);
            assert_eq!((written.len(), ids(&left)), (1998, bad.to_vec()));
            assert!(rejections <= REJECTIONS_MAX);
            assert_eq!(left.rest().expect("told").trouble, Trouble::Rejected);
            assert!(left.due().is_some());
        }
    }

    /// Those that were found are not in the way of those that were not.
    #[test]
    fn however_many_are_rejected_the_others_are_written_in_the_end() {
        let (mut left, mut outcomes) = (Left::default(), (0..2000).map(delivered).collect::<Vec<_>>());
        let is_bad = |id: i64| id % 50 == 7;
        let mut written = 0;
        for _ in 0..30 {
            let holds = |part: &Part| part.outcomes.iter().any(|outcome| is_bad(outcome.id));
            written += write(&mut left, outcomes, holds).0.len();
            left.rest();
            left.rejected.due = Some(Instant::now());
            outcomes = left.take_due().into_iter().flatten().collect();
        }
        assert_eq!((written, outcomes.len()), (1960, 40));
    }

    #[test]
    fn where_everything_is_rejected_it_is_not_looked_for() {
        let mut left = Left::default();
        let (written, rejections) = write(&mut left, (0..2000).map(delivered).collect(), |_| true);
        assert!(written.is_empty());
        assert!(rejections < 2 * REJECTIONS_MAX, "{rejections}");
        let mut kept = ids(&left);
        kept.sort_unstable();
        assert_eq!(kept, (0..2000).collect::<Vec<_>>(), "none is lost");
    }

    /// Its key is held by the worker as that of a row that waits, so it must not become an end of another kind.
    #[test]
    fn a_wait_that_cannot_be_written_is_a_death() {
        let mut left = Left::default();
        let (mut dead, waits) = (Vec::new(), |part: &Part| !part.settlement.waiting.is_empty());
        let mut parts = vec![Part::new(vec![delivered(1), wait(2, "k")])];
        while let Some(part) = parts.pop() {
            match waits(&part) {
                true => left.reject(part, &error(), 1, &mut parts),
                false => dead.extend(part.settlement.dead.iter().map(|dead| (dead.id, dead.reason.clone()))),
            }
        }
        assert_eq!(dead, [(2, "refused; dead because its wait cannot be written: no".to_owned())]);
        assert!(left.rest().is_none(), "nothing is left");
    }

    #[test]
    fn what_is_locked_stays_and_what_is_behind_it() {
        let mut left = Left::default();
        let outcomes = vec![wait(1, "a"), released(2, "a"), released(3, "b"), delivered(4), delivered(5)];
        let others = left.keep_locked(outcomes, &[1, 5]);
        assert_eq!(others.iter().map(|outcome| outcome.id).collect::<Vec<_>>(), [3, 4]);
        assert!(left.keep_locked(vec![released(6, "a")], &[]).is_empty(), "as long as it is locked");
        assert!(left.rest().is_none(), "a lock is no trouble of the database");
        assert!(left.due().is_some());
        assert_eq!(
            left.take_news(),
            [(1, Ending::Unsent), (5, Ending::Delivered), (2, Ending::Unsent), (6, Ending::Unsent)]
        );
        let again = left.locked.take();
        assert!(left.keep_locked(again, &[1, 5]).is_empty());
        assert!(left.take_news().is_empty(), "each is told once");
        assert_eq!(left.take().iter().map(|outcome| outcome.id).collect::<Vec<_>>(), [1, 5, 2, 6]);
        assert_eq!(left.keep_locked(vec![released(7, "a")], &[]).len(), 1);
        assert!(left.rest().is_none() && left.due().is_none(), "all are written");
    }
}

//! How the relays came back after each fault: figures, not verdicts.

use super::Case;
use crate::observations::Span;
use serde::Serialize;

/// What followed one fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Recovery {
    /// Id in the fault matrix.
    pub id: String,
    /// Name of the fault.
    pub fault: String,
    /// When it began.
    pub began: u64,
    /// How long it lasted, mending included.
    pub lasted: u64,
    /// Milliseconds from its end until the first row arrived that was committed after it; none: nothing was.
    pub next_row_after: Option<u64>,
    /// Milliseconds from its end until every message had arrived that was committed before: the backlog is gone.
    pub caught_up_after: u64,
    /// Messages that came again between its beginning and that of the next fault.
    pub duplicates: usize,
    /// Another fault was on: shortly before it, during it, or before the relays had caught up.
    pub disturbed: bool,
}

/// All faults of one name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Id in the fault matrix.
    pub id: String,
    /// Name of the fault.
    pub fault: String,
    /// How often it was made.
    pub times: usize,
    /// How often no other fault was on. What follows is of these.
    pub alone: usize,
    /// Median and maximum of `next_row_after`.
    pub next_row_after: Option<(u64, u64)>,
    /// Median and maximum of `caught_up_after`.
    pub caught_up_after: Option<(u64, u64)>,
    /// Most duplicates of one.
    pub duplicates: Option<usize>,
}

/// What comes so soon after a fault may be its work.
const AFTERMATH_MS: u64 = 1_000;

impl Case<'_> {
    /// What followed each fault.
    pub(super) fn recoveries(&self) -> Vec<Recovery> {
        // Rows for later come when they are due, fault or not.
        let committed_at =
            |id: &str| self.rows.get(id).filter(|row| row.row.delay_ms == 0).map(|row| row.ended);
        let firsts = self.sorted.firsts.iter();
        let arrivals: Vec<(u64, u64)> =
            firsts.filter_map(|first| Some((first.at, committed_at(&first.message_id)?))).collect();
        let faults = &self.seen().faults;
        let recovery = |(place, fault): (usize, &Span)| {
            let before = arrivals.iter().filter(|(_, committed)| *committed <= fault.ended);
            let caught_up = before.map(|(at, _)| *at).max().unwrap_or(0).max(fault.ended);
            let next_row = arrivals.iter().find(|(at, committed)| *at.min(committed) >= fault.ended);
            let next_began = faults.get(place + 1).map_or(u64::MAX, |next| next.began);
            let came_again =
                self.sorted.repeats.iter().filter(|repeat| (fault.began..next_began).contains(&repeat.at));
            let on = |(other, span): (usize, &Span)| {
                other != place && span.began <= caught_up && span.ended + AFTERMATH_MS > fault.began
            };
            Recovery {
                id: fault.id.clone(),
                fault: fault.name.clone(),
                began: fault.began,
                lasted: fault.ended - fault.began,
                next_row_after: next_row.map(|(at, _)| at - fault.ended),
                caught_up_after: caught_up - fault.ended,
                duplicates: came_again.count(),
                disturbed: faults.iter().enumerate().any(on),
            }
        };
        faults.iter().enumerate().map(recovery).collect()
    }
}

/// One line for each fault, in order of ids and names.
pub(super) fn summaries(recoveries: &[Recovery]) -> Vec<Summary> {
    let mut names: Vec<(&str, &str)> =
        recoveries.iter().map(|recovery| (&*recovery.id, &*recovery.fault)).collect();
    names.sort_unstable();
    names.dedup();
    let summary = |(id, fault): (&str, &str)| {
        let all: Vec<_> = recoveries.iter().filter(|recovery| recovery.fault == fault).collect();
        let alone = all.iter().filter(|recovery| !recovery.disturbed);
        Summary {
            id: id.to_owned(),
            fault: fault.to_owned(),
            times: all.len(),
            alone: alone.clone().count(),
            next_row_after: median_and_maximum(
                alone.clone().filter_map(|recovery| recovery.next_row_after).collect(),
            ),
            caught_up_after: median_and_maximum(
                alone.clone().map(|recovery| recovery.caught_up_after).collect(),
            ),
            duplicates: alone.map(|recovery| recovery.duplicates).max(),
        }
    };
    names.into_iter().map(summary).collect()
}

fn median_and_maximum(mut times: Vec<u64>) -> Option<(u64, u64)> {
    times.sort_unstable();
    Some((times[times.len().checked_sub(1)? / 2], *times.last()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_of_faults_that_were_alone() {
        let made = |fault: &str, caught_up_after, duplicates, disturbed| Recovery {
            id: "F01".to_owned(),
            fault: fault.to_owned(),
            began: 0,
            lasted: 1,
            next_row_after: None,
            caught_up_after,
            duplicates,
            disturbed,
        };
        let recoveries = [
            made("b", 300, 0, false),
            made("a", 1, 2, false),
            made("b", 100, 0, false),
            made("b", 200, 4, false),
            made("b", 9_999, 7, true),
        ];
        let summaries = summaries(&recoveries);
        assert_eq!(summaries.iter().map(|line| &*line.fault).collect::<Vec<_>>(), ["a", "b"]);
        let b = &summaries[1];
        assert_eq!((b.times, b.alone, b.duplicates), (4, 3, Some(4)));
        assert_eq!((b.next_row_after, b.caught_up_after), (None, Some((200, 300))));
    }
}

//! Which ids need not be asked for: those in flight and those that are settled.
//!
//! Ids are given out before commit, so a smaller id may appear after a larger one; `id > last`
//! would lose it. Comparing transaction ids instead would reorder a key and stall behind any open
//! transaction. So the poll remembers what it has *seen*, as intervals, and asks for everything
//! else, in id order, out of one snapshot. In that snapshot id order is right for every key whose
//! writers take turns.
//!
//! Forgetting an id is always safe: it is merely asked for again. Adding one is safe when the row
//! is in memory, was settled by us, belongs to another replica for now, or cannot exist any more
//! (see [`Known::close_gaps`]).
//!
//! Why it matters: as long as somebody's transaction keeps old row versions alive, the index still
//! lists every row delivered since, and a poll from the beginning would walk over all of them.

use std::collections::BTreeMap;

/// Intervals kept at most; above, the smaller half is forgotten, all at once, so that it costs each id little. An interval is
/// 16 bytes and a tree node's share; ten thousand holes at once mean that the ids are sparse anyway.
const INTERVALS_MAX: usize = 10_000;

/// A set of ids as disjoint, non-adjacent intervals.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Known {
    /// First id to last id.
    intervals: BTreeMap<i64, i64>,
}

/// What a set does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unknown {
    /// First and last id of each range, ascending.
    pub ranges: Vec<(i64, i64)>,
    /// No known id lies in any of the ranges.
    pub exact: bool,
}

impl Unknown {
    /// The part of it from this id on.
    pub fn since(mut self, id: i64) -> Self {
        self.ranges.retain(|(_, last)| *last >= id);
        if let Some((first, _)) = self.ranges.first_mut() {
            *first = id.max(*first);
        }
        self
    }
}

impl Known {
    /// Adds one id.
    pub fn add(&mut self, id: i64) {
        self.add_interval(id, id);
    }

    /// Adds all ids from `first` to `last`.
    pub fn add_interval(&mut self, first: i64, last: i64) {
        if first > last {
            return;
        }
        let (mut first, mut last) = (first, last);
        // Every interval that overlaps or touches the new one is taken in.
        while let Some((&start, &end)) = self.intervals.range(..=last.saturating_add(1)).next_back() {
            if end < first.saturating_sub(1) {
                break;
            }
            self.intervals.remove(&start);
            first = first.min(start);
            last = last.max(end);
        }
        self.intervals.insert(first, last);
        if self.intervals.len() > INTERVALS_MAX {
            self.forget_smaller_half();
        }
    }

    /// Removes one id: it has to be asked for again.
    pub fn remove(&mut self, id: i64) {
        let Some((&first, &last)) = self.intervals.range(..=id).next_back() else { return };
        if last < id {
            return;
        }
        self.intervals.remove(&first);
        if first < id {
            self.intervals.insert(first, id - 1);
        }
        if id < last {
            self.intervals.insert(id + 1, last);
        }
    }

    /// The id is known.
    pub fn contains(&self, id: i64) -> bool {
        self.intervals.range(..=id).next_back().is_some_and(|(_, last)| id <= *last)
    }

    /// What is not known, ascending; at most `max` ranges. When there are more, those with the least
    /// known ids between them are joined, so some known ids are asked for again.
    pub fn unknown(&self, max: usize) -> Unknown {
        let mut separators: Vec<(i64, i64)> =
            self.intervals.iter().map(|(first, last)| (*first, *last)).collect();
        let keep = max.max(2) - 1;
        let exact = separators.len() <= keep;
        if !exact {
            separators.sort_unstable_by_key(|(first, last)| std::cmp::Reverse(last.abs_diff(*first)));
            separators.truncate(keep);
            separators.sort_unstable();
        }
        let mut ranges = Vec::with_capacity(separators.len() + 1);
        let mut next = Some(i64::MIN);
        for (first, last) in separators {
            if let Some(start) = next.filter(|start| *start < first) {
                ranges.push((start, first - 1));
            }
            next = last.checked_add(1);
        }
        ranges.extend(next.map(|start| (start, i64::MAX)));
        Unknown { ranges, exact }
    }

    /// The smallest known id.
    pub fn first(&self) -> Option<i64> {
        self.intervals.first_key_value().map(|(first, _)| *first)
    }

    /// Unknown ids lie below this one.
    pub fn has_gap_below(&self, id: i64) -> bool {
        self.intervals.first_key_value().is_none_or(|(first, last)| *first > i64::MIN || *last < id)
    }

    /// Declares every id from `first` to `last` known, except those `pending`.
    ///
    /// The caller vouches that no other row in there can still appear: every transaction that
    /// may have taken one of these ids has ended.
    pub fn close_gaps(&mut self, first: i64, last: i64, pending: &[i64]) {
        let mut next = first;
        for &id in pending.iter().filter(|id| (first..=last).contains(*id)) {
            if let Some(before) = id.checked_sub(1) {
                self.add_interval(next, before);
            }
            next = id.saturating_add(1);
        }
        self.add_interval(next, last);
    }

    fn forget_smaller_half(&mut self) {
        let mut intervals: Vec<(i64, i64)> = std::mem::take(&mut self.intervals).into_iter().collect();
        let middle = intervals.len() / 2;
        intervals.select_nth_unstable_by_key(middle, |(first, last)| last.abs_diff(*first));
        self.intervals.extend(intervals.drain(middle..));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn nothing_known_asks_for_everything() {
        assert_eq!(Known::default().unknown(8).ranges, [(i64::MIN, i64::MAX)]);
    }

    #[test]
    fn the_ends_of_the_id_space_do_not_overflow() {
        let mut known = Known::default();
        known.add(i64::MIN);
        known.add(i64::MAX);
        assert_eq!(known.unknown(8).ranges, [(i64::MIN + 1, i64::MAX - 1)]);
        known.remove(i64::MIN);
        known.remove(i64::MAX);
        assert_eq!(known, Known::default());
    }

    /// What is forgotten is asked for again, which costs reads and loses nothing.
    #[test]
    fn of_too_many_intervals_the_larger_half_is_remembered() {
        let mut known = Known::default();
        let count = INTERVALS_MAX as i64 + 1;
        for n in 0..count {
            // Each larger than the one before.
            known.add_interval(n * 100_000, n * 100_000 + n);
        }
        assert_eq!(known.intervals.len(), count as usize - count as usize / 2);
        assert!(known.contains((count - 1) * 100_000) && !known.contains(0));
        assert!(known.intervals.iter().all(|(first, last)| last - first >= count / 2));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Add(i64),
        AddInterval(i64, i64),
        Remove(i64),
        CloseGaps(i64, i64, BTreeSet<i64>),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let id = 0..60i64;
        let step = prop_oneof![
            4 => id.clone().prop_map(Step::Add),
            1 => (id.clone(), 0..9i64).prop_map(|(first, length)| Step::AddInterval(first, first + length)),
            2 => id.clone().prop_map(Step::Remove),
            1 => (-5..60i64, id.clone(), prop::collection::btree_set(id, 0..5))
                .prop_map(|(first, last, pending)| Step::CloseGaps(first, last, pending)),
        ];
        prop::collection::vec(step, 0..80)
    }

    proptest! {
        /// The intervals hold what a plain set of ids would hold, and what is unknown is exactly the rest.
        #[test]
        fn agrees_with_a_plain_set(steps in steps(), max in 2usize..12) {
            let (mut known, mut plain) = (Known::default(), BTreeSet::new());
            for step in steps {
                match step {
                    Step::Add(id) => { known.add(id); plain.insert(id); }
                    Step::AddInterval(first, last) => { known.add_interval(first, last); plain.extend(first..=last); }
                    Step::Remove(id) => { known.remove(id); plain.remove(&id); }
                    Step::CloseGaps(first, last, pending) => {
                        // Pending ids are unknown by definition: the caller asks only about those.
                        for id in &pending { known.remove(*id); plain.remove(id); }
                        let listed: Vec<i64> = pending.iter().copied().collect();
                        known.close_gaps(first, last, &listed);
                        plain.extend((first..=last).filter(|id| !pending.contains(id)));
                    }
                }
                let below_zero = plain.contains(&-1);
                for id in if below_zero { -5 } else { 0 }..75 {
                    prop_assert_eq!(known.contains(id), plain.contains(&id), "id {}", id);
                }
                let all = known.unknown(usize::MAX);
                prop_assert!(all.exact);
                for id in 0..75 {
                    let asked = all.ranges.iter().any(|(first, last)| (*first..=*last).contains(&id));
                    prop_assert_eq!(asked, !plain.contains(&id), "asked for id {}", id);
                }
                let Unknown { ranges: joined, exact } = known.unknown(max);
                let known_is_asked_for =
                    (0..75).any(|id| plain.contains(&id) && joined.iter().any(|(first, last)| (*first..=*last).contains(&id)));
                prop_assert!(!(exact && known_is_asked_for), "exact, and yet known ids are asked for");
                prop_assert!(joined.len() <= max);
                prop_assert!(joined.windows(2).all(|pair| pair[0].1 < pair[1].0));
                for id in (0..75).filter(|id| !plain.contains(id)) {
                    prop_assert!(joined.iter().any(|(first, last)| (*first..=*last).contains(&id)), "lost id {}", id);
                }
            }
        }
    }
}

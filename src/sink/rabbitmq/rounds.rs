//! In which order the messages of a batch are sent: all that may go together; then for each exchange that refused lately
//! one message alone, and the others after it; and last what must not overtake those of its key.

use std::collections::HashMap;

/// Places in the batch, by round.
#[derive(Debug, Default)]
pub(super) struct Rounds<'a> {
    together: Vec<usize>,
    tries: Vec<(&'a str, Vec<usize>)>,
    last: Vec<usize>,
    /// Keys that do not go with the first: with which exchange's tries, or none, with the last.
    delayed: HashMap<&'a str, Option<&'a str>>,
}

impl<'a> Rounds<'a> {
    /// The next message of the batch; `one_try` says that its exchange refused lately.
    pub(super) fn add(&mut self, place: usize, exchange: &'a str, key: Option<&'a str>, one_try: bool) {
        match key.and_then(|key| self.delayed.get(key)) {
            None if !one_try => self.together.push(place),
            None => {
                self.delayed.extend(key.map(|key| (key, Some(exchange))));
                self.try_out(place, exchange);
            }
            Some(Some(tried)) if one_try && *tried == exchange => self.try_out(place, exchange),
            Some(_) => {
                self.delayed.extend(key.map(|key| (key, None)));
                self.last.push(place);
            }
        }
    }

    fn try_out(&mut self, place: usize, exchange: &'a str) {
        match self.tries.iter_mut().find(|(name, _)| *name == exchange) {
            Some((_, places)) => places.push(place),
            None => self.tries.push((exchange, vec![place])),
        }
    }

    /// The rounds, some of them empty.
    pub(super) fn into_rounds(self) -> Vec<Vec<usize>> {
        let mut rounds = vec![self.together];
        for (_, mut places) in self.tries {
            let rest = places.split_off(1);
            rounds.extend([places, rest]);
        }
        rounds.push(self.last);
        rounds
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(messages: &[(&'static str, &'static str, bool)]) -> Vec<Vec<usize>> {
        let mut rounds = Rounds::default();
        for (place, (exchange, key, one_try)) in messages.iter().enumerate() {
            rounds.add(place, exchange, Some(*key).filter(|key| !key.is_empty()), *one_try);
        }
        rounds.into_rounds()
    }

    #[test]
    fn an_exchange_that_refused_is_tried_with_one_message() {
        let messages = [("open", "a", false), ("bad", "b", true), ("bad", "c", true), ("open", "", false)];
        assert_eq!(rounds(&messages), [vec![0, 3], vec![1], vec![2], vec![]]);
    }

    /// Of a key with messages to exchanges of all kinds none overtakes another.
    #[test]
    fn a_key_keeps_its_order_through_all_rounds() {
        let kinds = [("open", false), ("a", true), ("b", true)];
        // Other keys decide which exchange is tried first.
        for first in [("b", "x", true), ("a", "x", true)] {
            for number in 0..3_usize.pow(5) {
                let of_key = (0..5).map(|place| kinds[number / 3_usize.pow(place) % 3]);
                let messages: Vec<_> = std::iter::once(first)
                    .chain(of_key.map(|(exchange, one_try)| (exchange, "k", one_try)))
                    .collect();
                let sent = rounds(&messages).concat();
                assert_eq!(sent.len(), messages.len(), "{messages:?}");
                let of_key: Vec<usize> = sent.into_iter().filter(|place| *place > 0).collect();
                assert!(of_key.is_sorted(), "{messages:?}: {of_key:?}");
            }
        }
    }
}

//! How a row's time with its worker ends: what follows from each refusal, and the ends that go to settle.

use super::{Worker, is_for_its_connection};
use crate::mutants::mutant;
use crate::pipeline::queue::Queued;
use crate::pipeline::{End, Outcome, hand_over};
use crate::retry::{Decision, History};
use crate::sink::{Fault, Publisher, Refusal, Verdict};
use crate::store::{Route, Row};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

/// Rows at most that are remembered for what they did to connections; for another, one is forgotten.
const BLAMED_MAX: usize = 1024;

impl<P: Publisher> Worker<P> {
    /// Acts on a refusal. Returns the row with it if it is to be sent again.
    pub(super) fn refused(&mut self, mut queued: Queued, refusal: Refusal) -> Option<(Queued, Refusal)> {
        self.count(refusal.fault);
        self.learn(&queued, refusal.fault);
        let suspicion = &mut queued.suspicion;
        let apart = suspicion.is_apart();
        suspicion.strikes += u32::from(refusal.fault == Fault::Message);
        suspicion.breaks +=
            u32::from(refusal.fault == Fault::Break || apart && is_for_its_connection(refusal.fault));
        let history = History {
            attempts: queued.row.attempts,
            silences: self.troubled.silences(&queued.row.route),
            strikes: suspicion.strikes,
            breaks: suspicion.breaks,
        };
        match self.policy.decide(refusal.fault, history) {
            Decision::Resend => return Some((queued, refusal)),
            Decision::ResendAlone => {
                suspicion.send_alone(Instant::now());
                return Some((queued, refusal));
            }
            Decision::ResendApart => {
                suspicion.send_apart(Instant::now());
                return Some((queued, refusal));
            }
            Decision::Accept => self.delivered(&queued.row),
            Decision::Wait => self.put_off(&queued.row, refusal),
            Decision::Dead => self.dead(&queued.row, refusal),
            Decision::GiveBack => self.give_back(&queued.row),
        }
        None
    }

    /// What a refusal tells of its route.
    fn learn(&mut self, queued: &Queued, fault: Fault) {
        match fault {
            // A refusal is an answer, too.
            Fault::Unroutable | Fault::Destination | Fault::Message => {
                self.troubled.answered(&queued.row.route);
            }
            // What is known of a row says nothing of others.
            Fault::Break if queued.suspicion.is_apart() && !self.blamed.contains(&queued.row.id) => {
                let now = Instant::now();
                if self.troubled.count_break(&queued.row.route, now) {
                    self.queue.suspect(&queued.row.route, now);
                }
            }
            Fault::Outage if queued.suspicion.is_apart() => {
                self.troubled.forget_break(&queued.row.route);
                self.queue.trust(&queued.row.route);
            }
            _ => {}
        }
    }

    pub(super) fn delivered(&mut self, row: &Row) {
        self.troubled.answered(&row.route);
        if !self.blamed.is_empty() {
            self.blamed.remove(&row.id);
        }
        self.end(row, End::Delivered { created_at_micros: row.created_at_micros });
    }

    /// It waits in the table, with what it did to connections remembered.
    pub(super) fn put_off(&mut self, row: &Row, refusal: Refusal) {
        if refusal.fault == Fault::Break {
            self.blame(row, &refusal.reason);
        }
        self.wait(row, refusal);
    }

    fn blame(&mut self, row: &Row, reason: &str) {
        if self.remember_blamed(row.id) && !self.troubled.count_blame(&row.route, Instant::now()) {
            let (id, message_id) = (row.id, row.message_id);
            tracing::warn!(id, %message_id, reason, "connections break whenever this row is on its way; trying it seldom");
        }
    }

    /// Whether it is news.
    pub(super) fn remember_blamed(&mut self, id: i64) -> bool {
        if self.blamed.len() >= BLAMED_MAX
            && !self.blamed.contains(&id)
            && let Some(any) = self.blamed.iter().next().copied()
        {
            self.blamed.remove(&any);
        }
        self.blamed.insert(id)
    }

    pub(super) fn wait(&mut self, row: &Row, refusal: Refusal) {
        let attempts = row.attempts.saturating_add(1);
        let followers = self.queue.hold_key_of(row);
        let end = End::Wait {
            key: row.ordering_key.clone(),
            route: Arc::clone(&row.route),
            fault: refusal.fault,
            attempts,
            wait: self.policy.wait(attempts),
            reason: refusal.reason,
        };
        self.end(row, end);
        self.release(followers);
    }

    /// The lease was not in force. The key is held, so that no later row of it goes before this one when the lease is
    /// in force again.
    pub(super) fn give_back(&mut self, row: &Row) {
        self.metrics.fenced.inc();
        let followers = if mutant!("no-hold-after-fence") { Vec::new() } else { self.queue.hold_key_of(row) };
        self.end(row, End::Fenced);
        self.release(followers);
    }

    fn dead(&mut self, row: &Row, refusal: Refusal) {
        let attempts = row.attempts.saturating_add(1);
        tracing::warn!(
            id = row.id,
            message_id = %row.message_id,
            attempts,
            reason = refusal.reason,
            "row is dead: it can not be delivered"
        );
        self.end(row, End::Dead { attempts, reason: refusal.reason });
    }

    pub(super) fn release(&mut self, rows: Vec<Row>) {
        for row in rows {
            self.give_back_unsent(&row);
        }
    }

    pub(super) fn give_back_unsent(&mut self, row: &Row) {
        self.end(row, End::Released { key: row.ordering_key.clone() });
    }

    /// Notes a row's end, to be handed over before anything is waited for.
    pub(super) fn end(&mut self, row: &Row, end: End) {
        let Row { id, message_id, lease, .. } = *row;
        self.ended.push(Outcome { id, message_id, lease, end });
    }

    pub(super) async fn hand_over_ended(&mut self) {
        if !self.ended.is_empty() {
            hand_over(&self.output, std::mem::take(&mut self.ended)).await;
        }
    }

    /// Counts confirm time-outs, once per batch and route.
    pub(super) fn count_silences(&mut self, rows: &[Row], verdicts: &[Verdict]) {
        let silent = |verdict: &Verdict| matches!(verdict, Err(refusal) if refusal.fault == Fault::Silence);
        let silent = rows.iter().zip(verdicts).filter(|(_, verdict)| silent(verdict));
        let (routes, now): (HashSet<&Arc<Route>>, _) =
            (silent.map(|(row, _)| &row.route).collect(), Instant::now());
        routes.into_iter().for_each(|route| self.troubled.count_silence(route, now));
    }

    fn count(&self, fault: Fault) {
        match fault {
            Fault::Unknown | Fault::Break | Fault::Silence | Fault::Suspect => {
                self.metrics.possible_duplicates.inc()
            }
            Fault::Unroutable => self.metrics.returned.inc(),
            Fault::Destination | Fault::Message | Fault::Hopeless => self.metrics.refused.inc(),
            Fault::Outage | Fault::Risk | Fault::Fenced => return,
        };
    }
}

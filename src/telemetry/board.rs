//! What is known about the outside, for the health endpoints; and the one place that logs changes of it.

use super::metrics::{Metrics, Peer};
use crate::store::{Census, StoreError, Trouble};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Who speaks with the database; each has a connection of its own and notices trouble by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatabaseUser {
    /// Reads rows.
    Poll,
    /// Writes outcomes.
    Settle,
    /// Counts.
    Census,
    /// Keeps the leases.
    Leases,
}

/// State of the database as all its users see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Database {
    /// Nobody has reached it yet.
    Unknown,
    /// Reachable, schema right.
    Up,
    /// Not usable, and why.
    Down(String),
}

/// Lost races in a row that are told as trouble: a lock that stays, a statement that always takes too long.
const RACES_LOST_TELL: u32 = 3;

/// The board.
#[derive(Debug)]
pub struct Board {
    state: Mutex<State>,
    stopping: AtomicBool,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct State {
    /// By user: not heard of, fine, or in trouble.
    users: [Option<Result<(), String>>; 4],
    /// Statements in a row that lost a race, by user.
    races_lost: [u32; 4],
    was_up: bool,
    shown: Option<Database>,
    census: Option<Census>,
    unmarked: Option<String>,
}

impl State {
    fn database(&self) -> Database {
        let mut up = false;
        for user in self.users.iter().flatten() {
            match user {
                Ok(()) => up = true,
                Err(reason) => return Database::Down(reason.clone()),
            }
        }
        if up { Database::Up } else { Database::Unknown }
    }
}

impl Board {
    /// An empty board.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { state: Mutex::default(), stopping: AtomicBool::new(false), metrics }
    }

    /// A call to the database went well.
    pub fn database_up(&self, user: DatabaseUser) {
        self.state().races_lost[user as usize] = 0;
        self.note(user, Ok(()));
    }

    /// A call to the database failed. A lost race is no trouble of the database, unless it is lost each time.
    pub fn database_down(&self, user: DatabaseUser, error: &StoreError) {
        match error.trouble {
            Trouble::Contention => {
                tracing::debug!(?user, reason = error.sentence, "statement lost a race");
                let mut state = self.state();
                state.races_lost[user as usize] += 1;
                // Counting may take too long on a huge table while rows flow all the same.
                let matters = user != DatabaseUser::Census;
                let lasting = matters && state.races_lost[user as usize] >= RACES_LOST_TELL;
                drop(state);
                if lasting {
                    self.note(user, Err(error.sentence.clone()));
                }
            }
            Trouble::Outage | Trouble::Configuration | Trouble::Rejected => {
                self.note(user, Err(error.sentence.clone()));
            }
        }
    }

    /// This user asks nothing of the database now; what it saw before may be over.
    pub fn database_idle(&self, user: DatabaseUser) {
        self.state().users[user as usize] = None;
    }

    /// Counts of the table were taken.
    pub fn set_census(&self, census: Census) {
        self.state().census = Some(census);
    }

    /// Why some rows cannot be marked although the database is up.
    pub fn set_unmarked(&self, reason: Option<String>) {
        self.state().unmarked = reason;
    }

    /// Why some rows cannot be marked, if so.
    pub fn unmarked(&self) -> Option<String> {
        self.state().unmarked.clone()
    }

    /// The relay has begun to stop.
    pub fn set_stopping(&self) {
        self.stopping.store(true, Relaxed);
    }

    /// The relay has begun to stop.
    pub fn stopping(&self) -> bool {
        self.stopping.load(Relaxed)
    }

    /// State of the database.
    pub fn database(&self) -> Database {
        self.state().database()
    }

    /// The newest counts, if there are any.
    pub fn census(&self) -> Option<Census> {
        self.state().census
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, user: DatabaseUser, result: Result<(), String>) {
        let mut state = self.state();
        let unchanged = state.users[user as usize].as_ref() == Some(&result);
        if unchanged {
            return;
        }
        state.users[user as usize] = Some(result);
        let now = state.database();
        if state.shown.as_ref() == Some(&now) {
            return;
        }
        match &now {
            Database::Up if state.was_up => {
                self.metrics.reconnected(Peer::Database);
                tracing::info!("the database is back");
            }
            Database::Up => tracing::info!("connected to the database"),
            Database::Down(reason) => tracing::warn!(reason, "cannot use the database; retrying"),
            Database::Unknown => {}
        }
        state.was_up |= now == Database::Up;
        state.shown = Some(now);
    }
}

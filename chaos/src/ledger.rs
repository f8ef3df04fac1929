//! The ledgers: what writers meant and did, and what the consumer got.
//!
//! Both are append-only files of JSON lines. [`Journal::append`] returns when its lines are on disk
//! (`fdatasync`), and many callers share one sync. So a crash of this tool, or of the machine, leaves
//! a ledger that never claims more than what happened, and the files alone are enough to judge a run.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};

/// Appends that may wait for a sync together.
const QUEUE: usize = 1024;

/// Milliseconds since the run began; one clock for all ledgers and observations.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

impl Clock {
    /// Begins now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Now.
    pub fn ms(self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// What a writer wrote down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "snake_case")]
pub enum WriterLine {
    /// All rows are inserted, and now comes `commit` or `rollback`.
    Intent {
        /// Number of the transaction.
        tx: u64,
        /// When.
        at: u64,
        /// What kind of transaction.
        kind: Kind,
        /// Its rows, also those that a savepoint took back.
        rows: Vec<WrittenRow>,
    },
    /// How it went.
    Outcome {
        /// Number of the transaction.
        tx: u64,
        /// When.
        at: u64,
        /// The answer of the database, if one came.
        outcome: Outcome,
    },
}

/// Kinds of transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// One key, inserted at once.
    Plain,
    /// Time goes by between the row lock of the key and the outbox rows.
    Thinks,
    /// Some rows are taken back to a savepoint.
    Savepoint,
    /// Everything is rolled back.
    RolledBack,
    /// Several keys.
    SeveralKeys,
    /// Rows without a key, some of them scheduled.
    Keyless,
    /// Stays open for seconds, so its ids commit late.
    Long,
    /// Contains rows that can never be delivered.
    Poison,
}

/// The database's answer to `commit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Committed.
    Committed,
    /// Rolled back, or lost before `commit` was sent.
    Aborted,
    /// `commit` was sent and no answer came; the witness table decides.
    Unknown,
}

/// A row of the outbox as its writer knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrittenRow {
    /// Its id.
    pub id: i64,
    /// Its message id.
    pub message_id: String,
    /// Its ordering key.
    pub key: Option<String>,
    /// Its number within the key, taken under the row lock of the key; 0 without a key.
    pub seq: i64,
    /// Its routing key.
    pub routing_key: String,
    /// Hash of the body as the column renders it.
    pub hash: String,
    /// How long after the insert it may not be sent yet, in milliseconds.
    #[serde(default)]
    pub delay_ms: i64,
    /// It can never be delivered and must end dead.
    #[serde(default)]
    pub poison: bool,
    /// A savepoint took it back.
    #[serde(default)]
    pub undone: bool,
}

/// A delivery as the consumer got it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delivered {
    /// When.
    pub at: u64,
    /// The consumer's connection, counted from 1.
    pub connection: u64,
    /// The broker has handed it out before.
    pub redelivered: bool,
    /// Property `message_id`.
    pub message_id: String,
    /// Header `x-outbox-id`.
    pub id: Option<i64>,
    /// Header `x-outbox-key`.
    pub key: Option<String>,
    /// Routing key.
    pub routing_key: String,
    /// Hash of the body.
    pub hash: String,
    /// `delivery_mode` 2.
    pub persistent: bool,
    /// Property `content_type`.
    pub content_type: Option<String>,
}

/// SHA-256 in hex.
pub fn hash(body: &[u8]) -> String {
    Sha256::digest(body).iter().fold(String::with_capacity(64), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

type Entry = (String, oneshot::Sender<()>);

/// An append-only file whose lines are on disk when `append` returns.
#[derive(Debug, Clone)]
pub struct Journal {
    entries: mpsc::Sender<Entry>,
}

impl Journal {
    /// Creates the file, which must not exist.
    pub fn create(path: &Path) -> Result<Self> {
        let file =
            File::create_new(path).with_context(|| format!("cannot create the ledger {}", path.display()))?;
        let (entries, queue) = mpsc::channel(QUEUE);
        std::thread::Builder::new().name("ledger".to_owned()).spawn(move || keep(file, queue))?;
        Ok(Self { entries })
    }

    /// Writes lines and waits until they are on disk.
    pub async fn append<T: Serialize>(&self, lines: &[T]) -> Result<()> {
        let mut text = String::new();
        for line in lines {
            text.push_str(&serde_json::to_string(line)?);
            text.push('\n');
        }
        let (done, on_disk) = oneshot::channel();
        let lost = "the ledger cannot be written: is the disk full?";
        self.entries.send((text, done)).await.ok().context(lost)?;
        on_disk.await.context(lost)
    }
}

/// Ends when all journals of the file are gone, or with the first error, which every caller then sees.
fn keep(mut file: File, mut queue: mpsc::Receiver<Entry>) {
    while let Some((mut text, done)) = queue.blocking_recv() {
        let mut waiting = vec![done];
        while let Ok((more, done)) = queue.try_recv() {
            text.push_str(&more);
            waiting.push(done);
        }
        if file.write_all(text.as_bytes()).and_then(|()| file.sync_data()).is_err() {
            return;
        }
        for done in waiting {
            let _ = done.send(());
        }
    }
}

/// Reads a ledger.
pub fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Vec<T>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let parse = |(number, line): (usize, &str)| {
        serde_json::from_str(line).with_context(|| format!("{}: line {}", path.display(), number + 1))
    };
    text.lines().enumerate().map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_appended_is_read_back_in_order() {
        let path = std::env::temp_dir().join(format!("chaos-ledger-{:016x}", fastrand::u64(..)));
        let journal = Journal::create(&path).unwrap();
        for tx in 0..10 {
            let outcome = WriterLine::Outcome { tx, at: tx * 7, outcome: Outcome::Unknown };
            journal.append(&[outcome.clone(), outcome]).await.unwrap();
        }
        let lines: Vec<WriterLine> = read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(lines.len(), 20);
        assert_eq!(lines[19], WriterLine::Outcome { tx: 9, at: 63, outcome: Outcome::Unknown });
    }

    #[test]
    fn the_hash_is_sha256() {
        assert_eq!(hash(b"abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}

//! The words of `outbox-relay check`: a finding, and a question with a time limit. What is asked of each server
//! stands beside its other code: `store/postgres/preflight.rs` and `sink/rabbitmq/preflight.rs`.

use std::time::Duration;

/// Longest one question may take. A broker with an alarm keeps silent instead of refusing.
const QUESTION_LIMIT: Duration = Duration::from_secs(10);

/// Something looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    /// What is wrong with it and what to do.
    pub problem: Option<String>,
}

impl Finding {
    /// A finding from a result whose error says problem and remedy.
    pub fn new(what: impl Into<String>, result: Result<(), String>) -> Self {
        Self { what: what.into(), problem: result.err() }
    }
}

/// Asks one question, bounded in time.
pub async fn ask(question: impl Future<Output = Result<(), String>>) -> Result<(), String> {
    match tokio::time::timeout(QUESTION_LIMIT, question).await {
        Ok(answer) => answer,
        Err(_) => Err(format!(
            "no answer within {} s; is the server overloaded or does it hold back clients?",
            QUESTION_LIMIT.as_secs()
        )),
    }
}

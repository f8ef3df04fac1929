//! Who sends beside whom. All workers share one connection, so what breaks it may be anybody's message. To blame one, it has to
//! be the only one on its way.

use std::sync::Arc;
use std::time::Duration;
use tokio::sync::RwLock;

/// Longest that others are kept from sending: until all have their answers, and then until the one has its own. Without an
/// answer in this time the others go on, and nothing is proven.
const LIMIT: Duration = Duration::from_secs(1);

/// The same for all workers of a relay.
#[derive(Debug, Clone, Default)]
pub struct Gate(Arc<RwLock<()>>);

impl Gate {
    /// The usual way.
    pub async fn beside_others<F: Future>(&self, sending: F) -> F::Output {
        let _others_may = self.0.read().await;
        sending.await
    }

    /// While nobody else sends, if that can be had soon; answers with whether it was so to the end, too.
    pub async fn alone<F: Future>(&self, sending: F) -> (F::Output, bool) {
        let Ok(nobody_else) = tokio::time::timeout(LIMIT, self.0.write()).await else {
            return (self.beside_others(sending).await, false);
        };
        tokio::pin!(sending);
        match tokio::time::timeout(LIMIT, &mut sending).await {
            Ok(answer) => (answer, true),
            Err(_) => {
                drop(nobody_else);
                (sending.await, false)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use tokio::time::{Instant, sleep, timeout};

    #[tokio::test(start_paused = true)]
    async fn one_is_alone_when_the_others_have_their_answers() {
        let (gate, begun) = (Gate::default(), Instant::now());
        let other = gate.beside_others(sleep(LIMIT / 2));
        let alone = async {
            tokio::task::yield_now().await;
            gate.alone(async { begun.elapsed() }).await
        };
        let ((), (sent_after, was_alone)) = tokio::join!(other, alone);
        assert!(was_alone && sent_after >= LIMIT / 2);
    }

    #[tokio::test(start_paused = true)]
    async fn others_wait_no_longer_than_the_limit() {
        let gate = Gate::default();
        let silent = gate.clone();
        let alone = tokio::spawn(async move { silent.alone(pending::<()>()).await });
        tokio::task::yield_now().await;
        assert!(timeout(LIMIT / 2, gate.beside_others(async {})).await.is_err(), "it is alone");
        assert!(timeout(LIMIT, gate.beside_others(async {})).await.is_ok(), "it had its time");
        alone.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_for_a_silent_one_goes_beside_it_and_proves_nothing() {
        let gate = Gate::default();
        let silent = gate.clone();
        let other = tokio::spawn(async move { silent.beside_others(pending::<()>()).await });
        tokio::task::yield_now().await;
        let ((), was_alone) = gate.alone(async {}).await;
        assert!(!was_alone);
        other.abort();
    }
}

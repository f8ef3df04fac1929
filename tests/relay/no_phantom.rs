//! Promise 2: a row whose transaction rolled back is never published.

use crate::support::World;
use crate::support::world::Allowed;
use sqlx::{Connection, Executor};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_rolled_back_is_never_published() {
    let world = World::new().await;
    let relay = world.relay(&[]).await;
    relay.ready().await;
    let mut db = world.db().await;
    for round in 0..60 {
        let mut transaction = db.begin().await.expect("begin");
        let insert = "insert into outbox (routing_key, ordering_key, payload) values ('ok.1', 'k', '{}')";
        transaction.execute(insert).await.expect("insert");
        let mut savepoint = transaction.begin().await.expect("savepoint");
        savepoint.execute(insert).await.expect("insert");
        if round % 2 == 0 {
            savepoint.rollback().await.expect("roll back to savepoint");
        } else {
            savepoint.commit().await.expect("release savepoint");
        }
        // Long enough for the relay to look.
        tokio::time::sleep(Duration::from_millis(20)).await;
        if round % 3 == 0 {
            transaction.rollback().await.expect("roll back");
        } else {
            transaction.commit().await.expect("commit");
        }
    }
    world.drained().await;
    relay.stop().await.expect("clean stop");
    // The ledger of writers holds committed rows only; `finish` panics on a message that is not in it.
    assert_eq!(world.number("select count(*) from written").await, 60);
    world.finish(Allowed::default()).await;
}

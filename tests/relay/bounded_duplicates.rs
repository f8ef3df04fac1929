//! Promise 5: a crash re-sends at most the rows in flight; a clean stop re-sends none.

use crate::support::world::{Allowed, UNDELIVERED};
use crate::support::{World, rng};
use std::collections::HashSet;
use std::time::Duration;

const IN_FLIGHT: usize = 400;

/// `kill -9` at random twenty times under load. The ledgers show: nothing lost, order kept, the same
/// `message_id` at each delivery, and no more duplicates than rows were in flight.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_twenty_times_it_repeats_at_most_what_was_in_flight() {
    let world = World::new().await;
    let mut rng = rng("killed_twenty_times");
    let window = IN_FLIGHT.to_string();
    let settings =
        [("OUTBOX_MAX_IN_FLIGHT", window.as_str()), ("OUTBOX_BATCH_SIZE", "100"), ("OUTBOX_LEASE_TTL", "1s")];
    let (mut received, mut in_the_middle) = (Vec::new(), 0);
    for _ in 0..20 {
        world.write(2000, 40).await;
        let relay = world.process(&settings).await;
        // The leases of the one before have to run out first.
        relay.until_owner().await;
        tokio::time::sleep(Duration::from_millis(rng.u64(0..300))).await;
        relay.kill().await;
        // What this crash may repeat: delivered, and not marked.
        received.extend(world.take_messages().await);
        let delivered = received.iter().map(|message| message.id).collect::<HashSet<_>>().len() as i64;
        let marked = world.delivered().await;
        assert!(delivered - marked <= IN_FLIGHT as i64, "{delivered} delivered, {marked} marked");
        in_the_middle += i32::from(delivered > marked);
    }
    eprintln!("{in_the_middle} kills while rows were in flight");
    assert!(in_the_middle >= 3, "{in_the_middle} kills of 20 were under load");
    let relay = world.process(&settings).await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    received.extend(world.take_messages().await);
    let allowed = Allowed { duplicates: 20 * IN_FLIGHT, rewinds: true, ..Allowed::default() };
    world.finish_with(received, allowed).await;
}

/// SIGTERM under load, fifty times: exit 0 within the grace period, and not one duplicate.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_fifty_times_under_load_it_repeats_nothing() {
    let world = World::new().await;
    let mut rng = rng("stopped_fifty_times");
    let pending = async || world.number(UNDELIVERED).await;
    let mut in_the_middle = 0;
    for _ in 0..50 {
        // More than is in flight, so that stops find something to read still.
        world.write(4000, 40).await;
        let before = pending().await;
        let relay = world.process(&[]).await;
        relay.until_owner().await;
        relay.ready().await;
        tokio::time::sleep(Duration::from_millis(rng.u64(0..150))).await;
        let begun = std::time::Instant::now();
        let status = relay.terminate().await;
        assert!(status.success(), "{status}");
        assert!(begun.elapsed() < Duration::from_secs(25), "stopped within the grace period");
        in_the_middle += i64::from((1..before).contains(&pending().await));
    }
    eprintln!("{in_the_middle} stops in the middle");
    assert!(in_the_middle >= 10, "{in_the_middle} stops of 50 were under load");
    let relay = world.process(&[]).await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    world.finish(Allowed::default()).await;
}

//! Passwords never reach a log, a Debug output or an error; payloads never reach a log.

use crate::support::world::{Allowed, resolve};
use crate::support::{World, eventually};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_password_and_no_payload_in_logs_at_trace_level() {
    let world = World::new().await;
    let (role, mut database) = world.login("swordfish-db").await;
    world.grant(&role).await;
    let mut broker = url::Url::parse(&world.servers().amqp_url).expect("URL");
    let user_of_broker = broker.password().expect("password").to_owned();
    for format in ["json", "pretty"] {
        // Good logins, then wrong ones.
        for wrong in [false, true] {
            if wrong {
                broker.set_password(Some("swordfish-mq")).expect("URL");
                database.set_password(Some("swordfish-xx")).expect("URL");
            } else {
                broker.set_password(Some(&user_of_broker)).expect("URL");
                database.set_password(Some("swordfish-db")).expect("URL");
            }
            let settings = [
                ("DATABASE_URL", database.as_str()),
                ("AMQP_URL", broker.as_str()),
                ("OUTBOX_LOG", "trace"),
                ("OUTBOX_LOG_FORMAT", format),
            ];
            let relay = world.process(&settings).await;
            if wrong {
                eventually("told", async || relay.logged().contains("cannot reach the broker")).await;
                eventually("told", async || relay.logged().contains("cannot use the database")).await;
            } else {
                world.sql("insert into outbox (routing_key, payload) values ('ok.1', '{\"card\": \"swordfish-payload\"}'), ('lost.1', '{\"card\": \"swordfish-payload\"}')").await;
                world
                    .until("select count(*) from outbox where delivered_at is null and attempts = 0", 0)
                    .await;
            }
            relay.signal("TERM").await;
            eventually("stopped", async || {
                relay.logged().contains("stopped; everything confirmed is marked")
            })
            .await;
            let log = relay.logged();
            assert!(
                !log.contains("swordfish"),
                "a secret in the log:\n{}",
                log.lines().find(|line| line.contains("swordfish")).unwrap_or_default()
            );
            assert!(!log.contains(&format!(":{user_of_broker}@")), "a password in the log");
        }
    }
    world.finish(Allowed { refusals: true, pending: true, ..Allowed::default() }).await;
}

#[tokio::test]
async fn no_password_in_any_debug_output() {
    let pairs = [
        ("DATABASE_URL", "postgres://u:swordfish@h/d?password=swordfish"),
        ("AMQP_URL", "amqp://u:swordfish@h/v,amqps://u:swordfish@h2/v"),
    ];
    let pairs = pairs.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let settings = resolve(&pairs);
    let connector = outbox_relay::store::postgres::Connector::new(settings.database.clone(), false);
    let store = outbox_relay::store::PostgresStore::new(connector.clone(), &settings);
    let error = connector.connect(&[]).await.expect_err("no such host");
    let shown = format!(
        "{settings:?} {settings:#?} {connector:?} {store:?} {error:?} {error} {}",
        connector.describe()
    );
    assert!(!shown.contains("swordfish"), "{shown}");
}

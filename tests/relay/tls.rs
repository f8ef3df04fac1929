//! TLS to both servers: certificates and names are checked, a refusal is told in one sentence and tried on, and
//! nothing falls back to plain text.

use crate::support::certificates::Authority;
use crate::support::process::{RelayProcess, run};
use crate::support::servers::Servers;
use crate::support::world::Allowed;
use crate::support::{World, eventually};

/// A world on servers that speak TLS for `localhost`, and their authority.
async fn world_with_tls(more: &'static [&'static str]) -> (World, Authority) {
    let authority = Authority::new().server("localhost").client();
    let folder = authority.folder().to_str().expect("UTF-8").to_owned();
    let start = move || Servers::start_with(&[&["--tls", folder.as_str()], more].concat());
    let servers = tokio::task::spawn_blocking(start).await.expect("servers");
    (World::with(servers).await, authority)
}

/// The database of this world, at a host, trusting an authority and nobody else's name.
fn database(world: &World, host: &str, ca: &str) -> String {
    let mut url = url::Url::parse(&world.database_url).expect("URL");
    url.set_host(Some(host)).expect("host");
    url.set_query(Some(&format!("sslmode=verify-full&sslrootcert={ca}")));
    url.to_string()
}

fn broker(world: &World, host: &str) -> String {
    world.servers().value("AMQP_TLS_URL").replace("localhost", host)
}

/// Both servers are told as away because of this, each in one line with its address, and the process lives.
async fn both_refused(relay: &RelayProcess, database_because: &str, broker_because: &str) {
    eventually("both refusals are told", async || {
        let health = relay.health().await;
        let told = |reason: Option<String>, server: &str, because: &str| {
            reason.is_some_and(|reason| {
                reason.contains(server) && reason.contains(because) && !reason.contains('\n')
            })
        };
        told(health.database.reason, "database at postgres://", database_because)
            && told(health.broker.reason, "broker at amqps://", broker_because)
    })
    .await;
    let broker = relay.logged();
    let line =
        broker.lines().find(|line| line.contains("cannot reach the broker") && line.contains(broker_because));
    let line = line.expect("told in the log");
    assert!(line.contains("\"configuration\":true"), "somebody has to change a setting: {line}");
    assert_eq!(relay.get("/readyz").await.0, 503);
    assert_eq!(relay.get("/livez").await.0, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_and_names_are_checked_and_rows_flow_encrypted() {
    let (world, authority) = world_with_tls(&[]).await;
    let stranger = Authority::new();
    let trusted = stranger.path("trusted.pem");
    std::fs::copy(stranger.file("ca.pem"), &trusted).expect("copy");
    world.write(300, 30).await;

    // A name the certificate is not for.
    let (right_ca, wrong_name) = (authority.path("ca.pem"), "127.0.0.1");
    let relay = world
        .process(&[
            ("DATABASE_URL", &database(&world, wrong_name, &right_ca)),
            ("AMQP_URL", &broker(&world, wrong_name)),
            ("AMQP_CA_FILE", &right_ca),
        ])
        .await;
    both_refused(&relay, "not valid for name", "not valid for name").await;
    assert!(relay.terminate().await.success());

    // An authority nobody trusts, until its certificate is put into the file.
    let relay = world
        .process(&[
            ("DATABASE_URL", &database(&world, "localhost", &trusted)),
            ("AMQP_URL", &broker(&world, "localhost")),
            ("AMQP_CA_FILE", &trusted),
        ])
        .await;
    both_refused(&relay, "UnknownIssuer", "UnknownIssuer").await;
    assert_eq!(world.delivered().await, 0);
    std::fs::copy(authority.file("ca.pem"), &trusted).expect("copy");
    world.drained().await;
    let ours = "from pg_stat_activity join pg_stat_ssl using (pid)
        where application_name = 'outbox-relay' and datname = current_database()";
    assert!(world.number(&format!("select count(*) {ours} and ssl")).await > 0);
    assert_eq!(world.number(&format!("select count(*) {ours} and not ssl")).await, 0);
    assert!(relay.terminate().await.success());
    let log = std::fs::read_to_string(world.servers().value("PG_LOG")).expect("log of Postgres");
    assert!(!log.contains("no encryption"), "somebody tried plain text");
    world.finish(Allowed::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_wants_a_certificate_gets_ours() {
    let (world, authority) = world_with_tls(&["--tls-client-required"]).await;
    let amqp = broker(&world, "localhost");
    let (ca, certificate) = (authority.path("ca.pem"), authority.path("client.pem"));
    let key = authority.path("client-key.pem");
    world.write(300, 30).await;

    let relay = world.process(&[("AMQP_URL", &amqp), ("AMQP_CA_FILE", &ca)]).await;
    eventually("the broker's wish is told", async || {
        let reason = relay.health().await.broker.reason.unwrap_or_default();
        reason.contains("broker at amqps://localhost") && reason.contains("CertificateRequired")
    })
    .await;
    assert_eq!(relay.get("/livez").await.0, 200);
    assert!(relay.terminate().await.success());

    let tls = [
        ("AMQP_URL", amqp.as_str()),
        ("AMQP_CA_FILE", &ca),
        ("AMQP_CLIENT_CERT_FILE", &certificate),
        ("AMQP_CLIENT_KEY_FILE", &key),
    ];
    let (code, output, _) = run(&["check"], &world.pairs(&tls)).await;
    assert_eq!(code, 0, "{output}");
    let relay = world.process(&tls).await;
    world.drained().await;
    assert!(relay.terminate().await.success());
    world.finish(Allowed::default()).await;
}

/// Where plain text would work, it is not used unless the URL asks for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_tls_gets_nothing() {
    let world = World::new().await;
    let authority = Authority::new();
    world.write(10, 10).await;
    let amqp = world.servers().amqp_url.replace("amqp://", "amqps://");
    let relay = world
        .process(&[
            ("DATABASE_URL", &database(&world, "127.0.0.1", &authority.path("ca.pem"))),
            ("AMQP_URL", &amqp),
        ])
        .await;
    both_refused(&relay, "server does not support TLS", "InvalidContentType").await;
    assert_eq!(world.delivered().await, 0);
    assert!(relay.terminate().await.success());
    world.finish(Allowed { pending: true, ..Allowed::default() }).await;
}

#[tokio::test]
async fn certificate_files_that_cannot_work_are_refused_at_the_start() {
    let authority = Authority::new().client();
    let (ca, certificate) = (authority.path("ca.pem"), authority.path("client.pem"));
    let key = authority.path("client-key.pem");
    let refusals: [(&[(&str, &str)], &str); 7] = [
        (&[("AMQP_CA_FILE", "/does/not/exist")], "cannot read /does/not/exist"),
        (&[("AMQP_CA_FILE", &key)], "client-key.pem holds no certificate in PEM"),
        (&[("AMQP_CLIENT_CERT_FILE", &certificate)], "belong together"),
        (
            &[("AMQP_CLIENT_CERT_FILE", &certificate), ("AMQP_CLIENT_KEY_FILE", &ca)],
            "ca.pem holds no private key in PEM without a password",
        ),
        (&[("AMQP_CA_FILE", &ca), ("AMQP_URL", "amqp://u:hunter2@localhost/%2f")], "write amqps://"),
        (
            &[(
                "DATABASE_URL",
                "postgres://u:hunter2@localhost/d?sslmode=verify-full&sslrootcert=/not/there",
            )],
            "cannot read /not/there (sslrootcert)",
        ),
        (&[("AMQP_CA", &ca), ("OUTBOX_AMQP_CA_FILE", &ca)], "OUTBOX_AMQP_CA_FILE is not a setting"),
    ];
    for (wrong, expected) in refusals {
        let env = [
            ("DATABASE_URL", "postgres://u:hunter2@localhost/d"),
            ("AMQP_URL", "amqps://u:hunter2@localhost/%2f"),
        ];
        let env = env.iter().chain(wrong).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let (code, _, error) = run(&["run"], &env.collect()).await;
        assert_eq!(code, 2, "{wrong:?}: {error}");
        assert!(error.contains(expected), "{wrong:?}: {error}");
        assert!(error.starts_with("error: ") && error.trim_end().lines().count() == 1, "{error}");
        assert!(!error.contains("hunter2") && !error.contains("-----BEGIN"), "{error}");
    }
}

//! Settings: wrong ones are refused in one good sentence, with the documented exit code; help and version
//! are there; the documents name every setting.

use crate::support::process::run;
use crate::support::servers::root;
use outbox_relay::config::catalog::SETTINGS;
use std::collections::BTreeMap;

const DATABASE: (&str, &str) = ("DATABASE_URL", "postgres://u:hunter2@localhost/db");
const BROKER: (&str, &str) = ("AMQP_URL", "amqp://u:hunter2@localhost/%2f");

fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    let all = [DATABASE, BROKER].into_iter().chain(pairs.iter().copied());
    all.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

#[tokio::test]
async fn thirty_wrong_settings_get_thirty_good_sentences() {
    let wrong: &[(&[(&str, &str)], &str)] = &[
        (&[("DATABASE_URL", "")], "DATABASE_URL is not set"),
        (&[("AMQP_URL", "")], "AMQP_URL is not set"),
        (
            &[("DATABASE_URL", "mysql://u:hunter2@localhost/x")],
            "DATABASE_URL is not usable: expected a URL that starts with postgres:// or postgresql://",
        ),
        (
            &[("AMQP_URL", "u:hunter2 localhost")],
            "AMQP_URL is not usable: expected a URL that starts with amqp:// or amqps://",
        ),
        (
            &[("DATABASE_URL_FILE", "/tmp/x")],
            "DATABASE_URL and DATABASE_URL_FILE are both set: give one of them",
        ),
        (
            &[("AMQP_URL", ""), ("AMQP_URL_FILE", "/does/not/exist")],
            "AMQP_URL_FILE is not usable: cannot read /does/not/exist",
        ),
        (
            &[("OUTBOX_TABLE", "out box")],
            "OUTBOX_TABLE is \"out box\": expected a table name such as outbox or billing.outbox",
        ),
        (&[("OUTBOX_TABLE", "a.b.c")], "OUTBOX_TABLE is \"a.b.c\""),
        (&[("OUTBOX_TABLE", "x; drop table y")], "OUTBOX_TABLE is"),
        (
            &[("OUTBOX_BATCH_SIZE", "many")],
            "OUTBOX_BATCH_SIZE is \"many\": expected a whole number from 1 to 10000",
        ),
        (
            &[("OUTBOX_BATCH_SIZE", "0")],
            "OUTBOX_BATCH_SIZE is \"0\": expected a whole number from 1 to 10000",
        ),
        (&[("OUTBOX_BATCH_SIZE", "-5")], "OUTBOX_BATCH_SIZE is \"-5\""),
        (&[("OUTBOX_WORKERS", "65")], "OUTBOX_WORKERS is \"65\": expected a whole number from 1 to 64"),
        (&[("OUTBOX_MAX_IN_FLIGHT", "1e9")], "OUTBOX_MAX_IN_FLIGHT is \"1e9\""),
        (
            &[("OUTBOX_MAX_IN_FLIGHT", "10")],
            "OUTBOX_BATCH_SIZE is 250 and OUTBOX_MAX_IN_FLIGHT is 10: a batch must fit into the window",
        ),
        (
            &[("OUTBOX_MAX_IN_FLIGHT_BYTES", "64 potatoes")],
            "OUTBOX_MAX_IN_FLIGHT_BYTES is \"64 potatoes\": expected a size from",
        ),
        (&[("OUTBOX_MAX_IN_FLIGHT_BYTES", "1")], "OUTBOX_MAX_IN_FLIGHT_BYTES is \"1\": expected a size from"),
        (
            &[("OUTBOX_ORDERING", "loose")],
            "OUTBOX_ORDERING is \"loose\": expected one of strict, pipelined, none",
        ),
        (
            &[("OUTBOX_POLL_INTERVAL", "100")],
            "OUTBOX_POLL_INTERVAL is \"100\": expected a duration from 1ms to 1m, with a unit such as 100ms, 30s or 7d",
        ),
        (&[("OUTBOX_POLL_INTERVAL", "0")], "OUTBOX_POLL_INTERVAL is \"0\""),
        (
            &[("OUTBOX_RETRY_MIN", "10m")],
            "OUTBOX_RETRY_MIN is 10m and OUTBOX_RETRY_MAX is 5m: the first must not be longer",
        ),
        (&[("OUTBOX_RETRY_MAX", "soon")], "OUTBOX_RETRY_MAX is \"soon\""),
        (&[("OUTBOX_MAX_ATTEMPTS", "0")], "OUTBOX_MAX_ATTEMPTS is \"0\""),
        (
            &[("OUTBOX_UNROUTABLE", "drop")],
            "OUTBOX_UNROUTABLE is \"drop\": expected one of wait, dead, accept",
        ),
        (&[("OUTBOX_CONFIRM_TIMEOUT", "1ms")], "OUTBOX_CONFIRM_TIMEOUT is \"1ms\""),
        (&[("OUTBOX_RETENTION", "a week")], "OUTBOX_RETENTION is \"a week\""),
        (
            &[("OUTBOX_HTTP_LISTEN", "8080")],
            "OUTBOX_HTTP_LISTEN is \"8080\": expected an address and a port, such as 127.0.0.1:8080",
        ),
        (&[("OUTBOX_MIGRATE", "maybe")], "OUTBOX_MIGRATE is \"maybe\": expected true or false"),
        (&[("OUTBOX_LOG", "outbox_relay=loud")], "OUTBOX_LOG is \"outbox_relay=loud\": expected a level"),
        (&[("OUTBOX_LOG_FORMAT", "xml")], "OUTBOX_LOG_FORMAT is \"xml\": expected one of pretty, json, auto"),
        (&[("OUTBOX_BATCHSIZE", "10")], "OUTBOX_BATCHSIZE is not a setting; did you mean OUTBOX_BATCH_SIZE?"),
        (&[("OUTBOX_HTTP_PORT", "8080")], "OUTBOX_HTTP_PORT is not a setting"),
        (
            &[("OUTBOX_MIGRATE", "true"), ("OUTBOX_TRANSACTION_POOLING", "true")],
            "OUTBOX_MIGRATE and OUTBOX_TRANSACTION_POOLING are both true",
        ),
        (&[("OUTBOX_CONFIG", "/does/not/exist.toml")], "cannot use the settings file /does/not/exist.toml"),
    ];
    for (pairs, sentence) in wrong {
        let (code, out, err) = run(&["run"], &env(pairs)).await;
        assert_eq!(code, 2, "{pairs:?}: {err}");
        assert!(err.starts_with("error: ") && err.contains(sentence), "{err:?} lacks {sentence:?}");
        assert_eq!(err.trim_end().lines().count(), 1, "{err:?}");
        assert!(!err.contains("hunter2") && !out.contains("hunter2"), "a password in {err:?}");
    }
}

#[tokio::test]
async fn a_settings_file_is_read_and_checked() {
    let file = std::env::temp_dir().join(format!("outbox-relay-{:016x}.toml", fastrand::u64(..)));
    let path = file.to_str().expect("UTF-8").to_owned();
    let refused = async |text: &str, sentence: &str| {
        std::fs::write(&file, text).expect("write");
        let (code, _, err) = run(&["run", "--config", &path], &env(&[])).await;
        assert_eq!(code, 2, "{err}");
        assert!(err.contains(sentence), "{err:?} lacks {sentence:?}");
    };
    refused("batchsize = 10", "is not a setting; did you mean batch_size?").await;
    refused("batch_size = 0", &format!("batch_size in {path} is \"0\"")).await;
    refused("batch_size = [1]", "expected a string, a whole number or true/false").await;
    refused("batch_size = ", "cannot use the settings file").await;
    // A flag wins over the environment, the environment over the file.
    std::fs::write(&file, "workers = 77").expect("write");
    let with_env = env(&[("OUTBOX_WORKERS", "88")]);
    let (_, _, err) = run(&["run", "--config", &path, "--workers", "99"], &with_env).await;
    assert!(err.contains("--workers is \"99\""), "{err}");
    let (_, _, err) = run(&["run", "--config", &path], &with_env).await;
    assert!(err.contains("OUTBOX_WORKERS is \"88\""), "{err}");
    let (_, _, err) = run(&["run", "--config", &path], &env(&[])).await;
    assert!(err.contains("is \"77\""), "{err}");
    std::fs::remove_file(&file).expect("remove");
}

#[tokio::test]
async fn variables_that_an_orchestrator_links_in_are_no_settings() {
    let linked = env(&[
        ("OUTBOX_RELAY_PORT", "tcp://10.0.0.1:8080"),
        ("OUTBOX_RELAY_SERVICE_HOST", "10.0.0.1"),
        ("OUTBOX_WORKERS", "x"),
    ]);
    let (_, _, err) = run(&["run"], &linked).await;
    assert!(err.contains("OUTBOX_WORKERS is \"x\""), "{err}");
}

#[tokio::test]
async fn help_version_and_completions_are_there() {
    let none = BTreeMap::new();
    let (code, out, _) = run(&["--version"], &none).await;
    assert_eq!((code, out.trim()), (0, concat!("outbox-relay ", env!("CARGO_PKG_VERSION"))));
    let (code, out, _) = run(&["--help"], &none).await;
    assert_eq!(code, 0);
    assert!(
        ["run", "migrate", "check", "status", "completions", "Exit codes"]
            .iter()
            .all(|word| out.contains(word)),
        "{out}"
    );
    let (code, out, _) = run(&["run", "--help"], &none).await;
    assert_eq!(code, 0);
    for setting in SETTINGS {
        assert!(
            out.contains(&setting.flag()) && out.contains(setting.env),
            "{} is not in --help",
            setting.key
        );
    }
    for shell in ["bash", "zsh", "fish"] {
        let (code, out, _) = run(&["completions", shell], &none).await;
        assert!(code == 0 && out.contains("outbox-relay"), "{shell}");
    }
    for wrong in [&["fly"][..], &["run", "--fast"], &["completions", "tcsh"], &[]] {
        let (code, _, err) = run(wrong, &none).await;
        assert_eq!(code, 2, "{wrong:?}: {err}");
    }
}

#[tokio::test]
async fn a_port_that_is_taken_and_a_relay_that_is_not_there_are_told() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("listen");
    let address = taken.local_addr().expect("address").to_string();
    let (code, _, err) = run(&["run"], &env(&[("OUTBOX_HTTP_LISTEN", &address)])).await;
    assert_eq!(code, 1);
    assert!(
        err.lines()
            .any(|line| line
                .starts_with(&format!("error: cannot listen on {address}; set OUTBOX_HTTP_LISTEN"))),
        "{err}"
    );
    drop(taken);
    let (code, _, err) = run(&["status", "--http-listen", &address], &BTreeMap::new()).await;
    assert_eq!(code, 3);
    assert!(err.contains(&format!("no relay answers on {address}")), "{err}");
}

/// The documents name every setting with its default.
#[test]
fn operating_md_documents_every_setting() {
    let text = std::fs::read_to_string(root().join("docs/OPERATING.md")).expect("docs/OPERATING.md");
    for setting in SETTINGS {
        let row = format!("| `{}` |", setting.env);
        let line = text.lines().find(|line| line.starts_with(&row));
        let line = line.unwrap_or_else(|| panic!("{} is not documented", setting.env));
        if let Some(default) = setting.default.filter(|default| !default.is_empty()) {
            assert!(line.contains(&format!("`{default}`")), "{line} lacks the default {default}");
        }
    }
}

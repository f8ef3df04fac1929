//! Files to deploy with, as far as they can be tested without container engine, cluster and systemd: what they name is
//! there.

use crate::support::servers::root;
use outbox_relay::config::catalog::SETTINGS;
use std::time::Duration;

const KUBERNETES: &str = "deploy/kubernetes.yaml";
const SYSTEMD: &str = "deploy/outbox-relay.service";

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn every_setting_that_the_files_name_exists() {
    for file in ["docker-compose.yml", "Dockerfile", ".env.example", KUBERNETES, SYSTEMD] {
        let text = read(file);
        assert!(text.contains("OUTBOX_"), "{file} names no setting");
        let words = text.split(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
        for word in words.filter(|word| word.starts_with("OUTBOX_") && word.len() > "OUTBOX_".len()) {
            let known = SETTINGS.iter().any(|setting| setting.env == word) || word == "OUTBOX_CONFIG";
            assert!(known, "{file} names {word}, which is not a setting");
        }
    }
}

#[test]
fn every_path_that_compose_and_dockerfile_name_exists() {
    let dockerfile = read("Dockerfile");
    let copies = dockerfile.lines().filter(|line| line.starts_with("COPY ") && !line.contains("--from"));
    let copies: Vec<&str> = copies.collect();
    assert!(copies.len() >= 5, "{copies:?}");
    for line in copies {
        let mut words: Vec<&str> =
            line.split_whitespace().skip(1).filter(|word| !word.starts_with("--")).collect();
        words.pop();
        for path in words {
            assert!(root().join(path).exists(), "Dockerfile copies {path}, which is not there");
        }
    }
    let compose = read("docker-compose.yml");
    let mounts: Vec<&str> = compose.lines().map(str::trim).filter(|line| line.starts_with("- ./")).collect();
    assert_eq!(mounts.len(), 3, "{mounts:?}");
    for line in mounts {
        let path = line.trim_start_matches("- ").split(':').next().unwrap_or_default();
        assert!(root().join(path).exists(), "docker-compose.yml mounts {path}, which is not there");
    }
}

#[test]
fn every_command_that_compose_and_dockerfile_name_exists() {
    let commands = outbox_relay::cli::command();
    let mut found = Vec::new();
    for file in ["docker-compose.yml", "Dockerfile"] {
        for line in read(file)
            .lines()
            .filter(|line| line.contains("outbox-relay\",") || line.trim_start().starts_with("CMD ["))
        {
            let words: Vec<&str> = line
                .split('"')
                .skip(1)
                .step_by(2)
                .filter(|word| !word.contains("outbox-relay") && *word != "CMD")
                .collect();
            if let Some(first) = words.first() {
                assert!(commands.find_subcommand(first).is_some(), "{file} runs {first:?}: {line}");
                found.push((*first).to_owned());
            }
        }
    }
    assert_eq!(found, ["status", "status", "run"]);
}

/// The values of all lines `KEY VALUE`, where the key may begin a list and the value be quoted.
fn values<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    let lines = text.lines().map(|line| line.trim().trim_start_matches("- "));
    lines.filter_map(|line| Some(line.strip_prefix(key)?.trim().trim_matches('"'))).collect()
}

fn default_of(env: &str) -> &'static str {
    let setting = SETTINGS.iter().find(|setting| setting.env == env);
    setting.and_then(|setting| setting.default).unwrap_or_else(|| panic!("{env} has no default"))
}

fn seconds(text: &str) -> Duration {
    let with_unit =
        if text.ends_with(|c: char| c.is_ascii_digit()) { format!("{text}s") } else { text.to_owned() };
    humantime::parse_duration(&with_unit).unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn every_command_that_kubernetes_and_systemd_run_exists() {
    let (kubernetes, systemd) = (read(KUBERNETES), read(SYSTEMD));
    let args = values(&kubernetes, "args:").into_iter().map(|args| args.trim_matches(['[', ']', '"']));
    let mut commands: Vec<&str> = args.collect();
    let [start] = values(&systemd, "ExecStart=")[..] else { panic!("{SYSTEMD} has no single ExecStart=") };
    let (program, command) = start.split_once(' ').unwrap_or_default();
    assert!(program.ends_with("/outbox-relay"), "{SYSTEMD} starts {program}");
    commands.push(command);
    assert_eq!(commands, ["migrate", "run", "run"]);
    for command in commands {
        assert!(outbox_relay::cli::command().find_subcommand(command).is_some(), "nobody knows {command:?}");
    }
}

#[test]
fn urls_come_from_settings_and_secrets_that_exist() {
    let (kubernetes, systemd) = (read(KUBERNETES), read(SYSTEMD));
    let settings = |name: &&str| name.ends_with("_URL_FILE");
    let variables = values(&kubernetes, "name:").into_iter().filter(settings);
    let variables =
        variables.chain(values(&systemd, "Environment=").into_iter().filter_map(|v| v.split('=').next()));
    let variables: Vec<&str> = variables.collect();
    assert_eq!(variables.len(), 5, "{variables:?}");
    for name in variables {
        assert!(SETTINGS.iter().any(|setting| setting.env == name), "{name} is not a setting");
    }
    let [mounted, ..] = values(&kubernetes, "mountPath:")[..] else { panic!("{KUBERNETES} mounts nothing") };
    let paths = values(&kubernetes, "value: /").into_iter().map(|path| format!("/{path}"));
    for path in paths {
        let key =
            path.strip_prefix(&format!("{mounted}/")).unwrap_or_else(|| panic!("{path} is not mounted"));
        assert!(
            !values(&kubernetes, &format!("{key}:")).is_empty(),
            "no Secret of {KUBERNETES} has the key {key}"
        );
    }
    for variable in values(&systemd, "Environment=") {
        let credential =
            variable.split_once("=%d/").unwrap_or_else(|| panic!("{variable} is no credential")).1;
        assert!(
            !values(&systemd, &format!("LoadCredential={credential}:")).is_empty(),
            "{credential} is not loaded"
        );
    }
}

#[test]
fn ports_and_paths_that_kubernetes_asks_exist() {
    let (kubernetes, dockerfile) = (read(KUBERNETES), read("Dockerfile"));
    let routes = read("src/http/mod.rs");
    let paths = [values(&kubernetes, "path:"), values(&kubernetes, "prometheus.io/path:")].concat();
    assert_eq!(paths, ["/livez", "/livez", "/readyz", "/metrics"]);
    for path in paths {
        assert!(routes.contains(&format!(".route(\"{path}\"")), "nobody answers {path}");
    }
    let [image] = values(&dockerfile, "EXPOSE ")[..] else { panic!("the image has no single port") };
    let ports = [values(&kubernetes, "containerPort:"), values(&kubernetes, "prometheus.io/port:")].concat();
    assert_eq!(ports, [image, image]);
    assert!(kubernetes.contains(&format!("value: 0.0.0.0:{image}")), "the relay listens on another port");
    assert_eq!(values(&kubernetes, "port:"), ["http"; 3], "the port by its name");
    assert!(values(&kubernetes, "name:").contains(&"http"));
}

#[test]
fn whoever_stops_the_relay_waits_longer_than_its_grace() {
    let grace = seconds(default_of("OUTBOX_SHUTDOWN_GRACE"));
    let limits = [
        (KUBERNETES, "terminationGracePeriodSeconds:", 1),
        (SYSTEMD, "TimeoutStopSec=", 1),
        // Its servers' too: they are to be there for as long as the relay stops.
        ("docker-compose.yml", "stop_grace_period:", 3),
    ];
    for (file, key, times) in limits {
        let text = read(file);
        let found = values(&text, key);
        assert_eq!(found.len(), times, "{file}: {key} {found:?}");
        let shortest = found.into_iter().map(seconds).min();
        assert!(
            shortest.is_some_and(|limit| limit >= grace + Duration::from_secs(10)),
            "{file}: {key} {shortest:?}"
        );
    }
}

#[test]
fn settings_that_kubernetes_spells_out_are_the_defaults() {
    let text = read(KUBERNETES);
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let pairs = lines.windows(2).filter_map(|pair| {
        let name = pair[0].strip_prefix("- name: OUTBOX_")?;
        Some((format!("OUTBOX_{name}"), pair[1].strip_prefix("value: ")?.trim_matches('"')))
    });
    let pairs: Vec<_> = pairs.filter(|(name, _)| name != "OUTBOX_HTTP_LISTEN").collect();
    assert_eq!(pairs.len(), 3, "{pairs:?}");
    for (name, value) in pairs {
        assert_eq!(value, default_of(&name), "{name}: the file says why it is so, the default is another");
    }
}

#[test]
fn systemd_knows_what_the_exit_codes_mean() {
    let (systemd, help) = (read(SYSTEMD), outbox_relay::cli::command().render_long_help().to_string());
    for (key, codes, meaning) in [
        ("RestartPreventExitStatus=", "2", "2    wrong usage or settings"),
        ("SuccessExitStatus=", "130 143", "130, 143  ended at once by a second SIGINT or SIGTERM"),
    ] {
        assert_eq!(values(&systemd, key), [codes], "{key}");
        assert!(help.contains(meaning), "help no longer says {meaning:?}");
    }
}

//! Containers, as far as they can be tested without an engine: what the files name is there.

use crate::support::servers::root;
use outbox_relay::config::catalog::SETTINGS;

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn every_setting_that_compose_and_dockerfile_name_exists() {
    for file in ["docker-compose.yml", "Dockerfile", ".env.example"] {
        let text = read(file);
        let words = text.split(|c: char| !(c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_'));
        for word in words.filter(|word| word.starts_with("OUTBOX_") && word.len() > "OUTBOX_".len()) {
            let known = SETTINGS.iter().any(|setting| setting.env == word) || word == "OUTBOX_CONFIG";
            assert!(known, "{file} names {word}, which is not a setting");
        }
    }
}

#[test]
fn every_path_that_compose_and_dockerfile_name_exists() {
    for line in
        read("Dockerfile").lines().filter(|line| line.starts_with("COPY ") && !line.contains("--from"))
    {
        let mut words: Vec<&str> =
            line.split_whitespace().skip(1).filter(|word| !word.starts_with("--")).collect();
        words.pop();
        for path in words {
            assert!(root().join(path).exists(), "Dockerfile copies {path}, which is not there");
        }
    }
    for line in read("docker-compose.yml").lines().map(str::trim).filter(|line| line.starts_with("- ./")) {
        let path = line.trim_start_matches("- ").split(':').next().unwrap_or_default();
        assert!(root().join(path).exists(), "docker-compose.yml mounts {path}, which is not there");
    }
}

#[test]
fn every_command_that_compose_and_dockerfile_name_exists() {
    let commands = outbox_relay::cli::command();
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
            }
        }
    }
}

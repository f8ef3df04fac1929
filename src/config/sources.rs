//! Where a setting's text comes from: flag over environment over file over default.
//!
//! Reads only; what the texts mean is decided in `config/mod.rs`. A key that nobody knows is
//! refused here, because a mistyped setting that is silently ignored is found in production.

use super::ConfigError;
use super::catalog::{SETTINGS, Setting, by_key};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// File that is read when it exists in the working directory and `--config` names no other.
pub const DEFAULT_FILE: &str = "outbox-relay.toml";

/// The texts of all settings that somebody gave, by source.
#[derive(Debug, Default, Clone)]
pub struct Sources {
    flags: HashMap<&'static str, String>,
    env: BTreeMap<String, String>,
    file: BTreeMap<String, String>,
    file_name: String,
}

/// A setting's text and the name under which it was given, for error messages.
#[derive(Debug, Clone)]
pub struct Given {
    /// As written by the user, or the default.
    pub text: String,
    /// `--batch-size`, `OUTBOX_BATCH_SIZE`, `batch_size in outbox-relay.toml`.
    pub name: String,
}

impl Sources {
    /// Sources from flags, the process environment and the settings file.
    pub fn new(
        flags: HashMap<&'static str, String>,
        env: impl Iterator<Item = (String, String)>,
        file: Option<&Path>,
    ) -> Result<Self, ConfigError> {
        let mut sources = Self { flags, ..Self::of_env(env)? };
        sources.read_file(file)?;
        Ok(sources)
    }

    fn of_env(env: impl Iterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let env = env.filter(|(name, _)| concerns_us(name)).collect();
        let sources = Self { env, ..Self::default() };
        sources.refuse_unknown_variables()?;
        Ok(sources)
    }

    /// Texts by environment variable name alone; for tests and embedding.
    pub fn from_env<'a>(pairs: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, ConfigError> {
        Self::of_env(pairs.into_iter().map(|(name, text)| (name.to_owned(), text.to_owned())))
    }

    /// What was given for this setting, or its default. An empty variable counts as absent,
    /// which is how compose files write "not set".
    pub fn get(&self, setting: &Setting) -> Option<Given> {
        self.explicit(setting).or_else(|| {
            let text = setting.default?.to_owned();
            Some(Given { text, name: setting.env.to_owned() })
        })
    }

    /// What was given for this setting, without its default.
    pub fn explicit(&self, setting: &Setting) -> Option<Given> {
        if let Some(text) = self.flags.get(setting.key) {
            return Some(Given { text: text.clone(), name: setting.flag() });
        }
        if let Some(text) = self.env.get(setting.env).filter(|text| !text.is_empty()) {
            return Some(Given { text: text.clone(), name: setting.env.to_owned() });
        }
        let text = self.file.get(setting.key)?.clone();
        Some(Given { text, name: format!("{} in {}", setting.key, self.file_name) })
    }

    fn refuse_unknown_variables(&self) -> Result<(), ConfigError> {
        for (name, value) in &self.env {
            let known = SETTINGS.iter().any(|setting| setting.env == name) || name == "OUTBOX_CONFIG";
            if !known && !is_service_link(name, value) {
                return Err(ConfigError::unknown(name, SETTINGS.iter().map(|s| s.env)));
            }
        }
        Ok(())
    }

    fn read_file(&mut self, path: Option<&Path>) -> Result<(), ConfigError> {
        let (path, must_exist) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_FILE), false),
        };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => return Ok(()),
            Err(error) => return Err(ConfigError::File(path.display().to_string(), error.to_string())),
        };
        self.file_name = path.display().to_string();
        let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
            ConfigError::File(self.file_name.clone(), first_line(error.message()))
        })?;
        for (key, value) in table {
            if by_key(&key).is_none() {
                let name = format!("{key} in {}", self.file_name);
                return Err(ConfigError::unknown(&name, SETTINGS.iter().map(|s| s.key)));
            }
            let text = scalar(&key, value, &self.file_name)?;
            self.file.insert(key, text);
        }
        Ok(())
    }
}

fn concerns_us(name: &str) -> bool {
    name.starts_with("OUTBOX_") || SETTINGS.iter().any(|setting| setting.env == name)
}

/// Kubernetes and old Docker links put `OUTBOX_RELAY_PORT=tcp://…` and the like into every
/// container when a service is called outbox-relay; those are not settings of ours.
fn is_service_link(name: &str, value: &str) -> bool {
    let is_url = value.starts_with("tcp://") || value.starts_with("udp://");
    let port_of_link = |(_, rest): (&str, &str)| rest.starts_with(|c: char| c.is_ascii_digit());
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || (name.ends_with("_PORT") && is_url)
        || name.split_once("_PORT_").is_some_and(port_of_link)
}

fn scalar(key: &str, value: toml::Value, file: &str) -> Result<String, ConfigError> {
    match value {
        toml::Value::String(text) => Ok(text),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Boolean(flag) => Ok(flag.to_string()),
        other => Err(ConfigError::value(
            &format!("{key} in {file}"),
            other.type_str(),
            "expected a string, a whole number or true/false",
        )),
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

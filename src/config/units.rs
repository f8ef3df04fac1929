//! Texts to values: durations, sizes, counts, switches. Each refusal says what is allowed.

use super::ConfigError;
use super::sources::Given;
use std::ops::RangeInclusive;
use std::time::Duration;

/// `100ms`, `30s`, `7d`; a bare `0` where zero means something.
pub(super) fn duration(given: &Given, allowed: RangeInclusive<Duration>) -> Result<Duration, ConfigError> {
    let bounds = || {
        format!(
            "expected a duration from {} to {}, with a unit such as 100ms, 30s or 7d",
            humantime::format_duration(*allowed.start()),
            humantime::format_duration(*allowed.end())
        )
    };
    let parsed = match given.text.trim() {
        "0" => Ok(Duration::ZERO),
        text => humantime::parse_duration(text),
    };
    match parsed {
        Ok(value) if allowed.contains(&value) => Ok(value),
        _ => Err(ConfigError::value(&given.name, &given.text, &bounds())),
    }
}

/// A whole number within bounds.
pub(super) fn count(given: &Given, allowed: RangeInclusive<usize>) -> Result<usize, ConfigError> {
    match given.text.trim().parse::<usize>() {
        Ok(value) if allowed.contains(&value) => Ok(value),
        _ => {
            let expected = format!("expected a whole number from {} to {}", allowed.start(), allowed.end());
            Err(ConfigError::value(&given.name, &given.text, &expected))
        }
    }
}

/// `64MiB`, `1GB`, `1048576`.
pub(super) fn bytes(given: &Given, allowed: RangeInclusive<u64>) -> Result<usize, ConfigError> {
    match given.text.trim().parse::<bytesize::ByteSize>() {
        Ok(size) if allowed.contains(&size.as_u64()) => Ok(size.as_u64() as usize),
        _ => {
            let expected = format!(
                "expected a size from {} to {}, such as 64MiB",
                bytesize::ByteSize(*allowed.start()).display().iec(),
                bytesize::ByteSize(*allowed.end()).display().iec()
            );
            Err(ConfigError::value(&given.name, &given.text, &expected))
        }
    }
}

/// `true` or `false`, and the usual other spellings.
pub(super) fn boolean(given: &Given) -> Result<bool, ConfigError> {
    match given.text.trim().to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" | "on" => Ok(true),
        "false" | "0" | "no" | "off" => Ok(false),
        _ => Err(ConfigError::value(&given.name, &given.text, "expected true or false")),
    }
}

/// One word out of a list.
pub(super) fn choice<T: Copy>(given: &Given, words: &[(&str, T)]) -> Result<T, ConfigError> {
    let text = given.text.trim().to_ascii_lowercase();
    words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value).ok_or_else(|| {
        let list = words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
        ConfigError::value(&given.name, &given.text, &format!("expected one of {list}"))
    })
}

//! URLs of the two servers: they hold passwords, so they print only what is safe.

use super::ConfigError;
use secrecy::{ExposeSecret, SecretString};
use std::fmt;
use std::path::PathBuf;
use url::Url;

/// A server URL given as text or as a file that is read again at each connect, so that a
/// rotated password is taken up without a restart.
#[derive(Clone)]
pub enum Endpoint {
    /// Given in the settings.
    Text(SecretString),
    /// Path of a file with the URL.
    File(PathBuf),
}

impl Endpoint {
    /// The URL as it is now. The error is one sentence without the secret.
    pub fn read(&self) -> Result<SecretString, String> {
        match self {
            Self::Text(secret) => Ok(secret.clone()),
            Self::File(path) => std::fs::read_to_string(path)
                .map(|text| SecretString::from(text.trim().to_owned()))
                .map_err(|error| format!("cannot read {}: {error}", path.display())),
        }
    }

    /// Host, port and path without user and password: for logs and errors.
    pub fn describe(&self) -> String {
        match self {
            Self::Text(secret) => redact(secret),
            Self::File(path) => format!("the URL in {}", path.display()),
        }
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.describe())
    }
}

/// `postgres://host:5432/database`: a URL without its user information, query and fragment. A password with
/// an unescaped slash ends up in the path; what looks like that is not shown at all.
pub fn redact(secret: &SecretString) -> String {
    let shown = urls(secret).into_iter().map(|text| {
        let Ok(mut url) = Url::parse(text) else { return "(not a URL)".to_owned() };
        let hidden = looks_split(&url);
        if hidden || url.set_username("").is_err() || url.set_password(None).is_err() {
            return format!("{}://(hidden)", url.scheme());
        }
        url.set_query(None);
        url.to_string()
    });
    shown.collect::<Vec<_>>().join(",")
}

/// The URLs of an endpoint: of brokers there may be several, separated by commas.
pub fn urls(secret: &SecretString) -> Vec<&str> {
    let text = secret.expose_secret().trim();
    if text.starts_with("amqp") { text.split(',').map(str::trim).collect() } else { vec![text] }
}

/// A password with an unescaped `/`, `?` or `#` has ended the part of the URL it belongs to.
fn looks_split(url: &Url) -> bool {
    url.path().contains('@')
        || url.query().is_some_and(|query| query.contains('@'))
        || url.fragment().is_some()
}

/// Refuses what is no URL of one of these schemes, without repeating the text: it may hold a password.
pub(super) fn check_url(name: &str, secret: &SecretString, schemes: &[&str]) -> Result<(), ConfigError> {
    for text in urls(secret) {
        let expected = format!("expected a URL that starts with {}://", schemes.join(":// or "));
        match Url::parse(text) {
            Ok(url) if looks_split(&url) => {
                let escape = "write special characters of user and password in percent-encoding".to_owned();
                return Err(ConfigError::Secret(name.to_owned(), escape));
            }
            Ok(url) if !schemes.contains(&url.scheme()) => {
                return Err(ConfigError::Secret(name.to_owned(), expected));
            }
            Ok(url) => check_files(name, &url)?,
            Err(error) => {
                return Err(ConfigError::Secret(name.to_owned(), format!("{expected} ({error})")));
            }
        }
    }
    Ok(())
}

/// Certificate files that a Postgres URL names: the driver's own error would not say which it misses.
fn check_files(name: &str, url: &Url) -> Result<(), ConfigError> {
    for (key, path) in url.query_pairs() {
        let named = matches!(&*key, "sslrootcert" | "sslcert" | "sslkey") && !path.starts_with("-----BEGIN");
        if let Some(error) = named.then(|| std::fs::File::open(&*path).err()).flatten() {
            return Err(ConfigError::Secret(name.to_owned(), format!("cannot read {path} ({key}): {error}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_secret_is_shown_of_any_url() {
        for url in [
            "postgres://app:secret@db/x?password=secret#secret",
            "postgres://app:2024/secret@db/x",
            "postgres://app:/secret@db/x",
            "postgres://app:1?secret@db/x",
            "postgres://app:sec,ret@db/secret@x",
            "amqp://u:secret@a/v,amqps://u:secret@b/v",
            "secret",
        ] {
            let shown = redact(&SecretString::from(url.to_owned()));
            assert!(!shown.contains("secret") && !shown.contains("ret@"), "{shown}");
        }
        let shown = redact(&SecretString::from("amqp://u:secret@a:1/v, amqps://u:secret@b/v".to_owned()));
        assert_eq!(shown, "amqp://a:1/v,amqps://b/v");
    }
}

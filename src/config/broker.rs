//! The broker as the settings describe it: its URLs, and the certificate files for `amqps://`.

use super::Endpoint;
use super::endpoint::urls;
use secrecy::{ExposeSecret, SecretString};
use std::path::{Path, PathBuf};

/// A broker, or a cluster of several addresses, and how TLS to it is checked.
#[derive(Debug, Clone)]
pub struct Broker {
    /// One URL, or several separated by commas.
    pub endpoint: Endpoint,
    /// Certificates for those that are `amqps://`.
    pub tls: TlsFiles,
}

impl From<Endpoint> for Broker {
    /// Nothing but the system's certificate store.
    fn from(endpoint: Endpoint) -> Self {
        Self { endpoint, tls: TlsFiles::default() }
    }
}

/// PEM files, read again at each connect, so that renewed certificates are taken up without a restart.
#[derive(Debug, Clone, Default)]
pub struct TlsFiles {
    /// Authorities trusted besides the system's.
    pub ca: Option<PathBuf>,
    /// Our own certificate and its key.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// What the files hold.
#[derive(Debug)]
pub struct TlsTexts {
    /// Certificates of authorities.
    pub ca: Option<String>,
    /// Our certificate with those between it and the authority, and its key.
    pub client: Option<(String, SecretString)>,
}

impl TlsFiles {
    /// What the files hold now. The error is one sentence that names the file.
    pub fn read(&self) -> Result<TlsTexts, String> {
        let ca = self.ca.as_deref().map(certificates).transpose()?;
        let client = match &self.client {
            Some((certificate, key)) => Some((certificates(certificate)?, private_key(key)?)),
            None => None,
        };
        Ok(TlsTexts { ca, client })
    }

    /// Certificates that no URL would use: somebody believes to have TLS and has not.
    pub(super) fn are_idle(&self, endpoint: &SecretString) -> bool {
        let given = self.ca.is_some() || self.client.is_some();
        given && !urls(endpoint).iter().any(|url| url.starts_with("amqps://"))
    }
}

fn certificates(path: &Path) -> Result<String, String> {
    let text = text(path)?;
    match text.contains("-----BEGIN CERTIFICATE-----") {
        true => Ok(text),
        false => Err(format!("{} holds no certificate in PEM", path.display())),
    }
}

/// PKCS#8, PKCS#1 or SEC1.
fn private_key(path: &Path) -> Result<SecretString, String> {
    let text = SecretString::from(text(path)?);
    let begins = |kind| text.expose_secret().contains(&format!("-----BEGIN {kind}PRIVATE KEY-----"));
    match ["", "RSA ", "EC "].into_iter().any(begins) {
        true => Ok(text),
        false => Err(format!("{} holds no private key in PEM without a password", path.display())),
    }
}

fn text(path: &Path) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

//! Certificates for `amqps://`, as lapin takes them.

use crate::config::broker::TlsFiles;
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use secrecy::ExposeSecret;

/// Reads the files. The error is one sentence that names the file.
///
/// lapin's rustls backend (tcp-stream 0.34, `src/rustls_impl.rs`) adds `cert_chain` to the system's store and takes
/// as `Identity::PKCS8` PEM texts of a certificate chain and of a key in PKCS#8, PKCS#1 or SEC1. Host name and
/// chain are always checked; there is no switch to leave that out.
pub(super) fn config(files: &TlsFiles) -> Result<OwnedTLSConfig, String> {
    let texts = files.read()?;
    let identity = texts.client.map(|(certificate, key)| OwnedIdentity::PKCS8 {
        pem: certificate.into_bytes(),
        key: key.expose_secret().as_bytes().to_vec(),
    });
    Ok(OwnedTLSConfig { identity, cert_chain: texts.ca })
}

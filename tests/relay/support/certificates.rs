//! A private authority and the certificates it signs, in a folder that `scripts/services start --tls` takes.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use std::path::{Path, PathBuf};

/// An authority with a folder of its own; the folder goes when it is dropped.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    folder: PathBuf,
}

impl Authority {
    /// A new one. Writes `ca.pem`.
    pub fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("outbox-relay-{:016x}.tls", fastrand::u64(..)));
        std::fs::create_dir(&folder).expect("folder");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
            .distinguished_name
            .push(DnType::CommonName, format!("test authority {:016x}", fastrand::u64(..)));
        let key = KeyPair::generate().expect("key");
        let certificate = params.self_signed(&key).expect("certificate");
        std::fs::write(folder.join("ca.pem"), certificate.pem()).expect("write");
        Self { issuer: Issuer::new(params, key), folder }
    }

    /// Writes `server.pem` and `server-key.pem` for a host.
    pub fn server(self, host: &str) -> Self {
        self.sign("server", host, ExtendedKeyUsagePurpose::ServerAuth);
        self
    }

    /// Writes `client.pem` and `client-key.pem`.
    pub fn client(self) -> Self {
        self.sign("client", "outbox-relay", ExtendedKeyUsagePurpose::ClientAuth);
        self
    }

    fn sign(&self, role: &str, name: &str, purpose: ExtendedKeyUsagePurpose) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages.push(purpose);
        let key = KeyPair::generate().expect("key");
        let certificate = params.signed_by(&key, &self.issuer).expect("certificate");
        std::fs::write(self.file(&format!("{role}.pem")), certificate.pem()).expect("write");
        std::fs::write(self.file(&format!("{role}-key.pem")), key.serialize_pem()).expect("write");
    }

    /// Where everything is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// One of the files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// One of the files, as text for a setting.
    pub fn path(&self, name: &str) -> String {
        self.file(name).to_str().expect("UTF-8").to_owned()
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

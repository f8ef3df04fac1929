//! A file with a URL, as an operator or a mounted secret changes it.

use std::path::PathBuf;

/// The file; removed when dropped.
#[derive(Debug)]
pub struct UrlFile(PathBuf);

impl UrlFile {
    /// A file with this URL.
    pub fn new(url: &str) -> Self {
        let file = Self(std::env::temp_dir().join(format!("outbox-relay-{:016x}.url", fastrand::u64(..))));
        file.write(url);
        file
    }

    /// Another URL, ended by a line feed as editors do.
    pub fn write(&self, url: &str) {
        std::fs::write(&self.0, format!("{url}\n")).expect("write");
    }

    /// Its path.
    pub fn path(&self) -> &str {
        self.0.to_str().expect("UTF-8")
    }
}

impl Drop for UrlFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

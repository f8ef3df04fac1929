//! What a relay tells on HTTP, be it a process or a part of this one.

use super::eventually;
use outbox_relay::http::Health;
use std::net::SocketAddr;
use std::time::Duration;

/// Where a relay's HTTP endpoint listens.
#[derive(Debug, Clone, Copy)]
pub struct Endpoint {
    /// Address and port.
    pub address: SocketAddr,
}

impl Endpoint {
    /// Status and body of a path; status 0 if nobody answers.
    pub async fn get(&self, path: &str) -> (u16, String) {
        let url = format!("http://{}{path}", self.address);
        let ask = move || {
            let config = ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(10)));
            let agent: ureq::Agent = config.http_status_as_error(false).build().into();
            match agent.get(&url).call() {
                Ok(mut answer) => {
                    (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap_or_default())
                }
                Err(_) => (0, String::new()),
            }
        };
        tokio::task::spawn_blocking(ask).await.expect("ask")
    }

    /// The health report.
    pub async fn health(&self) -> Health {
        self.try_health().await.expect("health")
    }

    /// The health report; `None` if nobody answers.
    pub async fn try_health(&self) -> Option<Health> {
        serde_json::from_str(&self.get("/health").await.1).ok()
    }

    /// Shards it owns, as it says itself.
    pub async fn owned(&self) -> Option<u32> {
        self.try_health().await.map(|health| health.ownership.owned)
    }

    /// Waits until it owns shards.
    pub async fn until_owner(&self) {
        let owner = async || self.try_health().await.is_some_and(|health| health.ownership.state == "owner");
        eventually("the relay owns shards", owner).await;
    }

    /// Waits until `/readyz` says 200.
    pub async fn ready(&self) {
        eventually("ready", async || self.get("/readyz").await.0 == 200).await;
    }

    /// Waits until `/readyz` says 503, and in its reason this.
    pub async fn until_not_ready(&self, because: &str) {
        let told = async || matches!(self.get("/readyz").await, (503, reason) if reason.contains(because));
        eventually(&format!("not ready: {because}"), told).await;
    }

    /// The value of a metric, by its name with labels.
    pub async fn metric(&self, name: &str) -> f64 {
        metric(&self.get("/metrics").await.1, name)
    }
}

/// The value of a metric in a scrape, by its name with labels and without the prefix.
pub fn metric(scrape: &str, name: &str) -> f64 {
    let prefix = format!("outbox_relay_{name} ");
    let value = scrape.lines().find_map(|line| line.strip_prefix(&prefix));
    value.unwrap_or_else(|| panic!("no metric {name}")).trim().parse().expect("a number")
}

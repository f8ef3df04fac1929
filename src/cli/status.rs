//! `outbox-relay status`: asks a running relay over HTTP.

use super::UNWELL;
use crate::config::{self, Sources};
use crate::http::{Health, Part};
use anyhow::Context;
use clap::ArgMatches;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

/// Longest the answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

pub(super) fn run(sources: &Sources, matches: &ArgMatches) -> anyhow::Result<ExitCode> {
    let address = reachable(config::address(sources)?);
    let probe = matches.get_one::<String>("probe").map_or("health", String::as_str);
    let agent = ureq::Agent::config_builder().timeout_global(Some(ANSWER_LIMIT)).http_status_as_error(false);
    let agent: ureq::Agent = agent.build().into();
    let mut answer = match agent.get(format!("http://{address}/{probe}")).call() {
        Ok(answer) => answer,
        Err(error) => {
            eprintln!(
                "error: no relay answers on {address}: {error}; is it running, and is OUTBOX_HTTP_LISTEN the same?"
            );
            return Ok(ExitCode::from(UNWELL));
        }
    };
    let body = answer.body_mut().read_to_string().context("cannot read the answer")?;
    if probe == "health" && !matches.get_flag("json") {
        print(&serde_json::from_str(&body).context("the answer is not from outbox-relay")?);
    } else {
        println!("{}", body.trim_end());
    }
    Ok(if answer.status().is_success() { ExitCode::SUCCESS } else { ExitCode::from(UNWELL) })
}

/// An address to listen on everywhere is asked on loopback.
fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

fn print(health: &Health) {
    let part = |part: &Part| match &part.reason {
        Some(reason) => format!("{} ({reason})", part.state),
        None => part.state.clone(),
    };
    println!("status      {}{}", health.status, if health.stopping { ", stopping" } else { "" });
    println!("database    {}", part(&health.database));
    println!("broker      {}", part(&health.broker));
    let ownership = &health.ownership;
    println!(
        "ownership   {}{}: {} of {} shards, {} live replicas",
        ownership.state,
        ownership.reason.as_ref().map_or(String::new(), |reason| format!(" ({reason})")),
        ownership.owned,
        ownership.shards,
        ownership.replicas
    );
    let count = |count: Option<u64>| count.map_or("?".to_owned(), |count| count.to_string());
    let oldest = health.oldest_pending_seconds.unwrap_or(0.0);
    println!("pending     {} (oldest {oldest:.1} s)", count(health.pending));
    println!("in flight   {} ({} bytes)", health.in_flight, health.in_flight_bytes);
    println!(
        "waiting     {} ({} keys blocked, {} routes parked)",
        count(health.waiting),
        count(health.blocked_keys),
        health.parked_routes
    );
    println!("dead        {}", count(health.dead));
    if let Some(reason) = &health.unmarked {
        println!("unmarked    {reason}");
    }
}

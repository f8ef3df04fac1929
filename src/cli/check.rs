//! `outbox-relay check`: looks at both servers and goes on after a problem, so that one run shows everything.

use super::UNWELL;
use crate::config::{Settings, Sources};
use crate::sink::rabbitmq;
use crate::store::postgres;
use std::process::ExitCode;

pub(super) fn run(sources: &Sources) -> anyhow::Result<ExitCode> {
    let settings = Settings::resolve(sources)?;
    let findings = super::block_on(async {
        let mut findings = postgres::preflight::check(&settings).await;
        findings.extend(rabbitmq::preflight::check(&settings).await);
        Ok(findings)
    })?;
    for finding in &findings {
        match &finding.problem {
            None => println!("ok       {}", finding.what),
            Some(problem) => println!("PROBLEM  {}: {problem}", finding.what),
        }
    }
    let problems = findings.iter().filter(|finding| finding.problem.is_some()).count();
    match problems {
        0 => println!("all well"),
        1 => println!("1 problem"),
        _ => println!("{problems} problems"),
    }
    Ok(if problems == 0 { ExitCode::SUCCESS } else { ExitCode::from(UNWELL) })
}

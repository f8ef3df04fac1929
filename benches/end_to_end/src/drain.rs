//! A backlog is drained, beside the raw publisher, and beside a fresh table if it has a past.

use crate::backlog::{Backlog, Done};
use crate::measures::{AGAINST_FRESH, Drain, Past};
use crate::raw::{self, SHAPES, Shape};
use crate::run::Sample;
use crate::stand::{Cores, NAME, Stand};
use anyhow::{Context, Result, ensure};
use std::process::Stdio;
use tokio::process::Command;

/// A raw publisher need not send more than this to show what it can.
const RAW_MESSAGES: usize = 100_000;

/// The same measure, round by round.
pub struct Drained<'a> {
    drain: Drain,
    backlog: Backlog<'a>,
    /// The same without a past.
    fresh: Option<Backlog<'a>>,
}

/// What a raw publisher says of itself.
#[derive(Debug, Clone, Copy)]
struct Raw {
    rate: f64,
    cpu_per_100k: f64,
    broker_cpu_per_100k: f64,
}

impl<'a> Drained<'a> {
    /// Makes the tables.
    pub async fn prepare(stand: &'a Stand, name: &str, drain: Drain) -> Result<Self> {
        let backlog = Backlog::prepare(stand, name, drain).await?;
        let fresh = match drain.past {
            Past::Fresh => None,
            _ => {
                let drain = Drain { past: Past::Fresh, ..drain };
                Some(Backlog::prepare(stand, &format!("{name}_fresh"), drain).await?)
            }
        };
        Ok(Self { drain, backlog, fresh })
    }

    /// Ends the places.
    pub async fn leave(self) -> Result<()> {
        if let Some(fresh) = self.fresh {
            fresh.leave().await?;
        }
        self.backlog.leave().await
    }

    /// One round: raw and the relay, by turns one of them first.
    pub async fn round(&self, round: usize) -> Result<Sample> {
        if !self.drain.apart {
            return self.round_by_turns(round).await;
        }
        let stand = self.backlog.stand();
        let apart = stand.share_cores(Cores::Apart).await;
        let sample = match apart {
            Ok(()) => self.round_by_turns(round).await,
            Err(error) => Err(error),
        };
        stand.share_cores(Cores::Shared).await?;
        sample
    }

    async fn round_by_turns(&self, round: usize) -> Result<Sample> {
        let (raw, (drained, fresh)) = if round % 2 == 1 {
            let raw = self.raw().await?;
            (raw, self.relay(round).await?)
        } else {
            let drained = self.relay(round).await?;
            (self.raw().await?, drained)
        };
        let Done { rate, cpu, peak_rss_mib, servers, counted } = drained;
        let per_100k = 1e5 / self.drain.rows as f64;
        let mut sample = vec![
            ("ratio", "of raw", rate / raw.rate),
            ("rate", "rows/s", rate),
            ("raw rate", "messages/s", raw.rate),
            ("CPU per 100 000 rows", "s", cpu * per_100k),
            ("Postgres's CPU per 100 000", "s", servers.database * per_100k),
            ("RabbitMQ's CPU per 100 000", "s", servers.broker * per_100k),
            ("raw CPU per 100 000", "s", raw.cpu_per_100k),
            ("RabbitMQ's CPU per 100 000, raw", "s", raw.broker_cpu_per_100k),
            ("peak RSS", "MiB", peak_rss_mib),
            ("WAL per row", "B", counted.wal_bytes() / self.drain.rows as f64),
            ("statements per 1000 rows", "", counted.statements() * per_100k / 100.0),
        ];
        sample.extend(fresh.map(|fresh| (AGAINST_FRESH, "", rate / fresh.rate)));
        Ok(sample)
    }

    /// The relay, also on the fresh table, by turns one of them first.
    async fn relay(&self, round: usize) -> Result<(Done, Option<Done>)> {
        let Some(fresh) = &self.fresh else { return Ok((self.backlog.drained().await?, None)) };
        if round % 2 == 1 {
            let fresh = fresh.drained().await?;
            Ok((self.backlog.drained().await?, Some(fresh)))
        } else {
            let drained = self.backlog.drained().await?;
            Ok((drained, Some(fresh.drained().await?)))
        }
    }

    /// The best that raw publishers reach now.
    async fn raw(&self) -> Result<Raw> {
        let shapes = self.drain.raw.map_or_else(|| SHAPES.to_vec(), |shape| vec![shape]);
        let mut best: Option<Raw> = None;
        for shape in shapes {
            let raw = self.raw_once(shape).await?;
            best = best.filter(|best| best.rate >= raw.rate).or(Some(raw));
        }
        best.context("no shapes")
    }

    async fn raw_once(&self, shape: Shape) -> Result<Raw> {
        let stand = self.backlog.stand();
        stand.fresh_queue(self.drain.queue).await?;
        let messages = self.drain.rows.min(RAW_MESSAGES);
        let url = self.backlog.amqp_url().await?;
        let servers = stand.cpu();
        let output = Command::new(std::env::current_exe()?)
            .args(["raw", "--amqp-url", &url, "--exchange", NAME])
            .args(["--messages", &messages.to_string(), "--bytes", &self.drain.bytes.to_string()])
            .args(["--channels", &shape.channels.to_string(), "--window", &shape.window.to_string()])
            .stdin(Stdio::null())
            .output()
            .await?;
        ensure!(output.status.success(), "raw publisher: {}", String::from_utf8_lossy(&output.stderr).trim());
        let servers = stand.cpu().since(servers);
        let received = stand.take_all().await?;
        ensure!(received >= messages as u64, "{received} of {messages} raw messages received");
        let done: raw::Done = serde_json::from_slice(&output.stdout)?;
        let messages = received as f64;
        Ok(Raw {
            rate: messages / done.seconds,
            cpu_per_100k: done.cpu_seconds / messages * 1e5,
            broker_cpu_per_100k: servers.broker / messages * 1e5,
        })
    }
}

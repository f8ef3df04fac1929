//! A backlog is drained, beside the raw publisher.

use crate::distance;
use crate::measures::{Drain, Keys, Past};
use crate::process::Relay;
use crate::raw::{self, SHAPES, Shape};
use crate::run::Sample;
use crate::stand::{Cores, Counted, NAME, Place, ServersCpu, Stand};
use anyhow::{Context, Result, ensure};
use outbox_relay_chaos::proxy::{led_to, target_of};
use sqlx::{Executor, PgConnection};
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::process::Command;

/// A raw publisher need not send more than this to show what it can.
const RAW_MESSAGES: usize = 100_000;
/// Between two looks at the relays. Each costs them a little.
const LOOK: Duration = Duration::from_millis(20);
/// A drain that stands still for so long has failed.
const STUCK: Duration = Duration::from_secs(60);

/// A place with its past, and what holds it open.
pub struct Drained<'a> {
    place: Place<'a>,
    drain: Drain,
    open: Option<PgConnection>,
}

/// What a raw publisher says of itself.
#[derive(Debug, Clone, Copy)]
struct Raw {
    rate: f64,
    cpu_per_100k: f64,
    broker_cpu_per_100k: f64,
}

/// What a drain has taken.
struct Done {
    rate: f64,
    /// Of all relays together, in seconds.
    cpu: f64,
    /// Of the largest relay.
    peak_rss_mib: f64,
    servers: ServersCpu,
    counted: Counted,
}

impl<'a> Drained<'a> {
    /// Makes the place.
    pub async fn prepare(stand: &'a Stand, name: &str, drain: Drain) -> Result<Self> {
        let place = stand.place(name).await?;
        if drain.payload != "jsonb" {
            let using = match drain.payload {
                "bytea" => "convert_to(payload::text, 'UTF8')".to_owned(),
                text => format!("payload::text::{text}"),
            };
            place
                .sql(&format!("alter table outbox alter payload type {} using {using}", drain.payload))
                .await?;
        }
        if drain.bytes > 2_000 {
            place.sql("alter table outbox alter payload set storage external").await?;
        }
        let open = match drain.past {
            Past::Fresh => None,
            Past::Delivered(rows) => {
                let past = "insert into outbox (routing_key, payload, delivered_at)
                            select 'past', '{}', clock_timestamp() from generate_series(1, ";
                place.sql(&format!("{past}{rows}) as i")).await?;
                place.sql("vacuum analyze outbox").await?;
                None
            }
            Past::OpenTransaction(rows) => {
                let mut open = place.db().await?;
                open.execute("begin isolation level repeatable read; select count(*) from outbox").await?;
                let past =
                    "insert into outbox (routing_key, payload) select 'past', '{}' from generate_series(1, ";
                place.sql(&format!("{past}{rows}) as i")).await?;
                place.sql("update outbox set delivered_at = clock_timestamp()").await?;
                place.sql("vacuum analyze outbox").await?;
                Some(open)
            }
        };
        Ok(Self { place, drain, open })
    }

    /// One round: raw and the relay, by turns one of them first.
    pub async fn round(&self, round: usize) -> Result<Sample> {
        if self.drain.apart {
            let apart = self.place.stand.share_cores(Cores::Apart).await;
            let sample = match apart {
                Ok(()) => self.round_by_turns(round).await,
                Err(error) => Err(error),
            };
            self.place.stand.share_cores(Cores::Shared).await?;
            return sample;
        }
        self.round_by_turns(round).await
    }

    async fn round_by_turns(&self, round: usize) -> Result<Sample> {
        let (raw, drained) = if round % 2 == 1 {
            let raw = self.raw().await?;
            (raw, self.relay().await?)
        } else {
            let drained = self.relay().await?;
            (self.raw().await?, drained)
        };
        let Done { rate, cpu, peak_rss_mib, servers, counted } = drained;
        let per_100k = 1e5 / self.drain.rows as f64;
        Ok(vec![
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
        ])
    }

    /// A backlog is made and drained.
    async fn relay(&self) -> Result<Done> {
        self.fill().await?;
        let stand = self.place.stand;
        stand.fresh_queue(self.drain.queue).await?;
        let (counted, servers) = (self.place.counted().await?, stand.cpu());
        let (seconds, relays) = self.drain().await?;
        let servers = stand.cpu().since(servers);
        let counted = self.place.counted().await?.since(counted);
        let (mut cpu, mut peak_rss_mib) = (0.0, 0.0_f64);
        for relay in relays {
            let usage = relay.usage()?;
            cpu += usage.cpu_seconds;
            peak_rss_mib = peak_rss_mib.max(usage.peak_rss_mib());
            relay.stop().await?;
        }
        let pending = self.place.number("select count(*) from outbox where delivered_at is null").await?;
        let received = stand.take_all().await?;
        ensure!(
            pending == 0 && received == self.drain.rows as u64,
            "{pending} rows pending, {received} messages received"
        );
        Ok(Done { rate: self.drain.rows as f64 / seconds, cpu, peak_rss_mib, servers, counted })
    }

    /// Ends the place.
    pub async fn leave(self) -> Result<()> {
        drop(self.open);
        self.place.leave().await
    }

    /// The backlog. Whatever the checkpoint before costs, the drain does not pay for it: rows are marked soon after they
    /// were written, on pages that are in the log already.
    async fn fill(&self) -> Result<()> {
        if self.drain.past == Past::Fresh {
            self.place.sql("truncate outbox").await?;
        }
        self.place.administer("checkpoint").await?;
        let Drain { rows, bytes, .. } = self.drain;
        let object = format!("json_build_object('x', repeat('x', {}))", bytes.saturating_sub(9));
        let payload = match self.drain.payload {
            "jsonb" => object.replace("json_", "jsonb_"),
            "json" => object,
            "text" => format!("repeat('x', {bytes})"),
            _ => format!("convert_to(repeat('x', {bytes}), 'UTF8')"),
        };
        let key = match self.drain.keys {
            Keys::Many(keys) => format!("'key ' || i % {keys}"),
            Keys::None => "null".to_owned(),
        };
        self.place
            .sql(&format!(
                "insert into outbox (routing_key, ordering_key, payload)
                 select 'bench', {key}, {payload} from generate_series(1, {rows}) as i"
            ))
            .await?;
        self.place.sql("analyze outbox").await
    }

    /// Starts the relays and waits until all rows are delivered and committed as such: seconds since the start.
    async fn drain(&self) -> Result<(f64, Vec<Relay>)> {
        let retention = if self.drain.delete { "0" } else { "7d" };
        let mut settings = vec![("OUTBOX_RETENTION", retention), ("OUTBOX_ORDERING", self.drain.ordering)];
        let url;
        if !self.drain.round_trip.is_zero() {
            url = self.further_away().await?;
            settings.push(("AMQP_URL", &url));
        }
        let begun = Instant::now();
        let relays: Vec<Relay> =
            (0..self.drain.replicas).map(|_| self.place.relay(&settings)).collect::<Result<_>>()?;
        let (mut last, mut moved) = (0, Instant::now());
        loop {
            let mut delivered = 0;
            for relay in &relays {
                delivered += relay.delivered().await;
            }
            if delivered >= self.drain.rows as u64 {
                return Ok((begun.elapsed().as_secs_f64(), relays));
            }
            if delivered > last {
                (last, moved) = (delivered, Instant::now());
            }
            ensure!(moved.elapsed() < STUCK, "nothing was delivered for a minute, after {delivered} rows");
            tokio::time::sleep(LOOK).await;
        }
    }

    /// The broker's URL, through a proxy.
    async fn further_away(&self) -> Result<String> {
        let url = self.place.stand.amqp_url();
        let proxy = distance::proxy(target_of(url), self.drain.round_trip / 2).await?;
        Ok(led_to(proxy, url))
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
        let stand = self.place.stand;
        stand.fresh_queue(self.drain.queue).await?;
        let messages = self.drain.rows.min(RAW_MESSAGES);
        let url = if self.drain.round_trip.is_zero() {
            stand.amqp_url().to_owned()
        } else {
            self.further_away().await?
        };
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

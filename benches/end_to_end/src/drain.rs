//! A backlog is drained, beside the raw publisher, and beside a fresh table if it has a past.

use crate::backlog::{Backlog, Bare, Done, Vacuum};
use crate::ceiling::{self, Ceilings, Raw};
use crate::distance;
use crate::measures::{AGAINST_FRESH, Drain, Past};
use crate::raw::Shape;
use crate::run::Sample;
use crate::stand::{Cores, Stand};
use crate::stats::Spread;
use crate::stolen;
use anyhow::{Context, Result};
use lapin::options::BasicQosOptions;
use lapin::{Connection, ConnectionProperties};
use std::time::Instant;

/// The same measure, round by round.
pub struct Drained<'a> {
    stand: &'a Stand,
    name: &'static str,
    drain: Drain,
    ceilings: &'a mut Ceilings,
}

impl<'a> Drained<'a> {
    /// Nothing is made yet: each round makes its own tables.
    pub fn new(stand: &'a Stand, name: &'static str, drain: Drain, ceilings: &'a mut Ceilings) -> Self {
        Self { stand, name, drain, ceilings }
    }

    /// One round: raw and the relay, by turns one of them first.
    pub async fn round(&mut self, round: usize) -> Result<Sample> {
        if !self.drain.apart {
            return self.round_by_turns(round).await;
        }
        let apart = self.stand.share_cores(Cores::Apart).await;
        let sample = match apart {
            Ok(()) => self.round_by_turns(round).await,
            Err(error) => Err(error),
        };
        self.stand.share_cores(Cores::Shared).await?;
        sample
    }

    async fn round_by_turns(&mut self, round: usize) -> Result<Sample> {
        let shape = self.ceilings.shape(self.stand, &self.drain).await?;
        let (raw, bare, (drained, fresh));
        if round % 2 == 1 {
            raw = self.raw_if(shape).await?;
            (drained, fresh) = self.relay(round).await?;
            bare = self.bare_if_wanted(round).await?;
        } else {
            bare = self.bare_if_wanted(round).await?;
            (drained, fresh) = self.relay(round).await?;
            raw = self.raw_if(shape).await?;
        }
        let mut sample = self.figures(&drained, raw.as_ref());
        if let Some(bare) = bare {
            sample.extend(self.figures_of_bare(&bare, drained.rate, raw.as_ref()));
        }
        if let Some(fresh) = fresh {
            sample.extend(self.figures_of_fresh(&fresh, drained.rate));
        }
        if !self.drain.round_trip.is_zero() {
            sample.push(("round trip to the broker", "ms", self.round_trip_ms().await?));
        }
        Ok(sample)
    }

    /// What is of a drain becomes that of 100 000 rows.
    fn per_100k(&self) -> f64 {
        1e5 / self.drain.rows as f64
    }

    fn figures(&self, done: &Done, raw: Option<&Raw>) -> Sample {
        let Done { rate, cpu, peak_rss_mib, servers, counted, vacuum, stolen } = done;
        let per_100k = self.per_100k();
        let mut sample = vec![
            ("rate", "rows/s", *rate),
            ("CPU per 100 000 rows", "s", cpu * per_100k),
            ("Postgres's CPU per 100 000", "s", servers.database * per_100k),
            ("RabbitMQ's CPU per 100 000", "s", servers.broker * per_100k),
            ("peak RSS", "MiB", *peak_rss_mib),
            ("WAL per row", "B", counted.wal_bytes() / self.drain.rows as f64),
            ("statements per 1000 rows", "", counted.statements() * per_100k / 100.0),
        ];
        if let Some(Vacuum { cpu, wal_bytes }) = vacuum {
            sample.extend([
                ("Postgres's CPU per 100 000, vacuum afterwards", "s", cpu * per_100k),
                ("WAL per row, vacuum afterwards", "B", wal_bytes / self.drain.rows as f64),
            ]);
        }
        sample.extend(stolen::figure("stolen by the host", *stolen));
        if let Some(raw) = raw {
            sample.insert(0, ("ratio", "of raw", rate / raw.rate));
            sample.extend([
                ("raw rate", "messages/s", raw.rate),
                ("raw CPU per 100 000", "s", raw.cpu_per_100k),
                ("RabbitMQ's CPU per 100 000, raw", "s", raw.broker_cpu_per_100k),
                ("raw connections", "", raw.shape.connections as f64),
                ("raw channels of each", "", raw.shape.channels as f64),
                ("raw window of each", "messages", raw.shape.window as f64),
            ]);
            sample.extend(stolen::figure("stolen by the host, raw", raw.stolen));
        }
        sample
    }

    fn figures_of_fresh(&self, fresh: &Done, rate: f64) -> Sample {
        let per_100k = self.per_100k();
        let mut sample = vec![
            (AGAINST_FRESH, "", rate / fresh.rate),
            ("CPU per 100 000 rows, fresh table", "s", fresh.cpu * per_100k),
            ("Postgres's CPU per 100 000, fresh table", "s", fresh.servers.database * per_100k),
            ("RabbitMQ's CPU per 100 000, fresh table", "s", fresh.servers.broker * per_100k),
        ];
        sample.extend(stolen::figure("stolen by the host, fresh table", fresh.stolen));
        sample
    }

    /// The relay, also on the fresh table, by turns one of them first; the picture of a profile is that of the first.
    async fn relay(&self, round: usize) -> Result<(Done, Option<Done>)> {
        let (name, drain) = (format!("{}_{round}", self.name), self.drain);
        let drained = async || Backlog::drained(self.stand, &name, drain).await;
        if drain.past == Past::Fresh {
            return Ok((drained().await?, None));
        }
        let (fresh_name, fresh_drain) = (format!("{name}_fresh"), Drain { past: Past::Fresh, ..drain });
        let fresh = async || Backlog::drained(self.stand, &fresh_name, fresh_drain).await;
        if round % 2 == 1 {
            let drained = drained().await?;
            Ok((drained, Some(fresh().await?)))
        } else {
            let fresh = fresh().await?;
            Ok((drained().await?, Some(fresh)))
        }
    }

    async fn bare_if_wanted(&self, round: usize) -> Result<Option<Bare>> {
        if !self.drain.bare {
            return Ok(None);
        }
        let name = format!("{}_{round}_bare", self.name);
        Ok(Some(Backlog::drained_bare(self.stand, &name, self.drain).await?))
    }

    fn figures_of_bare(&self, bare: &Bare, relay_rate: f64, raw: Option<&Raw>) -> Sample {
        let Bare { done, servers, stolen } = bare;
        let (rate, per_100k) = (self.drain.rows as f64 / done.seconds, self.per_100k());
        let mut sample = vec![
            ("against a bare relay", "", relay_rate / rate),
            ("bare rate", "rows/s", rate),
            ("bare CPU per 100 000 rows", "s", done.cpu_seconds * per_100k),
            ("Postgres's CPU per 100 000, bare", "s", servers.database * per_100k),
            ("RabbitMQ's CPU per 100 000, bare", "s", servers.broker * per_100k),
            ("bare peak RSS", "MiB", done.peak_rss_mib),
        ];
        sample.extend(raw.map(|raw| ("bare ratio", "of raw", rate / raw.rate)));
        sample.extend(stolen::figure("stolen by the host, bare", *stolen));
        sample
    }

    async fn raw_if(&self, shape: Option<Shape>) -> Result<Option<Raw>> {
        let Some(shape) = shape else { return Ok(None) };
        Ok(Some(ceiling::publish(self.stand, &self.drain, shape, self.drain.rows).await?))
    }

    /// What a way there and back takes over the proxy: the middle of some.
    async fn round_trip_ms(&self) -> Result<f64> {
        const CALLS: usize = 21;
        let url = distance::amqp_url(self.stand, self.drain.round_trip).await?;
        let connection = Connection::connect(&url, ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        let mut took = Vec::new();
        for _ in 0..CALLS {
            let begun = Instant::now();
            channel.basic_qos(1, BasicQosOptions::default()).await?;
            took.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        connection.close(200, "done".into()).await?;
        Ok(Spread::of(took).context("no calls")?.median)
    }
}

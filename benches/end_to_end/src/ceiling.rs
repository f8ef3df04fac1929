//! The ceiling: what the broker alone takes from a raw publisher, in the shape that is the best for such messages.

use crate::distance;
use crate::measures::{Against, Drain};
use crate::process;
use crate::raw::{SHAPES, Shape};
use crate::stand::{NAME, Stand};
use crate::stats::Spread;
use crate::stolen::{self, Stolen};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::time::Duration;

/// By turns with the others: rates waver by more than shapes differ.
const TRIALS: Trials = Trials { wanted: 3, at_most: 6 };
const QUICK: Trials = Trials { wanted: 1, at_most: 1 };

/// How often each shape is tried.
#[derive(Debug, Clone, Copy)]
struct Trials {
    wanted: usize,
    /// Where neighbours disturb it.
    at_most: usize,
}

/// What a raw publisher took.
#[derive(Debug, Clone, Copy)]
pub struct Raw {
    /// Its shape.
    pub shape: Shape,
    /// Confirmed messages a second.
    pub rate: f64,
    /// Its own processor time, in seconds.
    pub cpu_per_100k: f64,
    /// The broker's.
    pub broker_cpu_per_100k: f64,
    /// What the host took meanwhile, in percent.
    pub stolen: Option<f64>,
}

/// What makes one ceiling differ from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Messages {
    queue: &'static str,
    bytes: usize,
    round_trip: Duration,
    apart: bool,
}

/// A shape that was tried.
#[derive(Debug, Serialize)]
pub struct Trial {
    #[serde(flatten)]
    messages: Messages,
    #[serde(flatten)]
    shape: Shape,
    rates: Vec<f64>,
    /// Beside what the host had stolen too much.
    disturbed_rates: Vec<f64>,
}

/// The best shapes. Each is found before the first drain of such messages, and then measured anew in each round, since the
/// best of some figures that waver is not what it can.
#[derive(Debug)]
pub struct Ceilings {
    trials: Trials,
    known: Vec<(Messages, Shape)>,
    tried: Vec<Trial>,
}

impl Ceilings {
    /// None is known.
    pub fn new(quick: bool) -> Self {
        Self { trials: if quick { QUICK } else { TRIALS }, known: Vec::new(), tried: Vec::new() }
    }

    /// The raw publisher that a drain is compared with.
    pub async fn shape(&mut self, stand: &Stand, drain: &Drain) -> Result<Option<Shape>> {
        let of = Messages {
            queue: drain.queue,
            bytes: drain.bytes,
            round_trip: drain.round_trip,
            apart: drain.apart,
        };
        match drain.against {
            Against::Nothing => Ok(None),
            Against::Shape(shape) => Ok(Some(shape)),
            Against::Best => {
                if let Some((_, shape)) = self.known.iter().find(|(known, _)| *known == of) {
                    return Ok(Some(*shape));
                }
                let shape = self.best(stand, drain, of).await?;
                self.known.push((of, shape));
                Ok(Some(shape))
            }
        }
    }

    /// What was tried since the last time.
    pub fn take_tried(&mut self) -> Vec<Trial> {
        std::mem::take(&mut self.tried)
    }

    /// With as many messages as the drain has rows: what is best for few is not for many.
    async fn best(&mut self, stand: &Stand, drain: &Drain, messages: Messages) -> Result<Shape> {
        let mut trials: Vec<_> = SHAPES
            .map(|shape| Trial { messages, shape, rates: Vec::new(), disturbed_rates: Vec::new() })
            .into();
        let Trials { wanted, at_most } = self.trials;
        for turn in 0..at_most {
            for trial in trials.iter_mut().filter(|trial| trial.rates.len() < wanted) {
                let sent = publish(stand, drain, trial.shape, drain.rows).await?;
                let can_be_repeated = turn + wanted - trial.rates.len() < at_most;
                match stolen::is_too_much(sent.stolen) && can_be_repeated {
                    true => trial.disturbed_rates.push(sent.rate),
                    false => trial.rates.push(sent.rate),
                }
            }
        }
        let best = best_of(&trials).context("no shapes")?;
        self.tried.append(&mut trials);
        Ok(best)
    }
}

fn best_of(trials: &[Trial]) -> Option<Shape> {
    let median = |trial: &Trial| Spread::of(trial.rates.iter().copied()).map_or(0.0, |spread| spread.median);
    trials.iter().max_by(|a, b| median(a).total_cmp(&median(b))).map(|trial| trial.shape)
}

/// Publishes as many messages as a drain has rows, or so many, to where the drain publishes.
pub async fn publish(stand: &Stand, drain: &Drain, shape: Shape, messages: usize) -> Result<Raw> {
    stand.fresh_queue(drain.queue).await?;
    let url = distance::amqp_url(stand, drain.round_trip).await?;
    stand.rest().await;
    let (servers, stolen) = (stand.cpu(), Stolen::from_now());
    let mut raw = process::subcommand("raw")?;
    raw.args(["--amqp-url", &url, "--exchange", NAME])
        .args(["--messages", &messages.to_string(), "--bytes", &drain.bytes.to_string()])
        .args(["--connections", &shape.connections.to_string()])
        .args(["--channels", &shape.channels.to_string(), "--window", &shape.window.to_string()]);
    let done = process::done(raw).await.context("raw publisher")?;
    let (servers, stolen) = (stand.cpu().since(servers), stolen.percent());
    let received = stand.take_all().await?;
    ensure!(received >= messages as u64, "{received} of {messages} raw messages received");
    let messages = received as f64;
    Ok(Raw {
        shape,
        rate: messages / done.seconds,
        cpu_per_100k: done.cpu_seconds / messages * 1e5,
        broker_cpu_per_100k: servers.broker / messages * 1e5,
        stolen,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_shape_is_that_of_the_best_median() {
        let messages = Messages { queue: "quorum", bytes: 500, round_trip: Duration::ZERO, apart: false };
        let trial = |place: usize, rates: &[f64]| Trial {
            messages,
            shape: SHAPES[place],
            rates: rates.to_vec(),
            disturbed_rates: Vec::new(),
        };
        // One lucky trial does not make a shape the best.
        let trials =
            [trial(0, &[10.0, 99.0, 11.0]), trial(1, &[12.0, 12.0, 13.0]), trial(2, &[9.0, 12.0, 11.0])];
        assert_eq!(best_of(&trials), Some(SHAPES[1]));
        assert_eq!(best_of(&[]), None);
    }
}

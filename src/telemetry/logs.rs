//! Log lines: to stderr, pretty or JSON, and to a file if one is asked for.
//!
//! Libraries that speak the servers' protocols stay at `info` whatever the user asks for: below it
//! they print frames, and frames hold passwords and payloads.

use crate::config::{LogFormat, LogSettings};
use anyhow::Context;
use std::io::IsTerminal;
use tracing::{Level, Metadata};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry};

const CAPPED: [&str; 6] = ["lapin", "amq_protocol", "async_rs", "sqlx", "rustls", "hyper"];
/// lapin logs returned messages with their payload, and an ERROR for each channel that a missing exchange
/// closes. What they mean is told by our own lines, so lapin speaks only when it is asked for by name; of
/// returned messages, never.
const SPEAKS_WHEN_NAMED: &str = "lapin";
const SILENCED: &str = "lapin::returned_messages";

/// Keeps the log file's writer alive; dropped last, it writes what is buffered.
#[derive(Debug, Default)]
pub struct LogFile {
    _writer: Option<WorkerGuard>,
    dropped: Option<ErrorCounter>,
}

impl LogFile {
    /// Lines dropped so far because the disk was too slow.
    pub fn dropped_lines(&self) -> usize {
        self.dropped.as_ref().map_or(0, ErrorCounter::dropped_lines)
    }
}

/// Starts logging for the whole process. Called once.
pub fn start(settings: &LogSettings) -> anyhow::Result<LogFile> {
    let terminal = std::io::stderr().is_terminal();
    let json = match settings.format {
        LogFormat::Json => true,
        LogFormat::Pretty => false,
        LogFormat::Auto => !terminal,
    };
    let colours = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let console = layer(json, colours, std::io::stderr);
    let (file, keep) = match &settings.file {
        None => (None, LogFile::default()),
        Some(path) => {
            let mut options = std::fs::OpenOptions::new();
            let opened = options.create(true).append(true).open(path);
            let opened = opened.with_context(|| format!("cannot write the log file {}", path.display()))?;
            let (writer, guard) = NonBlockingBuilder::default().lossy(true).finish(opened);
            let dropped = Some(writer.error_counter());
            (Some(layer(json, false, writer)), LogFile { _writer: Some(guard), dropped })
        }
    };
    let lapin_asked_for = settings.directives.contains(SPEAKS_WHEN_NAMED);
    tracing_subscriber::registry()
        .with(vec![Some(console), file].into_iter().flatten().collect::<Vec<_>>())
        .with(EnvFilter::builder().parse(&settings.directives).context("log directives")?)
        .with(filter_fn(harmless))
        .with(filter_fn(move |metadata| lapin_asked_for || !metadata.target().starts_with(SPEAKS_WHEN_NAMED)))
        .init();
    Ok(keep)
}

/// Holds whatever the user's directives say, also for a single module.
fn harmless(metadata: &Metadata<'_>) -> bool {
    let target = metadata.target();
    let capped = CAPPED.iter().any(|library| target.starts_with(library));
    !target.starts_with(SILENCED) && (!capped || *metadata.level() <= Level::INFO)
}

fn layer<W>(json: bool, colours: bool, writer: W) -> Box<dyn Layer<Registry> + Send + Sync>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer().with_ansi(colours).with_target(false).with_writer(writer);
    match json {
        true => layer.json().flatten_event(true).boxed(),
        false => layer.boxed(),
    }
}

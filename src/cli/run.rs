//! `outbox-relay run`.

use crate::config::{Settings, Sources};
use crate::relay::Relay;
use crate::sink::RabbitMq;
use crate::store::PostgresStore;
use crate::store::postgres::Connector;
use crate::telemetry::{Metrics, logs};
use anyhow::Context;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// How often dropped log lines are carried over into the metric.
const COUNT_DROPPED: Duration = Duration::from_secs(5);

pub(super) fn run(sources: &Sources) -> anyhow::Result<ExitCode> {
    let settings = Settings::resolve(sources)?;
    let log_file = logs::start(&settings.log)?;
    super::block_on(async {
        let listener = TcpListener::bind(settings.http_listen).await.with_context(|| {
            format!("cannot listen on {}; set OUTBOX_HTTP_LISTEN to a free address", settings.http_listen)
        })?;
        let stop = stop_on_signals()?;
        let metrics = Arc::new(Metrics::default());
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            database = %settings.database.describe(),
            broker = %settings.amqp.endpoint.describe(),
            table = %settings.table,
            http = %settings.http_listen,
            "starting"
        );
        let counting = tokio::spawn(count_dropped_lines(log_file, Arc::clone(&metrics)));
        let relay = assemble(settings, metrics);
        let ended = relay.run(listener, stop).await;
        counting.abort();
        let _ = counting.await;
        ended.map(|()| ExitCode::SUCCESS).map_err(anyhow::Error::from)
    })
}

fn assemble(settings: Settings, metrics: Arc<Metrics>) -> Relay<PostgresStore, RabbitMq> {
    let connector = Connector::new(settings.database.clone(), settings.transaction_pooling);
    let store = PostgresStore::new(connector, &settings);
    let sink = RabbitMq::connect(settings.amqp.clone(), settings.confirm_timeout, Arc::clone(&metrics));
    Relay::new(settings, store, sink, metrics)
}

/// The first signal stops in order, the second at once.
fn stop_on_signals() -> anyhow::Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stopping = stop.clone();
    tokio::spawn(async move {
        next(&mut terminate, &mut interrupt).await;
        stopping.cancel();
        let code = next(&mut terminate, &mut interrupt).await;
        eprintln!("error: second signal, ending at once; rows in flight will be sent again");
        std::process::exit(code);
    });
    Ok(stop)
}

/// Waits for either signal; answers with the exit code a shell would give it.
async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> i32 {
    tokio::select! {
        biased;
        // 1. and 2. in no particular order: both mean the same.
        _ = terminate.recv() => 128 + 15,
        _ = interrupt.recv() => 128 + 2,
    }
}

async fn count_dropped_lines(log_file: logs::LogFile, metrics: Arc<Metrics>) {
    let mut counted = 0;
    loop {
        tokio::time::sleep(COUNT_DROPPED).await;
        let dropped = log_file.dropped_lines() as u64;
        metrics.log_lines_dropped.inc_by(dropped.saturating_sub(counted));
        counted = dropped;
    }
}

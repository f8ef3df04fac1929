//! The HTTP endpoint: `/livez`, `/readyz`, `/health`, `/metrics`. Read-only, no secrets, no payloads.

mod health;

pub use health::{Health, Part, View};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use serde_json::json;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Open connections are waited for this long at most when the relay ends.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// Serves until stopped.
pub async fn serve(listener: TcpListener, view: View, stop: CancellationToken) {
    let served = axum::serve(listener, router(view)).with_graceful_shutdown(stop.clone().cancelled_owned());
    let ending = async {
        stop.cancelled().await;
        tokio::time::sleep(CLOSE_LIMIT).await;
    };
    tokio::select! {
        biased;
        // 1. All connections are closed.
        result = served.into_future() => if let Err(error) = result {
            tracing::error!(%error, "the HTTP endpoint failed");
        },
        // 2. Somebody keeps one open.
        () = ending => {}
    }
}

fn router(view: View) -> Router {
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .fallback(unknown)
        .with_state(view)
}

async fn livez(State(view): State<View>) -> Response {
    match view.telemetry.pulses.stuck() {
        None => (StatusCode::OK, "ok\n").into_response(),
        Some(stage) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("the {stage} loop is stuck\n")).into_response()
        }
    }
}

async fn readyz(State(view): State<View>) -> Response {
    match view.health().not_ready() {
        None => (StatusCode::OK, "ready\n".to_owned()).into_response(),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}

async fn health(State(view): State<View>) -> Response {
    let health = view.health();
    let status = match health.reason {
        None => StatusCode::OK,
        Some(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, Json(health)).into_response()
}

async fn metrics(State(view): State<View>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], view.metrics()).into_response()
}

async fn unknown() -> Response {
    let body = json!({ "error": "not found; there are /livez, /readyz, /health and /metrics" });
    (StatusCode::NOT_FOUND, Json(body)).into_response()
}

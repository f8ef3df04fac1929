# syntax=docker/dockerfile:1

# Two stages: Rust builds, a base without a shell runs. The same Debian release in both, so the glibc is the same.

FROM rust:1.95-bookworm AS build
WORKDIR /build

# The dependencies first, in a layer of their own: they are built again only when a manifest changes. Cargo wants every
# target it reads of to exist, so the library and the binary are empty for now and benches, tests and examples (which
# the image does not need) are cut out of the manifest.
COPY Cargo.toml Cargo.lock ./
# Members of the workspace, for tests and measures: only their manifests must be there.
COPY chaos/Cargo.toml chaos/Cargo.toml
COPY benches/end_to_end/Cargo.toml benches/end_to_end/Cargo.toml
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    cp Cargo.toml /tmp/Cargo.toml \
    && awk '/^\[/ { cut = /^\[\[(bench|test|example)\]\]/ } !cut' /tmp/Cargo.toml > Cargo.toml \
    && mkdir src chaos/src benches/end_to_end/src \
    && touch src/lib.rs chaos/src/lib.rs chaos/src/main.rs benches/end_to_end/src/main.rs && echo 'fn main() {}' > src/main.rs \
    && cargo build --release --locked --bins \
    && rm -r src

COPY migrations migrations
COPY src src
# Cargo compares times of files, and these were written before the empty ones: touched, they count as changed.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    find src migrations -type f -exec touch {} + \
    && cargo build --release --locked --bins \
    && ./target/release/outbox-relay --version

# "cc": glibc, libgcc and the CA certificates for TLS to Postgres and RabbitMQ; no shell, no package manager.
FROM gcr.io/distroless/cc-debian12:nonroot

ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="outbox-relay" \
      org.opencontainers.image.description="Transactional outbox relay: Postgres rows to RabbitMQ, delivered means confirmed and routed" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION"

COPY --from=build /build/target/release/outbox-relay /usr/local/bin/outbox-relay

# In a container loopback reaches nobody.
ENV OUTBOX_HTTP_LISTEN=0.0.0.0:8080
EXPOSE 8080

# Liveness, not readiness: Swarm and others replace a container that is unhealthy, and an outage of database or broker
# is no reason to replace the relay, which resumes by itself.
HEALTHCHECK --interval=10s --timeout=6s --start-period=10s --retries=3 \
    CMD ["/usr/local/bin/outbox-relay", "status", "--probe", "livez"]

# SIGTERM stops it in good order, within OUTBOX_SHUTDOWN_GRACE (25 s). Docker waits 10 s before it kills: run with
# --stop-timeout 40 (compose: stop_grace_period).
STOPSIGNAL SIGTERM
USER nonroot:nonroot
ENTRYPOINT ["/usr/local/bin/outbox-relay"]
CMD ["run"]

-- Who publishes what, when several replicas of outbox-relay run: each shard of the keys has one owner at a time.
-- A few rows, written by the relays only, a few times a second at most.

create table if not exists {outbox:_lease} (
    -- hash(ordering_key or id) mod OUTBOX_SHARDS
    shard integer primary key,
    -- The process that publishes it; null: nobody, take it.
    owner uuid,
    -- One higher with every change of owner, so that what an earlier owner writes late can be told.
    epoch bigint not null default 0,
    -- By the clock of this database. Past it, the shard may be taken.
    expires_at timestamptz not null default '-infinity'
)
-- Rows are written again and again: room for new versions on the same page, and vacuum after a few hundred.
with (fillfactor = 25, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

create table if not exists {outbox:_replica} (
    -- Random, made at the start of the process.
    replica uuid primary key,
    -- Its OUTBOX_SHARDS. All that run at once must agree on it.
    shards integer not null,
    -- It reaches the broker; if not, others take its shards.
    ready boolean not null,
    expires_at timestamptz not null
)
with (fillfactor = 25, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

comment on table {outbox:_lease} is 'Owners of shards, kept by outbox-relay';
comment on table {outbox:_replica} is 'Running replicas, kept by outbox-relay';

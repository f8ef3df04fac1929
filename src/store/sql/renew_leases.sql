-- One renewal: says that this replica lives, gives back what it has drained, prolongs what it owns, takes what is free up
-- to its fair part, and answers with the result. Sent as one text, so that the server runs all of it without waiting for a
-- client that may have been frozen in the middle. Values are numbers and uuids only.
-- Read committed, whatever the role's default: each statement must see what others have committed while it waited.
begin isolation level read committed read write;
set local statement_timeout = {limit_ms};
set local lock_timeout = {limit_ms};
-- A lease that a crash of the server undid would be trusted by its owner and free for others.
set local synchronous_commit = on;

-- Renewals come one after the other. Each statement below then sees all that the ones before have done.
select pg_advisory_xact_lock(hashtextextended('outbox-relay leases', {lease_name}::regclass::oid::bigint));

delete from {replica} where expires_at <= clock_timestamp();

-- A replica with another number of shards would mean other rows by the same shard.
insert into {replica} as mine (replica, shards, ready, expires_at)
select {me}, {shards}, {ready}, clock_timestamp() + {lease_ms} * interval '1 millisecond'
where not exists (select from {replica} as other where other.shards <> {shards})
on conflict (replica) do update set ready = excluded.ready, expires_at = excluded.expires_at;

insert into {lease} (shard)
select shard from generate_series(0, {shards} - 1) as shard
where exists (select from {replica} where replica = {me})
  and not exists (select from {lease} as lease where lease.shard = shard.shard)
on conflict do nothing;

-- Under the very epoch that was drained: a renewal that comes late must not free what was taken anew since.
update {lease} as lease set owner = null, expires_at = clock_timestamp()
from unnest({drained_shards}, {drained_epochs}) as drained (shard, epoch)
where lease.owner = {me} and lease.shard = drained.shard and lease.epoch = drained.epoch;

-- Leases of more shards than there are now. What was read under them is in the shards above, which others may have had.
update {lease} set owner = null, epoch = epoch + 1
where shard >= {shards} and owner is not null and expires_at <= clock_timestamp()
  and exists (select from {replica} where replica = {me});

-- Also one that had expired and that nobody took: its epoch is the same, so nobody had it meanwhile.
update {lease} set expires_at = clock_timestamp() + {lease_ms} * interval '1 millisecond'
where owner = {me} and exists (select from {replica} where replica = {me});

update {lease} set owner = {me}, epoch = epoch + 1, expires_at = clock_timestamp() + {lease_ms} * interval '1 millisecond'
where shard in (
    select shard from {lease}
    where shard < {shards} and (owner is null or expires_at <= clock_timestamp())
    order by shard
    limit greatest(0, coalesce(({quota}), 0) - (select count(*) from {lease} where owner = {me})));

{look};

commit

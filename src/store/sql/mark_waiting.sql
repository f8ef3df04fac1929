-- Refused: due again after a wait. Absolute values, so it may be run again. Only by the owner of the shard: what an earlier
-- one writes late must not hold back rows that the next one has read already.
-- $1 id    $2 attempts    $3 wait in milliseconds    $4 reason    $5 shard    $6 epoch    $7 message_id
-- Each row is found by the primary key: "coalesce" hides from the planner that the index of pending rows would do, which it
-- walks over from end to end where it believes that none is there.
update {outbox} as o
set attempts = refused.attempts,
    available_at = clock_timestamp() + refused.wait_ms * interval '1 millisecond',
    last_error = refused.reason
from unnest($1::bigint[], $2::int[], $3::float8[], $4::text[], $5::int[], $6::bigint[], $7::uuid[])
    as refused (id, attempts, wait_ms, reason, shard, epoch, message_id)
where o.id = refused.id and o.message_id = refused.message_id and coalesce(o.delivered_at, o.dead_at) is null
  and exists (select from {lease} as lease where lease.shard = refused.shard and lease.epoch = refused.epoch)

-- Can never be delivered. Absolute values, so it may be run again. Only by the owner of the shard.
-- $1 id    $2 attempts    $3 reason    $4 shard    $5 epoch    $6 message_id
-- Each row is found by the primary key: "coalesce" hides from the planner that the index of pending rows would do, which it
-- walks over from end to end where it believes that none is there.
update {outbox} as o
set attempts = refused.attempts, dead_at = clock_timestamp(), last_error = refused.reason
from unnest($1::bigint[], $2::int[], $3::text[], $4::int[], $5::bigint[], $6::uuid[])
    as refused (id, attempts, reason, shard, epoch, message_id)
where o.id = refused.id and o.message_id = refused.message_id and coalesce(o.delivered_at, o.dead_at) is null
  and exists (select from {lease} as lease where lease.shard = refused.shard and lease.epoch = refused.epoch)

-- Can never be delivered. Absolute values, so it may be run again.
-- $1 id    $2 attempts    $3 reason    $4 shard    $5 epoch    $6 message_id
update {outbox} as o
set attempts = refused.attempts, dead_at = clock_timestamp(), last_error = refused.reason
from unnest($1::bigint[], $2::int[], $3::text[], $4::int[], $5::bigint[], $6::uuid[])
    as refused (id, attempts, reason, shard, epoch, message_id)
where {refused}

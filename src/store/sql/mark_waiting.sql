-- Refused: due again after a wait. Absolute values, so it may be run again.
-- $1 id    $2 attempts    $3 wait in milliseconds    $4 reason    $5 shard    $6 epoch    $7 message_id
update {outbox} as o
set attempts = refused.attempts,
    available_at = clock_timestamp() + refused.wait_ms * interval '1 millisecond',
    last_error = refused.reason
from unnest($1::bigint[], $2::int[], $3::float8[], $4::text[], $5::int[], $6::bigint[], $7::uuid[])
    as refused (id, attempts, wait_ms, reason, shard, epoch, message_id)
where {refused}

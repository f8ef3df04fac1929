-- Refused: due again after a wait. Absolute values, so it may be run again.
-- $1 id    $2 attempts    $3 wait in milliseconds    $4 reason
update {outbox} as o
set attempts = refused.attempts,
    available_at = clock_timestamp() + refused.wait_ms * interval '1 millisecond',
    last_error = refused.reason
from unnest($1::bigint[], $2::int[], $3::float8[], $4::text[]) as refused (id, attempts, wait_ms, reason)
where o.id = refused.id and o.delivered_at is null and o.dead_at is null

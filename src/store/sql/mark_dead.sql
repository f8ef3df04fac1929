-- Can never be delivered. Absolute values, so it may be run again.
-- $1 id    $2 attempts    $3 reason
update {outbox} as o
set attempts = refused.attempts, dead_at = clock_timestamp(), last_error = refused.reason
from unnest($1::bigint[], $2::int[], $3::text[]) as refused (id, attempts, reason)
where o.id = refused.id and o.delivered_at is null and o.dead_at is null

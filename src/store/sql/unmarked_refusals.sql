-- Refused rows that a mark has not reached, although they are there and this replica's: as in unmarked.sql.
-- $1 id    $2 attempts    $3 shard    $4 epoch    $5 message_id
select count(*)
from {outbox} as o,
     unnest($1::bigint[], $2::int[], $3::int[], $4::bigint[], $5::uuid[])
        as refused (id, attempts, shard, epoch, message_id)
where {refused} and o.attempts is distinct from refused.attempts

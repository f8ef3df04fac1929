-- Rows that a mark has not reached, although they are there and pending: a trigger, a rule or row-level security keeps it
-- from them. Postgres calls that a success.
-- $1 ids, ascending    $2 message_id of each
select count(*) from {outbox} as o where {sent} and o.delivered_at is null

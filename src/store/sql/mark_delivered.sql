-- Confirmed and routed. True whoever writes it and whenever, so it may be run again.
-- $1 ids, ascending    $2 message_id of each
update {outbox} as o
set delivered_at = clock_timestamp(), dead_at = null
where {sent} and o.delivered_at is null

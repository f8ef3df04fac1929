-- Confirmed and routed, and nobody wants to keep it (retention 0).
-- $1 ids, ascending    $2 message_id of each
delete from {outbox} as o where {sent}

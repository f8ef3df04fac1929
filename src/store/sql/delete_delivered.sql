-- Confirmed and routed, and nobody wants to keep it (retention 0).
delete from {outbox} where id = any ($1::bigint[])

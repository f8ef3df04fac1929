-- Confirmed and routed. True whoever writes it and whenever, so it may be run again.
update {outbox}
set delivered_at = clock_timestamp(), dead_at = null
where id = any ($1::bigint[]) and delivered_at is null

-- Waits for a row that may be read. The procedure is in migrations/0003_watch.sql. It ends transactions, so nothing may be
-- in this text besides the call, and it has no parameters: behind a pooler, what prepares a statement and what
-- executes it may be different sessions, unless a transaction holds them together.
call {watch}(
    '{noticed}'::bigint, {first_ids}, {last_ids}, {in_flight},
    interval '{first_poll_ms} ms', interval '{poll_interval_ms} ms', interval '{lasts_ms} ms', null)

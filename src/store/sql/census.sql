-- What health and metrics show. Every part reads a partial index only.
-- A row counts as late from the moment it could first have been sent.
select
    (select count(*) from {outbox} where delivered_at is null and dead_at is null) as pending,
    (select case when isfinite(since) then greatest(0, extract(epoch from clock_timestamp() - since))::float8 end
       from (select case when attempts > 0 then created_at else greatest(created_at, available_at) end as since
               from {outbox}
              where delivered_at is null and dead_at is null
                and (attempts > 0 or available_at <= clock_timestamp())
              order by id limit 1) as oldest) as oldest_seconds,
    (select count(*) from {outbox} where dead_at is not null) as dead,
    refused.waiting, refused.blocked_keys,
    -- Last, so that all the counting is over.
    extract(epoch from clock_timestamp() - statement_timestamp())::float8 as took_seconds
from (
    select count(*) as waiting, count(distinct ordering_key) as blocked_keys
    from (
        -- Only the index of waiting rows gives this order, so it is the one that is walked.
        select ordering_key from {outbox} where delivered_at is null and dead_at is null and attempts > 0
        order by ordering_key, id) as o) as refused

-- Pending and due rows, in id order, within the id ranges that are not settled yet.
-- $1, $2 first and last id of each range    $3 rows at most    $4 ids in flight
-- $5 keep the order of keys    $6, $7 parked routes: exchange, routing key    $8 default exchange
--
-- A refused row holds back later rows of its key until it is settled; the scalar subquery keeps
-- the planner from turning this into an anti-join that would read and sort the whole backlog.
select {columns}
from unnest($1::bigint[], $2::bigint[]) as unsettled (first_id, last_id)
cross join lateral (
    select *
    from {outbox} as o
    where o.id between unsettled.first_id and unsettled.last_id
      and o.delivered_at is null and o.dead_at is null
      and o.available_at <= clock_timestamp()
      and o.id <> all ($4::bigint[])
      and (o.attempts = 0 or not exists (
            select from unnest($6::text[], $7::text[]) as parked (exchange, routing_key)
            where parked.routing_key = o.routing_key
              and parked.exchange = coalesce(o.exchange, $8)))
      and (not $5::boolean or o.ordering_key is null or (
            select true from {outbox} as earlier
            where earlier.ordering_key = o.ordering_key and earlier.id < o.id
              and earlier.delivered_at is null and earlier.dead_at is null
              and earlier.attempts > 0
            limit 1) is null)
    order by o.id
    limit $3
) as o
limit $3

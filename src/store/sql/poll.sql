-- Pending and due rows, in id order, within the id ranges that are not settled yet. Rows of others, due or not, are told
-- without payload and headers: who knows their ids need not pass them again.
-- $1, $2 first and last id of each range    $3 rows at most    $4 ids in flight
-- $5 keep the order of keys    $6 number of shards    $7 shards to read, null for all of them
-- $8, $9 parked routes: exchange, routing key    $10 default exchange    $11 shards of others, null for none
-- $12 above which id
select o.*
from unnest($1::bigint[], $2::bigint[]) as unsettled (first_id, last_id)
cross join lateral (
    select {columns}
    from {outbox} as o
    where o.id between unsettled.first_id and unsettled.last_id
      and o.delivered_at is null and o.dead_at is null
      and {not_in_flight}
      and ({of_others} or (
            o.available_at <= clock_timestamp()
            and (o.attempts = 0 or not exists (
                  select from unnest($8::text[], $9::text[]) as parked (exchange, routing_key)
                  where parked.routing_key = o.routing_key
                    and parked.exchange = coalesce(o.exchange, $10)))
            and ($7::int[] is null or {shard} = any ($7))
            and {in_turn}))
    order by o.id
    limit $3
) as o
limit $3

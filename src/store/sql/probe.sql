-- The waiting row of a parked route that is or will be due first, and that no earlier row of its key holds back.
-- $1 exchange    $2 routing key    $3 default exchange    $4 ids in flight    $5 keep the order of keys
-- $6 number of shards    $7 shards to read, null for all of them
select {columns}
from (
    -- Only the index of waiting rows gives this order, so it is the one that is walked.
    select * from {outbox} as o
    where o.delivered_at is null and o.dead_at is null and o.attempts > 0
      and o.routing_key = $2 and coalesce(o.exchange, $3) = $1
      and {not_in_flight}
    order by o.ordering_key, o.id
) as o
where ($7::int[] is null or {shard} = any ($7))
  and {in_turn}
-- The longest due first, so that one poison row is not the only probe.
order by o.available_at, o.id
limit 1

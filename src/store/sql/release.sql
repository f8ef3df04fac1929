-- A route works again: its waiting rows are due now. In bites, so that no transaction is long.
-- "coalesce" keeps the outer part to the primary key, whatever statistics say.
-- $1 exchange    $2 routing key    $3 default exchange    $4 rows at most
update {outbox} as o
set available_at = clock_timestamp()
where coalesce(o.delivered_at, o.dead_at) is null and o.attempts > 0
  and o.id = any (array(
        select w.id from {outbox} as w
        where w.delivered_at is null and w.dead_at is null and w.attempts > 0
          and w.available_at > clock_timestamp()
          and w.routing_key = $2 and coalesce(w.exchange, $3) = $1
        -- Only the index of waiting rows gives this order, so it is the one that is walked.
        order by w.ordering_key, w.id
        limit $4
        -- A row that somebody has locked waits on its own.
        for update skip locked))

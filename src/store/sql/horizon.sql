-- One snapshot: which transactions run, and which ids below $1 within the unsettled ranges are
-- pending, due or not. An id that is not listed, although every transaction that may have taken it has ended, belongs to no
-- row. The xmax of a snapshot would not do: transactions with a higher number may run, as long as none of these has ended.
-- $1 last id    $2, $3 first and last id of each range    $4 ids in flight    $5 ids at most
select
    pg_snapshot_xmin(pg_current_snapshot())::text as xmin,
    (pg_snapshot_xmax(pg_current_snapshot())::text::bigint
        + age(pg_snapshot_xmax(pg_current_snapshot())::xid))::text as next_xid,
    array(
        select o.id
        from unnest($2::bigint[], $3::bigint[]) as unsettled (first_id, last_id)
        cross join lateral (
            select o.id from {outbox} as o
            where o.id between unsettled.first_id and least(unsettled.last_id, $1)
              and o.delivered_at is null and o.dead_at is null
              and {not_in_flight}
            order by o.id
            limit $5
        ) as o
        limit $5
    ) as pending

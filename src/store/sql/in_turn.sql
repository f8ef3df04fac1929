-- No earlier row of its key was refused: such a row holds back all later ones until it is settled.
-- $5 keep the order of keys
-- The scalar subquery keeps the planner from making an anti-join of it, which would read and sort the
-- whole backlog. And whatever statistics say of it, only the index of waiting rows gives this order: of "=" the planner
-- would conclude that the order of ids is enough, and walk over the backlog for each row where it believes that none is there.
(not $5::boolean or o.ordering_key is null or (
    select true from {outbox} as earlier
    where earlier.ordering_key >= o.ordering_key and earlier.ordering_key <= o.ordering_key and earlier.id < o.id
      and earlier.delivered_at is null and earlier.dead_at is null
      and earlier.attempts > 0
    order by earlier.ordering_key, earlier.id
    limit 1) is null)

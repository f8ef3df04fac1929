-- No earlier row of its key was refused: such a row holds back all later ones until it is settled.
-- $5 keep the order of keys
-- Whether any row was refused at all is asked once: mostly none was, and no key has to be looked at.
-- Scalar subqueries keep the planner from making an anti-join of them, which would read and sort the
-- whole backlog.
(not $5::boolean or o.ordering_key is null
or (
    select true from {outbox} as refused
    where refused.delivered_at is null and refused.dead_at is null
      and refused.attempts > 0
    limit 1) is null
or (
    select true from {outbox} as earlier
    where earlier.ordering_key = o.ordering_key and earlier.id < o.id
      and earlier.delivered_at is null and earlier.dead_at is null
      and earlier.attempts > 0
    limit 1) is null)

-- A row that was refused, found by its primary key: "coalesce" hides from the planner that the index of pending rows would do,
-- which it walks over from end to end where it believes that none is there. Only by the owner of the shard: what an earlier
-- one writes late must not hold back rows that the next one has read already.
o.id = refused.id and o.message_id = refused.message_id and coalesce(o.delivered_at, o.dead_at) is null
  and exists (select from {lease} as lease where lease.shard = refused.shard and lease.epoch = refused.epoch)

-- The shard of a row. Always computed here, so that all replicas agree. The sign bit is dropped, not abs(), which fails on
-- the smallest bigint.
-- $6 number of shards
((case when o.ordering_key is null then o.id else hashtextextended(o.ordering_key, 0) end & 9223372036854775807) % $6::int)::int

-- A row of a shard that another replica reads, beyond what has been told.
($11::int[] is not null and o.id > $12 and {shard} = any ($11))

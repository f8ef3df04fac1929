-- $4 ids in flight. Of a subquery Postgres makes a hash table; a parameter that is an array it searches from end to end, for
-- each row.
o.id not in (select unnest($4::bigint[]))

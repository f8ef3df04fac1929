-- What the outbox looks like: its columns with their types.
-- $1 the table, quoted    $2, $3 the tables of ownership, quoted
select
    to_regclass($1) is not null as present,
    pg_is_in_recovery() as standby,
    to_regclass($2) is not null and to_regclass($3) is not null as owned,
    coalesce((
        select array_agg(a.attname::text order by a.attnum) from pg_attribute a
        where a.attrelid = to_regclass($1) and a.attnum > 0 and not a.attisdropped), '{}') as columns,
    coalesce((
        select array_agg(format_type(a.atttypid, null) order by a.attnum) from pg_attribute a
        where a.attrelid = to_regclass($1) and a.attnum > 0 and not a.attisdropped), '{}') as types

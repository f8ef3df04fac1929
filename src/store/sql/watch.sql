-- Waits for a row that may be read. The procedure is in migrations/0003_watch.sql.
-- $1 highest id noticed    $2, $3 first and last id of each range    $4 ids in flight
-- $5 first poll after, $6 poll interval, $7 longest wait, in ms
call {watch}(
    $1, $2::bigint[], $3::bigint[], $4::bigint[],
    $5::float8 * interval '1 ms', $6::float8 * interval '1 ms', $7::float8 * interval '1 ms', null)

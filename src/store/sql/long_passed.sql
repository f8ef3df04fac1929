-- The last row in a stretch of ids that was delivered a while ago: ids up to there were given out before that. True of ids
-- that a sequence has given.
-- $1, $2 first id, and the one behind the last    $3 seconds
select id from {outbox}
where id >= $1 and id < $2 and delivered_at < clock_timestamp() - $3 * interval '1 second'
order by id desc
limit 1

-- The last row before $1 that was delivered a while ago: ids up to there were given out before that.
-- $1 id    $2 seconds    $3 rows looked at, at most
select max(o.id)
from (select id, delivered_at from {outbox} where id < $1 order by id desc limit $3) as o
where o.delivered_at < clock_timestamp() - $2 * interval '1 second'

-- One bite of retention: looks at the next delivered rows after $1 and deletes the expired ones.
-- $1 id    $2 rows at most    $3 retention in seconds
with bite as (
    select id, delivered_at from {outbox}
    where id > $1 and delivered_at is not null
    order by id
    limit $2
), purged as (
    delete from {outbox} as o using bite
    where o.id = bite.id
      and o.delivered_at < clock_timestamp() - $3 * interval '1 second'
    returning o.id
)
select count(*) as looked_at, max(id) as last_id, (select count(*) from purged) as purged from bite

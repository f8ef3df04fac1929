-- Which of these rows somebody else has locked. The others are locked from here on, until the transaction ends.
-- $1 ids
with free as (
    select id from {outbox} where id = any ($1::bigint[]) order by id for update skip locked)
select o.id from {outbox} as o
where o.id = any ($1::bigint[]) and not exists (select from free where free.id = o.id)

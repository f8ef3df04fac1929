-- Which of these rows somebody else has locked so that they cannot be changed, or deleted. The others are locked from here on, until the transaction ends.
-- $1 ids
with free as (
    select id from {outbox} where id = any ($1::bigint[]) order by id for {lock} skip locked)
select o.id from {outbox} as o
where o.id = any ($1::bigint[]) and not exists (select from free where free.id = o.id)

-- The watch: waits inside the database until a row may be there to read, so that a relay without work neither asks again
-- and again nor lets a row wait. Writers have no part in it.

-- Answers with a pending row's id in row_id: the highest above `noticed`, seen within 5 ms of its commit; or any that is due
-- within the given ranges and not in flight, looked for after first_poll and then once per poll_interval. Null: none
-- came within `lasts`.
--
-- It commits after each look, so it holds no lock while it rests, and no snapshot for longer than that. This is why it is
-- a procedure, and may not be called inside a transaction. A look that took long, because the index is full of dead
-- entries, is followed by twenty times as long a rest.
create or replace procedure {outbox:_watch}(
    noticed bigint,
    first_ids bigint[],
    last_ids bigint[],
    in_flight bigint[],
    first_poll interval,
    poll_interval interval,
    lasts interval,
    inout row_id bigint default null)
language plpgsql
as {body}
declare
    look constant interval := least(interval '5 ms', poll_interval);
    over constant timestamptz := clock_timestamp() + lasts;
    poll_at timestamptz := clock_timestamp() + first_poll;
    looked_at timestamptz;
begin
    loop
        looked_at := clock_timestamp();
        -- The pending index is right whatever the statistics say.
        set local enable_seqscan = off;
        set local enable_bitmapscan = off;
        select o.id into row_id from {outbox} as o
        where o.id > noticed and o.delivered_at is null and o.dead_at is null
        order by o.id desc
        limit 1;
        if row_id is null and looked_at >= poll_at then
            poll_at := looked_at + poll_interval;
            select o.id into row_id
            from unnest(first_ids, last_ids) as unsettled (first_id, last_id)
            cross join lateral (
                select o.id from {outbox} as o
                where o.id between unsettled.first_id and unsettled.last_id
                  and o.delivered_at is null and o.dead_at is null
                  and o.available_at <= looked_at
                  and o.id <> all (in_flight)
                order by o.id
                limit 1
            ) as o
            limit 1;
        end if;
        exit when row_id is not null or looked_at >= over;
        commit;
        perform pg_sleep_for(greatest(look, least((clock_timestamp() - looked_at) * 20, interval '5 s')));
    end loop;
end
{body};

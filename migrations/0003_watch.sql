-- The watch: waits inside the database until a row may be there to read, so that a relay without work neither asks again
-- and again nor lets a row wait. Writers have no part in it.

-- Answers with a pending row's id in row_id: the highest above `noticed`, seen within 10 ms of its commit; or any that is
-- due within the given ranges and not in flight, looked for after first_poll and then once per poll_interval. Null:
-- none came within `lasts`, which it exceeds by one look at most.
--
-- It commits after each look, so it holds no lock while it rests, and no snapshot for longer than that. This is why it is
-- a procedure, and may not be called inside a transaction. Looks that take long are followed by long rests, each kind by
-- its own: dead entries in the index slow the look for new rows, rows scheduled far ahead the look for due ones.
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
#variable_conflict use_variable
declare
    look constant interval := least(interval '10 ms', poll_interval);
    begun constant timestamptz := clock_timestamp();
    over constant timestamptz := begun + lasts;
    poll_at timestamptz := begun + first_poll;
    looked_at timestamptz;
    rest interval;
begin
    loop
        -- What every session of the relay has; behind a pooler the session is somebody else's.
        set local enable_seqscan = off;
        set local enable_bitmapscan = off;
        set local lock_timeout = '5s';
        looked_at := clock_timestamp();
        select o.id into row_id from {outbox} as o
        where o.id > noticed and o.delivered_at is null and o.dead_at is null
        order by o.id desc
        limit 1;
        rest := greatest(look, (clock_timestamp() - looked_at) * 20);
        if row_id is null and looked_at >= poll_at then
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
            poll_at := clock_timestamp() + greatest(poll_interval, (clock_timestamp() - looked_at) * 2);
        end if;
        -- Also when the clock was set back: the next call begins anew.
        exit when row_id is not null or looked_at >= over or looked_at < begun;
        commit;
        perform pg_sleep_for(least(rest, over - clock_timestamp()));
        -- A snapshot that the rest was given must not be that of the next look.
        commit;
    end loop;
end
{body};

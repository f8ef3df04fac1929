-- Shards that are this replica's fair part: what is left over goes to the first ones. A replica that cannot reach the
-- broker counts only when none can.
select {shards} / member.count + (member.rank < {shards} % member.count)::int
from (
    select replica, row_number() over (order by replica) - 1 as rank, count(*) over () as count
    from {replica}
    where expires_at > clock_timestamp()
      and (ready or not exists (select from {replica} where ready and expires_at > clock_timestamp()))
) as member
where member.replica = {me}

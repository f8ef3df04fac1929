-- A clean stop: everything this replica owned is free at once.
with left_behind as (delete from {replica} where replica = {me})
update {lease} set owner = null, expires_at = clock_timestamp() where owner = {me}

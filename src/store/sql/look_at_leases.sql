-- How shards and replicas stand, in one row.
select
    (select count(*) from {replica} where expires_at > clock_timestamp()) as replicas,
    exists (select from {replica} where replica = {me} and expires_at > clock_timestamp()) as member,
    (select shards from {replica}
      where shards <> {shards} and expires_at > clock_timestamp() limit 1) as other_shards,
    coalesce(({quota}), 0)::bigint as quota,
    (select count(*) from {lease}
      where shard < {shards} and (owner is null or expires_at <= clock_timestamp())) as free,
    array(select shard from {lease} where owner = {me} and expires_at > clock_timestamp() order by shard) as shards,
    array(select epoch from {lease} where owner = {me} and expires_at > clock_timestamp() order by shard) as epochs

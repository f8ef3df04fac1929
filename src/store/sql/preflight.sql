-- Everything `check` wants to know of an existing table.
-- $1 the table, quoted    $2 the tables of ownership, quoted    $3 the procedure that watches, quoted
select
    current_user::text as login,
    coalesce((
        select s.seqcache from pg_sequence s
        where s.seqrelid = pg_get_serial_sequence($1, 'id')::regclass), 1) as sequence_cache,
    exists (
        select from pg_index i
        where i.indrelid = to_regclass($1) and i.indisvalid and i.indpred is not null
          and pg_get_indexdef(i.indexrelid) ~ '\(id\) WHERE'
          and pg_get_expr(i.indpred, i.indrelid) ~ 'delivered_at IS NULL'
          and pg_get_expr(i.indpred, i.indrelid) ~ 'dead_at IS NULL') as pending_index,
    exists (
        select from pg_index i
        where i.indrelid = to_regclass($1) and i.indisvalid and i.indpred is not null
          and pg_get_indexdef(i.indexrelid) ~ '\(ordering_key, id\) WHERE'
          and pg_get_expr(i.indpred, i.indrelid) ~ 'attempts') as waiting_index,
    exists (
        select from pg_index i
        where i.indrelid = to_regclass($1) and i.indisvalid and i.indpred is not null
          and pg_get_indexdef(i.indexrelid) ~ '\(id\) WHERE'
          and pg_get_expr(i.indpred, i.indrelid) ~ 'dead_at IS NOT NULL') as dead_index,
    coalesce(has_function_privilege(to_regproc($3)::oid, 'execute'), false) as may_watch,
    has_table_privilege($1, 'select') as may_select,
    has_table_privilege($1, 'update') as may_update,
    has_table_privilege($1, 'delete') as may_delete,
    (select bool_and(to_regclass(name) is not null and coalesce(has_table_privilege(to_regclass(name), privilege), false))
       from unnest($2::text[]) as name
       cross join unnest(array['select', 'insert', 'update', 'delete']) as privilege) as may_own

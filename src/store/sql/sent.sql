-- A row that was sent. By its message_id too: after a failover that lost transactions an id may be given once more, and a
-- mark that was still on its way would fall on another message. Both lists are in the order of ids, so the message_id of an
-- id is found by halving.
o.id = any ($1::bigint[]) and o.message_id = ($2::uuid[])[width_bucket(o.id, $1::bigint[])]

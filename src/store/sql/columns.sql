o.id, o.message_id, o.exchange, o.routing_key, o.ordering_key, {payload}, o.content_type, {headers}, o.created_at, o.attempts, {shard} as shard

-- One order and its event, in one transaction: both happen, or neither. The row names its exchange, so the relay
-- needs no OUTBOX_EXCHANGE.
\set ON_ERROR_STOP on
set client_min_messages = warning;
create table if not exists demo_orders (
    id bigint generated always as identity primary key,
    created_at timestamptz not null default now()
);

begin;
with placed as (
    insert into demo_orders default values returning id, created_at
)
insert into outbox (exchange, routing_key, ordering_key, payload)
select 'demo', 'order.created', 'order-' || id, jsonb_build_object('id', id, 'created_at', created_at)
from placed
returning 'wrote ' || routing_key || ' ' || ordering_key as event \gset
commit;

\echo :event

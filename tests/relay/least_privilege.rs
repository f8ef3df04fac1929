//! Writers, the relay and its user at the broker need no more rights than `docs/OPERATING.md` grants, and have no more.
//! A table's name from the settings is a name, whatever it looks like.

use crate::support::process::run;
use crate::support::servers::root;
use crate::support::world::Allowed;
use crate::support::{World, eventually};
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions,
    ExchangeDeleteOptions, QueueBindOptions, QueueDeclareOptions, QueuePurgeOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind};
use sqlx::{AssertSqlSafe, Connection as _, Executor, PgConnection};

/// The grants of the documents, for roles of this test; answers with the URLs of writer and relay.
async fn roles(world: &World) -> (String, String) {
    let documents = std::fs::read_to_string(root().join("docs/OPERATING.md")).expect("OPERATING.md");
    let blocks = documents.split("```sql\n").skip(1).filter_map(|rest| rest.split("```").next());
    let grants =
        blocks.into_iter().find(|block| block.contains("create role app_writer")).expect("a block of grants");
    let (writer, relay) = (format!("{}_writer", world.name), format!("{}_relay", world.name));
    let named = |sql: &str| {
        sql.replace("app_writer", &writer)
            .replace(" relay ", &format!(" {relay} "))
            .replace(" relay;", &format!(" {relay};"))
    };
    world.superuser(&named(grants)).await;
    // The trigger of this test writes the ledger with the rights of the writer.
    world.sql(&format!("grant insert on written to {writer}")).await;
    (login(world, &writer, "writer-password"), login(world, &relay, "relay-password"))
}

fn login(world: &World, role: &str, password: &str) -> String {
    let mut url = url::Url::parse(&world.database_url).expect("URL");
    url.set_username(role).and_then(|()| url.set_password(Some(password))).expect("URL");
    url.to_string()
}

/// Each statement is refused for want of a right (42501), and for nothing else.
async fn refused(url: &str, statements: &[&str]) {
    let mut db = PgConnection::connect(url).await.expect("login");
    for sql in statements {
        let error = db.execute(AssertSqlSafe((*sql).to_owned())).await.expect_err(sql);
        let code = error.as_database_error().and_then(|error| error.code()).unwrap_or_default();
        assert_eq!(code, "42501", "{sql}: {error}");
    }
}

/// Everybody may call it, unless an operator has revoked that; what it looks at only those see who may read the table.
const WATCH: &str = "call outbox_watch(0, '{1}', '{9}', '{}', '0 s', '0 s', '1 s')";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_inserts_and_does_nothing_else() {
    let world = World::new().await;
    let (writer, _) = roles(&world).await;
    let mut db = PgConnection::connect(&writer).await.expect("login");
    for i in 0..20 {
        let sql = format!(
            "insert into outbox (routing_key, ordering_key, payload) values ('ok.1', 'key {}', '{i}')",
            i % 3
        );
        db.execute(AssertSqlSafe(sql)).await.expect("a writer may insert");
    }
    refused(
        &writer,
        &[
            "select * from outbox",
            "insert into outbox (routing_key, payload) values ('ok.1', '1') returning id",
            "update outbox set delivered_at = now()",
            "delete from outbox",
            "truncate outbox",
            "alter table outbox add column x int",
            "drop table outbox",
            "create table mine (i int)",
            "create index on outbox (id)",
            "select nextval('outbox_id_seq')",
            "select setval('outbox_id_seq', 1)",
            "select * from outbox_migrations",
            "select * from outbox_lease",
            "update outbox_lease set epoch = epoch + 1",
            "delete from outbox_replica",
            WATCH,
        ],
    )
    .await;
    let relay = world.relay(&[]).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");
    world.finish(Allowed::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_relay_does_all_its_work_with_its_grants_and_nothing_else() {
    let world = World::new().await;
    let (_, url) = roles(&world).await;
    world.write(500, 20).await;
    // A dead row, a row that waits, and old rows for retention.
    let long = "x".repeat(300);
    world
        .sql(&format!("insert into outbox (routing_key, payload) values ('{long}', '1'), ('lost', '2')"))
        .await;
    let (code, output, _) = run(&["check"], &world.pairs(&[("DATABASE_URL", &url)])).await;
    assert_eq!(code, 0, "{output}");
    let relay = world.process(&[("DATABASE_URL", &url), ("OUTBOX_RETENTION", "1s")]).await;
    world.until("select count(*) from outbox where dead_at is not null", 1).await;
    world.until("select count(*) from outbox where attempts > 0 and dead_at is null", 1).await;
    world.until_delivered(0).await;
    world.until("select count(*) from outbox", 2).await;
    eventually("health has counted them", async || {
        let health = relay.health().await;
        health.database.state == "up" && (health.dead, health.pending) == (Some(1), Some(1))
    })
    .await;
    assert!(!relay.logged().contains("no long polling"), "the database may not watch");
    assert!(relay.terminate().await.success());
    // Marked by deletion.
    world.write(100, 5).await;
    let relay = world.relay(&[("DATABASE_URL", &url), ("OUTBOX_RETENTION", "0")]).await;
    world.until("select count(*) from outbox", 2).await;
    relay.stop().await.expect("clean stop");
    refused(
        &url,
        &[
            "insert into outbox (routing_key, payload) values ('ok.1', '1')",
            "truncate outbox",
            "alter table outbox add column x int",
            "alter table outbox disable trigger all",
            "drop table outbox",
            "create table mine (i int)",
            "create index on outbox (id)",
            "create schema mine",
            "select * from written",
            "select * from outbox_migrations",
            "truncate outbox_lease",
            "alter table outbox_replica add column x int",
            "drop procedure outbox_watch",
            "select nextval('outbox_id_seq')",
        ],
    )
    .await;
    world.finish(Allowed { dead: true, pending: true, refusals: true, ..Allowed::default() }).await;
}

/// The broker's answer to an operation is 403.
async fn forbidden<T, F: Future<Output = lapin::Result<T>>>(
    connection: &Connection,
    what: &str,
    operation: impl FnOnce(Channel) -> F,
) {
    let channel = connection.create_channel().await.expect("channel");
    let Err(error) = operation(channel).await else { panic!("{what} was allowed") };
    assert!(error.to_string().contains("ACCESS_REFUSED"), "{what}: {error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_that_may_only_write_to_the_exchange_suffices() {
    let world = World::alone().await;
    let servers = world.servers();
    servers.rabbitmqctl(&["add_user", "relay", "relay-password"]).await;
    let write = format!("^{}$", world.name);
    servers.rabbitmqctl(&["set_permissions", "--vhost", "/", "relay", "^$", &write, "^$"]).await;
    let url = servers.amqp_url.replace("outbox:outbox@", "relay:relay-password@");
    let (code, output, _) = run(&["check"], &world.pairs(&[("AMQP_URL", &url)])).await;
    assert_eq!(code, 0, "{output}");
    world.write(500, 20).await;
    let relay = world.relay(&[("AMQP_URL", &url)]).await;
    world.drained().await;
    relay.stop().await.expect("clean stop");

    let connection = Connection::connect(&url, ConnectionProperties::default()).await.expect("login");
    let (connection, name) = (&connection, world.name.as_str());
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    forbidden(connection, "declaring an exchange", async |channel| {
        channel.exchange_declare("mine".into(), ExchangeKind::Topic, durable, FieldTable::default()).await
    })
    .await;
    forbidden(connection, "deleting its exchange", async |channel| {
        channel.exchange_delete(name.into(), ExchangeDeleteOptions::default()).await
    })
    .await;
    forbidden(connection, "declaring a queue", async |channel| {
        channel.queue_declare("mine".into(), QueueDeclareOptions::default(), FieldTable::default()).await
    })
    .await;
    forbidden(connection, "binding the queue", async |channel| {
        let options = QueueBindOptions::default();
        channel.queue_bind(name.into(), name.into(), "#".into(), options, FieldTable::default()).await
    })
    .await;
    forbidden(connection, "purging the queue", async |channel| {
        channel.queue_purge(name.into(), QueuePurgeOptions::default()).await
    })
    .await;
    forbidden(connection, "consuming", async |channel| {
        let options = BasicConsumeOptions::default();
        channel.basic_consume(name.into(), "".into(), options, FieldTable::default()).await
    })
    .await;
    for exchange in ["amq.topic", ""] {
        forbidden(connection, "publishing elsewhere", async |channel| {
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
            channel.basic_publish(exchange.into(), name.into(), options, b"", properties).await?.await
        })
        .await;
    }
    world.finish(Allowed::default()).await;
}

/// Names that would do harm if they became SQL. Some are refused; all others are names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_table_name_never_becomes_sql() {
    let world = World::new().await;
    world.sql("create table canary (i int); insert into canary values (1)").await;
    let tables =
        "select count(*) from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace";
    for name in [
        "outbox; drop table canary",
        "outbox--",
        "outbox\"; drop table canary; --",
        "\"x\"\"; drop table canary; --\"",
        "\"x\n; drop table canary; --\"",
        "\"x\r; drop table canary; --\"",
        "\"{outbox} {columns}\"",
        "\"{index:_x}\"",
        "U&\"x\"",
        "outbox where false",
    ] {
        let before = world.number(tables).await;
        for command in ["migrate", "check", "run"] {
            let (code, _, error) = run(&[command], &world.pairs(&[("OUTBOX_TABLE", name)])).await;
            assert_eq!(code, 2, "{command} with {name:?}: {error}");
            assert!(error.starts_with("error: OUTBOX_TABLE is "), "{error}");
        }
        assert_eq!(world.number(tables).await, before, "{name:?}");
    }
    for (number, name) in [
        "x; drop table canary; --",
        "x'); drop table canary; --",
        "x' or '1'='1",
        "/* x",
        "*/ drop table canary; --",
        "$$; drop table canary; $$",
        "$body$; drop table canary; $the_body$",
        "\\'; drop table canary; --",
        "%s $1 x; drop table canary",
        "ключ; ʼ drop table canary",
    ]
    .into_iter()
    .enumerate()
    {
        let quoted = format!("\"{name}\"");
        let before = world.number(tables).await;
        let pairs = world.pairs(&[("OUTBOX_TABLE", &quoted)]);
        for command in ["migrate", "migrate", "check"] {
            let (code, output, error) = run(&[command], &pairs).await;
            assert_eq!(code, 0, "{command} with {name:?}: {output}{error}");
        }
        assert_eq!(
            world.number(tables).await,
            before + 4,
            "the table, its migrations and leases, for {name:?}"
        );
        world.sql(&format!("insert into {quoted} (routing_key, payload) values ('ok.1', '{number}')")).await;
        let relay = world.process(&[("OUTBOX_TABLE", &quoted), ("OUTBOX_SWEEP_INTERVAL", "1s")]).await;
        world.until(&format!("select count(*) from {quoted} where delivered_at is not null"), 1).await;
        eventually("it is counted", async || {
            let (status, body) = relay.get("/health").await;
            status == 200 && body.contains("\"pending\":0")
        })
        .await;
        assert!(relay.terminate().await.success());
        assert_eq!(world.number("select count(*) from canary").await, 1, "{name:?}");
    }
    assert_eq!(world.queue_depth().await, 10);
    world.abandon();
}

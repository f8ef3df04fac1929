//! `outbox-relay check`: preflight of both servers. Goes on after a failure, so that one run shows
//! everything, and says the remedy for each.

use super::UNWELL;
use crate::config::{Settings, Sources, endpoint};
use crate::sink::SinkState;
use crate::sink::rabbitmq::{classify, connect};
use crate::store::StoreError;
use crate::store::postgres::{Connector, preflight};
use anyhow::Context;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{BasicProperties, Confirmation, Connection, ExchangeKind};
use secrecy::SecretString;
use std::process::ExitCode;

/// Something looked at: what, and what is wrong with it.
pub type Finding = (String, Result<(), String>);

pub(super) fn run(sources: &Sources) -> anyhow::Result<ExitCode> {
    let settings = Settings::resolve(sources)?;
    let findings = super::block_on(async {
        let mut findings = database(&settings).await;
        findings.extend(broker(&settings).await?);
        Ok(findings)
    })?;
    let problems = findings.iter().filter(|(_, result)| result.is_err()).count();
    for (what, result) in &findings {
        match result {
            Ok(()) => println!("ok       {what}"),
            Err(problem) => println!("PROBLEM  {what}: {problem}"),
        }
    }
    match problems {
        0 => println!("all well"),
        1 => println!("1 problem"),
        _ => println!("{problems} problems"),
    }
    Ok(if problems == 0 { ExitCode::SUCCESS } else { ExitCode::from(UNWELL) })
}

async fn database(settings: &Settings) -> Vec<Finding> {
    let connector = Connector::new(settings.database.clone(), settings.transaction_pooling);
    match connector.connect().await {
        Ok(connection) => preflight::check(connection, settings).await,
        Err(StoreError { sentence, .. }) => {
            let remedy = "check DATABASE_URL, that the server runs, and the login";
            vec![("database connection".to_owned(), Err(format!("{sentence}; {remedy}")))]
        }
    }
}

async fn broker(settings: &Settings) -> anyhow::Result<Vec<Finding>> {
    let urls = settings.amqp.read().map_err(anyhow::Error::msg).context("AMQP_URL_FILE")?;
    let mut findings = Vec::new();
    for url in endpoint::urls(&urls) {
        match connect(&SecretString::from(url.to_owned())).await {
            Ok(connection) => {
                findings.push(("broker connection and login".to_owned(), Ok(())));
                findings.extend(capabilities(&connection, &settings.exchange).await);
                let _ = connection.close(200, "checked".into()).await;
            }
            Err(SinkState::Away { reason, .. } | SinkState::Blocked { reason }) => {
                let remedy = "check AMQP_URL, that the server runs, the login and the vhost";
                findings.push(("broker connection and login".to_owned(), Err(format!("{reason}; {remedy}"))));
            }
            Err(SinkState::Ready) => {}
        }
    }
    Ok(findings)
}

async fn capabilities(connection: &Connection, exchange: &str) -> Vec<Finding> {
    let confirms = async {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await
    };
    let confirms = confirms.await.map_err(|error| {
        format!("{}; the broker must support publisher confirms", classify::sentence(&error))
    });
    let declared = match exchange {
        "" => Ok(()),
        name => declared(connection, name).await.map_err(|error| {
            let problem = classify::sentence(&error);
            format!("{problem}; declare it before the relay starts, or set OUTBOX_EXCHANGE")
        }),
    };
    let what = match exchange {
        "" => "default exchange".to_owned(),
        name => format!("exchange {name}"),
    };
    let returned = returns_unroutable(connection).await;
    vec![
        ("publisher confirms".to_owned(), confirms),
        ("unroutable messages are returned".to_owned(), returned),
        (what, declared),
    ]
}

/// Sends a mandatory message that no queue can take: the broker has to give it back. Reaches nobody, since
/// the default exchange leads only to the queue of exactly this name.
async fn returns_unroutable(connection: &Connection) -> Result<(), String> {
    let nowhere = format!("outbox-relay.check.{}", uuid::Uuid::new_v4());
    let publish = async {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        let options = BasicPublishOptions { mandatory: true, immediate: false };
        let key = ShortString::try_new(nowhere).unwrap_or_default();
        channel.basic_publish("".into(), key, options, b"", BasicProperties::default()).await?.await
    };
    match publish.await {
        Ok(Confirmation::Ack(Some(_))) => Ok(()),
        Ok(_) => {
            Err("a message that no queue takes was confirmed and not returned; is there a proxy in between?"
                .to_owned())
        }
        // A login that may not write to the default exchange cannot be asked this, and need not be.
        Err(error) if classify::reply_code(&error) == Some(403) => Ok(()),
        Err(error) => Err(classify::sentence(&error)),
    }
}

async fn declared(connection: &Connection, exchange: &str) -> lapin::Result<()> {
    let channel = connection.create_channel().await?;
    let options = ExchangeDeclareOptions { passive: true, ..Default::default() };
    let name = ShortString::try_new(exchange).unwrap_or_default();
    channel.exchange_declare(name, ExchangeKind::Direct, options, FieldTable::default()).await
}

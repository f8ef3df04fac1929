//! What `check` looks at in the broker.

use super::classify::{reply_code, sentence};
use super::connection::BrokerConnection;
use super::connector::connect;
use super::exchanges::declare_passively;
use crate::config::{Settings, endpoint};
use crate::preflight::{Finding, ask};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Confirmation};
use secrecy::SecretString;

/// Looks at each address of the broker.
pub async fn check(settings: &Settings) -> Vec<Finding> {
    let urls = match settings.amqp.endpoint.read() {
        Ok(urls) => urls,
        Err(problem) => return vec![Finding::new("broker connection and login", Err(problem))],
    };
    let mut findings = Vec::new();
    for url in endpoint::urls(&urls) {
        findings.extend(check_one(&SecretString::from(url.to_owned()), settings).await);
    }
    findings
}

async fn check_one(url: &SecretString, settings: &Settings) -> Vec<Finding> {
    let exchange = settings.exchange.as_str();
    let connected = "broker connection and login";
    let connection = match connect(url, &settings.amqp.tls).await {
        Ok(connection) => connection,
        Err(away) => {
            let remedy = "check AMQP_URL, that the server runs, the login and the vhost";
            return vec![Finding::new(connected, Err(format!("{away}; {remedy}")))];
        }
    };
    let what =
        if exchange.is_empty() { "default exchange".to_owned() } else { format!("exchange {exchange}") };
    let findings = vec![
        Finding::new(connected, Ok(())),
        Finding::new("publisher confirms", ask(confirms(&connection)).await),
        Finding::new("unroutable messages are returned", ask(returns(&connection)).await),
        Finding::new(what, ask(declared(&connection, exchange)).await),
    ];
    connection.close("checked").await;
    findings
}

async fn confirms(connection: &BrokerConnection) -> Result<(), String> {
    let select = async {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await
    };
    select.await.map_err(|error| format!("{}; the broker must support publisher confirms", sentence(&error)))
}

/// Sends a mandatory message that no queue can take: the broker has to give it back. Reaches nobody, since
/// the default exchange leads only to the queue of exactly this name.
async fn returns(connection: &BrokerConnection) -> Result<(), String> {
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
        // A login that may not write to the default exchange cannot be asked this; its own exchange is
        // asked for below.
        Err(error) if reply_code(&error) == Some(403) => Ok(()),
        Err(error) => Err(sentence(&error)),
    }
}

async fn declared(connection: &BrokerConnection, exchange: &str) -> Result<(), String> {
    if exchange.is_empty() {
        return Ok(());
    }
    let declare = async {
        let channel = connection.create_channel().await?;
        declare_passively(&channel, exchange).await
    };
    declare.await.map_err(|error| {
        format!("{}; declare it before the relay starts, or set OUTBOX_EXCHANGE", sentence(&error))
    })
}

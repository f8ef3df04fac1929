//! What the broker's errors mean. Codes: AMQP 0-9-1 specification, section 1.2 "reply codes".

use super::super::Fault;
use lapin::protocol::AMQPErrorKind;
use lapin::{Error, ErrorKind};

/// The reply code of an error the broker has sent.
pub fn reply_code(error: &Error) -> Option<u16> {
    match error.kind() {
        ErrorKind::ProtocolError(protocol) => Some(protocol.get_id()),
        _ => None,
    }
}

/// A connect that failed: does somebody have to change a setting?
pub fn is_configuration(error: &Error) -> bool {
    match error.kind() {
        // 403 login refused, 530 vhost missing or not allowed.
        ErrorKind::ProtocolError(_) => matches!(reply_code(error), Some(403 | 530)),
        ErrorKind::AuthProviderError(_) | ErrorKind::InvalidProtocolVersion(_) => true,
        // TLS: its errors come as invalid data, those of the system's certificate store in plain words.
        ErrorKind::IOError(io) => {
            io.kind() == std::io::ErrorKind::InvalidData || io.to_string().contains("certificate")
        }
        _ => false,
    }
}

/// One sentence without line breaks.
pub fn sentence(error: &Error) -> String {
    match error.kind() {
        ErrorKind::ProtocolError(protocol) => protocol.get_message().to_string(),
        ErrorKind::IOError(io) => io.to_string(),
        _ => error.to_string(),
    }
}

/// What is known of a message that a closed channel may be blamed on.
#[derive(Debug, Clone, Copy)]
pub struct Blamed<'a> {
    /// Its exchange.
    pub exchange: &'a str,
    /// Its routing key.
    pub routing_key: &'a str,
    /// Bytes of its body.
    pub payload_len: usize,
}

/// What the closing of a channel or connection means for one message that had no answer yet.
///
/// `alone` says that the batch held nothing else.
pub fn fault_of_close(error: &Error, message: Blamed<'_>, alone: bool) -> Fault {
    let suspect = if alone { Fault::Message } else { Fault::Suspect };
    let text = &sentence(error);
    match error.kind() {
        ErrorKind::InvalidChannelState(..) | ErrorKind::InvalidConnectionState(_) => Fault::Unknown,
        ErrorKind::ProtocolError(protocol) => match (protocol.kind(), reply_code(error)) {
            (AMQPErrorKind::Soft(_), Some(403 | 404)) => match names(text, message) {
                true => Fault::Destination,
                false => Fault::Unknown,
            },
            (AMQPErrorKind::Soft(_), Some(406)) => match size_limit(error, text) {
                Some(limit) if message.payload_len > limit => Fault::Hopeless,
                Some(_) => Fault::Unknown,
                None => suspect,
            },
            // Frame, syntax, command, channel, unexpected frame. 506 is the broker out of resources.
            (AMQPErrorKind::Hard(_), Some(501..=505)) => suspect,
            _ => Fault::Unknown,
        },
        _ => Fault::Unknown,
    }
}

/// The text blames this message's destination.
fn names(text: &str, message: Blamed<'_>) -> bool {
    match text.contains("access to topic") {
        // Topic permissions are about the routing key.
        true => text.contains(&format!("topic '{}'", message.routing_key)),
        false => names_exchange(text, message.exchange),
    }
}

/// The text blames this exchange as a whole. RabbitMQ names it in quotes, the default one by a name of
/// its own: "no exchange 'orders' in vhost '/'", "access to exchange 'amq.default' … refused".
pub fn names_exchange(text: &str, exchange: &str) -> bool {
    let name = if exchange.is_empty() { "amq.default" } else { exchange };
    !text.contains("access to topic") && text.contains(&format!("exchange '{name}'"))
}

/// The limit in "message size 2000 is larger than configured max size 1000". Other errors may have such words in a name.
pub fn size_limit(error: &Error, text: &str) -> Option<usize> {
    reply_code(error).filter(|code| *code == 406)?;
    let (_, after) = text.split_once("max size ")?;
    let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::protocol::{AMQPError, AMQPSoftError};

    fn close(kind: AMQPSoftError, text: &str) -> Error {
        ErrorKind::ProtocolError(AMQPError::new(kind.into(), text.into())).into()
    }

    fn blamed(exchange: &str, payload_len: usize) -> Blamed<'_> {
        Blamed { exchange, routing_key: "rk", payload_len }
    }

    #[test]
    fn the_default_exchange_is_named_amq_default() {
        let text = "ACCESS_REFUSED - access to exchange 'amq.default' in vhost '/' refused for user 'u'";
        let error = close(AMQPSoftError::ACCESSREFUSED, text);
        assert_eq!(fault_of_close(&error, blamed("", 1), false), Fault::Destination);
        assert_eq!(fault_of_close(&error, blamed("orders", 1), false), Fault::Unknown);
    }

    #[test]
    fn a_topic_permission_is_the_fault_of_its_routing_key_only() {
        let text =
            "ACCESS_REFUSED - access to topic 'rk' in exchange 'orders' in vhost '/' refused for user 'u'";
        let error = close(AMQPSoftError::ACCESSREFUSED, text);
        let other = Blamed { routing_key: "other", ..blamed("orders", 1) };
        assert_eq!(fault_of_close(&error, blamed("orders", 1), false), Fault::Destination);
        assert_eq!(fault_of_close(&error, other, false), Fault::Unknown);
        assert!(!names_exchange(text, "orders"));
    }

    #[test]
    fn a_missing_exchange_is_the_fault_of_its_own_messages_only() {
        let error = close(AMQPSoftError::NOTFOUND, "NOT_FOUND - no exchange 'orders' in vhost '/'");
        assert_eq!(fault_of_close(&error, blamed("orders", 10), false), Fault::Destination);
        assert_eq!(fault_of_close(&error, blamed("billing", 10), false), Fault::Unknown);
    }

    #[test]
    fn a_size_limit_names_its_culprits() {
        let text = "PRECONDITION_FAILED - message size 2000 is larger than configured max size 1000";
        let error = close(AMQPSoftError::PRECONDITIONFAILED, text);
        assert_eq!(fault_of_close(&error, blamed("x", 2000), false), Fault::Hopeless);
        assert_eq!(fault_of_close(&error, blamed("x", 1000), false), Fault::Unknown);
        assert_eq!(size_limit(&error, text), Some(1000));
        let text = "ACCESS_REFUSED - access to topic 'max size 1' in exchange 'x' refused";
        let error = close(AMQPSoftError::ACCESSREFUSED, text);
        assert_eq!(size_limit(&error, text), None, "a name of somebody's");
    }

    #[test]
    fn an_unnamed_culprit_is_found_one_by_one() {
        let error = close(AMQPSoftError::PRECONDITIONFAILED, "PRECONDITION_FAILED - invalid message");
        assert_eq!(fault_of_close(&error, blamed("x", 1), false), Fault::Suspect);
        assert_eq!(fault_of_close(&error, blamed("x", 1), true), Fault::Message);
    }
}

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

/// What is known of all messages that went together.
#[derive(Debug, Clone, Copy, Default)]
pub struct Evidence {
    /// There was one.
    pub alone: bool,
    /// And its connection had no other.
    pub apart: bool,
    /// The text blames one of them.
    pub named: bool,
    /// The whole connection is gone, and nobody has ended it on purpose.
    pub broke: bool,
}

/// Somebody ends the connection: the server because it stops, an operator, or this relay.
pub fn is_forced(error: &Error) -> bool {
    matches!(reply_code(error), Some(200 | 320))
}

/// The connection failed by itself, so that everything on it is lost.
pub fn is_loss(error: &Error) -> bool {
    use ErrorKind::{IOError, MissingHeartbeatError, ParsingError};
    matches!(error.kind(), IOError(_) | MissingHeartbeatError | ParsingError(_))
}

/// What the closing of a channel or connection means for one message that had no answer yet.
pub fn fault_of_close(error: &Error, message: Blamed<'_>, evidence: Evidence) -> Fault {
    let Evidence { alone, apart, named, broke } = evidence;
    let suspect = if alone { Fault::Message } else { Fault::Suspect };
    let unknown = if broke { Fault::Break } else { Fault::Unknown };
    let text = &sentence(error);
    match error.kind() {
        ErrorKind::InvalidChannelState(..) | ErrorKind::InvalidConnectionState(_) => unknown,
        ErrorKind::ProtocolError(protocol) => match (protocol.kind(), reply_code(error)) {
            (AMQPErrorKind::Soft(_), Some(403 | 404)) => match names(text, message) {
                true => Fault::Destination,
                false if named => Fault::Unknown,
                false if alone => Fault::Destination,
                false => Fault::Suspect,
            },
            (AMQPErrorKind::Soft(_), Some(406)) => match size_limit(error, text) {
                Some(limit) if message.payload_len > limit => Fault::Hopeless,
                Some(_) => Fault::Unknown,
                None => suspect,
            },
            // Frame, syntax, command, channel, unexpected frame: by anything on the connection. 506 is the broker out of resources.
            (AMQPErrorKind::Hard(_), Some(501..=505)) if alone && apart => Fault::Message,
            (AMQPErrorKind::Hard(_), Some(501..=505)) => Fault::Break,
            _ => unknown,
        },
        _ => unknown,
    }
}

/// The text blames this message's destination.
pub fn names(text: &str, message: Blamed<'_>) -> bool {
    match text.contains("access to topic") {
        // Topic permissions are about the routing key.
        true => quotes(text, "topic", message.routing_key),
        false => names_exchange(text, message.exchange),
    }
}

/// RabbitMQ cuts a text after 252 bytes, and puts three dots there.
fn quotes(text: &str, what: &str, name: &str) -> bool {
    let cut = || text.strip_suffix("...")?.split_once(&format!("{what} '"));
    text.contains(&format!("{what} '{name}'")) || cut().is_some_and(|(_, start)| name.starts_with(start))
}

/// The text blames this exchange as a whole. RabbitMQ names it in quotes, the default one by a name of
/// its own: "no exchange 'orders' in vhost '/'", "access to exchange 'amq.default' … refused".
pub fn names_exchange(text: &str, exchange: &str) -> bool {
    let name = if exchange.is_empty() { "amq.default" } else { exchange };
    !text.contains("access to topic") && quotes(text, "exchange", name)
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
    use lapin::protocol::{AMQPError, AMQPHardError, AMQPSoftError};

    fn close(kind: AMQPSoftError, text: &str) -> Error {
        ErrorKind::ProtocolError(AMQPError::new(kind.into(), text.into())).into()
    }

    /// Somebody is named.
    const TOGETHER: Evidence = Evidence { alone: false, apart: false, named: true, broke: false };
    const ALONE: Evidence = Evidence { alone: true, ..TOGETHER };

    fn blamed(exchange: &str, payload_len: usize) -> Blamed<'_> {
        Blamed { exchange, routing_key: "rk", payload_len }
    }

    #[test]
    fn the_default_exchange_is_named_amq_default() {
        let text = "ACCESS_REFUSED - access to exchange 'amq.default' in vhost '/' refused for user 'u'";
        let error = close(AMQPSoftError::ACCESSREFUSED, text);
        assert_eq!(fault_of_close(&error, blamed("", 1), TOGETHER), Fault::Destination);
        assert_eq!(fault_of_close(&error, blamed("orders", 1), TOGETHER), Fault::Unknown);
    }

    #[test]
    fn a_topic_permission_is_the_fault_of_its_routing_key_only() {
        let text =
            "ACCESS_REFUSED - access to topic 'rk' in exchange 'orders' in vhost '/' refused for user 'u'";
        let error = close(AMQPSoftError::ACCESSREFUSED, text);
        let other = Blamed { routing_key: "other", ..blamed("orders", 1) };
        assert_eq!(fault_of_close(&error, blamed("orders", 1), TOGETHER), Fault::Destination);
        assert_eq!(fault_of_close(&error, other, TOGETHER), Fault::Unknown);
        assert!(!names_exchange(text, "orders"));
    }

    #[test]
    fn a_missing_exchange_is_the_fault_of_its_own_messages_only() {
        let error = close(AMQPSoftError::NOTFOUND, "NOT_FOUND - no exchange 'orders' in vhost '/'");
        assert_eq!(fault_of_close(&error, blamed("orders", 10), TOGETHER), Fault::Destination);
        assert_eq!(fault_of_close(&error, blamed("billing", 10), TOGETHER), Fault::Unknown);
    }

    #[test]
    fn a_size_limit_names_its_culprits() {
        let text = "PRECONDITION_FAILED - message size 2000 is larger than configured max size 1000";
        let error = close(AMQPSoftError::PRECONDITIONFAILED, text);
        assert_eq!(fault_of_close(&error, blamed("x", 2000), TOGETHER), Fault::Hopeless);
        assert_eq!(fault_of_close(&error, blamed("x", 1000), TOGETHER), Fault::Unknown);
        assert_eq!(size_limit(&error, text), Some(1000));
        let text = "ACCESS_REFUSED - access to topic 'max size 1' in exchange 'x' refused";
        let error = close(AMQPSoftError::ACCESSREFUSED, text);
        assert_eq!(size_limit(&error, text), None, "a name of somebody's");
    }

    #[test]
    fn an_unnamed_culprit_is_found_one_by_one() {
        let error = close(AMQPSoftError::PRECONDITIONFAILED, "PRECONDITION_FAILED - invalid message");
        assert_eq!(fault_of_close(&error, blamed("x", 1), TOGETHER), Fault::Suspect);
        assert_eq!(fault_of_close(&error, blamed("x", 1), ALONE), Fault::Message);
    }

    /// Whoever has it on its connection may be the culprit.
    #[test]
    fn an_error_of_the_whole_connection_blames_only_what_was_alone_on_it() {
        let error: Error = ErrorKind::ProtocolError(AMQPError::new(
            AMQPHardError::SYNTAXERROR.into(),
            "SYNTAX_ERROR".into(),
        ))
        .into();
        assert_eq!(fault_of_close(&error, blamed("x", 1), TOGETHER), Fault::Break);
        assert_eq!(fault_of_close(&error, blamed("x", 1), ALONE), Fault::Break);
        let apart = Evidence { apart: true, ..ALONE };
        assert_eq!(fault_of_close(&error, blamed("x", 1), apart), Fault::Message);
    }

    /// The broker's words of names that are long: their end is missing.
    #[test]
    fn a_text_that_is_cut_names_its_culprits_too() {
        let long = "x".repeat(250);
        let topic = format!("ACCESS_REFUSED - write access to topic '{}...", &long[..212]);
        let exchange = format!("NOT_FOUND - no exchange '{}...", &long[..227]);
        let (topic, exchange) =
            (close(AMQPSoftError::ACCESSREFUSED, &topic), close(AMQPSoftError::NOTFOUND, &exchange));
        let of_long_key = Blamed { routing_key: &long, ..blamed("orders", 1) };
        assert_eq!(fault_of_close(&topic, of_long_key, TOGETHER), Fault::Destination);
        assert_eq!(fault_of_close(&topic, blamed("orders", 1), TOGETHER), Fault::Unknown);
        assert_eq!(fault_of_close(&exchange, blamed(&long, 1), TOGETHER), Fault::Destination);
        assert_eq!(fault_of_close(&exchange, blamed("x", 1), TOGETHER), Fault::Unknown);
    }

    #[test]
    fn where_nobody_is_named_the_culprit_is_found_one_by_one() {
        let error = close(AMQPSoftError::ACCESSREFUSED, "ACCESS_REFUSED - in words that nobody knows yet");
        let nobody_named = Evidence { named: false, ..TOGETHER };
        assert_eq!(fault_of_close(&error, blamed("orders", 1), nobody_named), Fault::Suspect);
        let found = Evidence { alone: true, ..nobody_named };
        assert_eq!(fault_of_close(&error, blamed("orders", 1), found), Fault::Destination);
    }

    #[test]
    fn a_broken_connection_is_told_from_one_that_was_ended() {
        let ended = ErrorKind::ProtocolError(AMQPError::new(
            AMQPHardError::CONNECTIONFORCED.into(),
            "shutdown".into(),
        ));
        assert!(is_forced(&ended.into()));
        let internal: Error = ErrorKind::ProtocolError(AMQPError::new(
            AMQPHardError::INTERNALERROR.into(),
            "INTERNAL_ERROR".into(),
        ))
        .into();
        assert!(!is_forced(&internal));
        let broke = Evidence { broke: true, ..ALONE };
        assert_eq!(fault_of_close(&internal, blamed("x", 1), broke), Fault::Break);
        assert_eq!(fault_of_close(&internal, blamed("x", 1), ALONE), Fault::Unknown);
    }
}

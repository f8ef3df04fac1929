//! Postgres errors to what the relay does next. Codes: Postgres documentation, appendix A.

use crate::store::{StoreError, Trouble};

/// What to do where a pooler keeps us from having a session.
pub(super) const POOLER_REMEDY: &str = "a pooler (PgBouncer) needs OUTBOX_TRANSACTION_POOLING=true, no options in DATABASE_URL, and a direct DATABASE_URL to migrate";

/// What was written has not reached its rows, although they are there.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unreached(pub String);

/// The one place where an error of the database gets its meaning.
pub(super) fn classify(error: &sqlx::Error) -> StoreError {
    let (trouble, sentence) = match error {
        sqlx::Error::Database(database) => {
            let (code, message) = (database.code().unwrap_or_default(), database.message());
            let mut sentence = format!("{} (SQLSTATE {code})", first_line(message));
            if by_pooler(&code, message) {
                sentence = format!("{sentence}; {POOLER_REMEDY}");
            }
            (by_code(&code, message), sentence)
        }
        sqlx::Error::Tls(cause) => {
            (Trouble::Configuration, format!("TLS failed: {}", first_line(&cause.to_string())))
        }
        sqlx::Error::Configuration(cause) if cause.is::<Unreached>() => {
            (Trouble::Rejected, cause.to_string())
        }
        sqlx::Error::Configuration(cause) => (Trouble::Configuration, first_line(&cause.to_string())),
        sqlx::Error::Decode(_) | sqlx::Error::ColumnDecode { .. } | sqlx::Error::ColumnNotFound(_) => {
            (Trouble::Configuration, format!("the outbox table has an unexpected column: {error}"))
        }
        // The handshake itself fails this way.
        sqlx::Error::Io(cause) if cause.kind() == std::io::ErrorKind::InvalidData => {
            (Trouble::Configuration, format!("TLS failed: {}", first_line(&cause.to_string())))
        }
        sqlx::Error::Io(cause) => (Trouble::Outage, cause.to_string()),
        other => (Trouble::Outage, first_line(&other.to_string())),
    };
    StoreError { trouble, sentence }
}

/// A pooler that does not take our limits in the startup parameter `options` (08P01 PgBouncer, 0A000 RDS Proxy), or has given
/// us a connection that does not know what we prepared (26000), or on which another client prepared something of the
/// same name (42P05).
fn by_pooler(code: &str, message: &str) -> bool {
    match code {
        "26000" | "42P05" => true,
        "08P01" => message.contains("startup parameter"),
        "0A000" => message.contains("command-line options"),
        _ => false,
    }
}

fn by_code(code: &str, message: &str) -> Trouble {
    match code {
        _ if by_pooler(code, message) => Trouble::Configuration,
        // Serialization failure, deadlock, lock not available, statement time-out.
        "40001" | "40P01" | "55P03" | "57014" => Trouble::Contention,
        // "cached plan must not change result type": the next connection prepares anew.
        "0A000" if message.contains("cached plan") => Trouble::Contention,
        // "cannot set transaction read-write mode during recovery", and 25006: a standby.
        "0A000" | "25006" => Trouble::Outage,
        // The policy of a row; a missing grant has the same code.
        "42501" if message.contains("row-level security policy") => Trouble::Rejected,
        _ => match code.get(..2) {
            // Login, database, schema; grants, missing or renamed objects, wrong types.
            Some("28" | "3D" | "3F" | "42") => Trouble::Configuration,
            // Connection lost; state of the transaction; other reasons to roll back; out of resources, disk full; object in
            // use; shutting down; I/O error; settings file; internal error.
            Some("08" | "25" | "40" | "53" | "55" | "57" | "58" | "F0" | "XX") | None => Trouble::Outage,
            // Data, constraint, limit, and whatever a trigger of somebody's may raise, with a code of its own: what is written
            // of some row is at fault.
            Some(_) => Trouble::Rejected,
        },
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::{Trouble, by_code, by_pooler};

    #[test]
    fn codes_lead_to_the_action_of_the_failure_table() {
        for code in
            ["57P01", "57P03", "08006", "53300", "53100", "25006", "58030", "XX000", "55000", "40003", ""]
        {
            assert_eq!(by_code(code, ""), Trouble::Outage, "{code}");
        }
        for code in ["40001", "40P01", "55P03", "57014"] {
            assert_eq!(by_code(code, ""), Trouble::Contention, "{code}");
        }
        for code in ["28P01", "28000", "3D000", "42P01", "42501", "42703"] {
            assert_eq!(by_code(code, ""), Trouble::Configuration, "{code}");
        }
        for code in ["22P05", "23514", "44000", "54000", "P0001", "45000", "38000", "2F003", "27000", "ABCDE"]
        {
            assert_eq!(by_code(code, ""), Trouble::Rejected, "{code}");
        }
        let policy = "new row violates row-level security policy for table \"outbox\"";
        assert_eq!(by_code("42501", policy), Trouble::Rejected);
        for (code, message) in [
            ("08P01", "unsupported startup parameter: options"),
            ("08P01", "unsupported startup parameter in options: jit"),
            ("0A000", "Feature not supported: RDS Proxy currently doesn’t support command-line options."),
            ("26000", "prepared statement \"sqlx_s_1\" does not exist"),
            ("42P05", "prepared statement \"sqlx_s_1\" already exists"),
        ] {
            assert!(by_pooler(code, message), "{message}");
            assert_eq!(by_code(code, message), Trouble::Configuration, "{message}");
        }
        assert_eq!(by_code("08P01", "invalid message format"), Trouble::Outage);
        assert_eq!(by_code("0A000", "cached plan must not change result type"), Trouble::Contention);
        assert_eq!(
            by_code("0A000", "cannot set transaction read-write mode during recovery"),
            Trouble::Outage
        );
    }
}

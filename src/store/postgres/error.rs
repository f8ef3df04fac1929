//! Postgres errors to what the relay does next. Codes: Postgres documentation, appendix A.

use crate::store::{StoreError, Trouble};

/// The one place where an error of the database gets its meaning.
pub(super) fn classify(error: &sqlx::Error) -> StoreError {
    let (trouble, sentence) = match error {
        sqlx::Error::Database(database) => {
            let code = database.code().unwrap_or_default();
            let trouble = by_code(&code, database.message());
            (trouble, format!("{} (SQLSTATE {code})", first_line(database.message())))
        }
        sqlx::Error::Tls(cause) => {
            (Trouble::Configuration, format!("TLS failed: {}", first_line(&cause.to_string())))
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

fn by_code(code: &str, message: &str) -> Trouble {
    match code {
        // Serialization failure, deadlock, lock not available, statement time-out.
        "40001" | "40P01" | "55P03" | "57014" => Trouble::Contention,
        // "cached plan must not change result type": the next connection prepares anew.
        "0A000" if message.contains("cached plan") => Trouble::Contention,
        // "cannot set transaction read-write mode during recovery", and 25006: a standby.
        "0A000" | "25006" => Trouble::Outage,
        _ => match code.get(..2) {
            // Login, database, schema; grants, missing or renamed objects, wrong types.
            Some("28" | "3D" | "3F" | "42" | "22" | "23") => Trouble::Configuration,
            // Connection lost, shutting down, out of resources, disk full, I/O error, anything new.
            _ => Trouble::Outage,
        },
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::{Trouble, by_code};

    #[test]
    fn codes_lead_to_the_action_of_the_failure_table() {
        for code in ["57P01", "57P03", "08006", "53300", "53100", "25006", "58030", "XX000"] {
            assert_eq!(by_code(code, ""), Trouble::Outage, "{code}");
        }
        for code in ["40001", "40P01", "55P03", "57014"] {
            assert_eq!(by_code(code, ""), Trouble::Contention, "{code}");
        }
        for code in ["28P01", "28000", "3D000", "42P01", "42501", "42703"] {
            assert_eq!(by_code(code, ""), Trouble::Configuration, "{code}");
        }
        assert_eq!(by_code("0A000", "cached plan must not change result type"), Trouble::Contention);
        assert_eq!(
            by_code("0A000", "cannot set transaction read-write mode during recovery"),
            Trouble::Outage
        );
    }
}

//! The outbox table's name: parsed once, quoted always, so that a setting can never become SQL.

use std::fmt;

/// Longest identifier Postgres keeps (`NAMEDATALEN - 1`).
const IDENTIFIER_MAX: usize = 63;
/// Longest suffix of the relay's own tables and indexes (`_migrations`, `_waiting`).
const SUFFIX_MAX: usize = 12;

/// A validated `table` or `schema.table`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableName {
    schema: Option<String>,
    table: String,
}

impl TableName {
    /// Parses as Postgres does: unquoted parts are folded to lower case, quoted ones kept.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = Vec::new();
        let mut rest = text.trim();
        loop {
            let (part, after) = identifier(rest)?;
            parts.push(part);
            match after.strip_prefix('.') {
                Some(next) => rest = next,
                None if after.is_empty() => break,
                None => return Err(expected()),
            }
        }
        let table = parts.pop().ok_or_else(expected)?;
        let schema = parts.pop();
        if !parts.is_empty() {
            return Err(expected());
        }
        if table.len() + SUFFIX_MAX > IDENTIFIER_MAX {
            return Err(format!("expected a table name of at most {} bytes", IDENTIFIER_MAX - SUFFIX_MAX));
        }
        Ok(Self { schema, table })
    }

    /// `"billing"."outbox"`, ready for SQL.
    pub fn quoted(&self) -> String {
        self.with_suffix("")
    }

    /// `"billing"."outbox_lease"` for the suffix `_lease`: the relay's own tables live beside the outbox.
    pub fn with_suffix(&self, suffix: &str) -> String {
        let table = quote(&format!("{}{suffix}", self.table));
        match &self.schema {
            Some(schema) => format!("{}.{table}", quote(schema)),
            None => table,
        }
    }

    /// Name of an index of this table, quoted; indexes take no schema where they are created.
    pub fn index(&self, suffix: &str) -> String {
        quote(&format!("{}{suffix}", self.table))
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(schema) = &self.schema {
            write!(f, "{schema}.")?;
        }
        f.write_str(&self.table)
    }
}

fn expected() -> String {
    "expected a table name such as outbox or billing.outbox".to_owned()
}

fn quote(part: &str) -> String {
    format!("\"{}\"", part.replace('"', "\"\""))
}

/// A line break would end a comment of the migration that names the table, and braces mark the places of our SQL
/// texts where something is put in.
fn not_for_templates(letter: char) -> bool {
    letter.is_control() || matches!(letter, '{' | '}')
}

/// Splits one identifier off the front of the text.
fn identifier(text: &str) -> Result<(String, &str), String> {
    let (part, rest) = match text.strip_prefix('"') {
        Some(quoted) => {
            let end = quoted.find('"').ok_or_else(expected)?;
            (quoted[..end].to_owned(), &quoted[end + 1..])
        }
        None => {
            let end = text.find('.').unwrap_or(text.len());
            let part = &text[..end];
            let starts_well = part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
            let goes_on_well = part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '$');
            if !starts_well || !goes_on_well {
                return Err(expected());
            }
            (part.to_ascii_lowercase(), &text[end..])
        }
    };
    if part.is_empty() || part.len() > IDENTIFIER_MAX || part.contains(not_for_templates) {
        return Err(expected());
    }
    Ok((part, rest))
}

#[cfg(test)]
mod tests {
    use super::TableName;

    #[test]
    fn names_fold_and_quote_as_in_postgres() {
        let quoted = |text: &str| TableName::parse(text).map(|name| name.quoted());
        assert_eq!(quoted("outbox").as_deref(), Ok("\"outbox\""));
        assert_eq!(quoted("Billing.Outbox").as_deref(), Ok("\"billing\".\"outbox\""));
        assert_eq!(quoted("\"My Schema\".events").as_deref(), Ok("\"My Schema\".\"events\""));
    }

    #[test]
    fn a_setting_never_becomes_sql() {
        for text in [
            "",
            ".",
            "a.b.c",
            "1x",
            "out box",
            "outbox;drop table x",
            "\"x\"\"y\"",
            "\"",
            "a.",
            "\"a\"b",
            "\"a\nb\"",
            "\"a\rb\"",
            "\"{index:_a}\"",
            &"x".repeat(60),
        ] {
            assert!(TableName::parse(text).is_err(), "accepted {text:?}");
        }
    }
}

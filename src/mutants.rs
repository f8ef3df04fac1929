//! Deliberate mistakes, to show that the tests would notice them. `scripts/mutants` switches each on in turn and fails
//! if one survives. They exist only in builds with `--cfg mutants`, which no manifest and no release sets.

/// This mistake is switched on, by its name in `RELAY_MUTANT`. `false` at compile time in every normal build.
macro_rules! mutant {
    ($name:literal) => {{
        #[cfg(mutants)]
        let on = $crate::mutants::is_on($name);
        #[cfg(not(mutants))]
        let on = false;
        on
    }};
}

pub(crate) use mutant;

#[cfg(mutants)]
pub(crate) fn is_on(name: &str) -> bool {
    use std::sync::LazyLock;
    static ON: LazyLock<Option<String>> = LazyLock::new(|| std::env::var("RELAY_MUTANT").ok());
    ON.as_deref() == Some(name)
}

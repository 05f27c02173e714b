//! Where in a configuration something is, as keys from the top: `ports.vm1-eth0.vhost-user.socket`.
//!
//! The parts that read a file speak of places only in this form; [`super::spans`] alone knows lines and columns.

use std::fmt;

/// One step down: into a mapping by key, or into a list by position.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    Key(Box<str>),
    Item(usize),
}

/// The steps from the top of the document.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct KeyPath(pub(super) Vec<Step>);

impl KeyPath {
    /// The path through mappings by these keys.
    pub(super) fn of(keys: &[&str]) -> Self {
        Self(keys.iter().map(|&key| Step::Key(key.into())).collect())
    }

    /// The path that goes on from this one by `steps`.
    pub(super) fn join(&self, steps: &[Step]) -> Self {
        Self(self.0.iter().chain(steps).cloned().collect())
    }
}

impl fmt::Display for KeyPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (depth, step) in self.0.iter().enumerate() {
            match step {
                Step::Item(position) => write!(f, "[{position}]")?,
                Step::Key(key) => {
                    let dot = if depth == 0 { "" } else { "." };
                    let plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
                    if plain { write!(f, "{dot}{key}")? } else { write!(f, "{dot}{key:?}")? }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_reads_as_it_would_be_written() {
        let path = KeyPath::of(&["profiles", "web.2", "inherit"]).join(&[Step::Item(1)]);
        assert_eq!(path.to_string(), "profiles.\"web.2\".inherit[1]");
    }
}

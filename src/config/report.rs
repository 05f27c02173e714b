//! The mistakes of a configuration while it is being checked.
//!
//! The parts that check add a [`Finding`] by key path to the [`Report`]; the report turns paths into lines and columns if
//! there is a text behind them (a port made at run time has none), and ends as [`Diagnostics`] in the order of the file.

use std::sync::Arc;

use super::diagnostic::{Diagnostic, Diagnostics, Place, Related, SHOWN};
use super::key_path::KeyPath;
use super::spans::{Index, Mark};

/// A mistake by key path, not yet looked up.
#[derive(Debug)]
pub(super) struct Finding {
    path: KeyPath,
    at: At,
    message: String,
    help: Option<String>,
    related: Vec<(KeyPath, At, String)>,
}

/// What is meant of the place that a path leads to.
#[derive(Debug, Clone, Copy)]
pub(super) enum At {
    /// The key, or what its value has or lacks as a whole.
    Key,
    /// The value.
    Value,
    /// A known place of the text: for mistakes that keep the path from leading anywhere.
    Mark(Mark),
}

impl Finding {
    /// A mistake in the key at `path`, or in what it has or lacks as a whole.
    pub(super) fn key(path: &KeyPath, message: impl Into<String>) -> Self {
        Self { path: path.clone(), at: At::Key, message: message.into(), help: None, related: Vec::new() }
    }

    /// A mistake in the value at `path`.
    pub(super) fn value(path: &KeyPath, message: impl Into<String>) -> Self {
        Self { at: At::Value, ..Self::key(path, message) }
    }

    /// A mistake at a known place of the text.
    pub(super) fn mark(path: &KeyPath, mark: Mark, message: impl Into<String>) -> Self {
        Self { at: At::Mark(mark), ..Self::key(path, message) }
    }

    /// Adds what to do about it.
    pub(super) fn help(self, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..self }
    }

    /// Adds another place that is involved, and what is there.
    pub(super) fn related(mut self, path: &KeyPath, at: At, message: impl Into<String>) -> Self {
        self.related.push((path.clone(), at, message.into()));
        self
    }
}

/// The mistakes found so far, and the text that they are in.
#[derive(Debug)]
pub(super) struct Report {
    file: String,
    text: Arc<str>,
    /// `None` before the text was indexed, and if there is none.
    index: Option<Index>,
    found: Vec<Diagnostic>,
}

impl Report {
    /// A report on `text`, the content of `file`.
    pub(super) fn on(file: &str, text: &str) -> Self {
        Self { file: file.into(), text: text.into(), index: None, found: Vec::new() }
    }

    /// A report on values that stand in no file.
    pub(super) fn without_text() -> Self {
        Self::on("", "")
    }

    /// Gives the report its places and takes over the duplicate keys that were seen on the way.
    pub(super) fn index(&mut self, mut index: Index) {
        let duplicates = std::mem::take(&mut index.duplicates);
        self.index = Some(index);
        for duplicate in duplicates {
            let finding = Finding::mark(&duplicate.path, duplicate.second, "this key is written twice");
            self.add(finding.related(&duplicate.path, At::Mark(duplicate.first), "first written here"));
        }
    }

    /// Takes a mistake, unless there are too many already.
    pub(super) fn add(&mut self, finding: Finding) {
        if self.is_full() {
            return;
        }
        let Finding { path, at, message, help, related } = finding;
        let place = self.place(&path, at);
        let related = related.into_iter().filter_map(|(path, at, message)| {
            // A default that is in the way stands nowhere.
            let written = matches!(at, At::Mark(_)) || self.index.as_ref().is_some_and(|index| index.holds(&path));
            let place = self.place(&path, at).filter(|_| written)?;
            Some(Related { place, message })
        });
        let related = related.collect();
        self.found.push(Diagnostic { place, path: path.to_string(), message, help, related });
    }

    /// Whether further mistakes would not be shown.
    pub(super) fn is_full(&self) -> bool {
        self.found.len() >= SHOWN
    }

    /// The mistakes, or `value` if there are none. Without a value there is one: whoever could not make it reported why.
    pub(super) fn finish<T>(mut self, value: Option<T>) -> Result<T, Diagnostics> {
        match value {
            Some(value) if self.found.is_empty() => Ok(value),
            _ => {
                debug_assert!(!self.found.is_empty(), "nothing was made of the input and nobody said why");
                self.found.sort_by(|a, b| a.place.cmp(&b.place));
                Err(Diagnostics { list: self.found, text: self.text })
            }
        }
    }

    /// Where that is in the text, if there is one.
    fn place(&self, path: &KeyPath, at: At) -> Option<Place> {
        let mark = match (at, &self.index) {
            (At::Mark(mark), _) => mark,
            (At::Key, Some(index)) => index.key(path),
            (At::Value, Some(index)) => index.value(path),
            (At::Key | At::Value, None) => return None,
        };
        let Mark { line, column, length } = self.within(mark);
        Some(Place { file: self.file.clone(), line, column, length })
    }

    /// A place that an editor can go to: the parser may count one line more than there is at the end of the text, and columns beyond
    /// the end of a line of which it was looking for the end.
    fn within(&self, Mark { line, column, length }: Mark) -> Mark {
        // A lone carriage return ends a line too (YAML 1.2, 5.4).
        let text = self.text.replace("\r\n", "\n").replace('\r', "\n");
        let lines = text.split('\n').count();
        let columns = text.split('\n').nth(line.min(lines).saturating_sub(1)).map_or(0, |line| line.chars().count());
        let column = if line > lines { columns + 1 } else { column.min(columns + 1) };
        Mark { line: line.min(lines), column, length: length.min(columns + 1 - column).max(1) }
    }
}

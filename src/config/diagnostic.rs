//! What is wrong with a configuration: as data for programs and in rustc's style for people.
//!
//! The parts that check add a [`Finding`] by key path to the [`Report`]; the report turns paths into lines and columns if
//! there is a text behind them (a port made at run time has none), and ends as [`Diagnostics`] in the order of the file.

use std::fmt;
use std::sync::Arc;

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet, normalize_untrusted_str};
use serde::Serialize;

use super::key_path::KeyPath;
use super::spans::{Index, Mark};

/// Most mistakes that are shown at once. Nobody reads further, and reading goes on once per mistake.
const SHOWN: usize = 100;

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    /// Where it is in a file; `None` for a port that was made at run time.
    #[serde(flatten)]
    pub place: Option<Place>,
    /// The keys that lead to it, as in `ports.vm1-eth0.mac`; empty for the whole file.
    pub path: String,
    /// What is wrong, in a sentence without its full stop.
    pub message: String,
    /// What to do about it, if that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// Other places of the same file that the mistake involves.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub related: Vec<Related>,
}

/// A place in a file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Place {
    /// The file's name, as it was given to [`super::check`].
    pub file: String,
    /// Counts from 1.
    pub line: usize,
    /// Counts characters from 1.
    pub column: usize,
    /// Characters of that line that are meant.
    pub length: usize,
}

/// A second place that a mistake involves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Related {
    /// Where it is.
    #[serde(flatten)]
    pub place: Place,
    /// What is there.
    pub message: String,
}

/// Every mistake that was found, in the order of the file; at least one. Serializes as a list.
#[derive(Debug, Clone)]
pub struct Diagnostics {
    list: Vec<Diagnostic>,
    text: Arc<str>,
}

impl Diagnostics {
    /// The mistakes, in the order of the file.
    pub fn list(&self) -> &[Diagnostic] {
        &self.list
    }

    /// The mistakes as text for a terminal, each with the lines it is about; ends with a count.
    pub fn render(&self, color: bool) -> String {
        let renderer = if color { Renderer::styled() } else { Renderer::plain() };
        let mut out = String::new();
        for diagnostic in &self.list {
            out.push_str(&renderer.render(&[self.group(diagnostic)]));
            out.push_str("\n\n");
        }
        out.push_str(&match self.list.len() {
            1 => "1 error: nothing was changed\n".into(),
            SHOWN.. => format!("the first {SHOWN} errors: nothing was changed\n"),
            count => format!("{count} errors: nothing was changed\n"),
        });
        out
    }

    fn group<'a>(&'a self, diagnostic: &'a Diagnostic) -> Group<'a> {
        let title = match diagnostic.path.as_str() {
            "" => diagnostic.message.clone(),
            path => format!("{path}: {}", diagnostic.message),
        };
        let mut group =
            Level::ERROR.primary_title(title).elements(Vec::<Snippet<'a, annotate_snippets::Annotation<'a>>>::new());
        if let Some(place) = &diagnostic.place {
            group = group.element(self.snippet(place, &diagnostic.related));
        }
        match &diagnostic.help {
            Some(help) => group.element(Level::HELP.message(normalize_untrusted_str(help))),
            None => group,
        }
    }

    /// The lines from the first place to the last; what lies far between is folded by the renderer.
    fn snippet<'a>(
        &'a self,
        place: &'a Place,
        related: &'a [Related],
    ) -> Snippet<'a, annotate_snippets::Annotation<'a>> {
        let lines = || related.iter().map(|other| other.place.line).chain([place.line]);
        let (first, last) = (lines().min().unwrap_or(1), lines().max().unwrap_or(1));
        let begin = line_start(&self.text, first);
        let end = begin + line_start(&self.text[begin..], last - first + 2);
        let source = self.text[begin..end].trim_end_matches(['\n', '\r']);
        let span = |place: &Place| {
            let line = line_start(source, place.line - first + 1);
            let start = after_chars(source, line, place.column - 1);
            start..after_chars(source, start, place.length)
        };
        let others = related.iter().map(|other| AnnotationKind::Context.span(span(&other.place)).label(&other.message));
        Snippet::source(source)
            .path(&place.file)
            .line_start(first)
            .annotation(AnnotationKind::Primary.span(span(place)))
            .annotations(others)
    }
}

impl Serialize for Diagnostics {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.list.serialize(serializer)
    }
}

/// One line per mistake: `file:line:column: path: message (help)`. For logs; people get [`Diagnostics::render`].
impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, diagnostic) in self.list.iter().enumerate() {
            let newline = if position == 0 { "" } else { "\n" };
            write!(f, "{newline}{diagnostic}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(Place { file, line, column, .. }) = &self.place {
            write!(f, "{file}:{line}:{column}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        self.help.as_ref().map_or(Ok(()), |help| write!(f, " ({help})"))
    }
}

impl std::error::Error for Diagnostics {}

/// The byte at which line `number` (from 1) of `text` begins, or its end.
fn line_start(text: &str, number: usize) -> usize {
    match number {
        0 | 1 => 0,
        _ => text.match_indices('\n').nth(number - 2).map_or(text.len(), |(newline, _)| newline + 1),
    }
}

/// The byte `count` characters after byte `from` of `text`, or the end of its line.
fn after_chars(text: &str, from: usize, count: usize) -> usize {
    let line = text[from..].split('\n').next().unwrap_or("");
    from + line.char_indices().nth(count).map_or(line.len(), |(offset, _)| offset)
}

/// A mistake by key path, not yet looked up.
#[derive(Debug)]
pub(super) struct Finding {
    path: KeyPath,
    at: At,
    message: String,
    help: Option<String>,
    related: Vec<(KeyPath, String)>,
}

#[derive(Debug)]
enum At {
    Key,
    Value,
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
    pub(super) fn help(self, help: impl Into<Option<String>>) -> Self {
        Self { help: help.into(), ..self }
    }

    /// Adds another key that is involved, and what is there.
    pub(super) fn related(mut self, path: KeyPath, message: impl Into<String>) -> Self {
        self.related.push((path, message.into()));
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
            let first = format!("first written on line {}", duplicate.first.line);
            let finding = Finding::mark(&duplicate.path, duplicate.second, "this key is written twice").help(first);
            let place = self.place(duplicate.first);
            self.add(finding);
            if let Some(diagnostic) = self.found.last_mut() {
                diagnostic.help = None;
                diagnostic.related.push(Related { place, message: "first written here".into() });
            }
        }
    }

    /// Takes a mistake, unless there are too many already.
    pub(super) fn add(&mut self, finding: Finding) {
        if self.is_full() {
            return;
        }
        let place = match (&self.index, finding.at) {
            (_, At::Mark(mark)) => Some(self.place(mark)),
            (Some(index), At::Key) => Some(self.place(index.key(&finding.path))),
            (Some(index), At::Value) => Some(self.place(index.value(&finding.path))),
            (None, _) => None,
        };
        let mut related = Vec::new();
        if let Some(index) = &self.index {
            related = finding.related.iter().map(|(path, message)| (self.place(index.key(path)), message)).collect();
        }
        let related = related.into_iter().map(|(place, message)| Related { place, message: message.clone() }).collect();
        let Finding { path, message, help, .. } = finding;
        self.found.push(Diagnostic { place, path: path.to_string(), message, help, related });
    }

    /// Whether further mistakes would not be shown.
    pub(super) fn is_full(&self) -> bool {
        self.found.len() >= SHOWN
    }

    /// The mistakes, or `value` if there are none.
    pub(super) fn finish<T>(mut self, value: T) -> Result<T, Diagnostics> {
        if self.found.is_empty() {
            return Ok(value);
        }
        self.found.sort_by(|a, b| a.place.cmp(&b.place));
        Err(Diagnostics { list: self.found, text: self.text })
    }

    fn place(&self, mark: Mark) -> Place {
        Place { file: self.file.clone(), line: mark.line, column: mark.column, length: mark.length }
    }
}

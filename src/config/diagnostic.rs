//! What is wrong with a configuration: as data for programs and in rustc's style for people.
//!
//! Only the outside sees these. Inside, mistakes are collected by key path, in [`super::report`].

use std::fmt;
use std::sync::Arc;

use annotate_snippets::{Annotation, AnnotationKind, Group, Level, Origin, Renderer, Snippet, normalize_untrusted_str};
use serde::Serialize;

/// Most mistakes that are shown at once. Nobody reads further, and reading goes on once per mistake.
pub(super) const SHOWN: usize = 100;

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
    pub(super) list: Vec<Diagnostic>,
    pub(super) text: Arc<str>,
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
            1 => "1 error\n".into(),
            SHOWN.. => format!("{SHOWN} errors, and perhaps more\n"),
            count => format!("{count} errors\n"),
        });
        out
    }

    fn group<'a>(&'a self, diagnostic: &'a Diagnostic) -> Group<'a> {
        let title = match diagnostic.path.as_str() {
            "" => diagnostic.message.clone(),
            path => format!("{path}: {}", diagnostic.message),
        };
        let mut group = Group::with_title(Level::ERROR.primary_title(title));
        if let Some(place) = &diagnostic.place {
            group = match self.snippet(place, &diagnostic.related) {
                Some(snippet) => group.element(snippet),
                None => group.element(Origin::path(&place.file).line(place.line).char_column(place.column)),
            };
        }
        match &diagnostic.help {
            Some(help) => group.element(Level::HELP.message(normalize_untrusted_str(help))),
            None => group,
        }
    }

    /// The lines from the first place to the last; what lies far between is folded by the renderer. `None` if that is
    /// more text than it should take in.
    fn snippet<'a>(&'a self, place: &'a Place, related: &'a [Related]) -> Option<Snippet<'a, Annotation<'a>>> {
        /// The renderer looks at every character, for each mistake anew.
        const SOURCE_BYTES: usize = 64 * 1024;
        let lines = || related.iter().map(|other| other.place.line).chain([place.line]);
        let (first, last) = (lines().min()?, lines().max()?);
        let begin = line_start(&self.text, first);
        let end = begin + line_start(&self.text[begin..], last - first + 2);
        let source = self.text[begin..end].trim_end_matches(['\n', '\r']);
        if source.len() > SOURCE_BYTES {
            return None;
        }
        let span = |place: &Place| {
            let line = line_start(source, place.line - first + 1);
            let start = after_chars(source, line, place.column.saturating_sub(1));
            start..after_chars(source, start, place.length)
        };
        let others = related.iter().map(|other| AnnotationKind::Context.span(span(&other.place)).label(&other.message));
        let snippet = Snippet::source(source).path(&place.file).line_start(first);
        Some(snippet.annotation(AnnotationKind::Primary.span(span(place))).annotations(others))
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

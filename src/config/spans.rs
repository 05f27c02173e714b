//! Where each key and value of a YAML text stands, and the refusal of texts that are not plain data.
//!
//! A tree of the same shape as the document, built from the parser's events without recursion, so depth costs heap and
//! is bounded by [`DEPTH`]. Aliases are refused whole: no document can then expand beyond its own length. Duplicate keys
//! are collected, not fatal, so that the rest of the file is still checked.

use std::collections::BTreeMap;

use saphyr_parser::{Event, Marker, Parser, Span};

use super::key_path::{KeyPath, Step};

/// Deepest nesting of mappings and lists. The deepest key of the format is at 5.
const DEPTH: usize = 32;

/// Most keys and values of a text, because the index is larger than what it indexes. A full host with every key has a fifth of it.
const NODES: usize = 1 << 20;

/// Duplicate keys that are collected; the rest are not shown.
const DUPLICATES: usize = 100;

/// One line's piece of the text: line and column count from 1, column and length in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mark {
    pub(super) line: usize,
    pub(super) column: usize,
    pub(super) length: usize,
}

/// Why a text was refused whole.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) message: String,
    pub(super) mark: Mark,
}

/// A key that is written a second time in the same mapping.
#[derive(Debug)]
pub(super) struct Duplicate {
    pub(super) path: KeyPath,
    pub(super) first: Mark,
    pub(super) second: Mark,
}

/// Key paths to places.
#[derive(Debug)]
pub(super) struct Index {
    root: Node,
    pub(super) duplicates: Vec<Duplicate>,
}

#[derive(Debug)]
struct Node {
    key: Mark,
    value: Mark,
    children: BTreeMap<Step, Node>,
}

impl Index {
    /// Reads `text` once. `None` if there is no document in it, or only an empty one.
    pub(super) fn of(text: &str) -> Result<Option<Self>, Refused> {
        let mut builder = Builder { open: Vec::new(), root: None, nodes: 0, duplicates: Vec::new() };
        let mut parser = Parser::new_from_str(text);
        while let Some(next) = parser.next_event() {
            match next {
                Ok((event, span)) => builder.event(event, span)?,
                Err(error) => return Err(Refused { message: error.info().into(), mark: Mark::point(error.marker()) }),
            }
        }
        let duplicates = builder.duplicates;
        Ok(builder.root.map(|root| Self { root, duplicates }))
    }

    /// Where the key at `path` stands, or the nearest key above it that is written.
    pub(super) fn key(&self, path: &KeyPath) -> Mark {
        self.node(path).0.key
    }

    /// Where the value at `path` stands. For a value over several lines, or one that is not written, the key's place.
    pub(super) fn value(&self, path: &KeyPath) -> Mark {
        match self.node(path) {
            (node, true) if node.value.length > 0 => node.value,
            (node, _) => node.key,
        }
    }

    /// Whether `path` is written.
    pub(super) fn holds(&self, path: &KeyPath) -> bool {
        self.node(path).1
    }

    /// The node at `path`, or the deepest above it, and whether it is the very one.
    fn node(&self, path: &KeyPath) -> (&Node, bool) {
        let mut node = &self.root;
        for step in &path.0 {
            match node.children.get(step) {
                Some(child) => node = child,
                None => return (node, false),
            }
        }
        (node, true)
    }
}

impl Mark {
    /// One character at `marker`; the parser counts columns from 0.
    fn point(marker: &Marker) -> Self {
        Self { line: marker.line().max(1), column: marker.col() + 1, length: 1 }
    }

    /// The span; of one over several lines only its first character, and of an empty one (a mapping without braces begins
    /// with one) the character that follows.
    fn over(span: &Span) -> Self {
        let columns = span.end.col().saturating_sub(span.start.col());
        let length = if span.start.line() == span.end.line() { columns.max(1) } else { 1 };
        Self { length, ..Self::point(&span.start) }
    }
}

/// A mapping or list whose end has not come yet.
struct Open {
    step: Option<Step>,
    node: Node,
    mapping: bool,
    /// The key that was read and whose value comes next.
    key: Option<(Box<str>, Mark)>,
}

struct Builder {
    open: Vec<Open>,
    root: Option<Node>,
    nodes: usize,
    duplicates: Vec<Duplicate>,
}

impl Builder {
    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), Refused> {
        let refused = |message: &str| Err(Refused { message: message.into(), mark: Mark::over(&span) });
        self.nodes += 1;
        match event {
            _ if self.nodes > NODES => refused(&format!("more than {NODES} keys and values")),
            Event::Alias(_) => refused("aliases are not read here: settings that repeat belong into a profile"),
            Event::Scalar(_, _, _, Some(_)) | Event::SequenceStart(_, Some(_)) | Event::MappingStart(_, Some(_)) => {
                refused("tags (`!name`) are not read here")
            }
            Event::DocumentStart(_) if self.root.is_some() => {
                refused("a second document begins here: a file holds one")
            }
            Event::SequenceStart(..) | Event::MappingStart(..) if self.open.len() == DEPTH => {
                refused(&format!("nested more than {DEPTH} deep"))
            }
            Event::SequenceStart(..) => self.begin(false, span),
            Event::MappingStart(..) => self.begin(true, span),
            Event::Scalar(text, ..) => self.scalar(&text, span),
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(open) = self.open.pop() {
                    self.place(open.step, open.node);
                }
                Ok(())
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentStart(_) | Event::DocumentEnd => {
                Ok(())
            }
        }
    }

    fn scalar(&mut self, text: &str, span: Span) -> Result<(), Refused> {
        if let Some(Open { mapping: true, key: key @ None, .. }) = self.open.last_mut() {
            *key = Some((text.into(), Mark::over(&span)));
            return Ok(());
        }
        let (step, key) = self.step(&span);
        let value = if text.is_empty() && span.is_empty() { Mark { length: 0, ..key } } else { Mark::over(&span) };
        self.place(step, Node { key, value, children: BTreeMap::new() });
        Ok(())
    }

    fn begin(&mut self, mapping: bool, span: Span) -> Result<(), Refused> {
        if let Some(Open { mapping: true, key: None, .. }) = self.open.last() {
            return Err(Refused { message: "a key is a plain word".into(), mark: Mark::over(&span) });
        }
        let (step, key) = self.step(&span);
        let node = Node { key, value: Mark { length: 0, ..key }, children: BTreeMap::new() };
        self.open.push(Open { step, node, mapping, key: None });
        Ok(())
    }

    /// How the value that begins at `span` hangs in the mapping or list around it, and the place of its key.
    fn step(&mut self, span: &Span) -> (Option<Step>, Mark) {
        match self.open.last_mut() {
            None => (None, Mark::point(&span.start)),
            Some(Open { mapping: false, node, .. }) => (Some(Step::Item(node.children.len())), Mark::over(span)),
            Some(Open { key, .. }) => match key.take() {
                Some((text, mark)) => (Some(Step::Key(text)), mark),
                None => (None, Mark::point(&span.start)),
            },
        }
    }

    fn place(&mut self, step: Option<Step>, node: Node) {
        match (self.open.last_mut(), step) {
            (Some(parent), Some(step)) => {
                let Some(first) = parent.node.children.get(&step).map(|node| node.key) else {
                    parent.node.children.insert(step, node);
                    return;
                };
                if self.duplicates.len() < DUPLICATES {
                    let above = self.open.iter().filter_map(|open| open.step.clone());
                    let path = KeyPath(above.chain([step]).collect());
                    self.duplicates.push(Duplicate { path, first, second: node.key });
                }
            }
            _ => self.root = Some(node),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn index(text: &str) -> Index {
        Index::of(text).unwrap().unwrap()
    }

    #[test]
    fn keys_and_values_are_found_where_they_stand() {
        let index = index("version: 1\nports:\n  vm1: { mac: \"52:54\", tags: [a, bc] }\n  vm2:\n");
        let at = |mark: Mark| (mark.line, mark.column, mark.length);
        assert_eq!(at(index.key(&KeyPath::of(&["ports", "vm1", "mac"]))), (3, 10, 3));
        assert_eq!(at(index.value(&KeyPath::of(&["ports", "vm1", "mac"]))), (3, 15, 7));
        assert_eq!(at(index.value(&KeyPath::of(&["ports", "vm1", "tags"]).join(&[Step::Item(1)]))), (3, 34, 2));
        assert_eq!(at(index.value(&KeyPath::of(&["ports", "vm2"]))), (4, 3, 3), "nothing written: its key");
        assert_eq!(at(index.value(&KeyPath::of(&["ports", "vm1", "mtu"]))), (3, 3, 3), "missing: the key above");
    }

    #[test]
    fn duplicates_are_collected_with_both_places() {
        let index = index("a: 1\nb: {c: 1, c: {d: 2}}\na: 2\n");
        let seen: Vec<_> = index
            .duplicates
            .iter()
            .map(|d| (d.path.to_string(), d.first.line, d.second.line, d.second.column))
            .collect();
        assert_eq!(seen, [("b.c".to_string(), 2, 2, 11), ("a".to_string(), 1, 3, 1)]);
    }

    #[test]
    fn what_is_not_plain_data_is_refused() {
        let bomb = format!("a: {}{}", "[".repeat(40), "]".repeat(40));
        for (text, says) in [
            ("a: &x [1]\nb: *x\n", "aliases"),
            ("a: !secret 1\n", "tags"),
            ("a: 1\n---\nb: 1\n", "second document"),
            ("? [a]\n: 1\n", "plain word"),
            (bomb.as_str(), "nested"),
        ] {
            let refused = Index::of(text).unwrap_err();
            assert!(refused.message.contains(says), "{text}: {}", refused.message);
        }
        assert!(Index::of("").unwrap().is_none());
        assert!(Index::of("# nothing\n").unwrap().is_none());
    }
}

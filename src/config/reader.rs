//! Reads serde types from a tree of values, and reports every mistake in it, not only the first.
//!
//! serde stops at the first error. Each error here knows which piece of the tree it is about, so [`read`] reads again
//! without that piece, until nothing is left to refuse. What was read with a piece left out is never handed on.
//!
//! The error type is our own because serde's texts are made for programmers: it keeps the known keys for a suggestion
//! and says what was found in an operator's words. A mapping written as nothing (`networks: { lan: }`) is an empty one.

use std::collections::HashSet;
use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeSeed, Deserializer, Error, Expected, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor,
};
use serde_json::Value;

use super::key_path::{KeyPath, Step};
use super::nearest::nearest;
use super::report::{Finding, Report};

/// The value at `path` as a `T`; `None` if anything in it was refused, which is then in `report`.
pub(super) fn read<'a, T: serde::Deserialize<'a>>(value: &'a Value, path: &KeyPath, report: &mut Report) -> Option<T> {
    let mut left_out = HashSet::new();
    let mut places: Vec<KeyPath> = Vec::new();
    while !report.is_full() {
        let mut refusal = match T::deserialize(Node { value, left_out: &left_out }) {
            Ok(read) => return places.is_empty().then_some(read),
            Err(refusal) => refusal,
        };
        refusal.steps.reverse();
        let place = path.join(&refusal.steps);
        // A required key that was just left out for its value is not missing.
        let known = refusal.missing.is_some_and(|key| places.contains(&place.join(&[Step::Key(key.into())])));
        if !known {
            report.add(refusal.finding(&place));
        }
        left_out.insert(refusal.piece?);
        places.push(place);
    }
    None
}

/// A piece of the tree that is being read, by its address: pieces are compared and never reached through this.
type Piece = *const Value;

/// Why a piece of the tree was refused.
#[derive(Debug)]
struct Refusal {
    /// Innermost first, as it is noted on the way out.
    steps: Vec<Step>,
    /// `None` if it is the whole tree.
    piece: Option<Piece>,
    /// Whether the key itself is wrong, not its value.
    key: bool,
    message: String,
    help: Option<String>,
    missing: Option<&'static str>,
}

impl Refusal {
    fn within(mut self, step: Step, value: &Value) -> Self {
        self.steps.push(step);
        self.piece.get_or_insert(value);
        self
    }

    fn finding(&self, place: &KeyPath) -> Finding {
        let at_key = self.key || self.missing.is_some();
        let finding = if at_key { Finding::key(place, &self.message) } else { Finding::value(place, &self.message) };
        match &self.help {
            Some(help) => finding.help(help),
            None => finding,
        }
    }

    fn choice(what: &str, written: &str, known: &'static [&'static str]) -> Self {
        let help = nearest(written, known.iter().copied()).map(|near| format!("did you mean `{near}`?"));
        let mut refusal = Self::custom(format_args!("{what} `{}`", clipped(written)));
        refusal.help = help.or_else(|| (!known.is_empty()).then(|| format!("known here: {}", listed(known))));
        refusal
    }
}

impl std::error::Error for Refusal {}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for Refusal {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self { steps: Vec::new(), piece: None, key: false, message: message.to_string(), help: None, missing: None }
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::invalid_value(found, expected)
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::custom(format_args!("expected {expected}, found {}", Found(found)))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::choice("unknown word", variant, expected)
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self { key: true, ..Self::choice("unknown key", field, expected) }
    }

    fn missing_field(field: &'static str) -> Self {
        Self { missing: Some(field), ..Self::custom(format_args!("the key `{field}` is missing")) }
    }
}

/// What was found, in words for somebody who writes YAML and not Rust.
struct Found<'a>(Unexpected<'a>);

impl fmt::Display for Found<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Unexpected::Str(text) => write!(f, "\"{}\"", clipped(text)),
            Unexpected::Bool(value) => write!(f, "{value}"),
            Unexpected::Unsigned(number) => write!(f, "{number}"),
            Unexpected::Signed(number) => write!(f, "{number}"),
            Unexpected::Float(number) => write!(f, "{number}"),
            Unexpected::Unit | Unexpected::Option => f.write_str("nothing"),
            Unexpected::Map => f.write_str("a mapping"),
            Unexpected::Seq => f.write_str("a list"),
            other => write!(f, "{other}"),
        }
    }
}

/// The first characters of a text that may be as long as the file.
pub(super) fn clipped(text: &str) -> String {
    /// Enough to recognise a word by, and a path nearly always.
    const SHOWN: usize = 120;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.into(),
    }
}

fn listed(words: &[&str]) -> String {
    words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

/// A piece of the tree, to be read.
#[derive(Clone, Copy)]
struct Node<'a, 'p> {
    value: &'a Value,
    left_out: &'p HashSet<Piece>,
}

impl<'a> Node<'a, '_> {
    fn found(&self) -> Unexpected<'a> {
        match self.value {
            Value::Null => Unexpected::Unit,
            Value::Bool(value) => Unexpected::Bool(*value),
            Value::Number(number) => match (number.as_u64(), number.as_i64()) {
                (Some(number), _) => Unexpected::Unsigned(number),
                (None, Some(number)) => Unexpected::Signed(number),
                (None, None) => Unexpected::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Value::String(text) => Unexpected::Str(text),
            Value::Array(_) => Unexpected::Seq,
            Value::Object(_) => Unexpected::Map,
        }
    }

    fn refuse<T>(&self, expected: String) -> Result<T, Refusal> {
        Err(Refusal::custom(format_args!("expected {expected}, found {}", Found(self.found()))))
    }
}

impl<'de> Deserializer<'de> for Node<'de, '_> {
    type Error = Refusal;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        match self.value {
            Value::String(text) => visitor.visit_borrowed_str(text),
            Value::Array(items) => visitor.visit_seq(Items { rest: items.iter().enumerate(), left_out: self.left_out }),
            Value::Object(entries) => visitor.visit_map(Entries::of(Some(entries), self.left_out)),
            _ => match self.found() {
                Unexpected::Bool(value) => visitor.visit_bool(value),
                Unexpected::Unsigned(number) => visitor.visit_u64(number),
                Unexpected::Signed(number) => visitor.visit_i64(number),
                Unexpected::Float(number) => visitor.visit_f64(number),
                _ => visitor.visit_unit(),
            },
        }
    }

    /// A key that is written has a value: `mac:` with nothing behind it is a mistake, not "no address".
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        visitor.visit_some(self)
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Refusal> {
        match self.value {
            Value::Null => visitor.visit_map(Entries::of(None, self.left_out)),
            Value::Object(_) => self.deserialize_any(visitor),
            _ => self.refuse("a mapping".into()),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        keys: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refusal> {
        match self.value {
            Value::Null | Value::Object(_) => self.deserialize_map(visitor),
            _ if keys.is_empty() => self.refuse("`{}`".into()),
            _ => self.refuse(format!("a mapping with keys such as {}", listed(&keys[..keys.len().min(3)]))),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        words: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Refusal> {
        match self.value {
            Value::String(text) => visitor.visit_enum(text.as_str().into_deserializer()),
            _ => self.refuse(format!("one of {}", listed(words))),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Refusal> {
        visitor.visit_newtype_struct(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct identifier ignored_any
    }
}

struct Items<'a, 'p> {
    rest: std::iter::Enumerate<std::slice::Iter<'a, Value>>,
    left_out: &'p HashSet<Piece>,
}

impl<'de> SeqAccess<'de> for Items<'de, '_> {
    type Error = Refusal;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Refusal> {
        let left_out = self.left_out;
        let Some((position, value)) = self.rest.find(|(_, value)| !left_out.contains(&std::ptr::from_ref(*value)))
        else {
            return Ok(None);
        };
        let item = seed.deserialize(Node { value, left_out });
        item.map(Some).map_err(|refusal| refusal.within(Step::Item(position), value))
    }
}

struct Entries<'a, 'p> {
    rest: Option<serde_json::map::Iter<'a>>,
    next: Option<(&'a String, &'a Value)>,
    left_out: &'p HashSet<Piece>,
}

impl<'a, 'p> Entries<'a, 'p> {
    fn of(entries: Option<&'a serde_json::Map<String, Value>>, left_out: &'p HashSet<Piece>) -> Self {
        Self { rest: entries.map(serde_json::Map::iter), next: None, left_out }
    }
}

impl<'de> MapAccess<'de> for Entries<'de, '_> {
    type Error = Refusal;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Refusal> {
        let left_out = self.left_out;
        let mut rest = self.rest.iter_mut().flatten();
        self.next = rest.find(|(_, value)| !left_out.contains(&std::ptr::from_ref(*value)));
        let Some((key, value)) = self.next else { return Ok(None) };
        let text: StrDeserializer<'_, Refusal> = key.as_str().into_deserializer();
        let refused = |refusal: Refusal| Refusal { key: true, ..refusal }.within(Step::Key(key.as_str().into()), value);
        seed.deserialize(text).map(Some).map_err(refused)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Refusal> {
        let (key, value) = self.next.take().expect("serde asks for a value only after its key");
        let read = seed.deserialize(Node { value, left_out: self.left_out });
        read.map_err(|refusal| refusal.within(Step::Key(key.as_str().into()), value))
    }
}

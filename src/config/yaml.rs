//! YAML text to a tree of plain values: the only file that knows which YAML library decides what a scalar means.
//!
//! Duplicate keys, aliases, tags and depth are refused before, by [`super::spans`]; what is left here is the core schema
//! (which scalars are numbers, booleans or null).

use serde_json::Value;

/// Why the text could not be read, with the place if the library knows it; lines and columns count from 1.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) message: String,
    pub(super) place: Option<(usize, usize)>,
}

/// The document in `text` as a tree of values.
pub(super) fn read(text: &str) -> Result<Value, Refused> {
    serde_yaml::from_str(text).map_err(|error| Refused {
        message: error.to_string(),
        place: error.location().map(|place| (place.line(), place.column())),
    })
}

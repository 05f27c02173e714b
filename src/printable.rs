//! Text that somebody else chose, made fit for a terminal and a log: [`name`] where it enters, [`text`] where it is printed.
//!
//! A name can hold escape sequences that clear a screen or retitle a window, line breaks that forge lines of a log or a table,
//! and characters that reverse or hide what stands beside them. What enters from a peer keeps only visible ASCII, and as much
//! of it as a sentence can bear. What is printed is looked at once more, whoever it is from, and keeps every script.

use std::borrow::Cow;

/// Bytes of a name that a sentence can bear once it is escaped. A path of `/proc/self/fd` says within these what it is.
const NAME_BYTES: usize = 160;

/// A name that a peer chose, as visible ASCII in at most 160 bytes: anything else is written as `\x1b`, `\n` or `\\`, and what is
/// cut off is replaced by `...`.
pub fn name(bytes: &[u8]) -> String {
    let mut name = String::new();
    for &byte in bytes {
        let escaped = byte.escape_ascii();
        if name.len() + escaped.len() > NAME_BYTES {
            return name + "...";
        }
        name.extend(escaped.map(char::from));
    }
    name
}

/// `text` as one line: control characters and those that are not seen but change how others look are written as `\u{1b}`.
pub fn line(text: &str) -> Cow<'_, str> {
    escaped(text, is_harmful)
}

/// `text` as the lines that it has, each of them like a [`line()`].
pub fn text(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c != '\n' && is_harmful(c))
}

fn escaped(text: &str, harmful: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&harmful) {
        return Cow::Borrowed(text);
    }
    let mut safe = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if harmful(c) { safe.extend(c.escape_default()) } else { safe.push(c) }
    }
    Cow::Owned(safe)
}

/// Control characters (Cc), line and paragraph separators, and format characters (Cf: marks and overrides of direction, joiners,
/// invisible operators, tags). Unicode's own list, which grows slowly; names of peers do not depend on it.
fn is_harmful(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{180e}'
                | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
                | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_visible_ascii_of_bounded_length() {
        assert_eq!(name(b"/memfd:guest (deleted)"), "/memfd:guest (deleted)");
        assert_eq!(name(b"a\x1b[2J\n\\\xff"), r"a\x1b[2J\n\\\xff");
        for byte in 0..=u8::MAX {
            let long = name(&[byte; 4096]);
            assert!(long.len() <= NAME_BYTES + 3 && long.ends_with("..."), "{byte}: {long}");
            assert!(long.bytes().all(|b| b.is_ascii_graphic() || b == b' '), "{byte}: {long}");
        }
    }

    #[test]
    fn what_is_printed_keeps_every_script_and_no_control() {
        let good = "Büro 1: ネットワーク, сеть; 4 KiB → 8 KiB";
        assert!(matches!(line(good), Cow::Borrowed(same) if same == good));
        assert_eq!(line("a\n\u{9b}2J\u{202e}b\t"), r"a\n\u{9b}2J\u{202e}b\t");
        assert_eq!(text("one\ntwo\r\x1b"), "one\ntwo\\r\\u{1b}");
    }
}

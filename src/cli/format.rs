//! How numbers, tables and sentences look. ASCII only, so that they survive every terminal, mail and ticket.

use comfy_table::{CellAlignment, ContentArrangement, Table};

use crate::printable;

/// A table without lines: columns apart by two blanks, numbers flush right; no headline if `header` is empty. A cell has one
/// line, whatever it holds.
pub(super) fn table(header: &[&str], numbers: &[usize], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    if !header.is_empty() {
        table.set_header(header);
    }
    table.add_rows(rows.map(|row| row.iter().map(|cell| printable::line(cell).into_owned()).collect::<Vec<_>>()));
    let last = table.column_count().saturating_sub(1);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, if index == last { 0 } else { 2 }));
        if numbers.contains(&index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_string() + "\n").collect()
}

/// A count that can be taken in at a glance: `950`, `12.3k`, `4.56M`.
pub(super) fn count(value: u64) -> String {
    scaled(value, 1000, &["", "k", "M", "G", "T", "P", "E"])
}

/// A size in bytes: `950 B`, `12.3 KiB`.
pub(super) fn size(bytes: u64) -> String {
    scaled(bytes, 1024, &[" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"])
}

fn scaled(value: u64, step: u64, units: &[&str]) -> String {
    let mut scale = 0;
    let mut rest = value as f64;
    // What would be printed as a full step belongs to the next unit.
    while rest >= step as f64 - 0.05 && scale + 1 < units.len() {
        rest /= step as f64;
        scale += 1;
    }
    match (scale, rest) {
        (0, _) => format!("{value}{}", units[0]),
        (_, small) if small < 9.995 => format!("{small:.2}{}", units[scale]),
        (_, large) => format!("{large:.1}{}", units[scale]),
    }
}

/// A count in full with its thousands apart: `1,234,567`.
pub(super) fn exact(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// How long something has lasted: `42 s`, `7 min`, `3 h 12 min`, `5 d 3 h`.
pub(super) fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{minutes} min"),
        3600..86_400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// `1 port`, `2 ports`.
pub(super) fn several(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_can_be_taken_in_at_a_glance() {
        let counts = [0, 999, 1000, 1234, 12_345, 99_999, 999_999, 1_000_000, u64::MAX].map(count);
        assert_eq!(counts, ["0", "999", "1.00k", "1.23k", "12.3k", "100.0k", "1.00M", "1.00M", "18.4E"]);
        assert_eq!([0, 1023, 1024, 1_572_864].map(size), ["0 B", "1023 B", "1.00 KiB", "1.50 MiB"]);
        assert_eq!([7, 1000, 1_234_567].map(exact), ["7", "1,000", "1,234,567"]);
        assert_eq!([59, 60, 3700, 90_000].map(duration), ["59 s", "1 min", "1 h 1 min", "1 d 1 h"]);
    }

    #[test]
    fn columns_are_aligned_and_nothing_trails() {
        let rows = [vec!["a".into(), "1".into(), "x".into()], vec!["long".into(), "100".into(), String::new()]];
        let text = table(&["NAME", "COUNT", "WHY"], &[1], rows.into_iter());
        assert_eq!(text, "NAME  COUNT  WHY\na         1  x\nlong    100\n");
        let forged = table(&[], &[], [vec!["a\nb  up".into(), "\u{1b}[2J".into()]].into_iter());
        assert_eq!(forged, "a\\nb  up  \\u{1b}[2J\n");
        let facts = [vec!["network".into(), "lan".into()], vec!["MAC".into(), "x".into()]];
        assert_eq!(table(&[], &[], facts.into_iter()), "network  lan\nMAC      x\n");
    }
}

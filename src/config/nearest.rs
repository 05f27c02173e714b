//! The word that was probably meant, for "did you mean" lines.

/// The candidate nearest to `written`, if one is near enough to be worth showing.
///
/// Near is at most a third of the word's letters wrong (a swap of neighbours counts once), or the only candidate that
/// goes on from what was written: `latency` for `latency-sensitivity`.
pub(super) fn nearest<'a>(written: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    /// Longer words than this are not compared: names end at 63 bytes and keys are shorter.
    const COMPARED_BYTES: usize = 64;
    if written.is_empty() || written.len() > COMPARED_BYTES {
        return None;
    }
    let allowed = (written.chars().count() / 3).max(1);
    let mut best: Option<(usize, &str)> = None;
    let mut longer = Vec::new();
    for candidate in candidates {
        if candidate.starts_with(written) {
            longer.push(candidate);
        }
        if candidate.len() <= COMPARED_BYTES {
            let steps = distance(written, candidate);
            if steps <= allowed && best.is_none_or(|(fewest, _)| steps < fewest) {
                best = Some((steps, candidate));
            }
        }
    }
    match (best, longer.as_slice()) {
        (Some((_, candidate)), _) => Some(candidate),
        (None, [only]) => Some(only),
        _ => None,
    }
}

/// Letters to insert, remove, replace or swap with their neighbour to turn `a` into `b`; case does not count.
fn distance(a: &str, b: &str) -> usize {
    let letters = |text: &str| text.chars().flat_map(char::to_lowercase).collect::<Vec<_>>();
    let (a, b) = (letters(a), letters(b));
    let mut before = vec![0; b.len() + 1];
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replaced = last[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut steps = replaced.min(last[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                steps = steps.min(before[j - 2] + 1);
            }
            row.push(steps);
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_words_are_found_and_far_ones_are_not() {
        let keys = ["latency-sensitivity", "labels", "limits", "mac", "mtu", "network"];
        for (written, meant) in [
            ("latency", Some("latency-sensitivity")),
            ("latency_sensitivity", Some("latency-sensitivity")),
            ("lables", Some("labels")),
            ("netwrok", Some("network")),
            ("MTU", Some("mtu")),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(written, keys), meant, "{written}");
        }
    }
}

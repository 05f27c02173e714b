//! `weakened.patch` still fits the source, so that `make replay-red` can show every test fail: the lines that it changes are
//! there, each name in it is one of a test, and no test of a fault goes without. Whether the tests then fail, only
//! `make replay-red` shows.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// What the patch replaces in one file: lines that stand there in a row.
struct Hunk {
    file: String,
    old: String,
}

/// The hunks of a unified diff; line numbers are not looked at.
fn hunks(patch: &str) -> Vec<Hunk> {
    let (mut hunks, mut file) = (Vec::<Hunk>::new(), String::new());
    for line in patch.lines() {
        if let Some(name) = line.strip_prefix("+++ b/") {
            file = name.into();
        } else if line.starts_with("@@") {
            hunks.push(Hunk { file: file.clone(), old: String::new() });
        } else if let Some(hunk) = hunks.last_mut().filter(|_| !line.starts_with(['+', '-']) || line.starts_with("- "))
        {
            hunk.old += &format!("{}\n", line.get(1..).unwrap_or(""));
        }
    }
    hunks
}

#[test]
fn every_weakening_fits_the_source_and_names_its_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let here = root.join("tests/replay");
    let patch = fs::read_to_string(here.join("weakened.patch")).unwrap();
    let hunks = hunks(&patch);
    assert!(hunks.len() > 10, "where are they?");
    for Hunk { file, old } in hunks {
        let text = fs::read_to_string(root.join(&file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(text.contains(&old), "{file} has not got these lines of weakened.patch any more:\n{old}");
    }
    let sources = ["rings.rs", "frames.rs", "messages.rs"].map(|file| fs::read_to_string(here.join(file)).unwrap());
    let sources = sources.concat();
    let named = sources.lines().filter_map(|line| line.strip_prefix("fn ")).filter_map(|line| line.split('(').next());
    let tests: Vec<_> =
        named.filter(|name| ["cve_", "dpdk_", "qemu_"].iter().any(|kind| name.starts_with(kind))).collect();
    let names: BTreeSet<_> = patch.split("weakened(\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    for name in &names {
        assert!(tests.iter().any(|test| test.starts_with(name)), "{name}: there is no such test");
    }
    let unseen: Vec<_> = tests.iter().filter(|test| !names.iter().any(|name| test.starts_with(name))).collect();
    assert!(unseen.is_empty(), "nobody has seen these fail: {unseen:?}");
}

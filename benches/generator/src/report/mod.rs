//! What a bench leaves behind: `results.json` with all figures, `tables.md` for people, and plots.

mod plot;
mod table;

use std::fs;
use std::io;
use std::path::Path;

use crate::bench::{Machine, Results};

/// What an earlier bench left in `dir`, if any, to be merged with figures of `machine`.
pub fn read(dir: &Path, machine: &Machine) -> io::Result<Option<Results>> {
    let path = dir.join("results.json");
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let refused =
        |why: String| io::Error::other(format!("{}: {why}; remove it or choose another --out", path.display()));
    let results: Results = serde_json::from_str(&text).map_err(|error| refused(error.to_string()))?;
    if !results.machine.is_like(machine) {
        return Err(refused("it has figures of another machine, kernel or version".into()));
    }
    Ok(Some(results))
}

/// Writes everything into `dir`.
pub fn write(results: &Results, dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    fs::write(dir.join("results.json"), json(results)?)?;
    fs::write(dir.join("tables.md"), table::tables(results))?;
    for (name, picture) in plot::plots(results) {
        fs::write(dir.join(name), picture)?;
    }
    Ok(())
}

/// All figures, a line for each row, so that two runs can be compared by eye and the file stays small.
fn json(results: &Results) -> io::Result<String> {
    let mut value = serde_json::to_value(results)?;
    let mut lists = String::new();
    for key in ["rows", "trips"] {
        let list = value[key].take();
        let rows: Vec<_> = list.as_array().into_iter().flatten().map(|row| format!("    {row}")).collect();
        lists += &format!(",\n  \"{key}\": [\n{}\n  ]", rows.join(",\n"));
        value.as_object_mut().and_then(|object| object.remove(key));
    }
    let head = serde_json::to_string_pretty(&value)?;
    Ok(format!("{}{lists}\n}}\n", head.trim_end().trim_end_matches('}').trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Failure, Group, Row, Run};

    #[test]
    fn what_is_written_is_read_again_and_only_for_the_same_machine() {
        let machine = Machine {
            processor: "p".into(),
            cpus: 2,
            ghz: 2.5,
            memory: 1,
            kernel: "k".into(),
            is_virtual: true,
            versions: Vec::new(),
        };
        let mut row = Row::new(Group::Forwarding, "64 B", 64.0, "Mpps");
        row.turns.insert(crate::measure::Kind::Ovs, vec![1.5]);
        let results = Results {
            machine: machine.clone(),
            runs: [(Group::Forwarding, Run { rounds: 3, seconds: 0.5, cpus_in_use: 0.25 })].into(),
            rows: vec![row],
            trips: Vec::new(),
            failures: vec![Failure { group: Group::Idle, why: "y".into() }],
        };
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(read(dir.path(), &machine).expect("nothing there"), None);
        write(&results, dir.path()).expect("written");
        assert_eq!(read(dir.path(), &machine).expect("JSON"), Some(results));
        let other = Machine { kernel: "l".into(), ..machine.clone() };
        let error = read(dir.path(), &other).expect_err("another kernel").to_string();
        assert!(error.contains("another machine"), "{error}");
        fs::write(dir.path().join("results.json"), "{}").expect("written");
        assert!(read(dir.path(), &machine).is_err(), "a file of another form");
    }
}

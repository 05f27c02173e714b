//! What a bench leaves behind: `results.json` with all figures, `tables.md` for people, and plots.

mod plot;
mod table;

use std::fs;
use std::io;
use std::path::Path;

use crate::bench::Results;

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
    use crate::bench::{Machine, Results};

    #[test]
    fn json_has_everything() {
        let machine = Machine {
            processor: "p".into(),
            cpus: 2,
            ghz: 2.5,
            memory: 1,
            kernel: "k".into(),
            is_virtual: true,
            load_average: 0.25,
            versions: Vec::new(),
        };
        let (rows, trips, failures) = (Vec::new(), Vec::new(), vec!["x: y".into()]);
        let results = Results { machine, rounds: 3, seconds: 0.5, rows, trips, failures };
        let text = json(&results).expect("JSON");
        let back: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(back, serde_json::to_value(&results).expect("a value"));
    }
}

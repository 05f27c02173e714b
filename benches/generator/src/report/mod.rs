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
    let json = serde_json::to_string_pretty(results).map_err(io::Error::other)?;
    fs::write(dir.join("results.json"), json + "\n")?;
    fs::write(dir.join("tables.md"), table::tables(results))?;
    for (name, picture) in plot::plots(results) {
        fs::write(dir.join(name), picture)?;
    }
    Ok(())
}

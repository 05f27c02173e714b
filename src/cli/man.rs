//! Man pages, from the definitions that parse the command line: [`write()`], for whoever makes a package.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use clap::CommandFactory;
use clap_mangen::Man;

use super::{DaemonOptions, Options};

/// Writes linecardd(8), linecard(1) and a page for each of its verbs, such as linecard-port-add(1), into `folder`, which is
/// made if it is not there.
///
/// # Errors
/// The folder or a file in it cannot be written.
pub(super) fn write(folder: &Path) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let daemon = Man::new(DaemonOptions::command()).section("8");
    daemon.render(&mut File::create(folder.join(daemon.get_filename()))?)?;
    clap_mangen::generate_to(Options::command().disable_help_subcommand(true), folder)
}

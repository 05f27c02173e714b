//! `linecard`: the command line.

use std::process::ExitCode;

use clap::Parser;
use linecard::cli::{self, Options};

fn main() -> ExitCode {
    cli::run(&Options::parse())
}

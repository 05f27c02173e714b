//! `linecardd`: the daemon.

use std::error::Error;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use linecard::cli::DaemonOptions;
use linecard::daemon::{self, DaemonError};
use linecard::port::vnic::relay;

fn main() -> ExitCode {
    let options = DaemonOptions::parse();
    if options.relay {
        return relay::process::run().map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS);
    }
    let ended = match options.check {
        true => daemon::check(&options.config),
        false => daemon::run(&options.config, Path::new(relay::THIS_PROGRAM)),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

/// Prints why the daemon ended: mistakes of the file with their lines, anything else with its causes in one line.
fn complain(error: &DaemonError) {
    if let DaemonError::Config(wrong) = error {
        eprint!("{}", wrong.render(io::stderr().is_terminal()));
        return;
    }
    let mut text = format!("linecardd: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    daemon::say(&(text + "\n"));
}

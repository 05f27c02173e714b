//! `check`, `plan` and `apply`: reads the file, and shows what it does.

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use super::format::several;
use crate::config::{self, Diagnostics, Plan};
use crate::control::diff::Change;
use crate::control::report::{PlanReport, Step, StepReport, Subject};
use crate::sys::regular_file::{self, Symlinks};

/// Why a configuration cannot be sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    /// It cannot be read.
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] regular_file::FileError),
    /// Standard input cannot be read.
    #[error("cannot read standard input")]
    Input(#[source] regular_file::FileError),
    /// It does not hold together. Shown by [`Diagnostics::render`].
    #[error("{} is not good", .0.display())]
    Bad(PathBuf, #[source] Box<Diagnostics>),
}

/// A configuration that was read and checked here.
pub(super) struct Checked {
    /// What the daemon is told that it is called.
    pub(super) name: String,
    /// What it says.
    pub(super) text: String,
    /// What that means.
    pub(super) plan: Plan,
}

/// Reads and checks `file`; `-` is standard input.
pub(super) fn read(file: &Path) -> Result<Checked, FileError> {
    let (name, text) = if file == Path::new("-") {
        let text = regular_file::read_text_from(io::stdin(), config::TEXT_BYTES).map_err(FileError::Input)?;
        ("standard input".into(), text)
    } else {
        let text = regular_file::read_text(file, config::TEXT_BYTES, Symlinks::Followed);
        (file.display().to_string(), text.map_err(|error| FileError::Read(file.into(), error))?)
    };
    match config::check(&name, &text) {
        Ok(plan) => Ok(Checked { name, text, plan }),
        Err(wrong) => Err(FileError::Bad(file.into(), Box::new(wrong))),
    }
}

/// Whether what goes to `stream` may have colours (<https://no-color.org>).
pub(super) fn color(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// `linecard check` of a good file.
pub(super) fn good(checked: &Checked) -> String {
    let (networks, ports) = (checked.plan.networks.len(), checked.plan.ports.len());
    format!("{} is good: {}, {}\n", checked.name, several(networks, "network"), several(ports, "port"))
}

/// What a good file asks for and would not get, a sentence each.
pub(super) fn warnings(plan: &Plan) -> Vec<String> {
    let unserved = config::unserved(&plan.shards, plan.ports.iter());
    unserved.into_iter().map(|(port, error)| format!("port {port} would not be served as asked: {error}")).collect()
}

/// `linecard plan` and `linecard apply`: what changes, a line each.
pub(super) fn steps(report: &PlanReport) -> String {
    let mut text: String = report.steps.iter().map(step).collect();
    if report.steps.is_empty() {
        text += "nothing changes\n";
    }
    for change in &report.restart_needed {
        text += &format!("! {}: only after a restart of linecardd\n", changed(change));
    }
    for (port, reason) in &report.stopped {
        text += &format!("! port {port} is stopped: {reason}\n");
    }
    for (port, reason) in &report.obstacles {
        text += &format!("! port {port} is {reason}\n");
    }
    text
}

fn step(step: &StepReport) -> String {
    let sign = match step.step {
        Step::Add => '+',
        Step::Remove => '-',
        Step::Change | Step::Remake | Step::Retry => '~',
    };
    let subject = match step.subject {
        Subject::Network => "network",
        Subject::Port => "port",
        Subject::Shards => "shards",
    };
    let how = match step.step {
        Step::Remake => " (made anew, its link goes down for a moment)",
        Step::Retry => " (was stopped, is tried again)",
        Step::Add | Step::Remove | Step::Change => "",
    };
    let mut text = format!("{}{how}\n", format!("{sign} {subject} {}", step.name).trim_end());
    for change in &step.changes {
        text += &format!("    {}\n", changed(change));
    }
    text
}

fn changed(change: &Change) -> String {
    let told = |value: &Option<String>| value.clone().unwrap_or_else(|| "not set".into());
    format!("{}: {} -> {}", change.key, told(&change.from), told(&change.to))
}

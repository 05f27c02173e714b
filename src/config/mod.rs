//! YAML text to a [`Plan`]: what is written, then what it means. Reads and decides nothing about this machine, so a file
//! can be checked anywhere.
//!
//! Two stages. First the text becomes what was *written* ([`written`], by [`yaml`], [`spans`] and [`reader`]): types with
//! a field per key, each value good on its own. Then that is *resolved* ([`resolve`]): profiles applied, names looked up,
//! defaults filled in. Every mistake of both stages is reported at once, with its place and a way out; a file with any
//! mistake yields no plan at all.
//!
//! Files are bounded ([`TEXT_BYTES`]; depth and aliases in [`spans`]) and nothing in them makes the reader panic.

mod cpus;
mod diagnostic;
#[cfg(any(test, fuzzing))]
pub mod exercise;
mod inherit;
mod key_path;
mod nearest;
mod plan;
mod port;
mod reader;
mod report;
mod resolve;
mod scalar;
mod size;
mod spans;
mod storm;
mod time;
mod written;
mod yaml;

pub use diagnostic::{Diagnostic, Diagnostics, Place, Related};
pub use plan::{
    CpuChoice, DaemonPlan, FaultyPlan, Idle, KindPlan, LogLevel, NetworkPlan, Offloads, Plan, PortPlan, ProfilePlan,
    ReplayPlan, ShardsPlan, SocketMode, TapPlan, VhostUserPlan, unserved,
};
pub use storm::{StormRate, StormRates};

use key_path::KeyPath;
use report::{Finding, Report};
use spans::{Index, Mark};

/// Longest file that is read, in bytes. [`crate::limits::PORTS`] ports with every key take less than half of it.
pub const TEXT_BYTES: usize = 4 << 20;

/// Checks `text`, the content of `file_name` (which is only named in diagnostics), and says what it means.
pub fn check(file_name: &str, text: &str) -> Result<Plan, Diagnostics> {
    // The text of a file that is refused unread is not shown either.
    let mut report = Report::on(file_name, if text.len() > TEXT_BYTES { "" } else { text });
    let plan = match document(text, &mut report) {
        Ok(document) => {
            let file = written::file(&document, &mut report);
            Some(resolve::file(file, &mut report))
        }
        Err(finding) => {
            report.add(*finding);
            None
        }
    };
    report.finish(plan)
}

/// Checks one port that is not in the file: `value` has the keys of an entry of `ports:`, and `plan` the networks and
/// profiles that it names. A port of the same name in `plan` is taken as the one to be replaced.
///
/// The answer depends on `plan`: after a reload, check the same value again.
pub fn check_port(name: &str, value: serde_json::Value, plan: &Plan) -> Result<PortPlan, Diagnostics> {
    let mut report = Report::without_text();
    let port = port::single(name, &value, plan, &mut report);
    report.finish(port)
}

/// The tree of values in `text`, which has a mapping at its top; its places are in `report` from then on.
fn document(text: &str, report: &mut Report) -> Result<serde_json::Value, Box<Finding>> {
    let top = KeyPath::default();
    let begin = Mark { line: 1, column: 1, length: 1 };
    let at = |mark, message: String| Box::new(Finding::mark(&top, mark, message));
    let begin_with_version = |finding: Finding| Box::new(finding.help("begin the file with `version: 1`"));
    let empty = || begin_with_version(Finding::mark(&top, begin, "the file is empty"));
    if text.len() > TEXT_BYTES {
        return Err(at(begin, format!("the file has {} bytes; at most {TEXT_BYTES} are read", text.len())));
    }
    let index = Index::of(text).map_err(|refused| at(refused.mark, refused.message))?;
    report.index(index.ok_or_else(empty)?);
    match yaml::read(text) {
        Ok(document @ serde_json::Value::Object(_)) => Ok(document),
        Ok(serde_json::Value::Null) => Err(empty()),
        Ok(_) => Err(begin_with_version(Finding::value(&top, "there are no keys in it"))),
        Err(refused) => {
            let (line, column) = refused.place.unwrap_or((1, 1));
            Err(at(Mark { line, column, length: 1 }, refused.message))
        }
    }
}

//! YAML text to a [`Plan`]: what is written, then what it means. Reads and decides nothing about this machine, so a file
//! can be checked anywhere.
//!
//! Two stages. First the text becomes what was *written* ([`written`], by [`yaml`], [`spans`] and [`reader`]): types with
//! a field per key, each value good on its own. Then that is *resolved* ([`resolve`]): profiles applied, names looked up,
//! defaults filled in. Every mistake of both stages is reported at once, with its place and a way out; a file with any
//! mistake yields no plan at all.
//!
//! Files are bounded ([`TEXT_BYTES`]; depth and aliases in [`spans`]) and nothing in them makes the reader panic.

mod diagnostic;
mod inherit;
mod key_path;
mod nearest;
mod plan;
mod port;
mod reader;
mod resolve;
mod scalar;
mod spans;
mod written;
mod yaml;

pub use diagnostic::{Diagnostic, Diagnostics, Place, Related};
pub use plan::{
    CpuChoice, DaemonPlan, FaultyPlan, Idle, KindPlan, LogLevel, NetworkPlan, Plan, PortPlan, ProfilePlan, ReplayPlan,
    ShardsPlan, SocketMode, TapPlan, VhostUserPlan,
};

use diagnostic::{Finding, Report};
use key_path::KeyPath;
use spans::{Index, Mark};

/// Longest file that is read, in bytes. [`crate::limits::PORTS`] ports with every key take a tenth of it.
pub const TEXT_BYTES: usize = 16 << 20;

/// Checks `text`, the content of `file_name` (which is only named in diagnostics), and says what it means.
pub fn check(file_name: &str, text: &str) -> Result<Plan, Diagnostics> {
    // The text of a file that is refused unread is not shown either.
    let mut report = Report::on(file_name, if text.len() > TEXT_BYTES { "" } else { text });
    let plan = document(text, &mut report).map(|document| {
        let file = written::file(&document, &mut report);
        resolve::file(file, &mut report)
    });
    report.finish(plan).map(|plan| plan.expect("a text without a document was reported"))
}

/// Checks one port that is not in the file: `value` has the keys of an entry of `ports:`, and `plan` the networks and
/// profiles that it names. A port of the same name in `plan` is taken as the one to be replaced.
///
/// The answer depends on `plan`: after a reload, check the same value again.
pub fn check_port(name: &str, value: serde_json::Value, plan: &Plan) -> Result<PortPlan, Diagnostics> {
    let mut report = Report::without_text();
    let port = port::single(name, &value, plan, &mut report);
    report.finish(port).map(|port| port.expect("a port that cannot be resolved was reported"))
}

/// The tree of values in `text`, which has a mapping at its top; `None` if there is none, which is then reported.
fn document(text: &str, report: &mut Report) -> Option<serde_json::Value> {
    let top = KeyPath::default();
    let begin = Mark { line: 1, column: 1, length: 1 };
    if text.len() > TEXT_BYTES {
        let message = format!("the file has {} bytes; at most {TEXT_BYTES} are read", text.len());
        report.add(Finding::mark(&top, begin, message));
        return None;
    }
    match Index::of(text) {
        Ok(Some(index)) => report.index(index),
        Ok(None) => {
            let empty = Finding::mark(&top, begin, "the file is empty");
            report.add(empty.help("begin it with `version: 1`".to_string()));
            return None;
        }
        Err(refused) => {
            report.add(Finding::mark(&top, refused.mark, refused.message));
            return None;
        }
    }
    match yaml::read(text) {
        Ok(document @ serde_json::Value::Object(_)) => Some(document),
        Ok(_) => {
            let other = Finding::value(&top, "this is not a configuration: no keys at the top");
            report.add(other.help("begin it with `version: 1`".to_string()));
            None
        }
        Err(refused) => {
            let (line, column) = refused.place.unwrap_or((1, 1));
            report.add(Finding::mark(&top, Mark { line, column, length: 1 }, refused.message));
            None
        }
    }
}

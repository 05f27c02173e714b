//! Tests in processes of their own: for what others in this one change at any time, or would be changed for: its mappings, its
//! limits, how it ends.

#![allow(clippy::unwrap_used)]

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

/// In the environment of such a process: what it is to do.
const TASK: &str = "LINECARD_TEST_ALONE";

/// What this process is to do, if it is one.
pub(super) fn task() -> Option<String> {
    std::env::var(TASK).ok()
}

/// Runs test `me` (its path in this crate), and nothing else, in a process whose [`task`] is `task`.
pub(super) fn run(me: &str, task: &str) -> Output {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", me, "--test-threads=1", "--nocapture"]).env(TASK, task).output().unwrap()
}

/// The same, and expects it to pass.
#[track_caller]
pub(super) fn expect(me: &str, task: &str) {
    let output = run(me, task);
    let (status, said) = (output.status, String::from_utf8_lossy(&output.stderr));
    assert!(status.success(), "{task}: signal {:?}, {said}", status.signal());
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(told.contains("1 passed"), "{me} was not run: {told}");
}

//! Child processes of a test, and what they must not have: [`spawn`] starts one, [`none_starts`] keeps all others from it.
//!
//! A child has copies of all that is open here until it becomes another program, whatever test it is of, and close-on-exec means
//! that it closes them: a copy of a socket that lingers, of a file on a file system that does not answer, or of an eventfd in a held
//! epoll set may be the last one, and then the child stands still, and whoever waits for what it says.

use std::process::{Child, Command, Output, Stdio};
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

static STARTING: RwLock<()> = RwLock::new(());

/// As long as this lives no child starts: for what is hard to close, from before it is opened until it is closed here. Whoever
/// has it starts none himself.
pub struct NoneStarts(#[expect(dead_code, reason = "it is held")] RwLockReadGuard<'static, ()>);

pub fn none_starts() -> NoneStarts {
    NoneStarts(STARTING.read().unwrap_or_else(PoisonError::into_inner))
}

/// Starts `command`.
#[track_caller]
pub fn spawn(command: &mut Command) -> Child {
    // It has its own table of descriptors when this returns.
    let _starting = STARTING.write().unwrap_or_else(PoisonError::into_inner);
    command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Runs `command` to its end.
#[track_caller]
pub fn output(command: &mut Command) -> Output {
    let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    spawn(command).wait_with_output().expect("its output")
}

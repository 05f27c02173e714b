//! The wake of a queue that a file descriptor announces work for: [`Watch`].
//!
//! Shared by the ports whose readiness is a descriptor's (`tap`, `replay`); it keeps to the order that
//! [`super::Wake`] asks for: the old shard's watch ends before the new one's begins, and before the descriptor closes.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};

use super::Wake;

/// Whose shard is woken when the descriptor becomes readable, if anybody's.
#[derive(Default)]
pub(super) struct Watch(Mutex<Option<Arc<dyn Wake>>>);

impl Watch {
    /// Has `wake` watch `fd` from now on, in place of whoever did; where there is none yet, from [`Watch::begin`] on. `what` names
    /// the queue in the log should the kernel refuse.
    pub(super) fn hand_over(&self, wake: Option<Arc<dyn Wake>>, fd: Option<BorrowedFd<'_>>, what: &str) {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *current, wake);
        let Some(fd) = fd else { return };
        if let Some(old) = old {
            old.unwatch(fd);
        }
        begin(current.as_deref(), fd, what);
    }

    /// Has whoever is there watch `fd`, which there was none of before. The caller keeps others from [`Watch::hand_over`] meanwhile.
    pub(super) fn begin(&self, fd: BorrowedFd<'_>, what: &str) {
        begin(self.0.lock().unwrap_or_else(PoisonError::into_inner).as_deref(), fd, what);
    }
}

/// Frames may have come in before, so the shard has a look at once.
fn begin(wake: Option<&dyn Wake>, fd: BorrowedFd<'_>, what: &str) {
    let Some(wake) = wake else { return };
    if let Err(error) = wake.watch(fd) {
        log::error!("{what} cannot be waited for, so it receives only while its shard polls: {error}");
    }
    wake.wake();
}

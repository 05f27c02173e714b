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
    /// Has `wake` watch `fd` from now on, in place of whoever did. Frames may have come in before, so its shard has a
    /// look at once. `what` names the queue in the log should the kernel refuse.
    pub(super) fn hand_over(&self, wake: Option<Arc<dyn Wake>>, fd: BorrowedFd<'_>, what: &str) {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = current.take() {
            old.unwatch(fd);
        }
        let Some(wake) = wake else { return };
        if let Err(error) = wake.watch(fd) {
            log::error!("{what} cannot be waited for, so it receives only while its shard polls: {error}");
        }
        wake.wake();
        *current = Some(wake);
    }
}

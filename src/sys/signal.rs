//! Signals that wait until somebody has a handler for them, and those that must not wait: [`hold_hangup`].

#![allow(unsafe_code)] // pthread_sigmask with sets of our own.

use std::mem::MaybeUninit;

/// Keeps SIGHUP waiting for this thread and for those that it starts, so that it does not end a process that has no handler for
/// it yet (signal(7): a blocked signal stays pending until it is unblocked). Nothing else is kept waiting: who started us may have
/// blocked signals that we are ended with, or need, which execve(2) hands on.
pub fn hold_hangup() {
    mask_hangup(libc::SIG_SETMASK);
}

/// Lets SIGHUP through to this thread again: one that came meanwhile is delivered now.
pub fn release_hangup() {
    mask_hangup(libc::SIG_UNBLOCK);
}

fn mask_hangup(how: libc::c_int) {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the whole set that it is given, which is ours; the two calls after it only use that set.
    // The old mask is not asked for. They fail only for numbers that are not of a signal or of an action (sigsetops(3),
    // pthread_sigmask(3)), which these are.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGHUP);
        libc::pthread_sigmask(how, set.as_ptr(), std::ptr::null_mut());
    }
}

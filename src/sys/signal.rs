//! Signals that wait until somebody has a handler for them, and those that must not wait: [`hold_hangup`]; and one that is not heard:
//! [`ignore_file_size`].

#![allow(unsafe_code)] // pthread_sigmask with sets of our own, signal.

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

/// Has a file that grows beyond RLIMIT_FSIZE, such as a log, be an error like that of a full disk, and not the end of the process.
pub fn ignore_file_size() {
    // SAFETY: SIG_IGN is a disposition that this signal can have; no handler of ours is involved.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
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

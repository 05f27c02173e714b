//! The signals by which a process is told to end or to read its configuration again: [`ignore`].

#![allow(unsafe_code)] // Signal handling.

/// Has this process take no notice of SIGHUP, SIGINT and SIGTERM.
pub fn ignore() {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM] {
        // SAFETY: SIG_IGN is a disposition that every one of these signals can have; no handler of ours is involved.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

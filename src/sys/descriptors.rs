//! How many descriptors this process may have ([`raise_limit`]), which of them others may not take ([`is_of_reserve`]), and which of
//! them the programs that it starts get ([`close_in_other_programs`]): one that is opened here is closed there anyway.

#![allow(unsafe_code)] // close_range.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Has this process, and those that it starts, have as many descriptors as the host lets it have, and returns how many those are.
/// Shells and service managers leave 1024, for programs that use select(2) (systemd: NEWS of version 240).
///
/// # Errors
/// What the kernel says; then the limit is as it was.
pub fn raise_limit() -> io::Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

/// How many descriptors this process may have now.
pub fn limit() -> u64 {
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Descriptors that are for this process's own use: some connections to the API and of front ends, files for a moment.
const RESERVE: u64 = 256;

/// Whether this one, which somebody else has sent, is one too many. The kernel gives out the lowest number that is free (open(2)), so
/// a number near the limit says that all below are in use, whoever has them, and nothing has to be counted.
pub fn is_of_reserve(descriptor: impl AsFd) -> bool {
    is_above(descriptor.as_fd().as_raw_fd(), limit())
}

fn is_above(number: i32, limit: u64) -> bool {
    u64::try_from(number).unwrap_or(0) >= without_reserve(limit)
}

/// How many descriptors this process may have of what others have sent.
pub fn for_others() -> u64 {
    without_reserve(limit())
}

fn without_reserve(limit: u64) -> u64 {
    limit - RESERVE.min(limit / 4)
}

/// Has what this process inherited be closed in the programs that it starts, but for standard input, output and error.
///
/// # Errors
/// The kernel, or a filter of system calls, does not know how (Linux 5.11 does).
pub fn close_in_other_programs() -> io::Result<()> {
    let (first, last, flags) = (3u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
    // SAFETY: close_range(2) takes three numbers. With this flag it closes nothing, so no descriptor that somebody here owns
    // becomes invalid; it sets a flag of theirs that matters to execve(2) only.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_numbers_are_not_for_others() {
        assert!(!is_above(767, 1024) && is_above(768, 1024));
        assert!(!is_above(74, 99) && is_above(75, 99), "of few descriptors a quarter");
        assert!(!is_above(i32::MAX, u64::MAX) && !is_of_reserve(std::io::stderr()));
    }
}

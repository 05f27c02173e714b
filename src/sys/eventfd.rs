//! eventfd(2) counters: how threads, guests and front ends wake each other.
//!
//! Ours are made by [`EventFd::new`]. Those that a front end hands over go through [`EventFd::from_peer`] first: a pipe or
//! a terminal in their place could block a shard in the middle of a doorbell. What is left of that danger is [`doorbell`]'s.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use super::doorbell;
use crate::printable;

/// A counter of the kernel that becomes readable when it is not zero. Ours never block.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// A new counter at zero.
    ///
    /// # Errors
    /// What the kernel says: in practice that the process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Takes over a descriptor that another process sent, if it is an eventfd, and makes it non-blocking, for as long as
    /// the other process leaves it so; from then on doorbells are watched.
    ///
    /// # Errors
    /// `InvalidInput` names what it is instead; else what the kernel says of `/proc/self/fd`, or of a thread to watch
    /// doorbells.
    pub fn from_peer(fd: OwnedFd) -> io::Result<Self> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        // The name that the kernel gives to these (fs/eventfd.c, do_eventfd).
        if link.as_os_str() != "anon_inode:[eventfd]" {
            let link = printable::name(link.as_os_str().as_bytes());
            let message = format!("the descriptor is not an eventfd but {link}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        doorbell::watch()?;
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self(fd))
    }

    /// Adds one to a counter of ours, so that whoever waits wakes up. One that is full is awake already.
    pub fn signal(&self) {
        // EAGAIN is the full counter; nothing else can come of 8 bytes to a live eventfd that does not block (eventfd(2)).
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Sets it to zero and returns what it was.
    pub fn drain(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut count)) {
            Ok(8) => u64::from_ne_bytes(count),
            Ok(_) | Err(Errno::AGAIN) | Err(_) => 0,
        }
    }
}

/// What the counter of an eventfd is at, without reading it.
///
/// # Errors
/// What the kernel says of `/proc/self/fdinfo`; `InvalidData` if that does not have the counter of an eventfd.
pub fn count(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    // In hexadecimal (fs/eventfd.c, eventfd_show_fdinfo).
    let count = info.lines().find_map(|line| line.strip_prefix("eventfd-count:"));
    count.and_then(|count| u64::from_str_radix(count.trim(), 16).ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for EventFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl From<EventFd> for OwnedFd {
    fn from(event: EventFd) -> Self {
        event.0
    }
}

impl From<EventFd> for std::fs::File {
    fn from(event: EventFd) -> Self {
        event.0.into()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn signals_add_up_and_drain() {
        let event = EventFd::new().unwrap();
        assert_eq!(event.drain(), 0);
        event.signal();
        event.signal();
        assert_eq!((event.drain(), event.drain()), (2, 0));
    }

    #[test]
    fn a_counter_can_be_looked_at_without_reading_it() {
        let event = EventFd(eventfd(300, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap());
        event.signal();
        assert_eq!((count(event.as_fd()).unwrap(), event.drain(), count(event.as_fd()).unwrap()), (301, 301, 0));
        let (pipe, _other) = std::io::pipe().unwrap();
        assert!(count(pipe.as_fd()).is_err());
    }

    #[test]
    fn only_eventfds_are_taken_from_a_peer_and_they_stop_blocking() {
        let blocking = eventfd(7, EventfdFlags::CLOEXEC).unwrap();
        let taken = EventFd::from_peer(blocking).unwrap();
        assert_eq!((taken.drain(), taken.drain()), (7, 0), "a second read would hang if it still blocked");
        let (pipe, _other) = std::io::pipe().unwrap();
        let refused = EventFd::from_peer(pipe.into()).unwrap_err().to_string();
        assert!(refused.contains("pipe:"), "{refused}");
    }
}

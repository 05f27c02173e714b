//! An eventfd shared by the driver, the VMM and the back end: a ring's kick, call or error.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

/// One eventfd; clones are the same one.
#[derive(Clone, Debug)]
pub struct Doorbell(Arc<OwnedFd>);

impl Doorbell {
    pub fn new() -> Self {
        Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("eventfd")))
    }

    pub fn ring(&self) {
        match rustix::io::write(&self.0, &1u64.to_ne_bytes()) {
            // Full: 2^64 - 2 rings that nobody took; the reader sees it all the same.
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => panic!("ringing an eventfd: {error}"),
        }
    }

    /// Takes the counter: how often it rang since the last take.
    pub fn take(&self) -> u64 {
        let mut counter = [0; 8];
        match rustix::io::read(&self.0, &mut counter) {
            Ok(_) => u64::from_ne_bytes(counter),
            Err(Errno::AGAIN) => 0,
            Err(error) => panic!("reading an eventfd: {error}"),
        }
    }

    /// Sleeps until it rings or `end` passes; true if it rang. The counter stays.
    pub fn wait_until(&self, end: Instant) -> bool {
        wait_any(&[self], end)
    }

    pub fn wait(&self, patience: Duration) -> bool {
        self.wait_until(Instant::now() + patience)
    }
}

/// Sleeps until one of `bells` rings or `end` passes; true if one rang.
pub fn wait_any(bells: &[&Doorbell], end: Instant) -> bool {
    let mut fds: Vec<_> = bells.iter().map(|bell| PollFd::new(&bell.0, PollFlags::IN)).collect();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut fds, Some(&timeout)) {
            Ok(ready) => return ready > 0,
            Err(Errno::INTR) => {}
            Err(error) => panic!("polling eventfds: {error}"),
        }
    }
}

impl AsFd for Doorbell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

//! Eventfds of front ends in the process that serves them: [`PeerEvent`]. None of them is closed here for the last time.
//!
//! Whoever closes the last descriptor of an eventfd may wait for its front end for ever (see [`super::link`]). So the relay keeps
//! a descriptor of each that it passes on for as long as this process may have one ([`super::kept`]). What it has to know for that
//! goes through a pipe, whose one end is the connection's [`Lease`]: of which message everything is closed here now. When nobody has
//! the lease any more, nothing of the connection is left here.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::sys::eventfd::EventFd;

/// That eventfds of a connection are here. It goes after everything else of the connection, what lies unread in it included.
#[derive(Debug, Default)]
pub(in super::super) struct Lease {
    /// Where the relay is told; there may be no relay.
    pipe: Option<OwnedFd>,
    /// The message that is being handled, counted from zero.
    message: AtomicU64,
    /// Something that came with it has a receipt.
    is_taken: AtomicBool,
}

impl Lease {
    pub(super) fn new(pipe: OwnedFd) -> Self {
        Self { pipe: Some(pipe), ..Self::default() }
    }

    /// A message was handled, as a whole, and the next one follows. What came with it and was not taken is closed.
    pub(in super::super) fn next_message(&self) {
        let message = self.message.fetch_add(1, Ordering::Relaxed);
        if !self.is_taken.swap(false, Ordering::Relaxed) {
            self.note(message);
        }
    }

    /// For the one descriptor that is taken of the message that is being handled: to go when that is closed.
    pub(in super::super) fn receipt(self: &Arc<Self>) -> Receipt {
        self.is_taken.store(true, Ordering::Relaxed);
        Receipt { lease: Arc::clone(self), message: self.message.load(Ordering::Relaxed) }
    }

    /// Nothing of a message is here any more.
    fn note(&self, message: u64) {
        if let Some(pipe) = &self.pipe {
            // It does not block: what there is no room for is let go of at the end of the connection.
            let _ = rustix::io::write(pipe, &message.to_ne_bytes());
        }
    }
}

/// A descriptor that came with a message. Whoever has this has that.
#[derive(Debug)]
pub(in super::super) struct Receipt {
    lease: Arc<Lease>,
    message: u64,
}

impl Drop for Receipt {
    fn drop(&mut self) {
        self.lease.note(self.message);
    }
}

/// An eventfd of a front end. Can be closed anywhere.
#[derive(Debug)]
pub(in super::super) struct PeerEvent {
    event: EventFd,
    // Goes after the descriptor.
    _receipt: Receipt,
}

impl PeerEvent {
    /// Takes an eventfd over, as [`EventFd::from_peer`].
    pub(in super::super) fn new(descriptor: OwnedFd, receipt: Receipt) -> io::Result<Self> {
        Ok(Self { event: EventFd::from_peer(descriptor)?, _receipt: receipt })
    }
}

impl AsFd for PeerEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
impl From<EventFd> for PeerEvent {
    fn from(event: EventFd) -> Self {
        Self { event, _receipt: Arc::new(Lease::default()).receipt() }
    }
}

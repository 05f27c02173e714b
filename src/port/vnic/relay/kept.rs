//! The descriptors that the relay keeps of eventfds that it has passed on: [`Kept`], those of one connection.
//!
//! The last descriptor of an eventfd is to be closed here and not in the daemon, which is therefore waited for: its
//! [lease](super::lease) says of which messages all are closed there, and in the end that all are. Both sides count messages, and a
//! session takes one eventfd of each at most.
//!
//! How many there can be is bounded by the rings that the port has: beyond that, no message is read before the daemon has let go
//! of some, and they are closed here. A front end whose eventfds do not get closed waits for that, and loses its connection for it.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

/// What the daemon may have of a ring: its kick and its call, those that take their places, and its error.
const RING: usize = 5;

/// Eventfds that are let go of together, by one thread.
const TOGETHER: usize = 24;

/// Bytes that are taken from a lease at once.
const NOTES_BYTES: usize = 512;

/// What is kept of a connection.
pub(super) struct Kept {
    lease: OwnedFd,
    /// The message that is being passed on, counted from zero.
    message: u64,
    /// What the daemon may have, by the message that it went with.
    passed_on: HashMap<u64, Vec<OwnedFd>>,
    /// How many those are.
    count: usize,
    /// What the daemon has let go of.
    released: Vec<OwnedFd>,
    /// How many of those are being closed.
    closing: usize,
    most: usize,
}

impl Kept {
    /// Nothing yet, of a connection to a port with so many rings.
    pub(super) fn new(lease: OwnedFd, rings: u32) -> Self {
        let most = Self::most(rings);
        let (passed_on, released) = Default::default();
        Self { lease, message: 0, passed_on, count: 0, released, closing: 0, most }
    }

    /// How many there can be of a connection to a port with so many rings, until a message has more.
    pub(super) fn most(rings: u32) -> usize {
        RING * rings as usize + TOGETHER
    }

    /// How many descriptors there are here.
    pub(super) fn len(&self) -> usize {
        1 + self.count + self.released.len()
    }

    /// Where the daemon is heard.
    pub(super) fn lease(&self) -> BorrowedFd<'_> {
        self.lease.as_fd()
    }

    /// Keeps descriptors that went with the present message.
    pub(super) fn keep(&mut self, descriptors: Vec<OwnedFd>) {
        if !descriptors.is_empty() {
            self.count += descriptors.len();
            self.passed_on.entry(self.message).or_default().extend(descriptors);
        }
    }

    /// The present message has been passed on as a whole.
    pub(super) fn next_message(&mut self) {
        self.message += 1;
    }

    /// How many the present message had so far.
    pub(super) fn of_message(&self) -> usize {
        self.passed_on.get(&self.message).map_or(0, Vec::len)
    }

    /// Whether some must go before there may be more.
    pub(super) fn is_full(&self) -> bool {
        self.count + self.released.len() + self.closing >= self.most
    }

    /// Hears what the daemon has closed; `false` if it has, or will have in a moment, nothing of the connection.
    pub(super) fn hear(&mut self) -> bool {
        let mut notes = [0; NOTES_BYTES];
        // They are written as a whole, and there is room for whole ones only.
        let len = match rustix::io::read(&self.lease, &mut notes) {
            Ok(0) => return false,
            Ok(len) => len,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => return false,
        };
        for note in notes[..len].as_chunks().0 {
            let released = self.passed_on.remove(&u64::from_ne_bytes(*note)).unwrap_or_default();
            self.count -= released.len();
            self.released.extend(released);
        }
        true
    }

    /// What is to be closed now, for [`Kept::closed`] to be told. The next come when these are: one that does not get closed is
    /// waited for once.
    pub(super) fn take_released(&mut self) -> Vec<OwnedFd> {
        let wanted = self.released.len() >= TOGETHER || self.is_full();
        if self.closing > 0 || !wanted {
            return Vec::new();
        }
        self.closing = self.released.len();
        std::mem::take(&mut self.released)
    }

    /// What was taken is closed.
    pub(super) fn closed(&mut self) {
        self.closing = 0;
    }

    /// All that there is, once the daemon has nothing.
    pub(super) fn into_all(self) -> Vec<OwnedFd> {
        let mut all = self.released;
        all.extend(self.passed_on.into_values().flatten());
        all
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::super::lease::{Lease, PeerEvent};
    use super::*;
    use crate::sys::eventfd::EventFd;

    fn event() -> OwnedFd {
        EventFd::new().unwrap().into()
    }

    fn pair(rings: u32) -> (Kept, Arc<Lease>) {
        let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        (Kept::new(read_end, rings), Arc::new(Lease::new(write_end)))
    }

    #[test]
    fn what_the_daemon_has_is_kept_and_what_it_has_closed_goes() {
        let (mut kept, lease) = pair(2);
        let take = |kept: &mut Kept| {
            kept.keep(vec![event()]);
            kept.next_message();
            let taken = PeerEvent::new(event(), lease.receipt()).unwrap();
            lease.next_message();
            taken
        };
        let first = take(&mut kept);
        // A message that has none; and one that has some which nobody takes.
        kept.next_message();
        lease.next_message();
        kept.keep(vec![event(), event()]);
        assert_eq!(kept.of_message(), 2);
        kept.next_message();
        assert!(kept.hear() && (kept.count, kept.released.len()) == (3, 0), "that one has not been handled");
        lease.next_message();
        assert!(kept.hear() && (kept.count, kept.released.len()) == (1, 2));
        assert_eq!(kept.of_message(), 0);
        let last = take(&mut kept);
        drop(first);
        assert!(kept.hear() && !kept.passed_on.contains_key(&0) && kept.passed_on.contains_key(&3));
        assert!(kept.take_released().is_empty(), "more may come");
        // One that is refused is not here any more either.
        kept.keep(vec![event()]);
        assert!(PeerEvent::new(kept.lease.try_clone().unwrap(), lease.receipt()).is_err());
        assert!(kept.hear() && (kept.count, kept.released.len()) == (1, 4));
        drop(lease);
        assert!(kept.hear(), "something is here still");
        drop(last);
        assert!(kept.hear() && !kept.hear());
        assert_eq!(kept.into_all().len(), 5);
    }

    #[test]
    fn there_are_no_more_than_the_rings_and_what_is_being_closed() {
        let (mut kept, lease) = pair(2);
        let mut replaced = None;
        let mut closed = 0;
        while closed < 10 * TOGETHER {
            assert!(!kept.is_full(), "{closed} were closed");
            kept.keep(vec![event()]);
            kept.next_message();
            replaced = Some(PeerEvent::new(event(), lease.receipt()).unwrap());
            lease.next_message();
            assert!(kept.hear());
            let taken = kept.take_released();
            if !taken.is_empty() {
                closed += taken.len();
                assert!(kept.take_released().is_empty());
                kept.closed();
            }
        }
        drop(replaced);
        // Nobody lets go of these.
        (0..kept.most).for_each(|_| kept.keep(vec![event()]));
        assert!(kept.is_full());
        let rest = kept.released.len();
        assert!(kept.hear());
        assert_eq!(kept.take_released().len(), rest + 1, "what there is, although it is little");
    }
}

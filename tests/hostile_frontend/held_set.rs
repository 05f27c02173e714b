//! An epoll set that nobody gets into: [`HeldSet`]. A thread takes an event out of it into a [`HeldPage`], with the set's lock, and
//! whoever closes the last descriptor of a file in the set waits for that lock, whatever signal he gets.

#![allow(unsafe_code)] // epoll_wait(2) into memory that is not there.

use std::os::fd::{AsFd, AsRawFd};

use rustix::event::epoll::{CreateFlags, EventData, EventFlags, add, create};

use super::event;
use super::held_page::HeldPage;

/// The set. It is let go of when this goes.
pub struct HeldSet {
    _page: HeldPage,
}

impl HeldSet {
    /// A set with `what` in it.
    pub fn around(what: impl AsFd) -> Self {
        let set = create(CreateFlags::CLOEXEC).unwrap();
        let ready = event();
        ready.ring();
        add(&set, what, EventData::new_u64(0), EventFlags::IN).unwrap();
        add(&set, &ready, EventData::new_u64(1), EventFlags::IN).unwrap();
        let page = HeldPage::holding(move |page| {
            // SAFETY: the page has room for 64 events, which are packed and have 12 bytes, and is this thread's alone.
            unsafe { libc::epoll_wait(set.as_raw_fd(), page as *mut libc::epoll_event, 64, -1) };
            drop(ready);
        });
        Self { _page: page }
    }
}

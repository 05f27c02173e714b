//! An epoll set that nobody gets into: [`HeldSet`]. A thread takes an event out of it into memory that is not there, so it is in a
//! page fault (userfaultfd(2)) with the set's lock, and whoever closes the last descriptor of a file in the set waits for that lock,
//! whatever signal he gets. Takes root.

#![allow(unsafe_code)] // userfaultfd(2), and memory for it.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::thread::JoinHandle;

use rustix::event::epoll::{CreateFlags, EventData, EventFlags, add, create};
use rustix::event::{PollFd, PollFlags, poll};

use super::event;

const PAGE: usize = 4096;

/// include/uapi/linux/userfaultfd.h: UFFD_API, UFFDIO_API and UFFDIO_REGISTER with UFFDIO_REGISTER_MODE_MISSING.
const API: u64 = 0xaa;
const ASK_API: libc::c_ulong = 0xc018_aa3f;
const REGISTER: libc::c_ulong = 0xc020_aa00;
const MISSING: u64 = 1;

/// The set. It is let go of when this goes.
pub struct HeldSet {
    faults: Option<OwnedFd>,
    waiter: Option<JoinHandle<()>>,
}

impl HeldSet {
    /// A set with `what` in it.
    pub fn around(what: impl AsFd) -> Self {
        let set = create(CreateFlags::CLOEXEC).unwrap();
        let ready = event();
        ready.ring();
        add(&set, what, EventData::new_u64(0), EventFlags::IN).unwrap();
        add(&set, &ready, EventData::new_u64(1), EventFlags::IN).unwrap();
        // SAFETY: the call takes flags; the descriptor that it returns is nobody else's.
        let faults = unsafe {
            let number = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) as i32;
            assert!(number >= 0, "userfaultfd(2), for which this test needs root: {}", std::io::Error::last_os_error());
            OwnedFd::from_raw_fd(number)
        };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, of which nobody knows but this function and the thread below.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) }
            as usize;
        let (mut api, mut register) = ([API, 0, 0], [page as u64, PAGE as u64, MISSING, 0]);
        // SAFETY: both structures are as large as the requests say, and outlive the calls.
        let asked = unsafe {
            libc::ioctl(faults.as_raw_fd(), ASK_API, api.as_mut_ptr())
                | libc::ioctl(faults.as_raw_fd(), REGISTER, register.as_mut_ptr())
        };
        assert_eq!(asked, 0, "userfaultfd: {}", std::io::Error::last_os_error());
        let waiter = std::thread::spawn(move || {
            // SAFETY: the page has room for 64 events, which are packed and have 12 bytes, and is this thread's alone.
            unsafe {
                libc::epoll_wait(set.as_raw_fd(), page as *mut libc::epoll_event, 64, -1);
                libc::munmap(page as *mut libc::c_void, PAGE);
            }
            drop(ready);
        });
        // It is in the fault when somebody is asked to see to that.
        poll(&mut [PollFd::new(&faults, PollFlags::IN)], None).unwrap();
        Self { faults: Some(faults), waiter: Some(waiter) }
    }
}

impl Drop for HeldSet {
    fn drop(&mut self) {
        // Then the kernel sees to it.
        self.faults = None;
        self.waiter.take().map(JoinHandle::join);
    }
}

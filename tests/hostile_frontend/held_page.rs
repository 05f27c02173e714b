//! Memory that is not there: [`HeldPage`]. Whoever writes to it in a system call is in a page fault (userfaultfd(2)) with every lock
//! that the call has taken, until this lets go of it. Takes root.

#![allow(unsafe_code)] // userfaultfd(2), and memory for it.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};

pub const PAGE: usize = 4096;

/// include/uapi/linux/userfaultfd.h: UFFD_API, UFFDIO_API and UFFDIO_REGISTER with UFFDIO_REGISTER_MODE_MISSING.
const API: u64 = 0xaa;
const ASK_API: libc::c_ulong = 0xc018_aa3f;
const REGISTER: libc::c_ulong = 0xc020_aa00;
const MISSING: u64 = 1;

/// A page that a thread is held in. It is let go of when this goes.
pub struct HeldPage {
    faults: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl HeldPage {
    /// Has a thread run `call`, which gets the page's address and is to have the kernel write there. Returns when it is held.
    pub fn holding(call: impl FnOnce(usize) + Send + 'static) -> Self {
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
        let thread = std::thread::spawn(move || {
            call(page);
            // SAFETY: the call has returned, and nobody else knows of the page.
            unsafe { libc::munmap(page as *mut libc::c_void, PAGE) };
        });
        // It is in the fault when somebody is asked to see to that.
        poll(&mut [PollFd::new(&faults, PollFlags::IN)], None).unwrap();
        Self { faults: Some(faults), thread: Some(thread) }
    }
}

impl Drop for HeldPage {
    fn drop(&mut self) {
        // Then the kernel sees to it.
        self.faults = None;
        self.thread.take().map(JoinHandle::join);
    }
}

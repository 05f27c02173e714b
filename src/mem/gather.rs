//! Writing scattered guest memory to a file descriptor in one system call: [`write_frame`].
//!
//! The kernel reads the pieces straight from where the sender put them, so a frame that leaves the switch through a
//! descriptor is copied once, by the kernel.

#![allow(unsafe_code)] // One system call on raw guest memory.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use arrayvec::ArrayVec;

use super::Span;
use crate::limits::BATCH_SEGMENTS;

/// Writes one frame to `to`: `head`, which begins with the virtio-net header, then the pieces of `tail`.
///
/// # Errors
/// What writev(2) says; of a TAP: `EAGAIN` when the kernel has no room, `EIO` when the interface is down, `EBADFD` when it
/// was deleted.
pub fn write_frame<'m>(to: BorrowedFd<'_>, head: &[u8], tail: impl Iterator<Item = Span<'m>>) -> io::Result<()> {
    let mut pieces = ArrayVec::<libc::iovec, WRITE_PIECES>::new_const();
    pieces.push(libc::iovec { iov_base: head.as_ptr().cast_mut().cast(), iov_len: head.len() });
    for span in tail {
        if pieces.try_push(span.as_iovec()).is_err() {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
    }
    // SAFETY: `pieces` has `pieces.len()` initialised entries. Its first is `head`, borrowed for this call; each other is
    // a span, mapped for 'm, which outlives this call. writev only reads; bytes that a guest changes meanwhile arrive as
    // a mixture, and a page that went away makes the call fail with EFAULT.
    let result = unsafe { libc::writev(to.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A frame's head, the first piece of its tail, and whatever more pieces a batch can describe.
const WRITE_PIECES: usize = 2 + BATCH_SEGMENTS;
const _: () = assert!(WRITE_PIECES <= 1024, "UIO_MAXIOV of linux/uio.h");

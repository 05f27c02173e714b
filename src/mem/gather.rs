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
use crate::sys::sigbus;

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
    if result >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::EFAULT) {
        pieces.iter().skip(1).for_each(find_missing);
    }
    Err(error)
}

/// Has a page of `piece` that its file does not have noticed: the kernel says EFAULT where an access of ours is SIGBUS, which
/// stops the port that the memory is of. Without this it would be up and lose every frame.
#[cold]
fn find_missing(piece: &libc::iovec) {
    let pages = (0..piece.iov_len).step_by(SMALLEST_PAGE).chain(piece.iov_len.checked_sub(1));
    for at in pages {
        // SAFETY: `at` is below the piece's length, and the piece is a span that is mapped for as long as its caller has it.
        unsafe { sigbus::touch(piece.iov_base.cast::<u8>().add(at)) };
    }
}

/// Bytes of the smallest pages there are.
const SMALLEST_PAGE: usize = 4096;

/// A frame's head, the first piece of its tail, and whatever more pieces a batch can describe.
const WRITE_PIECES: usize = 2 + BATCH_SEGMENTS;
const _: () = assert!(WRITE_PIECES <= 1024, "UIO_MAXIOV of linux/uio.h");

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::mem::{RegionRequest, SharedMemory};
    use crate::sys::eventfd::EventFd;

    #[test]
    fn memory_that_the_kernel_finds_gone_fails_as_if_we_had() {
        let file = File::from(memfd_create("tail", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(8192).unwrap();
        let attention = Arc::new(EventFd::new().unwrap());
        let memory = SharedMemory::new(Arc::clone(&attention), u64::MAX);
        let request = RegionRequest { guest: 0, user: 0, len: 8192, offset: 0 };
        let memory = memory.with(request, file.try_clone().unwrap()).unwrap().unwrap();
        let (_reader, writer) = std::io::pipe().unwrap();
        let write = || write_frame(writer.as_fd(), b"head", memory.memory().span(4000, 1000, &mut 0).into_iter());
        write().unwrap();
        file.set_len(4096).unwrap();
        // A pipe takes what it can get, so the call may succeed in part; a TAP takes all of a frame or nothing.
        let second = memory.memory().span(4096, 100, &mut 0);
        assert_eq!(
            write_frame(writer.as_fd(), b"", second.into_iter()).unwrap_err().raw_os_error(),
            Some(libc::EFAULT)
        );
        assert!(memory.failed());
        assert_eq!(attention.drain(), 1);
    }
}

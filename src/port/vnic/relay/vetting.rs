//! What a descriptor is, and letting go of those that are nothing we take: [`look`], on threads that may wait for ever.
//!
//! The link of a descriptor in `/proc/self/fd` tells an eventfd without asking anybody: the kernel makes the name, and those of
//! files begin with a slash. Everything else has to be asked for, which is a file system's business, and so is closing it.
//!
//! A descriptor that is refused has its place taken by a stand-in, so that its message has as many as it came with: a pipe that
//! holds what the other was. No pipe of a front end is let through, so whoever gets one knows that it is ours.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FileType, FsWord, OFlags, fcntl_setfl, fstat, fstatfs};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, Shutdown};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::printable;

/// Threads that look at the descriptors of one port at a time.
pub(super) const THREADS: u32 = 2;

/// statfs(2): `f_type` of tmpfs, which also backs memfd_create(2), and of hugetlbfs.
const MEMORY_FILE_SYSTEMS: [FsWord; 2] = [0x0102_1994, 0x9584_58f6];

/// Most descriptors that the kernel lets come at once (net/core/scm.c, SCM_MAX_FD).
pub(super) const MOST_AT_ONCE: usize = 253;

/// Stack of such a thread.
const STACK_BYTES: usize = 64 * 1024;

/// Bytes of what a stand-in says.
const SENTENCE_BYTES: usize = 256;

fn link(descriptor: &impl AsRawFd) -> Vec<u8> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
    link.map(|link| link.as_os_str().as_bytes().to_vec()).unwrap_or_default()
}

/// Whether it is an eventfd. Waits for nobody.
pub(super) fn is_eventfd(descriptor: &OwnedFd) -> bool {
    // fs/eventfd.c, do_eventfd.
    link(descriptor) == b"anon_inode:[eventfd]"
}

/// What the descriptors are for a session: themselves, or stand-ins. May wait for ever, and closes what is refused.
pub(super) fn look(descriptors: Vec<OwnedFd>) -> std::io::Result<Vec<OwnedFd>> {
    descriptors
        .into_iter()
        .map(|descriptor| match obstacle(&descriptor) {
            None => Ok(descriptor),
            Some(what) => {
                let stand_in = stand_in(&what);
                close(descriptor);
                stand_in
            }
        })
        .collect()
}

/// What a descriptor is that is neither an eventfd nor memory.
fn obstacle(descriptor: &OwnedFd) -> Option<String> {
    if is_eventfd(descriptor) {
        return None;
    }
    let name = printable::name(&link(descriptor));
    let is_file = fstat(descriptor).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile);
    match fstatfs(descriptor) {
        Ok(system) if is_file && MEMORY_FILE_SYSTEMS.contains(&system.f_type) => None,
        Ok(system) if is_file => Some(format!("{name} (f_type {:#x})", system.f_type)),
        _ => Some(name),
    }
}

/// Lets go of a descriptor. A socket must not linger: unless another process has it, too, that cannot be undone any more.
pub(super) fn close(descriptor: OwnedFd) {
    let _ = rustix::net::sockopt::set_socket_linger(&descriptor, None);
    drop(descriptor);
}

/// A descriptor that says what another one was.
pub(super) fn stand_in(what: &str) -> std::io::Result<OwnedFd> {
    let (read_end, write_end) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    // An empty pipe takes a page at once.
    File::from(write_end).write_all(&what.as_bytes()[..what.len().min(SENTENCE_BYTES)])?;
    Ok(read_end)
}

/// What the descriptor was that `file` stands for, if it is a stand-in. Takes that out of it.
pub(in super::super) fn refused(file: &File) -> Option<String> {
    // fs/pipe.c, pipefs_dname. Files on file systems, FIFOs too, have names that begin with a slash.
    let link = link(file);
    if !link.starts_with(b"pipe:[") {
        return None;
    }
    let mut sentence = [0; SENTENCE_BYTES];
    // Ours does not block; where there is no relay it may be anybody's.
    let _ = fcntl_setfl(file, OFlags::NONBLOCK);
    let len = (&mut &*file).read(&mut sentence).unwrap_or(0);
    // Escaped already, if it is one of ours.
    let visible = sentence[..len].iter().copied().filter(|byte| matches!(byte, b' '..=b'~'));
    let sentence: String = visible.map(char::from).collect();
    Some(if sentence.is_empty() { printable::name(&link) } else { sentence })
}

/// Gives descriptors to `work` on a thread of its own, which may never come back. They come back if there is no thread; to drop
/// them is what must not be.
pub(super) fn elsewhere(
    descriptors: Vec<OwnedFd>,
    work: impl FnOnce(Vec<OwnedFd>) + Send + 'static,
) -> Result<(), Vec<OwnedFd>> {
    let kept = Arc::new(Mutex::new(descriptors));
    let take = |kept: &Mutex<Vec<_>>| std::mem::take(&mut *kept.lock().unwrap_or_else(PoisonError::into_inner));
    let handed_over = Arc::clone(&kept);
    let run = move || work(take(&handed_over));
    let started = std::thread::Builder::new().name("vetting".into()).stack_size(STACK_BYTES).spawn(run);
    started.map(drop).map_err(|_| take(&kept))
}

/// Never lets go of descriptors.
pub(super) fn keep(descriptors: Vec<OwnedFd>) {
    std::mem::forget(descriptors);
}

/// Lets go of descriptors where nobody waits for it.
pub(super) fn drop_elsewhere(descriptors: Vec<OwnedFd>) {
    if !descriptors.is_empty() {
        let close_all = |descriptors: Vec<_>| descriptors.into_iter().for_each(close);
        elsewhere(descriptors, close_all).unwrap_or_else(keep);
    }
}

/// Ends a connection and lets go of it where nobody waits for that.
pub(super) fn hang_up_elsewhere(stream: OwnedFd) {
    let hang_up_all = |streams: Vec<_>| streams.into_iter().filter_map(hang_up).for_each(close);
    elsewhere(vec![stream], hang_up_all).unwrap_or_else(|streams| {
        streams.iter().for_each(shut_down);
        keep(streams);
    });
}

/// Has what comes out of band stay in its place. Else the kernel throws it away where the next message is read, and with it the
/// descriptors that it came with.
pub(super) fn take_in_line(stream: &OwnedFd) {
    let _ = rustix::net::sockopt::set_socket_oobinline(stream, true);
}

/// Ends a connection.
pub(super) fn shut_down(stream: &OwnedFd) {
    let _ = rustix::net::shutdown(stream, Shutdown::Both);
}

/// Ends a connection and lets go of it, unless something lies in it: then it comes back.
pub(super) fn hang_up(stream: OwnedFd) -> Option<OwnedFd> {
    take_in_line(&stream);
    shut_down(&stream);
    let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    // From here on nobody can send anything: one that is empty stays so.
    let is_empty = rustix::net::recv(&stream, &mut [0; 1], peek).is_ok_and(|(len, _)| len == 0);
    Some(stream).filter(|_| !is_empty)
}

/// Descriptors that [`drain`] has at a time.
pub(super) const DRAINED: usize = 16;

/// Reads what lies in a connection that was shut down, and lets go of all that came with it. The kernel does so with those that are
/// too many at once.
pub(super) fn drain(stream: &OwnedFd) {
    let (mut bytes, mut space) = ([0; 4096], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DRAINED))]);
    loop {
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags);
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                rights.for_each(close);
            }
        }
        match received {
            Ok(received) if received.bytes > 0 => {}
            Err(Errno::INTR) => {}
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn eventfds_and_memory_pass_and_everything_else_has_a_stand_in() {
        let event = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let memory = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        // It says what it likes, and is memory.
        File::from(memory.try_clone().unwrap()).write_all(b"not me").unwrap();
        let (pipe, _other) = std::io::pipe().unwrap();
        let (socket, _end) = std::os::unix::net::UnixStream::pair().unwrap();
        let proc = File::open("/proc/self/maps").unwrap();
        let directory = File::open("/dev/shm").unwrap();
        assert!(is_eventfd(&event()) && !is_eventfd(&memory));
        let looked =
            look(vec![event(), memory, pipe.into(), socket.into(), proc.into(), directory.into(), event()]).unwrap();
        let said: Vec<_> = looked.into_iter().map(|descriptor| refused(&File::from(descriptor))).collect();
        assert!([&said[0], &said[1], &said[6]].iter().all(|said| said.is_none()), "{said:?}");
        let said: Vec<_> = said[2..6].iter().map(|said| said.as_deref().unwrap()).collect();
        assert!(said[0].starts_with("pipe:[") && said[1].starts_with("socket:["), "{said:?}");
        assert!(said[2].contains("/maps (f_type 0x9fa0)") && said[3] == "/dev/shm", "{said:?}");
    }

    #[test]
    fn a_socket_that_is_let_go_of_does_not_linger() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let lingers = rustix::net::sockopt::socket_linger;
        rustix::net::sockopt::set_socket_linger(&socket, Some(std::time::Duration::from_secs(3600))).unwrap();
        let kept = socket.try_clone().unwrap();
        assert!(lingers(&kept).unwrap().is_some());
        close(socket.into());
        assert_eq!(lingers(&kept).unwrap(), None);
    }
}

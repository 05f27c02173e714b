//! What a descriptor is, and letting go of those that are nothing we take: [`look`], on threads that may wait for ever.
//!
//! The link of a descriptor in `/proc/self/fd` tells an eventfd without asking anybody: the kernel makes the name, and those of
//! files begin with a slash. Everything else has to be asked for, which is a file system's business, and so is closing it.
//!
//! A descriptor that is refused has its place taken by a stand-in, so that its message has as many as it came with: a sealed
//! memfd that holds what the other was.

use std::fs::File;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FileType, FsWord, MemfdFlags, SealFlags, fcntl_add_seals, fstat, fstatfs, memfd_create};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

use crate::printable;

/// Threads that look at the descriptors of one port at a time.
pub(super) const THREADS: u32 = 2;

/// statfs(2): `f_type` of tmpfs, which also backs memfd_create(2), and of hugetlbfs.
const MEMORY_FILE_SYSTEMS: [FsWord; 2] = [0x0102_1994, 0x9584_58f6];

/// Most descriptors that the kernel lets come at once (net/core/scm.c, SCM_MAX_FD).
pub(super) const AT_ONCE: usize = 253;

/// Stack of such a thread.
const STACK_BYTES: usize = 64 * 1024;

/// Name of the memfd that stands for a descriptor, and its link in `/proc/self/fd`. A front end may give that name to a file of
/// its own; then what the file says is why it is refused.
const STAND_IN: &str = "linecard-refused";
const STAND_IN_LINK: &[u8] = b"/memfd:linecard-refused (deleted)";

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
    let mut file = File::from(memfd_create(STAND_IN, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.write_all(&what.as_bytes()[..what.len().min(SENTENCE_BYTES)])?;
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file.into())
}

/// What the descriptor was that `file` stands for, if it is a stand-in.
pub(in super::super) fn refused(file: &File) -> Option<String> {
    if link(file) != STAND_IN_LINK {
        return None;
    }
    let mut sentence = [0; SENTENCE_BYTES];
    let len = file.read_at(&mut sentence, 0).unwrap_or(0);
    // Escaped already, if it is one of ours.
    let sentence: Vec<u8> = sentence[..len].iter().copied().filter(|byte| matches!(byte, b' '..=b'~')).collect();
    Some(String::from_utf8(sentence).unwrap_or_default())
}

/// Gives descriptors to `work` on a thread of its own, which may never come back. `false`: there is no thread, and they are kept
/// for ever.
pub(super) fn elsewhere(descriptors: Vec<OwnedFd>, work: impl FnOnce(Vec<OwnedFd>) + Send + 'static) -> bool {
    let kept = Arc::new(Mutex::new(descriptors));
    let handed_over = Arc::clone(&kept);
    let run = move || {
        let descriptors = std::mem::take(&mut *handed_over.lock().unwrap_or_else(PoisonError::into_inner));
        work(descriptors);
    };
    let started = std::thread::Builder::new().name("vetting".into()).stack_size(STACK_BYTES).spawn(run).is_ok();
    if !started {
        // Dropping them here is what must not be.
        std::mem::forget(kept);
    }
    started
}

/// Lets go of descriptors where nobody waits for it.
pub(super) fn drop_elsewhere(descriptors: Vec<OwnedFd>) {
    if !descriptors.is_empty() {
        elsewhere(descriptors, |descriptors| descriptors.into_iter().for_each(close));
    }
}

/// Reads what lies in a connection that was shut down, and lets go of all that came with it.
pub(super) fn drain(stream: &OwnedFd) {
    let (mut bytes, mut space) = ([0; 4096], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(AT_ONCE))]);
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

    use super::*;

    #[test]
    fn eventfds_and_memory_pass_and_everything_else_has_a_stand_in() {
        let event = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let memory = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
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
}

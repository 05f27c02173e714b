//! What a Unix socket tells about its other end: [`peer`], [`peer_groups`].

#![allow(unsafe_code)] // getsockopt into a plain structure.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Who connected, as the kernel saw it then (unix(7), SO_PEERCRED).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Process; zero if it is not visible from this process's PID namespace (which is why this is not rustix's, whose
    /// process ids cannot be zero).
    pub pid: i32,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
}

/// The process at the other end of a connected Unix socket.
///
/// # Errors
/// `socket` is none.
pub fn peer(socket: impl AsFd) -> io::Result<Peer> {
    let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    let (fd, level, name) = (socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED);
    // SAFETY: the kernel writes at most `len` bytes, the size of the structure, every bit pattern of which is valid; the
    // descriptor is borrowed for the call.
    let result = unsafe { libc::getsockopt(fd, level, name, (&raw mut credentials).cast(), &mut len) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Peer { pid: credentials.pid, uid: credentials.uid, gid: credentials.gid })
}

/// The supplementary groups that the process at the other end had when it connected (unix(7), SO_PEERGROUPS).
///
/// # Errors
/// `socket` is not a connected Unix socket.
pub fn peer_groups(socket: impl AsFd) -> io::Result<Vec<u32>> {
    let (fd, level, name) = (socket.as_fd().as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERGROUPS);
    let mut groups = vec![0 as libc::gid_t; 64];
    loop {
        let mut len = size_of_val(groups.as_slice()) as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes, which is the size of the vector's initialised elements, every bit
        // pattern of which is valid; the descriptor is borrowed for the call.
        let result = unsafe { libc::getsockopt(fd, level, name, groups.as_mut_ptr().cast(), &mut len) };
        let count = len as usize / size_of::<libc::gid_t>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // The kernel then says how long the list is (net/core/sock.c, sk_getsockopt).
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_other_end_of_a_pair_is_this_process() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let found = peer(&one).unwrap();
        assert_eq!(found.pid as u32, std::process::id());
        assert_eq!(found.uid, rustix::process::geteuid().as_raw());
        assert_eq!(found.gid, rustix::process::getegid().as_raw());
        assert!(peer(std::io::pipe().unwrap().0).is_err());
    }

    #[test]
    fn supplementary_groups_are_told_however_many_there_are() {
        let groups: Vec<u32> = (5000..5200).collect();
        // Ids of a thread are its own; this one ends with what it has become.
        let found = std::thread::spawn({
            let groups = groups.clone();
            move || {
                let list: Vec<_> = groups.iter().map(|group| rustix::process::Gid::from_raw(*group)).collect();
                let set = rustix::thread::set_thread_groups(&list);
                let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
                (set.is_ok(), peer_groups(&one).unwrap())
            }
        });
        let (set, found) = found.join().unwrap();
        assert!(!set || found == groups, "{found:?}");
        assert!(set || !rustix::process::geteuid().is_root());
        assert!(peer_groups(std::io::pipe().unwrap().0).is_err());
    }
}

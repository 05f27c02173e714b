//! The file of a Unix socket: who may have it before us ([`make_way`]), and that ours goes with us ([`SocketFile`]).
//!
//! A daemon that was killed leaves its sockets behind, and the next one wants their paths. What is there is removed only if it
//! is a socket, is ours, and no process serves it any more: nobody has it open, or the process that listened has ended without letting
//! go of it ([`super::process`]). Everything else is left alone and named.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::process::has_ended;
use super::socket::peer;

/// Why a path is not free for a socket.
#[derive(Debug)]
pub enum Obstacle {
    /// It is no socket but what the words say, with their article.
    Other(&'static str),
    /// It is a socket of this user.
    User(u32),
    /// Another process serves it.
    Alive,
    /// The kernel refused what the words say.
    System(&'static str, io::Error),
}

/// Removes the socket of a dead process, if that is what is at `path`.
///
/// # Errors
/// What else is there; it has not been touched then.
pub fn make_way(path: &Path) -> Result<(), Obstacle> {
    let there = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|error| Obstacle::System("look at", error))?,
    };
    match there.file_type() {
        kind if kind.is_socket() => {}
        kind if kind.is_file() => return Err(Obstacle::Other("a file")),
        kind if kind.is_dir() => return Err(Obstacle::Other("a directory")),
        kind if kind.is_symlink() => return Err(Obstacle::Other("a symbolic link")),
        _ => return Err(Obstacle::Other("a special file")),
    }
    let user = rustix::process::geteuid();
    if !user.is_root() && there.st_uid() != user.as_raw() {
        return Err(Obstacle::User(there.st_uid()));
    }
    match connect(path) {
        // Only this says that no process has the socket any more (unix(7)).
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|error| Obstacle::System("remove the old", error))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Its mode keeps even its owner out, who cannot know then.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(Obstacle::System("find out who listens at", error))
        }
        // unix(7), SO_PEERCRED: who called listen(2).
        Ok(stream) if peer(&stream).is_ok_and(|owner| has_ended(owner.pid)) => {
            fs::remove_file(path).map_err(|error| Obstacle::System("remove the old", error))
        }
        // A backlog that is full, or a socket of another type, is a live one as well.
        Ok(_) | Err(_) => Err(Obstacle::Alive),
    }
}

/// Connects to the socket at `path`, which may be no symbolic link: its owner could lead us to the socket of somebody else. Does not
/// wait for a listener (one whose backlog is full is an error, `WouldBlock`), but for whatever keeps the kernel from finding the path.
///
/// # Errors
/// What the kernel says; `NotFound` and `ConnectionRefused` mean that nobody listens.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let there = rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&there)?.st_mode) == FileType::Symlink {
        return Err(io::Error::other("it is a symbolic link, and a socket has to be there itself"));
    }
    // What was looked at is connected to, whatever may be at the path by now.
    let address = SocketAddrUnix::new(format!("/proc/self/fd/{}", there.as_raw_fd()))?;
    let socket = unbound()?;
    rustix::net::connect(&socket, &address)?;
    // From here on its user may wait for the other end.
    fcntl_setfl(&socket, fcntl_getfl(&socket)? - OFlags::NONBLOCK)?;
    Ok(socket.into())
}

/// A new stream socket, which does not block.
///
/// # Errors
/// What the kernel says: in practice that the process has no descriptor left.
pub fn unbound() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// A socket file that we made. Dropping it removes the file, if it still is the one we made.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    /// Takes charge of the file at `path`, which was just made.
    ///
    /// # Errors
    /// It is not there.
    pub fn made(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.into(), identity: identity(path)? })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            // Gone or not: nobody is left to tell.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|there| (there.st_dev(), there.st_ino()))
}

/// Leaves the socket of a dead process at `path`. Closing alone would not do: a child that another test is starting has what was
/// open here until it becomes another program.
#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub fn leave_behind(path: &Path) {
    let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
    rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::{UnixDatagram, UnixListener};

    use super::*;

    #[test]
    fn only_sockets_of_dead_processes_make_way() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        make_way(&at("nothing")).unwrap();
        leave_behind(&at("stale"));
        make_way(&at("stale")).unwrap();
        assert!(!at("stale").exists());
        let _live = UnixListener::bind(at("live")).unwrap();
        let _other_type = UnixDatagram::bind(at("datagrams")).unwrap();
        for name in ["live", "datagrams"] {
            assert!(matches!(make_way(&at(name)), Err(Obstacle::Alive)), "{name}");
        }
        // Nobody accepts, and whoever looks must not wait for that.
        let full = unbound().unwrap();
        rustix::net::bind(&full, &SocketAddrUnix::new(at("full")).unwrap()).unwrap();
        rustix::net::listen(&full, 0).unwrap();
        let _waiting: Vec<_> = std::iter::from_fn(|| connect(&at("full")).ok()).collect();
        assert!(matches!(make_way(&at("full")), Err(Obstacle::Alive)));
        fs::write(at("file"), "precious").unwrap();
        fs::create_dir(at("dir")).unwrap();
        std::os::unix::fs::symlink(at("live"), at("link")).unwrap();
        for (name, what) in [("file", "a file"), ("dir", "a directory"), ("link", "a symbolic link")] {
            assert!(matches!(make_way(&at(name)), Err(Obstacle::Other(found)) if found == what), "{name}");
        }
        for name in ["live", "datagrams", "full", "file", "dir", "link"] {
            assert!(fs::symlink_metadata(at(name)).is_ok(), "{name} is gone");
        }
    }

    #[test]
    fn a_link_is_not_followed_to_a_socket_but_one_on_the_way_is() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("real")).unwrap();
        let listener = UnixListener::bind(at("real/socket")).unwrap();
        std::os::unix::fs::symlink("real", at("way")).unwrap();
        std::os::unix::fs::symlink(at("real/socket"), at("link")).unwrap();
        drop((connect(&at("way/socket")).unwrap(), listener.accept().unwrap()));
        let error = connect(&at("link")).unwrap_err();
        assert!(error.to_string().contains("symbolic link"), "{error}");
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "somebody came by the link");
    }

    #[test]
    fn a_socket_of_somebody_else_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        leave_behind(&path);
        assert!(rustix::process::geteuid().is_root(), "this test becomes another user, so run it as root");
        std::os::unix::fs::chown(dir.path(), Some(4711), None).unwrap();
        // Ids of a thread are its own; this one ends with what it has become.
        let found = std::thread::spawn({
            let path = path.clone();
            move || {
                rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(4711)).unwrap();
                make_way(&path)
            }
        });
        assert!(matches!(found.join().unwrap(), Err(Obstacle::User(0))));
        assert!(path.exists());
    }

    #[test]
    fn our_file_goes_and_what_took_its_place_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let _listener = UnixListener::bind(&path).unwrap();
        drop(SocketFile::made(&path).unwrap());
        assert!(!path.exists() && SocketFile::made(&path).is_err());
        let _listener = UnixListener::bind(&path).unwrap();
        let file = SocketFile::made(&path).unwrap();
        // The old one is kept, or its number may be given to the new one.
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "somebody else's").unwrap();
        drop(file);
        assert!(path.exists());
    }
}

//! The socket of a vNIC in server mode: [`listen`] makes it, with the care of [`crate::sys::socket_file`] for what is there
//! already.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode, Uid, chmod, chown, fchmod};
use rustix::io::Errno;
use rustix::net::SocketAddrUnix;

use super::nic::VnicConfig;
use crate::sys::socket_file::{Obstacle, SocketFile, make_way, unbound};

/// Connections that may wait for the acceptor thread.
const BACKLOG: i32 = 8;

/// Why a socket cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The path does not fit a socket address (unix(7): 108 bytes with the final zero).
    #[error("socket path {} has {} bytes: 107 is the limit", .0.display(), .0.as_os_str().len())]
    PathTooLong(PathBuf),
    /// The directory is missing.
    #[error("there is no directory {}: create it, or correct the socket's path", .0.display())]
    NoDirectory(PathBuf),
    /// Something that is not a socket has the path.
    #[error("{path} is in the way: it is {1}, not a socket, and is left alone", path = .0.display())]
    InTheWay(PathBuf, &'static str),
    /// A socket of another user has the path.
    #[error("{path} is in the way: it is a socket of user {1}, and is left alone", path = .0.display())]
    NotOurs(PathBuf, u32),
    /// Another process serves the socket.
    #[error("another process listens at {}: stop it, or give one of the two another path", .0.display())]
    InUse(PathBuf),
    /// A system call failed.
    #[error("cannot {1} socket {path}", path = .0.display())]
    System(PathBuf, &'static str, #[source] io::Error),
}

/// Makes the socket of `config` and listens on it. The descriptor does not block.
///
/// # Errors
/// What is in the way, or what the kernel refused.
pub(super) fn listen(config: &VnicConfig) -> Result<(OwnedFd, SocketFile), EndpointError> {
    let path = &config.socket;
    let address = address(path)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !parent.is_dir() {
        return Err(EndpointError::NoDirectory(parent.to_owned()));
    }
    make_way(path).map_err(|obstacle| refusal(path, obstacle))?;
    let failed = |what| move |errno: Errno| EndpointError::System(path.clone(), what, errno.into());
    let socket = unbound().map_err(failed("make"))?;
    // The file gets the mode of the socket (net/unix/af_unix.c, unix_bind_bsd): nobody else comes in before the file has
    // its owner and its permissions.
    fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed("protect"))?;
    rustix::net::bind(&socket, &address).map_err(failed("bind"))?;
    let file = SocketFile::made(path).map_err(|e| EndpointError::System(path.clone(), "find", e))?;
    if config.owner.is_some() || config.group.is_some() {
        let (owner, group) = (config.owner.map(Uid::from_raw), config.group.map(Gid::from_raw));
        chown(path, owner, group).map_err(failed("give away"))?;
    }
    chmod(path, Mode::from_raw_mode(config.permissions & 0o777)).map_err(failed("set the permissions of"))?;
    rustix::net::listen(&socket, BACKLOG).map_err(failed("listen at"))?;
    Ok((socket, file))
}

/// What is in the way at `path`, in the words of a port.
fn refusal(path: &Path, obstacle: Obstacle) -> EndpointError {
    let path = path.to_owned();
    match obstacle {
        Obstacle::Other(what) => EndpointError::InTheWay(path, what),
        Obstacle::User(user) => EndpointError::NotOurs(path, user),
        Obstacle::Alive => EndpointError::InUse(path),
        Obstacle::System(what, error) => EndpointError::System(path, what, error),
    }
}

fn address(path: &Path) -> Result<SocketAddrUnix, EndpointError> {
    SocketAddrUnix::new(path).map_err(|_| EndpointError::PathTooLong(path.to_owned()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::port::vnic::Mode as Side;
    use crate::sys::socket_file::{connect, leave_behind};

    fn config(socket: PathBuf) -> VnicConfig {
        VnicConfig {
            name: "vm1".parse().unwrap(),
            socket,
            mode: Side::Server,
            queue_pairs: 1,
            mtu: None,
            owner: None,
            group: None,
            permissions: 0o660,
            memory: None,
            mac: None,
            compat: crate::ident::Compat::default(),
            records: None,
        }
    }

    #[test]
    fn a_socket_gets_its_permissions_and_goes_with_its_port() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm1.sock");
        let (listener, file) = listen(&config(path.clone())).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        connect(&path).unwrap();
        drop((listener, file));
        assert!(!path.exists());
        let (_listener, file) = listen(&config(path.clone())).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "somebody else's").unwrap();
        drop(file);
        assert!(path.exists(), "a file that took the place of ours is left alone");
    }

    #[test]
    fn stale_sockets_are_replaced_and_live_ones_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm1.sock");
        leave_behind(&path);
        assert!(path.exists());
        let (_listener, _file) = listen(&config(path.clone())).unwrap();
        assert!(matches!(listen(&config(path.clone())), Err(EndpointError::InUse(_))));
        let waiting: Vec<_> = (0..2 * BACKLOG).map_while(|_| connect(&path).ok()).collect();
        assert!(waiting.len() < 2 * BACKLOG as usize, "the backlog is full");
        assert!(
            matches!(listen(&config(path)), Err(EndpointError::InUse(_))),
            "a full backlog is a live socket as well"
        );
    }

    #[test]
    fn whatever_else_is_in_the_way_is_named_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "precious").unwrap();
        fs::create_dir(at("dir")).unwrap();
        std::os::unix::fs::symlink(at("nowhere"), at("link")).unwrap();
        for (name, what) in [("file", "a file"), ("dir", "a directory"), ("link", "a symbolic link")] {
            let error = listen(&config(at(name))).unwrap_err().to_string();
            assert!(error.contains("is in the way") && error.contains(what), "{error}");
            assert!(fs::symlink_metadata(at(name)).is_ok());
        }
        let missing = listen(&config(at("missing/vm1.sock"))).unwrap_err();
        assert!(matches!(missing, EndpointError::NoDirectory(ref parent) if parent.ends_with("missing")), "{missing}");
        let long = listen(&config(at(&"x".repeat(120)))).unwrap_err().to_string();
        assert!(long.contains("107 is the limit"), "{long}");
    }
}

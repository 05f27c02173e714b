//! The API's Unix socket: made without ever removing what is not ours, and who is at the other end of a connection.
//!
//! Who may connect is decided by the file: its mode, owner and group (unix(7): connecting takes write permission). Where
//! the mode lets everybody in, so that anybody may look, only root, the daemon's own user and the socket's group may
//! change something. The mode and the group are those that the socket was made with, and a peer's groups, supplementary ones
//! too, are those that the kernel vouches for; nothing is looked up by the file's name, which somebody else may have by then.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Mode, chmod, chown, fchmod};
use rustix::net::SocketAddrUnix;
use tokio::net::{UnixListener, UnixStream};

use crate::host::account::{self, AccountError};
use crate::sys::socket::{peer, peer_groups};
use crate::sys::socket_file::{Obstacle, SocketFile, make_way, unbound};

/// Connections that may wait until they are accepted: a burst, which whoever may connect can make. More than net.core.somaxconn are
/// not (listen(2)); that is 4096 unless somebody changed it.
const BACKLOG: i32 = 4096;

/// Permission bits of the socket's directory if there is none yet: who may read a directory can keep others from using it.
const DIRECTORY: u32 = 0o711;

/// Why there is no API.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Something that is not a socket is in its place.
    #[error("{path} is not a socket but {1}: move it away, or set daemon.api to another path", path = .0.display())]
    NotASocket(PathBuf, &'static str),
    /// A socket of another user is in its place.
    #[error("{path} is a socket of user {1}: move it away, or set daemon.api to another path", path = .0.display())]
    NotOurs(PathBuf, u32),
    /// Somebody answers there.
    #[error("another process answers on {}: stop that linecardd first, or set daemon.api to another path", .0.display())]
    Alive(PathBuf),
    /// The kernel refused.
    #[error("cannot make the API's socket {}: does its directory exist, and may linecardd write there?", .0.display())]
    Make(PathBuf, #[source] io::Error),
    /// The group of daemon.api-group.
    #[error("cannot give the API's socket its group (daemon.api-group)")]
    Group(#[from] AccountError),
}

/// A listening socket.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    access: Access,
}

impl ApiSocket {
    /// Makes the socket at `path` with these permission bits and, if given, this group. Needs a tokio runtime. The file is to be
    /// dropped where nobody waits: removing it takes the lock of its directory.
    ///
    /// # Errors
    /// The path is taken, cannot be used, or the group does not exist.
    pub fn bind(path: &Path, mode: u32, group: Option<&str>) -> Result<(Self, SocketFile), SocketError> {
        let group = group.map(account::group).transpose()?;
        let failed = |error: io::Error| SocketError::Make(path.into(), error);
        if let Some(directory) = path.parent() {
            fs::DirBuilder::new().recursive(true).mode(DIRECTORY).create(directory).map_err(failed)?;
        }
        make_way(path).map_err(|obstacle| refusal(path, obstacle))?;
        let (listener, file, access) = make(path, mode, group).map_err(failed)?;
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        Ok((Self { listener, access }, file))
    }

    /// The listener, and whom it lets change something.
    pub(super) fn into_parts(self) -> (UnixListener, Access) {
        (self.listener, self.access)
    }
}

fn make(
    path: &Path,
    mode: u32,
    group: Option<u32>,
) -> io::Result<(std::os::unix::net::UnixListener, SocketFile, Access)> {
    let socket = unbound()?;
    // The file gets the mode of the socket (net/unix/af_unix.c, unix_bind_bsd), so it never stands there with wider permissions
    // than its last ones. Nobody gets in before listen(2).
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    let file = SocketFile::made(path)?;
    if let Some(group) = group {
        chown(path, None, Some(Gid::from_raw(group)))?;
    }
    chmod(path, Mode::from_raw_mode(mode & 0o777))?;
    // Without a group of its own it has that of the daemon, or in a set-group-ID directory that of the directory.
    let group = group.map_or_else(|| rustix::fs::lstat(path).map(|there| there.st_gid), Ok)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok((socket.into(), file, Access { mode, group }))
}

/// What is in the way at `path`, in the words of the API.
fn refusal(path: &Path, obstacle: Obstacle) -> SocketError {
    let path = path.into();
    match obstacle {
        Obstacle::Other(what) => SocketError::NotASocket(path, what),
        Obstacle::User(user) => SocketError::NotOurs(path, user),
        Obstacle::Alive => SocketError::Alive(path),
        Obstacle::System(_, error) => SocketError::Make(path, error),
    }
}

/// Whom the socket lets change something: the mode and the group that it was made with.
#[derive(Debug, Clone, Copy)]
pub(super) struct Access {
    mode: u32,
    group: u32,
}

/// Who is at the other end of a connection, as the kernel noted when it was made (SO_PEERCRED).
#[derive(Debug, Clone)]
pub struct Peer {
    /// The peer's user; `None` if the kernel did not say.
    pub uid: Option<u32>,
    /// Whether it may change something.
    pub may_write: bool,
}

impl Access {
    /// Who is at the other end of `stream`.
    pub(super) fn peer(self, stream: &UnixStream) -> Peer {
        let Ok(credentials) = peer(stream) else { return Peer { uid: None, may_write: false } };
        let groups = peer_groups(stream).unwrap_or_default();
        let of_group = credentials.gid == self.group || groups.contains(&self.group);
        Peer { uid: Some(credentials.uid), may_write: self.may_write(credentials.uid, of_group) }
    }

    /// Whether a user that the file's mode let in may change something.
    fn may_write(self, uid: u32, of_group: bool) -> bool {
        const OTHERS_WRITE: u32 = 0o002;
        let own = uid == 0 || uid == rustix::process::geteuid().as_raw();
        own || of_group || self.mode & OTHERS_WRITE == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sockets_mode_and_group_decide_who_changes_something() {
        let own = rustix::process::geteuid().as_raw();
        let stranger = own + 4711;
        let (closed, open) = (Access { mode: 0o660, group: 4712 }, Access { mode: 0o666, group: 4712 });
        assert!(open.may_write(0, false) && open.may_write(own, false));
        assert!(closed.may_write(stranger, false), "the file's mode let it in, so it is of the group");
        assert!(open.may_write(stranger, true));
        assert!(!open.may_write(stranger, false), "everybody may look only");
    }
}

//! The API's Unix socket: made without ever removing what is not ours, and who is at the other end of a connection.
//!
//! Who may connect is decided by the file: its mode, owner and group (unix(7): connecting takes write permission). Where
//! the mode lets everybody in, so that anybody may look, only root, the daemon's own user and the socket's group may
//! change something; a group counts if it is the peer's effective one, because the kernel vouches for no other.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use tokio::net::UnixListener;

use crate::host::account::{self, AccountError};
use crate::sys::socket_file::{Obstacle, SocketFile, make_way};

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

/// A listening socket; its file goes when this is dropped, if it is still ours.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    file: SocketFile,
}

impl ApiSocket {
    /// Makes the socket at `path` with these permission bits and, if given, this group. Needs a tokio runtime.
    ///
    /// The socket is made under another name and moved into place, so that it never stands there with wider permissions.
    ///
    /// # Errors
    /// The path is taken, cannot be used, or the group does not exist.
    pub fn bind(path: &Path, mode: u32, group: Option<&str>) -> Result<Self, SocketError> {
        let group = group.map(account::group).transpose()?;
        let failed = |error| SocketError::Make(path.into(), error);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(failed)?;
        }
        make_way(path).map_err(|obstacle| refusal(path, obstacle))?;
        let mut beside = path.as_os_str().to_owned();
        beside.push(format!(".{}", std::process::id()));
        let beside = PathBuf::from(beside);
        // Left over from a process of the same number that died between the two steps.
        let _ = fs::remove_file(&beside);
        let listener = UnixListener::bind(&beside).map_err(failed)?;
        let placed = fs::set_permissions(&beside, Permissions::from_mode(mode))
            .and_then(|()| group.map_or(Ok(()), |group| chown(&beside, None, Some(group))))
            .and_then(|()| fs::rename(&beside, path));
        if let Err(error) = placed {
            let _ = fs::remove_file(&beside);
            return Err(failed(error));
        }
        let file = SocketFile::made(path).map_err(failed)?;
        Ok(Self { listener, file })
    }

    /// The listener, and what removes the file when it is dropped.
    pub(super) fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
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

/// Who is at the other end of a connection, as the kernel noted when it was made (SO_PEERCRED).
#[derive(Debug, Clone)]
pub struct Peer {
    /// The peer's user; `None` if the kernel did not say.
    pub uid: Option<u32>,
    /// Whether it may change something.
    pub may_write: bool,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let credentials = stream.io().peer_cred().ok();
        let socket = stream.io().local_addr().ok();
        let file = socket.as_ref().and_then(|address| address.as_pathname()).and_then(|path| fs::metadata(path).ok());
        let (uid, gid) = (credentials.map(|c| c.uid()), credentials.map(|c| c.gid()));
        Self { uid, may_write: may_write(uid, gid, file.map(|f| (f.mode(), f.gid()))) }
    }
}

/// Whether a peer that the file's mode let in may change something. `file` is the socket's mode and group.
fn may_write(uid: Option<u32>, gid: Option<u32>, file: Option<(u32, u32)>) -> bool {
    const OTHERS_WRITE: u32 = 0o002;
    let Some(uid) = uid else { return false };
    let own = uid == 0 || uid == rustix::process::geteuid().as_raw();
    let let_in = file.is_some_and(|(mode, group)| mode & OTHERS_WRITE == 0 || Some(group) == gid);
    own || let_in
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_mode_and_group_decide_who_changes_something() {
        let own = rustix::process::geteuid().as_raw();
        let (stranger, group) = (own + 4711, 4712);
        let (closed, open) = (Some((0o140_660, group)), Some((0o140_666, group)));
        assert!(may_write(Some(0), Some(0), open) && may_write(Some(own), Some(1), open));
        assert!(may_write(Some(stranger), Some(1), closed), "the file's mode let it in, so it is of the group");
        assert!(may_write(Some(stranger), Some(group), open));
        assert!(!may_write(Some(stranger), Some(1), open), "everybody may look only");
        assert!(!may_write(None, None, closed) && !may_write(Some(stranger), Some(1), None));
    }
}

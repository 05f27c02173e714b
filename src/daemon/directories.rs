//! Directories of our own sockets: who may read them.
//!
//! Whoever may read a directory can hold its lock for as long as he likes, by having its names written to memory of a file system that
//! never answers (fs/readdir.c: iterate_dir). Whoever makes, finds or removes a socket there then waits. That others may pass through,
//! to a socket whose name they know, is harmless.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::{fs, io, thread};

use crate::config::{KindPlan, Plan, SocketMode};

/// The bit of a mode that lets everybody read.
const OTHERS_READ: u32 = 0o004;

/// Says so if everybody may read where sockets of `plan` are. Asks on a thread of its own, for that may already be waited for.
pub(super) fn compare(plan: &Plan) {
    let directories = directories(plan);
    let say = move || directories.iter().filter(|path| is_open(path).unwrap_or(false)).for_each(|path| warn(path));
    if let Err(error) = thread::Builder::new().name("directories".into()).spawn(say) {
        log::debug!("nobody looks at who may read the directories of sockets: {error}");
    }
}

/// Where we make sockets.
fn directories(plan: &Plan) -> BTreeSet<PathBuf> {
    let ports = plan.ports.values().filter_map(|port| match &port.kind {
        KindPlan::VhostUser(vnic) if vnic.mode == SocketMode::Server => Some(&vnic.socket),
        _ => None,
    });
    ports.chain([&plan.daemon.api]).filter_map(|socket| socket.parent()).map(Path::to_owned).collect()
}

fn is_open(directory: &Path) -> io::Result<bool> {
    Ok(fs::metadata(directory)?.permissions().mode() & OTHERS_READ != 0)
}

fn warn(directory: &Path) {
    log::warn!(
        "every user of this host may read {0}, and can keep linecardd from making and removing sockets there, and so from being changed \
         and from ending: have sockets in a directory of mode 0711 (chmod o-r {0})",
        directory.display()
    );
}

//! Groups of this machine by name, from /etc/group (group(5)).
//!
//! Who may use the API is a group of the host itself, so the file is enough; asking a directory server from the daemon
//! that has to run when the network is down is not wanted.

use std::path::Path;

/// Why a group could not be found.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// /etc/group could not be read.
    #[error("cannot read /etc/group")]
    Read(#[source] std::io::Error),
    /// It has no such group.
    #[error("there is no group \"{0}\" on this host: make it with `groupadd --system {0}`, or name another")]
    Unknown(String),
}

/// Number of the group called `name`; a number stands for itself.
///
/// # Errors
/// There is no such group, or no list of groups.
pub fn id(name: &str) -> Result<u32, GroupError> {
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    let text = std::fs::read_to_string(Path::new("/etc/group")).map_err(GroupError::Read)?;
    find(&text, name).ok_or_else(|| GroupError::Unknown(name.into()))
}

fn find(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next()? == name;
        fields.nth(1).filter(|_| found)?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_found_by_their_whole_name() {
        let text = "root:x:0:\nkvm:x:104:libvirt-qemu\n\nbroken\n";
        assert_eq!((find(text, "kvm"), find(text, "kv"), find(text, "broken")), (Some(104), None, None));
        assert!(matches!(id("no-such-group-here"), Err(GroupError::Unknown(_))));
        assert_eq!(id("7").ok(), Some(7));
    }
}

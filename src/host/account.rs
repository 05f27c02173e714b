//! Users and groups of this machine by name, from /etc/passwd and /etc/group (passwd(5), group(5)).
//!
//! Who may use a socket is an account of the host itself, so the files are enough; asking a directory server from a
//! daemon that has to run when the network is down is not wanted.

use std::fs;

/// Why an account could not be found.
#[derive(Debug, thiserror::Error)]
pub enum AccountError {
    /// The list could not be read.
    #[error("cannot read {0}")]
    Read(&'static str, #[source] std::io::Error),
    /// There is no such group.
    #[error("there is no group \"{0}\" on this host: make it with `groupadd --system {0}`, or name another")]
    NoGroup(String),
    /// There is no such user.
    #[error("there is no user \"{0}\" on this host: name another")]
    NoUser(String),
}

/// Number of the group called `name`; a number stands for itself.
///
/// # Errors
/// There is no such group, or no list of groups.
pub fn group(name: &str) -> Result<u32, AccountError> {
    id("/etc/group", name)?.ok_or_else(|| AccountError::NoGroup(name.into()))
}

/// Number of the user called `name`; a number stands for itself.
///
/// # Errors
/// There is no such user, or no list of users.
pub fn user(name: &str) -> Result<u32, AccountError> {
    id("/etc/passwd", name)?.ok_or_else(|| AccountError::NoUser(name.into()))
}

fn id(file: &'static str, name: &str) -> Result<Option<u32>, AccountError> {
    if let Ok(id) = name.parse() {
        return Ok(Some(id));
    }
    let text = fs::read_to_string(file).map_err(|error| AccountError::Read(file, error))?;
    Ok(find(&text, name))
}

/// Both files have the name first, a password that is elsewhere second, and the number third.
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
    fn accounts_are_found_by_their_whole_name() {
        let text = "root:x:0:\nkvm:x:104:libvirt-qemu\n\nbroken\n";
        assert_eq!((find(text, "kvm"), find(text, "kv"), find(text, "broken")), (Some(104), None, None));
        assert!(matches!(group("no-such-group-here"), Err(AccountError::NoGroup(_))));
        assert!(matches!(user("no-such-user-here"), Err(AccountError::NoUser(_))));
        assert_eq!((group("7").ok(), user("root").ok()), (Some(7), Some(0)));
    }
}

//! What the service manager is told: the protocol of sd_notify(3), [`Manager`].
//!
//! The manager may not read its socket for a while: it is stopped, executes itself anew, or waits for something. Nobody here waits for
//! it: no message is sent that there is no room for. What it has to know is kept and sent when there is room, in its order and
//! before anything else; what is said every second anyway is not said then.

use std::collections::VecDeque;
use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sendto, socket_with};
use rustix::time::{ClockId, clock_gettime};

use crate::control::Tally;

/// The service manager that started the daemon, if one did.
pub(super) struct Manager {
    listener: Option<Listener>,
    /// Whether it wants to be told every now and then that the daemon still serves.
    pub(super) wants_pulse: bool,
}

impl Manager {
    /// The one that the environment names.
    pub(super) fn of_environment() -> Self {
        let listener = env::var_os("NOTIFY_SOCKET").and_then(|name| match Listener::at(&name) {
            Ok(listener) => Some(listener),
            Err(error) => {
                log::warn!("NOTIFY_SOCKET={}: nothing can be told to the service manager: {error}", name.display());
                None
            }
        });
        Self { listener, wants_pulse: wants_pulse() }
    }

    /// The daemon serves, with its first configuration or, after [`Manager::reloading`], with one that was applied or refused.
    pub(super) fn ready(&self) {
        self.keep("READY=1".into());
    }

    /// A new configuration is being applied.
    pub(super) fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        // `Type=notify-reload` wants the time with it, to tell this reload from an earlier one.
        let usec = now.tv_sec * 1_000_000 + now.tv_nsec / 1000;
        if let Some(listener) = &self.listener {
            // Of several reloads that it has not heard of, the last says all.
            listener.kept().clear();
        }
        self.keep(format!("RELOADING=1\nMONOTONIC_USEC={usec}"));
    }

    /// The daemon ends.
    pub(super) fn stopping(&self) {
        self.keep("STOPPING=1".into());
    }

    /// The daemon's threads answer; for the watchdog.
    pub(super) fn alive(&self) {
        self.mention("WATCHDOG=1");
    }

    /// What `systemctl status` shows.
    pub(super) fn tell_status(&self, Tally { up, down, stopped }: Tally) {
        self.mention(&format!("STATUS=ports: {up} up, {down} down, {stopped} stopped"));
    }

    /// Tells what it has to know and there was no room for.
    pub(super) fn catch_up(&self) {
        if let Some(listener) = &self.listener {
            listener.catch_up(&mut listener.kept());
        }
    }

    /// Tells what it has to know, now or later. That is never more than a reload, its end and the daemon's.
    fn keep(&self, text: String) {
        let Some(listener) = &self.listener else { return };
        let mut kept = listener.kept();
        kept.push_back(text);
        listener.catch_up(&mut kept);
    }

    /// Tells what will be told again, if there is room.
    fn mention(&self, text: &str) {
        let Some(listener) = &self.listener else { return };
        if listener.catch_up(&mut listener.kept()) {
            listener.send(text);
        }
    }
}

/// Whether the environment asks for a pulse (sd_watchdog_enabled(3)): a time is set, and it is meant for this process.
fn wants_pulse() -> bool {
    let number = |name| env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let ours = env::var_os("WATCHDOG_PID").is_none() || number("WATCHDOG_PID") == Some(std::process::id().into());
    ours && number("WATCHDOG_USEC").is_some_and(|usec| usec > 0)
}

/// Where the manager listens.
struct Listener {
    socket: OwnedFd,
    address: SocketAddrUnix,
    /// What it has to know and was not told yet.
    kept: Mutex<VecDeque<String>>,
}

impl Listener {
    /// The one of this name: a path, or `@` and an abstract name.
    fn at(name: &OsStr) -> io::Result<Self> {
        let address = match name.as_bytes() {
            [b'@', rest @ ..] if !rest.is_empty() => SocketAddrUnix::new_abstract_name(rest)?,
            [b'/', ..] => SocketAddrUnix::new(name)?,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is neither a path nor an abstract name")),
        };
        // Made now, so that it is there when the process has no descriptor left.
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket, address, kept: Mutex::default() })
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<String>> {
        // It is whole between two statements.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what was kept. Returns whether nothing is left.
    fn catch_up(&self, kept: &mut VecDeque<String>) -> bool {
        while let Some(text) = kept.front() {
            if !self.send(text) {
                return false;
            }
            kept.pop_front();
        }
        true
    }

    /// Returns whether it need not be sent again. Never waits.
    fn send(&self, text: &str) -> bool {
        loop {
            match sendto(&self.socket, text.as_bytes(), SendFlags::DONTWAIT, &self.address) {
                Err(Errno::INTR) => {}
                // What lies there unread is held against the reader's bound and ours (unix(7); net/unix/af_unix.c,
                // unix_dgram_sendmsg).
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return false,
                // A manager that is gone does not matter to the switch.
                _ => return true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixDatagram;

    use super::*;

    /// A manager that does not read yet, and how many messages lie before it already.
    fn full(directory: &std::path::Path) -> (UnixDatagram, Manager, usize) {
        let path = directory.join("notify");
        let reader = UnixDatagram::bind(&path).unwrap();
        reader.set_nonblocking(true).unwrap();
        let listener = Listener::at(path.as_os_str()).unwrap();
        let count = std::iter::repeat_with(|| listener.send("FILL=1")).take_while(|sent| *sent).count();
        (reader, Manager { listener: Some(listener), wants_pulse: true }, count)
    }

    fn heard(reader: &UnixDatagram) -> Vec<String> {
        let mut message = [0; 1000];
        let texts = std::iter::from_fn(|| {
            reader.recv(&mut message).ok().map(|len| String::from_utf8_lossy(&message[..len]).into_owned())
        });
        texts.collect()
    }

    #[test]
    fn what_is_kept_is_bounded_comes_first_and_ends_with_the_last_word() {
        let directory = tempfile::tempdir().unwrap();
        let (reader, manager, filled) = full(directory.path());
        manager.ready();
        for _ in 0..1000 {
            manager.alive();
            manager.reloading();
            manager.ready();
        }
        manager.stopping();
        assert!(manager.listener.as_ref().unwrap().kept().len() <= 3);
        assert_eq!(heard(&reader).len(), filled, "there was no room");
        manager.alive();
        let heard = heard(&reader);
        assert_eq!(heard.len(), 4, "{heard:?}");
        assert!(heard[0].starts_with("RELOADING=1\nMONOTONIC_USEC="), "{heard:?}");
        assert_eq!(heard[1..], ["READY=1", "STOPPING=1", "WATCHDOG=1"]);
    }

    #[test]
    fn a_manager_that_is_gone_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let (reader, manager, _) = full(directory.path());
        manager.ready();
        drop(reader);
        manager.catch_up();
        assert!(manager.listener.unwrap().kept().is_empty());
        for name in ["", "@", "notify", "vsock:2:1234"] {
            assert!(Listener::at(OsStr::new(name)).is_err(), "{name}");
        }
    }
}

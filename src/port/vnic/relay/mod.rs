//! The relay: a process between the front ends and this one, which looks at every descriptor that they send before it gets here.
//!
//! A descriptor is a front end's own, and closing it may take as long as the front end likes: close(2) calls the FLUSH of a file
//! on a FUSE file system, waits for it beyond any signal, and leaves the process a zombie with all its sockets when it is killed;
//! closing the last descriptor of a TCP socket waits for as long as its SO_LINGER says. fstat(2) and fstatfs(2) ask that file
//! system, too. Threads of one process share one table of descriptors, so none of this may happen in the process that serves
//! everybody. It happens in the relay: a process of the same program that has no other work, is not waited for by anybody, and
//! is started again when it ends.
//!
//! A connection is accepted here, for who the other end is ([`FarEnd`]), and then given to the relay with one end of a pair of
//! sockets; the session has the other end. Messages go through byte by byte, each with the descriptors that came with it: eventfds
//! and files on tmpfs and hugetlbfs as they are, everything else as a [stand-in](vetting::refused) that says what it was. Only
//! control messages take this way: frames do not come near it.
//!
//! - [`process`]: its one thread, and what it does with each connection; the `link` of a connection, both directions of it
//! - [`vetting`]: what descriptors are, found out on threads that may never come back; two of a port's at most

mod link;
pub mod process;
pub(super) mod vetting;

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};

/// The option of `linecardd` that makes it the relay. Its standard input is the socket to the daemon.
pub const OPTION: &str = "--relay";

/// The program that this process runs, whatever has become of its file since.
pub const THIS_PROGRAM: &str = "/proc/self/exe";

/// How long to wait before a relay that has ended is started again.
const BACK_OFF: Duration = Duration::from_millis(200);

/// How long a connection waits for the relay to take it over, which takes microseconds.
const TAKE_OVER: Duration = Duration::from_secs(2);

/// Descriptors of one port that the relay could not let go of, from which on the port takes no connections.
pub(super) const MOST_HELD: u32 = vetting::THREADS;

/// What this process asks of the relay. Each message has the number of a port behind it and descriptors with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Order {
    /// A connection and the end of a pair that stands for it.
    Connect = 1,
    /// A connection that nobody wants any more.
    Discard = 2,
}

/// Bytes of an order.
const ORDER_BYTES: usize = 9;

/// Bytes of what the relay says: the number of a port, and how many of its descriptors are held up.
const NEWS_BYTES: usize = 12;

/// The relay of this process.
pub(super) struct Relay {
    /// What is started with [`OPTION`].
    program: PathBuf,
    control: Mutex<OwnedFd>,
    last_port: AtomicU64,
    /// How many descriptors of each port are held up, if there are any.
    held: Mutex<HashMap<u64, u32>>,
}

static RELAY: OnceLock<Relay> = OnceLock::new();

/// Starts the relay, and a thread that starts it again should it end. To be called once, before the first port is made, by a
/// thread that is kept off the shards' CPUs. `program` is one that calls [`process::run`] when it is given [`OPTION`].
///
/// # Errors
/// The kernel refused sockets, a process or a thread.
pub fn start(program: &Path) -> io::Result<()> {
    let (control, child) = launch(program)?;
    let (last_port, held) = (AtomicU64::new(0), Mutex::default());
    let relay = Relay { program: program.into(), control: Mutex::new(control), last_port, held };
    if RELAY.set(relay).is_err() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a relay"));
    }
    std::thread::Builder::new().name("relay".into()).stack_size(128 * 1024).spawn(move || watch(child)).map(drop)
}

/// The relay, in a process that has started one. Unit tests have none, and their front ends are their own.
fn running() -> Option<&'static Relay> {
    RELAY.get()
}

fn launch(program: &Path) -> io::Result<(OwnedFd, Child)> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::sockopt::set_socket_timeout(&ours, rustix::net::sockopt::Timeout::Send, Some(TAKE_OVER))?;
    let child = Command::new(program)
        .arg(OPTION)
        .current_dir("/")
        .stdin(theirs)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    Ok((ours, child))
}

/// Hears what the relay has to say, and starts it again when it has ended: its connections end with it, and front ends come back.
fn watch(mut child: Child) {
    let Some(relay) = running() else { return };
    loop {
        relay.hear();
        let status =
            child.try_wait().ok().flatten().map_or_else(|| "it still runs".into(), |status| status.to_string());
        log::error!("the relay has ended ({status}): front ends are cut off and have to connect again");
        relay.held().clear();
        let (control, next) = loop {
            std::thread::sleep(BACK_OFF);
            match launch(&relay.program) {
                Ok(started) => break started,
                Err(error) => log::error!("cannot start the relay again: {error}"),
            }
        };
        let old = std::mem::replace(&mut *relay.control(), control);
        // It may hold connections that were not taken over.
        vetting::drop_elsewhere(vec![old]);
        child = next;
    }
}

impl Relay {
    fn control(&self) -> MutexGuard<'_, OwnedFd> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, HashMap<u64, u32>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the relay has ended.
    fn hear(&self) {
        let Ok(control) = self.control().try_clone() else { return };
        let mut news = [0; NEWS_BYTES];
        loop {
            match rustix::net::recv(&control, news.as_mut_slice(), RecvFlags::empty()) {
                Ok((NEWS_BYTES, _)) => {
                    let [a, b, c, d, e, f, g, h, i, j, k, l] = news;
                    let (port, count) =
                        (u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u32::from_ne_bytes([i, j, k, l]));
                    match count {
                        0 => self.held().remove(&port),
                        count => self.held().insert(port, count),
                    };
                }
                Err(rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => return,
            }
        }
    }

    fn order(&self, order: Order, port: u64, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let [a, b, c, d, e, f, g, h] = port.to_ne_bytes();
        let bytes = [order as u8, a, b, c, d, e, f, g, h];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        let control = self.control();
        let data = [io::IoSlice::new(&bytes)];
        rustix::io::retry_on_intr(|| rustix::net::sendmsg(&*control, &data, &mut ancillary, SendFlags::NOSIGNAL))?;
        Ok(())
    }
}

/// A port as the relay knows it.
#[derive(Debug, Clone, Copy)]
pub(super) struct PortNumber(u64);

impl PortNumber {
    /// A number that no other port of this process has had.
    pub(super) fn next() -> Self {
        Self(running().map_or(0, |relay| relay.last_port.fetch_add(1, Ordering::Relaxed) + 1))
    }

    /// Descriptors of its front ends that the kernel has not let go of for some seconds.
    pub(super) fn held(self) -> u32 {
        running().and_then(|relay| relay.held().get(&self.0).copied()).unwrap_or(0)
    }
}

/// A connection of a front end, of which nothing was read yet. Nobody reads from it here, and nobody closes it: what lies in it
/// may hold descriptors, and whoever closes it last closes those.
pub(super) struct FarEnd {
    stream: UnixStream,
    port: PortNumber,
}

impl FarEnd {
    pub(super) fn new(stream: UnixStream, port: PortNumber) -> Self {
        Self { stream, port }
    }

    /// Has the relay take it over; returns the end that a session can read from and close.
    pub(super) fn connect(&self) -> io::Result<UnixStream> {
        let Some(relay) = running() else { return self.stream.try_clone() };
        let (ours, theirs) = UnixStream::pair()?;
        relay.order(Order::Connect, self.port.0, &[self.stream.as_fd(), theirs.as_fd()])?;
        Ok(ours)
    }
}

impl AsFd for FarEnd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Drop for FarEnd {
    fn drop(&mut self) {
        let Some(relay) = running() else { return };
        if relay.order(Order::Discard, self.port.0, &[self.stream.as_fd()]).is_err() {
            let _ = self.stream.shutdown(Shutdown::Both);
            // Then it is not closed for the last time here.
            vetting::drop_elsewhere(self.stream.try_clone().map(OwnedFd::from).into_iter().collect());
        }
    }
}

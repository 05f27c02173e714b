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
//! What passes is still a front end's, and whoever closes the last descriptor of an eventfd may wait for as long as its owner likes.
//! So that is the relay, too: it keeps a descriptor of each until this process has closed its own.
//!
//! - [`process`]: its one thread, and what it does with each connection; the `link` of a connection, both directions of it
//! - [`vetting`]: what descriptors are, found out on threads that may never come back; two of a port's at most
//! - [`ledger`]: how many descriptors it has in hand, of which port
//! - [`kept`]: eventfds that it has passed on; the [`lease`] of a connection, by which this process says which of them it has

mod job;
mod kept;
pub(super) mod lease;
mod ledger;
mod link;
mod pacing;
pub mod process;
pub(super) mod vetting;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::pipe::{PipeFlags, pipe_with};

use self::lease::Lease;
use self::ledger::ALL_PORTS;
use super::offence::{Docket, Offence};

/// The option of `linecardd` that makes it the relay. Its standard input is the socket to the daemon.
pub const OPTION: &str = "--relay";

/// The program that this process runs, whatever has become of its file since.
pub const THIS_PROGRAM: &str = "/proc/self/exe";

/// How long to wait before a relay that has ended is started again.
const BACK_OFF: Duration = Duration::from_millis(200);

/// How long a relay that no longer listens takes to end, at most; the kernel closes its sockets some microseconds before.
const ENDING: Duration = Duration::from_secs(1);

/// How long a connection waits for the relay to take it over, which takes microseconds.
const TAKE_OVER: Duration = Duration::from_secs(2);

/// Descriptors of one port that the relay could not let go of, from which on the port takes no connections.
const MOST_HELD: u32 = vetting::THREADS;

/// Why a port takes no connections: each could leave more in the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Obstacle {
    #[error(
        "no connections: {0} descriptors of earlier ones cannot be closed, for the file systems they are on do not answer"
    )]
    Held(u32),
    #[error(
        "no connections: the kernel gives the relay no threads: raise TasksMax= of its unit (pids.max of its cgroup), or have fewer tasks on this host"
    )]
    NoThreads,
    #[error("no connections: descriptors of earlier ones are still being closed")]
    Full,
}

/// Bytes of what the two tell each other: a kind, the number of a port, and what there is to say.
const WORD_BYTES: usize = 13;

fn word(kind: u8, port: u64, value: u32) -> [u8; WORD_BYTES] {
    let ([a, b, c, d, e, f, g, h], [i, j, k, l]) = (port.to_ne_bytes(), value.to_ne_bytes());
    [kind, a, b, c, d, e, f, g, h, i, j, k, l]
}

/// The kind, the port and the rest.
fn parse([kind, a, b, c, d, e, f, g, h, value @ ..]: [u8; WORD_BYTES]) -> (u8, u64, u32) {
    (kind, u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u32::from_ne_bytes(value))
}

/// What this process asks of the relay. Descriptors come with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// A connection, the end of a pair that stands for it, and the end of a pipe from its [lease](lease::Lease); to a port with so
    /// many rings.
    Connect(u32),
    /// A connection that nobody wants any more.
    Discard,
}

/// Descriptors that come with an order, at most.
const ORDER_DESCRIPTORS: usize = 3;

impl Order {
    fn bytes(self, port: u64) -> [u8; WORD_BYTES] {
        match self {
            Self::Connect(rings) => word(1, port, rings),
            Self::Discard => word(2, port, 0),
        }
    }

    /// The port and what is asked for.
    fn parse(bytes: [u8; WORD_BYTES]) -> Option<(u64, Self)> {
        match parse(bytes) {
            (1, port, rings) => Some((port, Self::Connect(rings))),
            (2, port, _) => Some((port, Self::Discard)),
            _ => None,
        }
    }
}

/// What the relay says of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum News {
    /// So many of its descriptors are held up.
    Held(u32),
    /// Its front end's socket takes too much to use, and is not used any more.
    Costly,
    /// Whether the relay has as many descriptors of it in hand as it may have.
    Full(bool),
    /// Whether something of it waits because the kernel has no thread.
    NoThreads(bool),
}

impl News {
    fn bytes(self, port: u64) -> [u8; WORD_BYTES] {
        match self {
            Self::Held(count) => word(1, port, count),
            Self::Costly => word(2, port, 0),
            Self::Full(is_full) => word(3, port, is_full.into()),
            Self::NoThreads(lacks) => word(4, port, lacks.into()),
        }
    }

    /// The port and what is said of it.
    fn parse(bytes: [u8; WORD_BYTES]) -> Option<(u64, Self)> {
        match parse(bytes) {
            (1, port, count) => Some((port, Self::Held(count))),
            (2, port, _) => Some((port, Self::Costly)),
            (3, port, is_full) => Some((port, Self::Full(is_full != 0))),
            (4, port, lacks) => Some((port, Self::NoThreads(lacks != 0))),
            _ => None,
        }
    }
}

/// The relay of this process.
pub(super) struct Relay {
    /// What is started with [`OPTION`].
    program: PathBuf,
    control: Mutex<OwnedFd>,
    last_port: AtomicU64,
    ports: Mutex<HashMap<u64, Told>>,
    /// It reads nothing of any port, for all that it has of all of them.
    crowded: AtomicBool,
}

/// What the relay has said of a port, and whom that concerns.
struct Told {
    /// Descriptors that are held up.
    held: u32,
    /// It has its share of descriptors in hand.
    full: bool,
    /// Something of it waits because the kernel has no thread.
    no_threads: bool,
    docket: Weak<Docket>,
}

impl Told {
    fn obstacle(&self) -> Option<Obstacle> {
        match self {
            Self { held: MOST_HELD.., .. } => Some(Obstacle::Held(self.held)),
            Self { no_threads: true, .. } => Some(Obstacle::NoThreads),
            Self { full: true, .. } => Some(Obstacle::Full),
            _ => None,
        }
    }
}

/// A relay that was started.
struct Started {
    child: Child,
    /// Where it is heard.
    news: OwnedFd,
}

static RELAY: OnceLock<Relay> = OnceLock::new();

/// Starts the relay, and a thread that starts it again should it end. To be called once, before the first port is made, by a
/// thread that is kept off the shards' CPUs. `program` is one that calls [`process::run`] when it is given [`OPTION`].
///
/// # Errors
/// The kernel refused sockets, a process or a thread.
pub fn start(program: &Path) -> io::Result<()> {
    let (control, started) = launch(program)?;
    let (last_port, ports) = (AtomicU64::new(0), Mutex::default());
    let relay = Relay {
        program: program.into(),
        control: Mutex::new(control),
        last_port,
        ports,
        crowded: AtomicBool::new(false),
    };
    if RELAY.set(relay).is_err() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a relay"));
    }
    std::thread::Builder::new().name("relay".into()).stack_size(128 * 1024).spawn(move || watch(started)).map(drop)
}

/// The relay, in a process that has started one. Unit tests have none, and their front ends are their own.
fn running() -> Option<&'static Relay> {
    RELAY.get()
}

fn launch(program: &Path) -> io::Result<(OwnedFd, Started)> {
    let flags = SocketFlags::CLOEXEC;
    let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::sockopt::set_socket_timeout(&ours, rustix::net::sockopt::Timeout::Send, Some(TAKE_OVER))?;
    let news = ours.try_clone()?;
    let child = Command::new(program)
        .arg(OPTION)
        .current_dir("/")
        .stdin(theirs)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    Ok((ours, Started { child, news }))
}

/// Hears what the relay has to say, and starts it again when it has ended: its connections end with it, and front ends come back.
fn watch(mut started: Started) {
    let Some(relay) = running() else { return };
    loop {
        relay.hear(&started.news);
        let status = reap(started.child);
        log::error!("the relay has ended ({status}): front ends are cut off and have to connect again");
        relay.crowded.store(false, Ordering::Relaxed);
        relay.ports().values_mut().for_each(|told| (told.held, told.full, told.no_threads) = Default::default());
        let (control, next) = loop {
            std::thread::sleep(BACK_OFF);
            match launch(&relay.program) {
                Ok(started) => break started,
                Err(error) => log::error!("cannot start the relay again: {error}"),
            }
        };
        let old = std::mem::replace(&mut *relay.control(), control);
        // It may hold connections that were not taken over.
        vetting::drop_elsewhere(vec![old, started.news]);
        started = next;
    }
}

/// How the relay has ended, which no longer listens. Its sockets go before it does, and it stays for as long as a file system
/// keeps a thread of it; then another thread waits for that, so that it leaves nothing behind.
fn reap(mut child: Child) -> String {
    let begin = Instant::now();
    while begin.elapsed() < ENDING {
        match child.try_wait() {
            Ok(Some(status)) => return status.to_string(),
            Ok(None) => std::thread::sleep(ENDING / 100),
            Err(error) => return error.to_string(),
        }
    }
    // One that only does not listen any more is of no use.
    let _ = child.kill();
    let wait = move || drop(child.wait());
    let waits = std::thread::Builder::new().name("old-relay".into()).stack_size(64 * 1024).spawn(wait).is_ok();
    if waits { "the kernel keeps it" } else { "the kernel keeps it, and nobody waits for it" }.into()
}

impl Relay {
    fn control(&self) -> MutexGuard<'_, OwnedFd> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ports(&self) -> MutexGuard<'_, HashMap<u64, Told>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when the relay has ended.
    fn hear(&self, from: &OwnedFd) {
        let mut bytes = [0; WORD_BYTES];
        loop {
            match rustix::net::recv(from, bytes.as_mut_slice(), RecvFlags::empty()) {
                Ok((WORD_BYTES, _)) => News::parse(bytes).into_iter().for_each(|(port, news)| self.note(port, news)),
                Err(rustix::io::Errno::INTR) => {}
                Ok(_) | Err(_) => return,
            }
        }
    }

    fn note(&self, port: u64, news: News) {
        if let (ALL_PORTS, News::Full(is_full)) = (port, news) {
            self.crowded.store(is_full, Ordering::Relaxed);
        }
        let mut ports = self.ports();
        let Some(told) = ports.get_mut(&port) else { return };
        match news {
            News::Held(count) => told.held = count,
            News::Full(is_full) => told.full = is_full,
            News::NoThreads(lacks) => told.no_threads = lacks,
            News::Costly => {
                let docket = told.docket.upgrade();
                drop(ports);
                docket.into_iter().for_each(|docket| docket.enter(Offence::SlowSocket));
            }
        }
    }

    fn order(&self, order: Order, port: u64, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = order.bytes(port);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ORDER_DESCRIPTORS))];
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
    /// A number that no other port of this process has had, for the port with this docket.
    pub(super) fn next(docket: &Arc<Docket>) -> Self {
        let Some(relay) = running() else { return Self(0) };
        let number = relay.last_port.fetch_add(1, Ordering::Relaxed) + 1;
        let mut ports = relay.ports();
        ports.retain(|_, told| told.docket.strong_count() > 0);
        ports.insert(number, Told { held: 0, full: false, no_threads: false, docket: Arc::downgrade(docket) });
        Self(number)
    }

    /// Descriptors of its front ends that the kernel has not let go of for some seconds.
    pub(super) fn held(self) -> u32 {
        running().and_then(|relay| relay.ports().get(&self.0).map(|told| told.held)).unwrap_or(0)
    }

    /// What keeps connections away now.
    pub(super) fn obstacle(self) -> Option<Obstacle> {
        running().and_then(|relay| relay.ports().get(&self.0).and_then(Told::obstacle))
    }
}

/// Whether no port's messages are read, for all the descriptors that came with those of some.
pub(super) fn is_crowded() -> bool {
    running().is_some_and(|relay| relay.crowded.load(Ordering::Relaxed))
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

    /// Has the relay take it over, for a port with so many rings; returns the end that a session can read from and close, and the
    /// lease that is to go after it.
    pub(super) fn connect(&self, rings: usize) -> io::Result<(UnixStream, Lease)> {
        let Some(relay) = running() else { return Ok((self.stream.try_clone()?, Lease::default())) };
        let (ours, theirs) = UnixStream::pair()?;
        let (notes, lease) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let order = Order::Connect(u32::try_from(rings).unwrap_or(u32::MAX));
        relay.order(order, self.port.0, &[self.stream.as_fd(), theirs.as_fd(), notes.as_fd()])?;
        Ok((ours, Lease::new(lease)))
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
            // Then it is not closed for the last time here.
            self.stream.try_clone().into_iter().for_each(|stream| vetting::hang_up_elsewhere(stream.into()));
        }
    }
}

//! Who is at the far end of a vNIC right now: [`Attachment`].
//!
//! A port has one front end at a time, and a thread for it. A second one is closed at once, unless the first has hung up
//! and its rings are only just being stopped: then the new one waits for that, so that a VM that restarts quickly is not
//! sent away.

use std::io;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};

use super::handler::Handler;
use super::nic::Nic;
use super::offence::Offence;
use super::refusal::Refusal;
use super::relay::lease::Lease;
use super::relay::{FarEnd, Obstacle, PortNumber};
use super::session;
use crate::mem::NodePages;
use crate::port::LinkState;
use crate::port::rate_limit::log_limited;
use crate::sys::mapping_turn::in_faults;
use crate::sys::socket::{Peer, peer};

/// Stack of a session's thread: its deepest call is the crate's decoding of one message of 4 KiB.
pub(super) const STACK_BYTES: usize = 256 * 1024;

/// How long the end of a port waits for its session. It takes some milliseconds, but for a session that waits in the kernel for
/// memory of its front end.
const CLOSING: Duration = Duration::from_secs(2);

/// How long looking for a socket may take before that is told. The kernel takes microseconds.
const LONG_LOOK: Duration = Duration::from_secs(1);

/// Why a connection was ended that the relay could not go on with.
const HELD: &str =
    "last time it sent a descriptor that cannot be examined or closed, for its file system does not answer";

/// The far end of a port: a connection or none.
pub(super) struct Attachment {
    nic: Arc<Nic>,
    number: PortNumber,
    slot: Mutex<Slot>,
    stopping: AtomicBool,
    connections: AtomicU64,
    refused: AtomicU64,
}

struct Slot {
    connection: Option<Arc<Connection>>,
    /// A front end that takes over as soon as the present one, which has hung up, is cleaned up.
    next: Option<FarEnd>,
    thread: Option<SessionThread>,
    closed: bool,
    /// What the port waits for while there is no connection.
    waiting: String,
    /// Since when the kernel is looking for the VM's socket, if it is.
    looking: Option<Instant>,
    /// Why no connection was taken when last one could have come.
    obstacle: Option<Obstacle>,
}

impl Slot {
    /// Why there is no connection to the socket at `path`.
    fn why_down(&self, path: &Path) -> String {
        match self.looking.map(|since| since.elapsed()) {
            Some(time) if time >= LONG_LOOK => {
                let (path, seconds) = (path.display(), time.as_secs());
                format!(
                    "looking for the VM at {path}: the kernel has not found it for {seconds} s; who may read a directory on the way can hold it up, and so can a file system"
                )
            }
            _ => self.waiting.clone(),
        }
    }
}

/// A thread that serves a connection.
struct SessionThread {
    /// `None` while it is being started, and if it is the port's own dialler.
    thread: Option<JoinHandle<()>>,
    /// Disconnected when the thread is about to return.
    end: mpsc::Receiver<()>,
}

/// One connected front end.
struct Connection {
    /// What the session reads from and writes to.
    stream: UnixStream,
    far_end: FarEnd,
    handler: Arc<Handler>,
    peer: Peer,
    // Goes after the stream, in which descriptors may lie.
    _lease: Arc<Lease>,
}

impl Connection {
    fn new(far_end: FarEnd, nic: &Arc<Nic>) -> io::Result<Self> {
        // Every Unix socket has a peer; the numbers are shown and nothing else.
        let peer = peer(&far_end).unwrap_or(Peer { pid: 0, uid: u32::MAX, gid: u32::MAX });
        let (stream, lease) = far_end.connect(nic.queues.len())?;
        let lease = Arc::new(lease);
        let handler = Arc::new(Handler::new(Arc::clone(nic), Arc::clone(&lease)));
        Ok(Self { stream, far_end, handler, peer, _lease: lease })
    }

    /// Whether the front end has closed its side.
    fn has_hung_up(&self) -> bool {
        let mut fds = [PollFd::new(&self.far_end, PollFlags::RDHUP)];
        let polled = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        polled.is_ok() && fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP)
    }
}

impl Attachment {
    /// A port that waits for its first front end.
    pub(super) fn new(nic: Arc<Nic>, waiting: String) -> Self {
        let (connection, next, thread, looking, obstacle) = Default::default();
        let slot = Slot { connection, next, thread, closed: false, waiting, looking, obstacle };
        Self {
            number: PortNumber::next(&nic.docket),
            nic,
            slot: Mutex::new(slot),
            stopping: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }
    }

    /// The port itself.
    pub(super) fn nic(&self) -> &Nic {
        &self.nic
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether connections may come. Tells why not, when that is news.
    pub(super) fn is_open(&self) -> bool {
        let obstacle = self.number.obstacle();
        let told = std::mem::replace(&mut self.slot().obstacle, obstacle);
        let Some(obstacle) = obstacle else { return true };
        if told != Some(obstacle) {
            log_limited!(self.nic.log, log::Level::Error, "{}: {obstacle}", self.nic.config.name);
        }
        false
    }

    /// Lets go of a connection that nobody wants.
    pub(super) fn send_away(&self, stream: UnixStream) {
        drop(FarEnd::new(stream, self.number));
    }

    /// A VM that is to be looked for is not, for what it did while nobody was connected. Returns for how long.
    pub(super) fn keep_away(&self, offence: Offence) -> Duration {
        let time = self.nic.docket.sentence(offence);
        let why = Refusal::Barred(offence, time.as_secs());
        let name = &self.nic.config.name;
        log_limited!(self.nic.log, log::Level::Warn, "{name}: {why}");
        self.note_waiting(format!("not looking for the VM at {}: {why}", self.nic.config.socket.display()));
        time
    }

    /// What `look` finds at the VM's socket. It may have to wait there, and is told to while it does.
    pub(super) fn while_looking<T>(&self, look: impl FnOnce(&Path) -> T) -> T {
        self.slot().looking = Some(Instant::now());
        let found = look(&self.nic.config.socket);
        self.slot().looking = None;
        found
    }

    /// Takes a new connection on, or closes it if the port has one.
    pub(super) fn offer(self: &Arc<Self>, stream: UnixStream) {
        if let Some((first, alive)) = self.take_on(stream) {
            self.start(first, alive);
        }
    }

    /// The same, but the calling thread serves it. Returns for how long it did; nothing if the connection was closed.
    pub(super) fn serve(&self, stream: UnixStream) -> Option<Duration> {
        let (first, _alive) = self.take_on(stream)?;
        let started = Instant::now();
        self.run(first);
        Some(started.elapsed())
    }

    /// The connection that has the port now, and what is to be dropped when its thread has let go of it.
    fn take_on(&self, stream: UnixStream) -> Option<(Arc<Connection>, mpsc::Sender<()>)> {
        let far_end = FarEnd::new(stream, self.number);
        let mut slot = self.slot();
        if slot.closed {
            return None;
        }
        let name = &self.nic.config.name;
        if let Some(current) = &slot.connection {
            if current.has_hung_up() {
                slot.next = Some(far_end);
                return None;
            }
            self.refused.fetch_add(1, Ordering::Relaxed);
            let pid = current.peer.pid;
            log_limited!(
                self.nic.log,
                log::Level::Warn,
                "{name}: closed a second front end; process {pid} is connected"
            );
            return None;
        }
        let first = self.connect(far_end, &mut slot)?;
        let (alive, end) = mpsc::channel();
        slot.connection = Some(Arc::clone(&first));
        // The thread of the last connection has let go of the port, so it is about to return, and nobody waits for that here.
        slot.thread = Some(SessionThread { thread: None, end });
        Some((first, alive))
    }

    /// Starts the thread of a connection that has the port. The kernel may keep whoever starts a thread waiting for as long as a
    /// session waits for its front end's file (`sys/mapping_turn.rs`), so nobody may need to wait for this: the slot is free.
    fn start(self: &Arc<Self>, first: Arc<Connection>, alive: mpsc::Sender<()>) {
        let name = &self.nic.config.name;
        let attachment = Arc::clone(self);
        let run = move || {
            attachment.run(first);
            drop(alive);
        };
        let started = std::thread::Builder::new().name(format!("vhost-{name}")).stack_size(STACK_BYTES).spawn(run);
        let mut slot = self.slot();
        match started {
            Ok(thread) => {
                // Whoever closes the port meanwhile has taken the place, and hears of the thread's end all the same.
                if let Some(place) = &mut slot.thread {
                    place.thread = Some(thread);
                }
            }
            Err(error) => {
                let unserved = slot.connection.take();
                slot.thread = None;
                slot.waiting = format!("no thread for the front end: {error}");
                drop(slot);
                drop(unserved);
                log_limited!(self.nic.log, log::Level::Error, "{name}: no thread for the front end: {error}");
            }
        }
    }

    fn connect(&self, far_end: FarEnd, slot: &mut Slot) -> Option<Arc<Connection>> {
        let name = &self.nic.config.name;
        let connection = match Connection::new(far_end, &self.nic) {
            Ok(connection) => connection,
            Err(error) => {
                slot.waiting = format!("no resources for the front end: {error}");
                log_limited!(self.nic.log, log::Level::Error, "{name}: no resources for the front end: {error}");
                return None;
            }
        };
        self.connections.fetch_add(1, Ordering::Relaxed);
        self.nic.records.connected(connection.peer);
        let Peer { pid, uid, .. } = connection.peer;
        log_limited!(self.nic.log, log::Level::Info, "{name}: front end connected (process {pid}, user {uid})");
        Some(Arc::new(connection))
    }

    /// The session thread.
    fn run(&self, first: Arc<Connection>) {
        let mut connection = Some(first);
        while let Some(current) = connection {
            let serve = || session::serve(&current.stream, &self.nic, &current.handler, &self.stopping);
            // The last resort: a panic costs the connection, and the port can take another.
            let end = catch_unwind(AssertUnwindSafe(serve)).unwrap_or(session::End::Panicked);
            in_faults(|| current.handler.device().tear_down());
            // What was still mapped is not any more, and no ring runs. That may have been waited for as well.
            let last = if self.nic.was_kept_waiting() { Some(Offence::Mapping) } else { self.nic.docket.take() };
            let end = last.map_or(end, session::End::Offence);
            self.nic.docket.acquit();
            if let session::End::Offence(offence) = end {
                self.keep_out(&current, offence);
            }
            let held = if self.number.held() > 0 { format!("; {HELD}") } else { String::new() };
            log_limited!(self.nic.log, log::Level::Info, "{}: front end gone: {end}{held}", self.nic.config.name);
            connection = self.finish(&end);
        }
    }

    /// Serves nobody for a while: what a front end can take of a shard by holding it up is then bounded in each such time,
    /// however often it comes back.
    fn keep_out(&self, connection: &Connection, offence: Offence) {
        let _ = connection.stream.shutdown(std::net::Shutdown::Both);
        let time = self.nic.docket.sentence(offence);
        connection.handler.device().note(&Refusal::Barred(offence, time.as_secs()));
        let end = Instant::now() + time;
        while !self.stopping.load(Ordering::Acquire) {
            let Ok(left) = Timespec::try_from(end.saturating_duration_since(Instant::now())) else { return };
            if left.tv_sec == 0 && left.tv_nsec == 0 {
                return;
            }
            let _ = poll(&mut [PollFd::new(&*self.nic.attention, PollFlags::IN)], Some(&left));
            self.nic.attention.drain();
        }
    }

    /// Frees the port, or hands it to who waits for it.
    fn finish(&self, end: &session::End) -> Option<Arc<Connection>> {
        let mut slot = self.slot();
        let old = slot.connection.take();
        slot.waiting = match end {
            _ if self.number.held() > 0 => {
                format!("waiting for the VM at {}; {HELD}", self.nic.config.socket.display())
            }
            session::End::Closed => format!("waiting for the VM at {}", self.nic.config.socket.display()),
            end => format!("waiting for the VM at {}; last time {end}", self.nic.config.socket.display()),
        };
        let next = slot.next.take().filter(|_| !slot.closed);
        let next = next.and_then(|next| self.connect(next, &mut slot));
        slot.connection.clone_from(&next);
        drop(slot);
        // What the connection held is let go of where nobody else waits.
        drop(old);
        next
    }

    /// Notes what the port waits for while nobody is connected. `true` if that is news.
    pub(super) fn note_waiting(&self, waiting: String) -> bool {
        let mut slot = self.slot();
        let news = slot.waiting != waiting;
        slot.waiting = waiting;
        news
    }

    /// Ends the connection and takes no other; returns when its thread is gone, or could not go in time.
    pub(super) fn close(&self) {
        let (connected, thread) = {
            let mut slot = self.slot();
            slot.closed = true;
            slot.next = None;
            self.stopping.store(true, Ordering::Release);
            if let Some(connection) = &slot.connection {
                // Wakes the thread wherever it is: asleep, or sending to a front end that does not read.
                let _ = connection.stream.shutdown(std::net::Shutdown::Both);
            }
            self.nic.attention.signal();
            (slot.connection.is_some(), slot.thread.take())
        };
        if let Some(SessionThread { thread, end }) = thread {
            if end.recv_timeout(CLOSING) == Err(RecvTimeoutError::Timeout) {
                let name = &self.nic.config.name;
                log::warn!(
                    "{name}: the kernel keeps its connection from being closed: it ends when that lets go of it"
                );
                return;
            }
            // Whether it panicked or not, it has said so.
            let _ = thread.map(JoinHandle::join);
        }
        self.nic.records.close(&self.nic, connected);
    }

    /// Whether frames flow.
    pub(super) fn link(&self) -> LinkState {
        // What keeps connections away is over when the relay says so, whether anybody comes or not.
        let obstacle = self.number.obstacle();
        let connection = {
            let slot = self.slot();
            match (&slot.connection, obstacle) {
                (Some(connection), _) => Arc::clone(connection),
                (None, Some(obstacle)) => return LinkState::Down(obstacle.to_string()),
                (None, None) => return LinkState::Down(slot.why_down(&self.nic.config.socket)),
            }
        };
        match (connection.handler.view().link(&self.nic.queues), obstacle) {
            // Nor does one get on that has been taken.
            (LinkState::Down(_), Some(obstacle @ Obstacle::NoThreads)) => LinkState::Down(obstacle.to_string()),
            (link, _) => link,
        }
    }

    /// What the front end shares now, if one is connected.
    #[cfg(test)]
    pub(super) fn memory(&self) -> Option<Arc<crate::mem::GuestMemory>> {
        self.slot().connection.as_ref().map(|connection| connection.handler.device().memory())
    }

    /// What happens while the session works at its device, for however long.
    #[cfg(test)]
    pub(super) fn while_busy<R>(&self, act: impl FnOnce() -> R) -> R {
        let connection = self.slot().connection.clone().expect("a front end");
        let _device = connection.handler.device();
        act()
    }

    /// On which NUMA nodes the guest's memory lies; `None` while it has no ring that runs, or while that is not known: ask again
    /// a second later.
    pub(super) fn memory_nodes(&self) -> Option<NodePages> {
        let connection = self.slot().connection.clone()?;
        connection.handler.nodes()
    }

    /// The far end's part of `linecard port show`: who is connected, what was negotiated, the state of each ring.
    pub(super) fn report(&self) -> (Value, Vec<Value>) {
        let connection = self.slot().connection.clone();
        let mut report = json!({
            "connected": connection.is_some(),
            "connections": self.connections.load(Ordering::Relaxed),
            "refused_connections": self.refused.load(Ordering::Relaxed),
        });
        let Some(connection) = connection else { return (report, Vec::new()) };
        let (view, nodes) = (connection.handler.view(), connection.handler.last_nodes());
        report["peer"] = json!({ "pid": connection.peer.pid, "uid": connection.peer.uid });
        report["device"] = view.report(&nodes);
        (report, view.ring_reports(&self.nic.queues))
    }
}

//! Where connections come from: [`Acceptor`], one thread for the sockets of all ports.
//!
//! It sleeps in epoll on the listening sockets of ports in server mode. What it accepts it hands to the port's [`Attachment`], which
//! has a thread of its own for it; so nothing here ever waits for a front end, and a thousand idle ports cost one sleeping
//! thread. For a port in client mode it starts the [`Dialler`], and looks for no path itself: that may take for ever.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags};

use super::attachment::Attachment;
use super::dialler::Dialler;
use crate::port::rate_limit::{Admission, RateLimit, log_limited};
use crate::sys::eventfd::EventFd;

/// Connections that one port takes in a period; more wait in the socket's backlog. One costs about 0.2 ms of a control
/// thread, so a front end that does nothing but connect gets a twentieth of one CPU, none of it a shard's. VMs that come
/// and go, and supervisors that restart them at once, stay far below.
const CONNECTIONS: (u32, Duration) = (25, Duration::from_millis(100));

/// How long a listening socket rests after accept(2) failed, in practice for want of descriptors; and a port in client mode that
/// got no thread.
const REST: Duration = Duration::from_millis(500);

/// Events that are taken from the kernel at once.
const EVENTS: usize = 64;

/// Key of the acceptor's own wake-up in its epoll set. Endpoints count from 1.
const WAKE: u64 = 0;

/// The thread that accepts and makes the connections of all vNICs. Dropping it ends that; ports keep what they have.
pub struct Acceptor {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Acceptor {
    /// Starts the thread.
    ///
    /// # Errors
    /// What the kernel says: no descriptor or no thread is left.
    pub fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            wake: EventFd::new()?,
            stopping: AtomicBool::new(false),
            table: Mutex::new(Table { last: WAKE, endpoints: HashMap::new(), timers: BTreeSet::new() }),
        });
        epoll::add(&shared.epoll, &shared.wake, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)?;
        let run = {
            let shared = Arc::clone(&shared);
            move || shared.run()
        };
        let thread = std::thread::Builder::new().name("vhost-accept".into()).spawn(run)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Accepts from `listener`, which must not block, for `attachment`.
    pub(super) fn listen(&self, listener: OwnedFd, attachment: Arc<Attachment>) -> io::Result<Registration> {
        self.register(Way::Listen(listener), attachment)
    }

    /// Has the socket of `attachment`'s configuration looked for, again and again.
    pub(super) fn dial(&self, attachment: Arc<Attachment>) -> io::Result<Registration> {
        self.register(Way::Dial(Dialler::new(Arc::clone(&attachment))), attachment)
    }

    fn register(&self, way: Way, attachment: Arc<Attachment>) -> io::Result<Registration> {
        let rate = RateLimit::new(CONNECTIONS.0, CONNECTIONS.1);
        let mut table = self.shared.table();
        let id = table.last + 1;
        let endpoint = Arc::new(Endpoint { id, way, attachment, rate });
        if let Way::Listen(listener) = &endpoint.way {
            epoll::add(&self.shared.epoll, listener, epoll::EventData::new_u64(id), epoll::EventFlags::IN)?;
        } else {
            table.timers.insert((Instant::now(), id));
        }
        table.last = id;
        table.endpoints.insert(id, endpoint);
        drop(table);
        self.shared.wake.signal();
        Ok(Registration { shared: Arc::clone(&self.shared), id })
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take() {
            // It does not panic; if it did, the panic was reported by its own thread.
            let _ = thread.join();
        }
    }
}

/// A port's place at the acceptor. Dropping it closes the listening socket, or ends the search for the VM.
pub(super) struct Registration {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let endpoint = self.shared.table().endpoints.remove(&self.id);
        match endpoint.as_deref() {
            Some(Endpoint { way: Way::Listen(listener), attachment, .. }) => {
                // The thread may hold the endpoint a moment longer, so closing alone would not end the events.
                let _ = epoll::delete(&self.shared.epoll, listener);
                // Nobody comes any more, and who has come already is not closed together with the socket: see `FarEnd`.
                let _ = rustix::net::shutdown(listener, Shutdown::Read);
                while let Ok(stream) = rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
                    attachment.send_away(UnixStream::from(stream));
                }
            }
            Some(Endpoint { way: Way::Dial(dialler), .. }) => dialler.stop(),
            None => {}
        }
    }
}

struct Shared {
    epoll: OwnedFd,
    wake: EventFd,
    stopping: AtomicBool,
    table: Mutex<Table>,
}

struct Table {
    last: u64,
    endpoints: HashMap<u64, Arc<Endpoint>>,
    /// When to look at which endpoint. Those of endpoints that are gone are ignored when their time comes.
    timers: BTreeSet<(Instant, u64)>,
}

/// One port, as seen from here.
struct Endpoint {
    id: u64,
    way: Way,
    attachment: Arc<Attachment>,
    rate: RateLimit,
}

enum Way {
    Listen(OwnedFd),
    Dial(Arc<Dialler>),
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(self: &Arc<Self>) {
        let mut events = Vec::with_capacity(EVENTS);
        while !self.stopping.load(Ordering::Acquire) {
            let timeout = self.table().timers.first().map(|(at, _)| at.saturating_duration_since(Instant::now()));
            let timeout = timeout.and_then(|left| Timespec::try_from(left).ok());
            events.clear();
            let waited = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref());
            if let Err(errno) = waited
                && errno != Errno::INTR
            {
                log::error!("waiting for vhost-user connections failed: {errno}");
                std::thread::sleep(REST);
            }
            for event in &events {
                self.ready(event.data.u64());
            }
            self.expire(Instant::now());
        }
    }

    /// A listening socket, or the wake-up, is readable.
    fn ready(self: &Arc<Self>, id: u64) {
        if id == WAKE {
            self.wake.drain();
            return;
        }
        let endpoint = self.table().endpoints.get(&id).cloned();
        if let Some(endpoint) = endpoint
            && let Way::Listen(listener) = &endpoint.way
        {
            self.accept(&endpoint, listener);
        }
    }

    fn accept(self: &Arc<Self>, endpoint: &Endpoint, listener: &OwnedFd) {
        if !endpoint.attachment.is_open() {
            return self.rest(endpoint, listener, REST);
        }
        if let Admission::Refused(left) = endpoint.rate.admit() {
            return self.rest(endpoint, listener, left);
        }
        match rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(stream) => {
                endpoint.attachment.offer(UnixStream::from(stream));
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(errno) => {
                let nic = endpoint.attachment.nic();
                log_limited!(nic.log, log::Level::Error, "{}: cannot accept a connection: {errno}", nic.config.name);
                self.rest(endpoint, listener, REST);
            }
        }
    }

    /// Does not look at a listening socket for some time.
    fn rest(&self, endpoint: &Endpoint, listener: &OwnedFd, time: Duration) {
        self.watch(endpoint.id, listener, epoll::EventFlags::empty());
        self.look_after(endpoint, time);
    }

    /// Has [`Shared::expire`] look after it when this time has passed.
    fn look_after(&self, endpoint: &Endpoint, time: Duration) {
        self.table().timers.insert((Instant::now() + time, endpoint.id));
    }

    fn watch(&self, id: u64, listener: &OwnedFd, events: epoll::EventFlags) {
        // Fails only for a socket that has just been taken out of the set.
        let _ = epoll::modify(&self.epoll, listener, epoll::EventData::new_u64(id), events);
    }

    /// Looks after every endpoint whose time has come.
    fn expire(self: &Arc<Self>, now: Instant) {
        loop {
            let endpoint = {
                let mut table = self.table();
                let Some(due) = table.timers.first().copied().filter(|(at, _)| *at <= now) else { return };
                table.timers.remove(&due);
                table.endpoints.get(&due.1).cloned()
            };
            match endpoint.as_deref() {
                Some(Endpoint { id, way: Way::Listen(listener), .. }) => {
                    self.watch(*id, listener, epoll::EventFlags::IN);
                }
                Some(endpoint @ Endpoint { way: Way::Dial(dialler), .. }) => self.dial(endpoint, dialler),
                None => {}
            }
        }
    }

    fn dial(&self, endpoint: &Endpoint, dialler: &Arc<Dialler>) {
        if let Err(error) = dialler.start() {
            let nic = endpoint.attachment.nic();
            endpoint.attachment.note_waiting(format!("no thread to look for the VM: {error}"));
            log_limited!(nic.log, log::Level::Error, "{}: no thread to look for the VM: {error}", nic.config.name);
            self.look_after(endpoint, REST);
        }
    }
}

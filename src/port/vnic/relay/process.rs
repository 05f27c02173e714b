//! The process that the relay is: [`run`]. One thread in epoll, for all connections; and one for each message that has descriptors
//! with it, or that is to be thrown away with what it has.
//!
//! It must never wait for a front end, and nothing that one can send may end it. What its thread does at a front end's socket wakes
//! all who wait for the other end, which may be very many: messages are charged to their link ([`Step::Costly`]), and what cannot
//! be, shutting down and closing, is done on another thread.
//!
//! It ends with the daemon, and after it: the daemon's descriptors are closed when that has been killed, too, and until then none of
//! the eventfds that are [kept](Kept) may go. Its end is that of the last of its threads ([`Daemon::wait`]); neither the end of a
//! socket nor that of the thread that has started this process says as much.

mod lateness;
mod telling;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::super::attendance::Attendance;
use super::job::{Done, Job, Running, Work};
use super::kept::Kept;
use super::ledger::Ledger;
use super::link::{Link, Step};
use super::pacing::Pacing;
use super::{News, ORDER_DESCRIPTORS, Order, WORD_BYTES, vetting};
use crate::sys::eventfd::EventFd;
use crate::sys::toll::thread_time;
use crate::sys::{arguments, descriptors, process, socket, stop_signals};

/// When jobs are tried again for which the kernel had no thread.
const RETRY: Duration = Duration::from_millis(100);

/// Stack of the thread that waits for the daemon.
const STACK_BYTES: usize = 64 * 1024;

/// Events that are taken from the kernel at once.
const EVENTS: usize = 64;

/// Orders that are taken at once.
const ORDERS: usize = 64;

/// Jobs of which the outcome is taken at once. Each may begin another one, so that there is always one where enough ports have some.
const OUTCOMES: usize = 16;

/// How long this process takes to end after its daemon, at most, whatever its thread does.
const ENDING: Duration = Duration::from_secs(1);

/// Keys in the epoll set. Each connection has [`KEYS`] from there on: for its front end, its session and its lease.
const CONTROL: u64 = 0;
const WAKE: u64 = 1;
const KEYS: u64 = 3;
const SESSION: u64 = 1;
const LEASE: u64 = 2;

/// What a process does that was started with [`super::OPTION`]: its standard input is the socket to the daemon. Returns when the
/// daemon has ended.
///
/// # Errors
/// What the kernel says: in practice that standard input is no such socket.
pub fn run() -> io::Result<()> {
    // A service manager, or a terminal, tells all processes at once; the daemon is served until it has ended.
    stop_signals::ignore();
    let _ = rustix::thread::set_name(c"linecard-relay");
    // The daemon has said so where this cannot be had.
    let _ = arguments::hide();
    let control = io::stdin().as_fd().try_clone_to_owned()?;
    let Some(daemon) = Daemon::of(&control)? else { return Ok(()) };
    let watched = daemon.try_clone()?;
    // Should this thread hang, the process goes with the daemon as well.
    let watch = move || {
        watched.wait();
        std::thread::sleep(ENDING);
        std::process::exit(1);
    };
    std::thread::Builder::new().name("daemon".into()).stack_size(STACK_BYTES).spawn(watch)?;
    // Closing may take for ever, and nobody is to be left in the belief that he is still served.
    let mut process = serve(control, vetting::elsewhere)?;
    process.hang_up();
    daemon.wait();
    Ok(())
}

/// The process that has started this one.
struct Daemon(OwnedFd);

impl Daemon {
    /// The one at the other end of `control`; nothing if it is gone.
    fn of(control: &OwnedFd) -> io::Result<Option<Self>> {
        let pid = Pid::from_raw(socket::peer(control)?.pid);
        let daemon = match pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
            None | Some(Err(Errno::SRCH)) => return Ok(None),
            Some(opened) => opened?,
        };
        // Else it may be another process of that number.
        Ok(Some(Self(daemon)).filter(|_| rustix::process::getppid() == pid))
    }

    fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Returns when it is gone, with all of its threads: each has let go of the process's descriptors before (kernel/exit.c, do_exit).
    fn wait(&self) {
        let mut end = [PollFd::new(&self.0, PollFlags::IN)];
        while poll(&mut end, None) != Ok(1) {}
    }
}

/// Gives descriptors to what is to be done with them, on another thread; they come back if there is none.
type Elsewhere = fn(Vec<OwnedFd>, Task) -> Result<(), Vec<OwnedFd>>;
type Task = Box<dyn FnOnce(Vec<OwnedFd>) + Send>;

/// Serves the daemon at the other end of `control`, until it has ended or is about to, with threads that come from `elsewhere`. What
/// comes back has all connections.
fn serve(control: OwnedFd, elsewhere: Elsewhere) -> io::Result<Process> {
    let (report, reports) = mpsc::channel();
    let mut process = Process {
        epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        daemon: socket::peer(&control)?.pid,
        control,
        wake: Arc::new(EventFd::new()?),
        report,
        reports,
        links: HashMap::new(),
        ended: HashMap::new(),
        last: 0,
        elsewhere,
        jobs: HashMap::new(),
        running: Running::default(),
        waiting: VecDeque::new(),
        refused: None,
        without_thread: BTreeSet::new(),
        held_untold: BTreeSet::new(),
        untold: false,
        ledger: Ledger::new(descriptors::for_others().try_into().unwrap_or(usize::MAX)),
        starved: BTreeSet::new(),
        pacing: Pacing::default(),
        paced: BTreeMap::new(),
        attendance: Attendance::new(Instant::now()),
    };
    let read = epoll::EventFlags::IN;
    epoll::add(&process.epoll, &process.control, epoll::EventData::new_u64(CONTROL), read)?;
    epoll::add(&process.epoll, &process.wake, epoll::EventData::new_u64(WAKE), read)?;
    process.run()?;
    Ok(process)
}

struct Process {
    epoll: OwnedFd,
    control: OwnedFd,
    /// The number of the daemon's process.
    daemon: i32,
    /// Signalled when a job is done.
    wake: Arc<EventFd>,
    report: Sender<Done>,
    reports: Receiver<Done>,
    links: HashMap<u64, Linked>,
    /// Ports of links that have ended, and what the daemon may still have of them.
    ended: HashMap<u64, (u64, Kept)>,
    /// The last number that was given to a link or a job.
    last: u64,
    elsewhere: Elsewhere,
    jobs: HashMap<u64, Job>,
    running: Running,
    /// What waits until a job of its port has ended, or for a thread, by number.
    waiting: VecDeque<(u64, Job, Vec<OwnedFd>)>,
    /// When the kernel last had no thread for one of them.
    refused: Option<Instant>,
    /// Ports of such jobs, as the daemon was told.
    without_thread: BTreeSet<u64>,
    /// Ports of which the daemon does not know how many descriptors are held up.
    held_untold: BTreeSet<u64>,
    /// There is news that the daemon had no room for.
    untold: bool,
    /// What links and jobs have.
    ledger: Ledger,
    /// Links that are not read until there is room.
    starved: BTreeSet<u64>,
    /// What ports have used.
    pacing: Pacing,
    /// Links that are not read for that, and until when.
    paced: BTreeMap<u64, Instant>,
    /// By which jobs are found to take too long.
    attendance: Attendance,
}

/// A link, and what the epoll set waits for at its two sockets.
struct Linked {
    link: Link,
    watched: [epoll::EventFlags; 2],
}

impl Process {
    fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        loop {
            let timeout = self.patience().and_then(|left| Timespec::try_from(left).ok());
            events.clear();
            let waited = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref());
            if let Err(errno) = waited
                && errno != Errno::INTR
            {
                return Err(errno.into());
            }
            self.attendance.turn(Instant::now());
            for event in &events {
                match event.data.u64() {
                    CONTROL => {
                        if !self.orders() {
                            return Ok(());
                        }
                    }
                    WAKE => self.done(),
                    key => self.charged(key / KEYS, |process| process.ready(key, event.flags)),
                }
            }
            self.expire();
            self.go_on_paced();
            if self.refused.is_some_and(|refused| refused.elapsed() >= RETRY) {
                self.go_on_waiting();
            }
            let told = [self.tell_held_again(), self.tell_full(), self.tell_refused()];
            self.untold = told.contains(&false);
        }
    }

    /// Takes orders; `false` if there is nobody any more who gives them.
    fn orders(&mut self) -> bool {
        for _ in 0..ORDERS {
            let mut bytes = [0; WORD_BYTES];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(ORDER_DESCRIPTORS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received =
                rustix::net::recvmsg(&self.control, &mut [io::IoSliceMut::new(&mut bytes)], &mut ancillary, flags);
            let mut descriptors = Vec::new();
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    descriptors.extend(rights);
                }
            }
            match received {
                Ok(received) if received.bytes > 0 => self.obey(bytes, descriptors),
                Err(Errno::AGAIN) => return true,
                Err(Errno::INTR) => {}
                _ => return false,
            }
        }
        true
    }

    fn obey(&mut self, bytes: [u8; WORD_BYTES], descriptors: Vec<OwnedFd>) {
        let Some((port, order)) = Order::parse(bytes) else { return };
        let mut descriptors = descriptors.into_iter();
        match (order, descriptors.next(), descriptors.next(), descriptors.next()) {
            (Order::Connect(rings), Some(front_end), Some(session), Some(lease)) => {
                self.ledger.admit(port, rings);
                self.connect(port, front_end, session, Kept::new(lease, rings));
            }
            // One that nobody wants; or no room for all descriptors was left in this process, and the daemon sees the end of its pair.
            (_, Some(front_end), ..) => self.discard(port, front_end),
            _ => {}
        }
    }

    fn connect(&mut self, port: u64, front_end: OwnedFd, session: OwnedFd, kept: Kept) {
        stay_beside_daemon();
        vetting::take_in_line(&front_end);
        self.last += 1;
        let id = self.last;
        let data = epoll::EventData::new_u64(key(id, LEASE));
        let heard = epoll::add(&self.epoll, kept.lease(), data, epoll::EventFlags::IN);
        let watched = [epoll::EventFlags::empty(); 2];
        self.links.insert(id, Linked { link: Link::new(port, front_end, session, kept), watched });
        match heard {
            Ok(()) => self.step(id),
            Err(_) => self.end(id),
        }
    }

    /// Does something for a link, and charges its port for the CPU time of that.
    fn charged(&mut self, id: u64, work: impl FnOnce(&mut Self)) {
        let Some((port, _)) = self.kept(id) else { return };
        let before = thread_time();
        work(self);
        self.pacing.charge(port, thread_time().saturating_sub(before));
    }

    /// Something happened at a socket of a link, or at its lease.
    fn ready(&mut self, key: u64, flags: epoll::EventFlags) {
        let (id, which) = (key / KEYS, key % KEYS);
        if which == LEASE {
            return self.hear(id);
        }
        let is_session = which == SESSION;
        self.step(id);
        let gone = is_session && flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
        // Replies that nobody reads are those of a session that has ended.
        if gone && self.links.get(&id).is_some_and(|linked| linked.link.has_replies()) {
            self.end(id);
        }
    }

    /// What is kept of a link, and its port, whether it has ended or not.
    fn kept(&mut self, id: u64) -> Option<(u64, &mut Kept)> {
        match self.links.get_mut(&id) {
            Some(Linked { link, .. }) => Some((link.port, &mut link.kept)),
            None => self.ended.get_mut(&id).map(|(port, kept)| (*port, kept)),
        }
    }

    /// Counts what a link has, or what is kept of it when it has ended.
    fn count(&mut self, id: u64) {
        if let Some(Linked { link, .. }) = self.links.get(&id) {
            self.ledger.set(id, link.port, link.descriptors());
        } else if let Some((port, kept)) = self.ended.get(&id) {
            self.ledger.set(id, *port, kept.len());
        }
    }

    /// The daemon has closed something of a link, or everything.
    fn hear(&mut self, id: u64) {
        let Some((_, kept)) = self.kept(id) else { return };
        if kept.hear() {
            return self.close_released(id);
        }
        self.end(id);
        let Some((port, kept)) = self.ended.remove(&id) else { return };
        self.ledger.set(id, port, 0);
        let _ = epoll::delete(&self.epoll, kept.lease());
        if process::has_ended(self.daemon) {
            // It was killed, and may be about to let go of what lies in its sockets.
            vetting::keep(kept.into_all());
        } else {
            self.let_go(port, id, kept.into_all());
        }
    }

    /// Closes what the daemon has let go of, if it is enough.
    fn close_released(&mut self, id: u64) {
        let Some((port, kept)) = self.kept(id) else { return };
        let released = kept.take_released();
        self.count(id);
        self.let_go(port, id, released);
    }

    /// Moves what a link can move, and waits for what it then needs.
    fn step(&mut self, id: u64) {
        self.allow(id);
        let Some(Linked { link, .. }) = self.links.get_mut(&id) else { return };
        let port = link.port;
        match link.step(|| self.pacing.forgives(port)) {
            Step::Waits => {}
            Step::Look(descriptors) => self.begin(Job::new(port, Work::Look(id)), descriptors),
            Step::Close(descriptors) => self.begin(Job::new(port, Work::Close(id)), descriptors),
            Step::Costly => {
                // The daemon ends it, and knows why then.
                if !self.tell(port, News::Costly) {
                    return self.end(id);
                }
            }
            Step::Ended => return self.end(id),
        }
        self.count(id);
        if !self.watch(id) {
            self.end(id);
        }
    }

    /// Has a link read on or not, by the room that there is and by what its port has used; it is stepped when that has changed.
    fn allow(&mut self, id: u64) {
        let Some(Linked { link, .. }) = self.links.get_mut(&id) else { return };
        let (room, debt) = (self.ledger.has_room(link.port), self.pacing.debt(link.port));
        link.has_room = room && debt.is_zero();
        if !debt.is_zero() {
            self.paced.entry(id).or_insert_with(|| Instant::now() + debt);
        } else if !room {
            self.starved.insert(id);
        }
    }

    /// Has links go on whose ports may have more time now.
    fn go_on_paced(&mut self) {
        let now = Instant::now();
        let due: Vec<u64> = self.paced.extract_if(.., |_, until| *until <= now).map(|(id, _)| id).collect();
        due.into_iter().for_each(|id| self.charged(id, |process| process.step(id)));
    }

    /// Has the epoll set wait for what a link needs. A socket that nothing is needed of is not in the set: the kernel tells of its
    /// end whether asked or not, and again and again.
    fn watch(&mut self, id: u64) -> bool {
        self.allow(id);
        let Some(Linked { link, watched }) = self.links.get_mut(&id) else { return true };
        for ((side, socket), (reads, writes)) in (0..).zip(link.sockets()).zip(link.interest()) {
            let mut flags = epoll::EventFlags::empty();
            flags.set(epoll::EventFlags::IN, reads);
            flags.set(epoll::EventFlags::OUT, writes);
            let before = std::mem::replace(&mut watched[side as usize], flags);
            let data = epoll::EventData::new_u64(key(id, side));
            let changed = match (before.is_empty(), flags.is_empty()) {
                _ if before == flags => Ok(()),
                (true, _) => epoll::add(&self.epoll, socket, data, flags),
                (false, true) => epoll::delete(&self.epoll, socket),
                (false, false) => epoll::modify(&self.epoll, socket, data, flags),
            };
            if changed.is_err() {
                return false;
            }
        }
        true
    }

    fn end(&mut self, id: u64) {
        let Some(Linked { link, watched }) = self.links.remove(&id) else { return };
        for (socket, watched) in link.sockets().into_iter().zip(watched) {
            if !watched.is_empty() {
                // The daemon has the front end's as well, so that closing it alone would not end its events.
                let _ = epoll::delete(&self.epoll, socket);
            }
        }
        let port = link.port;
        let (front_end, descriptors, kept) = link.end();
        self.ended.insert(id, (port, kept));
        self.count(id);
        self.let_go(port, id, descriptors);
        self.discard(port, front_end);
    }

    /// Ends all connections, and returns when whoever is at the other ends has been told.
    fn hang_up(&mut self) {
        let links: Vec<u64> = self.links.keys().copied().collect();
        links.into_iter().for_each(|link| self.end(link));
        while self.jobs.values().chain(self.waiting.iter().map(|(_, job, _)| job)).any(|job| job.work == Work::HangUp) {
            if let Ok(done) = self.reports.recv_timeout(RETRY) {
                self.take(done);
            }
            self.go_on_waiting();
        }
    }

    /// Ends a connection and lets go of it, and of what lies in it.
    fn discard(&mut self, port: u64, front_end: OwnedFd) {
        self.begin(Job::new(port, Work::HangUp), vec![front_end]);
    }

    /// Lets go of descriptors of a link, for which it does not wait.
    fn let_go(&mut self, port: u64, link: u64, descriptors: Vec<OwnedFd>) {
        if !descriptors.is_empty() {
            self.begin(Job::new(port, Work::LetGo(link)), descriptors);
        }
    }

    /// Begins a job, or puts it off if its port has as many as it may.
    fn begin(&mut self, mut job: Job, descriptors: Vec<OwnedFd>) {
        job.since = self.attendance.total();
        self.last += 1;
        self.ledger.set(self.last, job.port, descriptors.len() + job.work.opens());
        self.go(self.last, job, descriptors);
    }

    fn go(&mut self, id: u64, mut job: Job, descriptors: Vec<OwnedFd>) {
        if self.running.is_full(&job) {
            self.waiting.push_back((id, job, descriptors));
            return;
        }
        let work = job.work;
        let (report, wake) = (self.report.clone(), Arc::clone(&self.wake));
        let task = move |descriptors| {
            let outcome = work.run(descriptors);
            let _ = report.send(Done { id, outcome, used: thread_time() }); // Nobody is left only when the process ends.
            wake.signal();
        };
        match (self.elsewhere)(descriptors, Box::new(task)) {
            Ok(()) => {
                self.running.begin(&job);
                self.jobs.insert(id, job);
            }
            Err(descriptors) => {
                // A host without threads may stay so for long, and whoever is at the other end is to know: once, as it wakes all who
                // wait there.
                if job.work == Work::HangUp && !job.refused {
                    descriptors.iter().for_each(vetting::shut_down);
                }
                job.refused = true;
                self.waiting.push_back((id, job, descriptors));
                self.refused = Some(Instant::now());
            }
        }
    }

    /// Begins what waits, as far as its ports may have so many jobs and until the kernel has no thread.
    fn go_on_waiting(&mut self) {
        self.refused = None;
        for (id, job, descriptors) in std::mem::take(&mut self.waiting) {
            if self.refused.is_some() {
                self.waiting.push_back((id, job, descriptors));
            } else {
                self.go(id, job, descriptors);
            }
        }
    }

    /// Jobs were done. Those that are left have their turn after what has happened at sockets meanwhile.
    fn done(&mut self) {
        self.wake.drain();
        if (0..OUTCOMES).all(|_| self.reports.try_recv().map(|done| self.take(done)).is_ok()) {
            // There may be more.
            self.wake.signal();
        }
        self.go_on_waiting();
        let starved = std::mem::take(&mut self.starved);
        starved.into_iter().for_each(|id| self.charged(id, |process| process.step(id)));
    }

    /// A job was done, with so much CPU time.
    fn take(&mut self, Done { id, outcome, used }: Done) {
        let Some(job) = self.jobs.remove(&id) else { return };
        self.running.end(&job);
        let before = thread_time();
        self.ledger.set(id, job.port, 0);
        if job.held {
            self.tell_held(job.port);
        }
        self.go_on(id, &job, outcome);
        self.pacing.charge(job.port, used + thread_time().saturating_sub(before));
    }

    /// Goes on with what came of a job.
    fn go_on(&mut self, id: u64, job: &Job, outcome: io::Result<Vec<OwnedFd>>) {
        if let Work::LetGo(link) = job.work {
            if let Some((_, kept)) = self.kept(link) {
                kept.closed();
            }
            self.close_released(link);
            // It may have waited for that.
            return self.step(link);
        }
        let link = job.work.link();
        match (link.and_then(|link| Some((link, self.links.get_mut(&link)?))), outcome) {
            (Some((link, linked)), Ok(descriptors)) => {
                linked.link.resume(descriptors);
                self.step(link);
            }
            (Some((link, _)), Err(_)) => self.end(link),
            (None, Ok(full)) if job.work == Work::HangUp && !full.is_empty() => {
                self.begin(Job::new(job.port, Work::Drain), full);
            }
            (None, outcome) => self.let_go(job.port, link.unwrap_or(id), outcome.unwrap_or_default()),
        }
    }
}

/// The key of something that a link has.
fn key(link: u64, which: u64) -> u64 {
    KEYS * link + which
}

/// Runs where the daemon's control threads may, which is not on the shards' CPUs.
fn stay_beside_daemon() {
    let daemon = rustix::process::getppid().and_then(|daemon| rustix::thread::sched_getaffinity(Some(daemon)).ok());
    let own = rustix::thread::sched_getaffinity(None).ok();
    if let Some(cpus) = daemon.filter(|cpus| own.as_ref() != Some(cpus)) {
        let _ = rustix::thread::sched_setaffinity(None, &cpus);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{IoSlice, IoSliceMut, Read, Write};
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::thread::JoinHandle;

    use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType};
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::lateness::PATIENCE;
    use super::*;

    /// Rings of the port.
    const RINGS: u32 = 2;

    /// A relay on a thread, with one connection: the front end's end and the session's.
    struct Rig {
        control: Option<OwnedFd>,
        front_end: UnixStream,
        session: UnixStream,
        thread: Option<JoinHandle<io::Result<()>>>,
        lease: OwnedFd,
    }

    impl Rig {
        fn new() -> Self {
            Self::with(vetting::elsewhere)
        }

        fn with(elsewhere: Elsewhere) -> Self {
            let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
            let (control, theirs) = pair.unwrap();
            Self::over(control, theirs, elsewhere)
        }

        fn over(control: OwnedFd, theirs: OwnedFd, elsewhere: Elsewhere) -> Self {
            let thread = Some(std::thread::spawn(move || serve(theirs, elsewhere).map(drop)));
            let (front_end, session, lease) = connect(&control, 7);
            Self { control: Some(control), front_end, session, thread, lease }
        }

        /// Another connection, of another port.
        fn connect(&self, port: u64) -> (UnixStream, UnixStream, OwnedFd) {
            connect(self.control.as_ref().unwrap(), port)
        }

        /// What the daemon is told next.
        fn hear(&self) -> Option<(u64, News)> {
            let control = self.control.as_ref().unwrap();
            let timeout = Some(Duration::from_secs(30));
            rustix::net::sockopt::set_socket_timeout(control, rustix::net::sockopt::Timeout::Recv, timeout).unwrap();
            let mut bytes = [0; WORD_BYTES];
            rustix::net::recv(control, bytes.as_mut_slice(), RecvFlags::empty()).unwrap();
            News::parse(bytes)
        }

        /// What the session gets when it asks for so many bytes: they, and the number of descriptors with them.
        fn take(&self, len: usize) -> (Vec<u8>, usize) {
            let mut bytes = vec![0; len];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let into = &mut [IoSliceMut::new(&mut bytes)];
            let received = rustix::net::recvmsg(&self.session, into, &mut ancillary, RecvFlags::empty()).unwrap();
            bytes.truncate(received.bytes);
            let count =
                |message| if let RecvAncillaryMessage::ScmRights(rights) = message { rights.count() } else { 0 };
            (bytes, ancillary.drain().map(count).sum())
        }
    }

    impl Drop for Rig {
        fn drop(&mut self) {
            self.control = None;
            assert!(self.thread.take().unwrap().join().unwrap().is_ok(), "it ends with its daemon");
        }
    }

    /// Gives the relay a connection: the front end's end, the session's, and the lease.
    fn connect(control: &OwnedFd, port: u64) -> (UnixStream, UnixStream, OwnedFd) {
        let (front_end, relayed) = UnixStream::pair().unwrap();
        let (session, end) = UnixStream::pair().unwrap();
        let (notes, lease) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        send(control, &Order::Connect(RINGS).bytes(port), &[relayed.as_fd(), end.as_fd(), notes.as_fd()]);
        for stream in [&front_end, &session] {
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        }
        (front_end, session, lease)
    }

    fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(descriptors.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
        let sent = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, bytes.len());
    }

    fn message(request: u32, body: &[u8]) -> Vec<u8> {
        [&[request, 1, body.len() as u32].map(u32::to_ne_bytes).concat(), body].concat()
    }

    #[test]
    fn descriptors_stay_with_their_message_whatever_they_are_and_however_it_comes() {
        let rig = Rig::new();
        let event = EventFd::new().unwrap();
        let (pipe, _other) = io::pipe().unwrap();
        let (plain, kick) = (message(8, &[1; 8]), message(12, &[2; 8]));
        // All at once, so that the kernel could join them.
        send(&rig.front_end, &plain, &[]);
        send(&rig.front_end, &kick, &[event.as_fd(), pipe.as_fd()]);
        send(&rig.front_end, &plain, &[]);
        assert_eq!(rig.take(20), (plain.clone(), 0));
        assert_eq!(rig.take(20), (kick.clone(), 2));
        assert_eq!(rig.take(20), (plain.clone(), 0));
        // In pieces, with some time between them.
        for (piece, descriptors) in [(0..5, 0), (5..13, 1), (13..20, 0)] {
            let with = [event.as_fd()];
            send(&rig.front_end, &kick[piece.clone()], &with[..descriptors]);
            assert_eq!(rig.take(20), (kick[piece].to_vec(), descriptors));
        }
        // As many as a message may have, and more.
        for (sent, come) in [(32, 32), (33, 33), (253, 33)] {
            send(&rig.front_end, &kick, &vec![pipe.as_fd(); sent]);
            assert_eq!(rig.take(20), (kick.clone(), come));
        }
        // What is no message is shown, and nothing behind it.
        send(&rig.front_end, &[message(1, &[])[..8].to_vec(), vec![0xff; 40]].concat(), &[]);
        assert_eq!(rig.take(64).0.len(), 12);
        assert_eq!(rig.take(64).0.len(), 0);
    }

    #[test]
    fn replies_come_back_and_the_end_of_one_side_is_the_end_of_the_other() {
        let mut rig = Rig::new();
        rig.session.write_all(&[9; 3000]).unwrap();
        let mut reply = [0; 3000];
        rig.front_end.read_exact(&mut reply).unwrap();
        assert_eq!(reply, [9; 3000]);
        // A reply that is under way when the session ends arrives.
        rig.session.write_all(b"last").unwrap();
        rig.session.shutdown(std::net::Shutdown::Both).unwrap();
        let mut rest = Vec::new();
        rig.front_end.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"last");

        let mut rig = Rig::new();
        let half = &message(8, &[1; 8])[..15];
        rig.front_end.write_all(half).unwrap();
        rig.front_end.shutdown(std::net::Shutdown::Both).unwrap();
        let mut rest = Vec::new();
        rig.session.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, half);
    }

    #[test]
    fn what_finds_no_thread_is_tried_again_and_nothing_is_kept() {
        static REFUSES: AtomicBool = AtomicBool::new(false);
        static REFUSED: AtomicUsize = AtomicUsize::new(0);
        let rig = Rig::with(|descriptors, task| {
            if REFUSES.load(Ordering::SeqCst) {
                REFUSED.fetch_add(1, Ordering::SeqCst);
                return Err(descriptors);
            }
            vetting::elsewhere(descriptors, task)
        });
        let refused = |times| {
            let end = Instant::now() + Duration::from_secs(30);
            while REFUSED.load(Ordering::SeqCst) < times {
                assert!(Instant::now() < end, "it was tried {} times, not {times}", REFUSED.load(Ordering::SeqCst));
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        // The other end of what is sent is told when nobody has it any more.
        let (other, sent) = io::pipe().unwrap();
        let kick = message(12, &[2; 8]);
        REFUSES.store(true, Ordering::SeqCst);
        send(&rig.front_end, &kick, &[sent.as_fd()]);
        drop(sent);
        refused(3);
        assert_eq!(rig.hear(), Some((7, News::NoThreads(true))));
        REFUSES.store(false, Ordering::SeqCst);
        assert_eq!(rig.take(20), (kick, 1));
        assert_eq!(rig.hear(), Some((7, News::NoThreads(false))));
        // A connection that is over is let go of as soon as there are threads.
        let waiter = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let edges = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&waiter, &rig.front_end, epoll::EventData::new_u64(0), edges).unwrap();
        REFUSES.store(true, Ordering::SeqCst);
        rig.front_end.shutdown(std::net::Shutdown::Both).unwrap();
        rig.session.shutdown(std::net::Shutdown::Both).unwrap();
        refused(REFUSED.load(Ordering::SeqCst) + 3);
        // Whoever waits at the other end has been woken, and is not each time.
        let mut event = Vec::with_capacity(1);
        let mut woken = || {
            event.clear();
            epoll::wait(&waiter, rustix::buffer::spare_capacity(&mut event), Some(&Timespec::default())).unwrap()
        };
        assert_eq!(woken(), 1);
        refused(REFUSED.load(Ordering::SeqCst) + 3);
        assert_eq!(woken(), 0);
        REFUSES.store(false, Ordering::SeqCst);
        let (mut other, mut rest) = (other, Vec::new());
        assert_eq!(other.read_to_end(&mut rest).unwrap(), 0);
    }

    #[test]
    fn what_the_daemon_had_no_room_for_is_told_later() {
        let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (control, theirs) = pair.unwrap();
        let filler = theirs.try_clone().unwrap();
        let rig = Rig::over(control, theirs, |descriptors, _| Err(descriptors));
        let fill = || rustix::net::send(&filler, &[0; WORD_BYTES], SendFlags::DONTWAIT);
        while fill().is_ok() {}
        // It finds no thread, and nobody hears of that for a while.
        let (_other, sent) = io::pipe().unwrap();
        send(&rig.front_end, &message(12, &[2; 8]), &[sent.as_fd()]);
        std::thread::sleep(3 * RETRY);
        drop(filler);
        let told = std::iter::repeat_with(|| rig.hear()).find_map(|news| news);
        assert_eq!(told, Some((7, News::NoThreads(true))));
    }

    #[test]
    fn what_is_held_up_is_told_when_the_daemon_has_room_for_that() {
        static HOLDS: AtomicBool = AtomicBool::new(true);
        let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let (control, theirs) = pair.unwrap();
        let filler = theirs.try_clone().unwrap();
        let mut rig = Rig::over(control, theirs, |descriptors, task| {
            let held = Box::new(move |descriptors| {
                while HOLDS.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                task(descriptors);
            });
            vetting::elsewhere(descriptors, held)
        });
        while rustix::net::send(&filler, &[0; WORD_BYTES], SendFlags::DONTWAIT).is_ok() {}
        let (_other, sent) = io::pipe().unwrap();
        send(&rig.front_end, &message(12, &[2; 8]), &[sent.as_fd()]);
        // Its connection ends for that, and nobody hears why.
        rig.session.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        assert_eq!(rig.session.read(&mut [0; 20]).unwrap(), 0);
        drop(filler);
        let told = |rig: &Rig| std::iter::repeat_with(|| rig.hear()).find_map(|news| news);
        assert_eq!(told(&rig), Some((7, News::Held(1))));
        HOLDS.store(false, Ordering::SeqCst);
        assert_eq!(told(&rig), Some((7, News::Held(0))));
    }

    #[test]
    fn time_in_which_the_relay_does_not_run_is_held_against_nobody() {
        static JOBS: AtomicUsize = AtomicUsize::new(0);
        static HOLDS: AtomicBool = AtomicBool::new(true);
        let rig = Rig::with(|descriptors, task| {
            if JOBS.fetch_add(1, Ordering::SeqCst) == 1 {
                // On the relay's own thread, while the first job is being done.
                std::thread::sleep(PATIENCE + Duration::from_secs(1));
                HOLDS.store(false, Ordering::SeqCst);
            }
            let held = Box::new(move |descriptors| {
                while HOLDS.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                task(descriptors);
            });
            vetting::elsewhere(descriptors, held)
        });
        let (front_end, session, _lease) = rig.connect(8);
        let ((_other, sent), kick) = (io::pipe().unwrap(), message(12, &[2; 8]));
        send(&rig.front_end, &kick, &[sent.as_fd()]);
        while JOBS.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        send(&front_end, &kick, &[sent.as_fd()]);
        for session in [&rig.session, &session] {
            session.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        }
        assert_eq!(rig.take(20), (kick.clone(), 1), "it was done as soon as anything was");
        let mut passed_on = vec![0; kick.len()];
        (&session).read_exact(&mut passed_on).unwrap();
        assert_eq!(passed_on, kick);
    }

    /// Does what a job does at once, so that there is always one that was done.
    fn at_once(descriptors: Vec<OwnedFd>, task: Task) -> Result<(), Vec<OwnedFd>> {
        task(descriptors);
        Ok(())
    }

    #[test]
    fn jobs_of_many_ports_keep_nobody_waiting() {
        /// How many jobs have begun, and which is the first that may not yet.
        static JOBS: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];
        let rig = Rig::with(|descriptors, task| {
            let number = JOBS[0].fetch_add(1, Ordering::SeqCst);
            while number >= JOBS[1].load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            at_once(descriptors, task)
        });
        let (one, file) = (message(8, &[1; 8]), io::pipe().unwrap().0);
        let mut ports: Vec<_> = (8..32).map(|port| rig.connect(port)).collect();
        for (front_end, session, _) in &mut ports {
            front_end.write_all(&one).unwrap();
            session.read_exact(&mut vec![0; one.len()]).unwrap();
        }
        let (mut front_end, mut session, _lease) = ports.pop().unwrap();
        // More comes than can be done in one turn, and one thing while they are about it.
        send(&rig.front_end, &one, &[file.as_fd()]);
        for (front_end, ..) in &ports {
            (0..100).for_each(|_| send(front_end, &one, &[file.as_fd()]));
        }
        JOBS[1].store(200, Ordering::SeqCst);
        while JOBS[0].load(Ordering::SeqCst) <= 200 {
            std::thread::sleep(Duration::from_millis(1));
        }
        front_end.write_all(&one).unwrap();
        JOBS[1].store(400, Ordering::SeqCst);
        let read = session.read_exact(&mut vec![0; one.len()]);
        JOBS[1].store(usize::MAX, Ordering::SeqCst);
        read.unwrap();
    }

    #[test]
    fn a_port_that_has_used_its_time_waits_and_others_do_not() {
        let rig = Rig::with(|descriptors, task| {
            let began = thread_time();
            while thread_time() - began < Duration::from_millis(400) {}
            at_once(descriptors, task)
        });
        let (_other, sent) = io::pipe().unwrap();
        let (costly, one) = (message(12, &[2; 8]), message(8, &[1; 8]));
        // It is charged for what the thread does and for what the job does, which is the same here.
        let began = Instant::now();
        send(&rig.front_end, &costly, &[sent.as_fd()]);
        assert_eq!(rig.take(20), (costly, 1));
        send(&rig.front_end, &one, &[]);
        let (mut front_end, mut session, _lease) = rig.connect(8);
        front_end.write_all(&one).unwrap();
        session.read_exact(&mut vec![0; one.len()]).unwrap();
        rig.session.set_nonblocking(true).unwrap();
        let early = (&rig.session).read(&mut [0; 20]).is_ok();
        assert!(!early || began.elapsed() > Duration::from_secs(4), "it has five seconds to wait");
        if !early {
            rig.session.set_nonblocking(false).unwrap();
            rig.session.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
            assert_eq!(rig.take(20), (one, 0));
        }
    }

    #[test]
    fn eventfds_wait_until_earlier_ones_are_closed() {
        let rig = Rig::new();
        let kick = message(12, &[2; 8]);
        let mut front_end = rig.front_end.try_clone().unwrap();
        // What has come when nothing more comes.
        let passed_on = || {
            let come = |patience| {
                rig.session.set_read_timeout(Some(patience)).unwrap();
                (&rig.session).read_exact(&mut [0; 20]).is_ok()
            };
            assert!(come(Duration::from_secs(30)));
            1 + std::iter::from_fn(|| come(Duration::from_millis(100)).then_some(())).count()
        };
        // More than there may be at once, and no more than the socket takes.
        (0..200).for_each(|_| send(&front_end, &kick, &[EventFd::new().unwrap().as_fd()]));
        front_end.write_all(&message(8, &[1; 8])).unwrap();
        let mut sent = 0u64;
        while sent < 201 {
            let count = passed_on();
            assert!(count <= 40, "{count} came together");
            for _ in 0..count {
                rustix::io::write(&rig.lease, &sent.to_ne_bytes()).unwrap();
                sent += 1;
            }
        }
        assert_eq!(sent, 201);
    }

    #[test]
    fn a_session_that_does_not_read_holds_up_its_front_end_and_nothing_is_lost() {
        let rig = Rig::new();
        let (one, count) = (message(8, &[1; 8]), 50_000);
        let writer = {
            let (mut front_end, one) = (rig.front_end.try_clone().unwrap(), one.clone());
            std::thread::spawn(move || (0..count).for_each(|_| front_end.write_all(&one).unwrap()))
        };
        std::thread::sleep(Duration::from_millis(50));
        assert!(!writer.is_finished(), "a megabyte lies somewhere");
        let mut session = &rig.session;
        for _ in 0..count {
            let mut bytes = [0; 20];
            session.read_exact(&mut bytes).unwrap();
            assert_eq!(bytes, one[..]);
        }
        writer.join().unwrap();
    }
}

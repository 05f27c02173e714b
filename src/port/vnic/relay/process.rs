//! The process that the relay is: [`run`]. One thread in epoll, for all connections; and one for each message that has descriptors
//! with it, or that is to be thrown away with what it has.
//!
//! It must never wait for a front end, and nothing that one can send may end it. It ends when the daemon does. What its thread
//! does at a front end's socket wakes all who wait for the other end, which may be very many: messages are charged to their link
//! ([`Step::Costly`]), and what cannot be, shutting down and closing, is done on another thread.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};

use super::super::message::DESCRIPTORS;
use super::link::{Link, Step};
use super::{News, ORDER_BYTES, Order, vetting};
use crate::sys::eventfd::EventFd;
use crate::sys::stop_signals;

/// How long a descriptor may take to be looked at or let go of. Then its connection is ended, and the daemon hears of it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Events that are taken from the kernel at once.
const EVENTS: usize = 64;

/// Orders that are taken at once.
const ORDERS: usize = 64;

/// Keys in the epoll set. Each connection has two, from 2 on: an even one for its front end and an odd one for its session.
const CONTROL: u64 = 0;
const WAKE: u64 = 1;

/// What a process does that was started with [`super::OPTION`]: its standard input is the socket to the daemon. Returns when the
/// daemon has ended.
///
/// # Errors
/// What the kernel says: in practice that standard input is no such socket.
pub fn run() -> io::Result<()> {
    // A service manager, or a terminal, tells all processes at once; the daemon is served until it has ended.
    stop_signals::ignore();
    let _ = rustix::thread::set_name(c"linecard-relay");
    // Should this one hang, it goes with the daemon as well. If that is gone already, standard input says so.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    serve(io::stdin().as_fd().try_clone_to_owned()?)
}

/// Serves the daemon at the other end of `control`.
fn serve(control: OwnedFd) -> io::Result<()> {
    let (report, reports) = mpsc::channel();
    let mut process = Process {
        epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        control,
        wake: Arc::new(EventFd::new()?),
        report,
        reports,
        links: HashMap::new(),
        last: 0,
        jobs: HashMap::new(),
        waiting: VecDeque::new(),
    };
    let read = epoll::EventFlags::IN;
    epoll::add(&process.epoll, &process.control, epoll::EventData::new_u64(CONTROL), read)?;
    epoll::add(&process.epoll, &process.wake, epoll::EventData::new_u64(WAKE), read)?;
    process.run()
}

struct Process {
    epoll: OwnedFd,
    control: OwnedFd,
    /// Signalled when a job is done.
    wake: Arc<EventFd>,
    report: Sender<Done>,
    reports: Receiver<Done>,
    links: HashMap<u64, Linked>,
    /// The last number that was given to a link or a job.
    last: u64,
    jobs: HashMap<u64, Job>,
    /// What waits until a job of its port has ended.
    waiting: VecDeque<(Job, Vec<OwnedFd>)>,
}

/// A link, and what the epoll set waits for at its two sockets.
struct Linked {
    link: Link,
    watched: [epoll::EventFlags; 2],
}

/// Something that may take for ever.
struct Job {
    port: u64,
    work: Work,
    since: Instant,
    /// It has taken for too long.
    held: bool,
}

/// What a job does with its descriptors.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// They came with a message of this link, which waits for them to be looked at.
    Look(u64),
    /// They went with messages of this link, which waits for them to be closed if there still is one.
    Close(u64),
    /// They are connections to be shut down. That takes time, perhaps, and waits for nobody.
    HangUp,
    /// They are such connections, in which something lies.
    Drain,
}

impl Work {
    /// The link that waits for it.
    fn link(self) -> Option<u64> {
        if let Self::Look(link) | Self::Close(link) = self { Some(link) } else { None }
    }

    /// Does it.
    fn run(self, descriptors: Vec<OwnedFd>) -> io::Result<Vec<OwnedFd>> {
        match self {
            Self::Look(_) => {
                let mut looked = vetting::look(descriptors)?;
                // The others are let go of here.
                looked.truncate(DESCRIPTORS + 1);
                Ok(looked)
            }
            Self::Close(_) => {
                descriptors.into_iter().for_each(vetting::close);
                Ok(Vec::new())
            }
            Self::HangUp => Ok(descriptors.into_iter().filter_map(vetting::hang_up).collect()),
            Self::Drain => {
                descriptors.iter().for_each(vetting::drain);
                descriptors.into_iter().for_each(vetting::close);
                Ok(Vec::new())
            }
        }
    }
}

/// A job that was done, with the descriptors that came of it.
type Done = (u64, io::Result<Vec<OwnedFd>>);

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
            for event in &events {
                match event.data.u64() {
                    CONTROL => {
                        if !self.orders() {
                            return Ok(());
                        }
                    }
                    WAKE => self.done(),
                    key => self.ready(key, event.flags),
                }
            }
            self.expire();
        }
    }

    /// Takes orders; `false` if there is nobody any more who gives them.
    fn orders(&mut self) -> bool {
        for _ in 0..ORDERS {
            let mut bytes = [0; ORDER_BYTES];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
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

    fn obey(&mut self, [order, port @ ..]: [u8; ORDER_BYTES], descriptors: Vec<OwnedFd>) {
        let port = u64::from_ne_bytes(port);
        let mut descriptors = descriptors.into_iter();
        match (descriptors.next(), descriptors.next()) {
            (Some(front_end), Some(session)) if order == Order::Connect as u8 => self.connect(port, front_end, session),
            (Some(front_end), None) if order == Order::Discard as u8 => self.discard(port, front_end),
            // No room for descriptors was left in this process: the daemon sees the end of its pair.
            (Some(front_end), _) => self.discard(port, front_end),
            _ => {}
        }
    }

    fn connect(&mut self, port: u64, front_end: OwnedFd, session: OwnedFd) {
        stay_beside_daemon();
        vetting::take_in_line(&front_end);
        self.last += 1;
        let watched = [epoll::EventFlags::empty(); 2];
        self.links.insert(self.last, Linked { link: Link::new(port, front_end, session), watched });
        self.step(self.last);
    }

    /// Something happened at a socket of a link.
    fn ready(&mut self, key: u64, flags: epoll::EventFlags) {
        let (id, is_session) = (key / 2, key % 2 == 1);
        self.step(id);
        let gone = is_session && flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
        // Replies that nobody reads are those of a session that has ended.
        if gone && self.links.get(&id).is_some_and(|linked| linked.link.has_replies()) {
            self.end(id);
        }
    }

    /// Moves what a link can move, and waits for what it then needs.
    fn step(&mut self, id: u64) {
        let Some(Linked { link, .. }) = self.links.get_mut(&id) else { return };
        match link.step() {
            Step::Waits => {}
            Step::Look(descriptors) => {
                let job = Job::new(link.port, Work::Look(id));
                self.begin(job, descriptors);
            }
            Step::Close(descriptors) => {
                let job = Job::new(link.port, Work::Close(id));
                self.begin(job, descriptors);
            }
            Step::Costly => {
                let port = link.port;
                // The daemon ends it, and knows why then.
                if !self.tell(port, News::Costly) {
                    return self.end(id);
                }
            }
            Step::Ended => return self.end(id),
        }
        if !self.watch(id) {
            self.end(id);
        }
    }

    /// Has the epoll set wait for what a link needs. A socket that nothing is needed of is not in the set: the kernel tells of its
    /// end whether asked or not, and again and again.
    fn watch(&mut self, id: u64) -> bool {
        let Some(Linked { link, watched }) = self.links.get_mut(&id) else { return true };
        for ((side, socket), (reads, writes)) in (0..).zip(link.sockets()).zip(link.interest()) {
            let mut flags = epoll::EventFlags::empty();
            flags.set(epoll::EventFlags::IN, reads);
            flags.set(epoll::EventFlags::OUT, writes);
            let before = std::mem::replace(&mut watched[side as usize], flags);
            let data = epoll::EventData::new_u64(2 * id + side);
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
        let (front_end, descriptors) = link.end();
        self.let_go(port, id, descriptors);
        self.discard(port, front_end);
    }

    /// Ends a connection and lets go of it, and of what lies in it.
    fn discard(&mut self, port: u64, front_end: OwnedFd) {
        self.begin(Job::new(port, Work::HangUp), vec![front_end]);
    }

    /// Lets go of descriptors of a link that has ended.
    fn let_go(&mut self, port: u64, link: u64, descriptors: Vec<OwnedFd>) {
        if !descriptors.is_empty() {
            self.begin(Job::new(port, Work::Close(link)), descriptors);
        }
    }

    /// Begins a job, or puts it off if its port has as many as it may. Hanging up is not kept waiting by what may take for ever.
    fn begin(&mut self, job: Job, descriptors: Vec<OwnedFd>) {
        let hangs_up = |job: &Job| job.work == Work::HangUp;
        let alike = |other: &&Job| other.port == job.port && hangs_up(other) == hangs_up(&job);
        if self.jobs.values().filter(alike).count() >= vetting::THREADS as usize {
            self.waiting.push_back((job, descriptors));
            return;
        }
        self.last += 1;
        let (id, work) = (self.last, job.work);
        let (report, wake) = (self.report.clone(), Arc::clone(&self.wake));
        let started = vetting::elsewhere(descriptors, move |descriptors| {
            // Nobody is left to be told only when the process ends.
            let _ = report.send((id, work.run(descriptors)));
            wake.signal();
        });
        match started {
            Ok(()) => drop(self.jobs.insert(id, job)),
            Err(descriptors) => {
                if hangs_up(&job) {
                    descriptors.iter().for_each(vetting::shut_down);
                }
                vetting::keep(descriptors);
                work.link().into_iter().for_each(|link| self.end(link));
            }
        }
    }

    /// Jobs were done.
    fn done(&mut self) {
        self.wake.drain();
        while let Ok((id, looked)) = self.reports.try_recv() {
            let Some(job) = self.jobs.remove(&id) else { continue };
            if job.held {
                self.tell_held(job.port);
            }
            let link = job.work.link();
            match (link.and_then(|link| Some((link, self.links.get_mut(&link)?))), looked) {
                (Some((link, linked)), Ok(descriptors)) => {
                    linked.link.resume(descriptors);
                    self.step(link);
                }
                (Some((link, _)), Err(_)) => self.end(link),
                (None, Ok(full)) if job.work == Work::HangUp && !full.is_empty() => {
                    self.begin(Job::new(job.port, Work::Drain), full);
                }
                (None, looked) => self.let_go(job.port, link.unwrap_or(id), looked.unwrap_or_default()),
            }
            for (job, descriptors) in std::mem::take(&mut self.waiting) {
                self.begin(job, descriptors);
            }
        }
    }

    /// How long the oldest job may still take.
    fn patience(&self) -> Option<Duration> {
        let waiting = self.waiting.iter().map(|(job, _)| job).filter(|job| job.work.link().is_some());
        let oldest = self.jobs.values().chain(waiting).filter(|job| job.may_be_late()).map(|job| job.since).min();
        oldest.map(|since| (since + PATIENCE).saturating_duration_since(Instant::now()))
    }

    /// Ends connections whose descriptors take too long, and tells the daemon.
    fn expire(&mut self) {
        let mut ended = Vec::new();
        let mut told = Vec::new();
        let waiting = self.waiting.iter_mut().map(|(job, _)| (false, job));
        let late = |job: &Job| job.may_be_late() && job.since.elapsed() >= PATIENCE;
        for (running, job) in self.jobs.values_mut().map(|job| (true, job)).chain(waiting).filter(|(_, job)| late(job))
        {
            job.held = true;
            ended.extend(job.work.link());
            told.extend(running.then_some(job.port));
        }
        // First, so that the session's end can be explained.
        told.into_iter().for_each(|port| self.tell_held(port));
        ended.into_iter().for_each(|link| self.end(link));
    }

    /// Tells the daemon how many descriptors of a port are held up.
    fn tell_held(&self, port: u64) {
        let held = self.jobs.values().filter(|job| job.port == port && job.held).count();
        self.tell(port, News::Held(u32::try_from(held).unwrap_or(u32::MAX)));
    }

    /// Tells the daemon something of a port. `false` if it does not listen: it has ended, or is about to.
    fn tell(&self, port: u64, news: News) -> bool {
        rustix::net::send(&self.control, &news.bytes(port), SendFlags::DONTWAIT | SendFlags::NOSIGNAL).is_ok()
    }
}

impl Job {
    /// One that begins now.
    fn new(port: u64, work: Work) -> Self {
        Self { port, work, since: Instant::now(), held: false }
    }

    /// Whether it could be found to take too long.
    fn may_be_late(&self) -> bool {
        !self.held && self.work != Work::HangUp
    }
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
    use std::thread::JoinHandle;

    use rustix::net::{AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SocketFlags, SocketType};

    use super::*;

    /// A relay on a thread, with one connection: the front end's end and the session's.
    struct Rig {
        control: Option<OwnedFd>,
        front_end: UnixStream,
        session: UnixStream,
        thread: Option<JoinHandle<io::Result<()>>>,
    }

    impl Rig {
        fn new() -> Self {
            let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
            let (control, theirs) = pair.unwrap();
            let thread = Some(std::thread::spawn(move || serve(theirs)));
            let (front_end, relayed) = UnixStream::pair().unwrap();
            let (session, end) = UnixStream::pair().unwrap();
            send(&control, &[Order::Connect as u8, 7, 0, 0, 0, 0, 0, 0, 0], &[relayed.as_fd(), end.as_fd()]);
            for stream in [&front_end, &session] {
                stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            }
            Self { control: Some(control), front_end, session, thread }
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

//! A connection of a front end that sends anything, with everything asserted that must hold whatever it is: [`exercise`].
//! The fuzz target `control` calls it, and so does the test below, with the seeds of `fuzz/seeds/control`.
//!
//! All on one thread, so that a run repeats itself: a message is sent, then the session takes what has arrived. The bytes
//! are operations until the end, integers little-endian and missing ones zero; [`Exercise::step`] has them.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use vhost::vhost_user::message::FrontendReq;

use super::handler::Handler;
use super::message::{Arrival, HEADER_BYTES, arrival};
use super::nic::{Mode, Nic, VnicConfig};
use super::receive::ReceiveQueue;
use super::session::{End, Session};
use super::steering::Steering;
use super::transmit::TransmitSide;
use crate::frame::{Batch, Heads, heads};
use crate::limits::BATCH_FRAMES;
use crate::port::{LinkState, Outcome, Receive, Received, Transmit};
use crate::sys::eventfd::EventFd;

/// Bytes of the file that the front end shares as memory.
const MEMORY: u64 = 0x2_0000;
/// Messages that are sent: as many replies fit the socket's buffer unread.
const MESSAGES: usize = 100;
/// Most descriptors that come with one message.
const DESCRIPTORS: usize = 3;
const NEED_REPLY: u32 = 8;
/// Version 1, and a reply.
const REPLY: u32 = 5;

/// Sends `bytes` to a vNIC. Returns how its connection ended and what the link was before.
pub fn exercise(bytes: &[u8]) -> (String, LinkState) {
    let nic = Arc::new(Nic::new(config()).unwrap());
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let handler = Arc::new(Handler::new(Arc::clone(&nic), Arc::default()));
    let memory = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
    memory.set_len(MEMORY).unwrap();
    let (transmit, receive): (Vec<_>, Vec<_>) = nic.queues.iter().cloned().enumerate().partition(|(i, _)| i % 2 == 0);
    let numbered = (0..).zip(receive);
    let steering = Arc::new(Steering::new(config().queue_pairs));
    let mut exercise = Exercise {
        nic: &nic,
        theirs,
        session: Session::new(&ours, &nic, &handler).unwrap(),
        ours: &ours,
        handler: &handler,
        memory,
        events: [EventFd::new().unwrap(), EventFd::new().unwrap()],
        receive: numbered.map(|(pair, (_, queue))| ReceiveQueue::new(queue, pair, Arc::clone(&steering))).collect(),
        transmit: TransmitSide::new(transmit.into_iter().map(|(_, queue)| queue).collect(), steering),
        heads: heads(),
        whole: true,
    };
    let mut input = Input(bytes);
    let mut end = None;
    for _ in 0..MESSAGES {
        if end.is_some() || input.0.is_empty() {
            break;
        }
        end = exercise.step(&mut input);
    }
    let link = handler.view().link(&nic.queues);
    let _ = exercise.theirs.shutdown(std::net::Shutdown::Write);
    let end = end.unwrap_or_else(|| exercise.session.run(&AtomicBool::new(false)).unwrap_or_else(End::Socket));
    handler.device().tear_down();
    exercise.shards();
    assert!(nic.queues.iter().all(|queue| !queue.is_running()), "a ring outlives its connection");
    assert!(matches!(handler.view().link(&nic.queues), LinkState::Down(_)));
    assert_eq!(handler.view().regions, 0);
    (end.to_string(), link)
}

pub(super) fn config() -> VnicConfig {
    VnicConfig {
        name: "fuzz".parse().unwrap(),
        socket: "/nowhere".into(),
        mode: Mode::Server,
        queue_pairs: 2,
        mtu: Some(9000),
        owner: None,
        group: None,
        permissions: 0o600,
        memory: None,
        mac: None,
        compat: crate::ident::Compat::default(),
        records: None,
    }
}

struct Exercise<'a> {
    nic: &'a Nic,
    handler: &'a Arc<Handler>,
    ours: &'a UnixStream,
    theirs: UnixStream,
    session: Session<'a>,
    memory: File,
    events: [EventFd; 2],
    receive: Vec<ReceiveQueue>,
    transmit: TransmitSide,
    heads: Box<Heads>,
    /// Everything sent so far was a whole message, so that replies can be told apart.
    whole: bool,
}

impl Exercise<'_> {
    /// One operation, by its first byte (modulo 8). `Some`: the connection has ended.
    ///
    /// - 0 to 3: a message. Its number, flags (1 NEED_REPLY; 2 a header word by word follows instead: number, flags and
    ///   size; the high half is how many descriptors come with it, each a byte for [`Self::descriptor`]), its length, body
    /// - 4: the guest writes. Address in units of 2 bytes, length, bytes
    /// - 5: the shards take a turn
    /// - 6: the memory file gets a new length, in pages
    /// - 7: bytes that need not be a message. Length, bytes
    fn step(&mut self, input: &mut Input<'_>) -> Option<End> {
        match input.u8() % 8 {
            0..=3 => return self.message(input),
            4 => {
                let (address, len) = (2 * u64::from(input.u16()), input.u8());
                let _ = self.memory.write_all_at(input.slice(len.into()), address);
            }
            5 => self.shards(),
            6 => self.memory.set_len(u64::from(input.u8() % 64) * 4096).unwrap(),
            _ => {
                let len = input.u8();
                let bytes = input.slice(len.into());
                self.whole &= bytes.is_empty();
                self.send(bytes, &[]);
                return self.serve();
            }
        }
        self.handler.device().attend();
        self.look();
        None
    }

    fn message(&mut self, input: &mut Input<'_>) -> Option<End> {
        let (number, flags) = (input.u8(), input.u8());
        let odd = flags & 2 != 0;
        let need_reply = flags & 1 != 0 && !odd;
        let mut header = [u32::from(number), 1 | if need_reply { NEED_REPLY } else { 0 }, 0];
        if odd {
            header = [input.u32(), input.u32(), input.u32()];
        }
        let count = usize::from(flags >> 4) % (DESCRIPTORS + 1);
        let descriptors: Vec<_> = (0..count).filter_map(|_| self.descriptor(input.u8())).collect();
        let len = input.u8();
        let body = input.slice(len.into());
        if !odd {
            header[2] = body.len() as u32;
        }
        self.whole &= !odd;
        self.drain();
        let acks = self.handler.device().has_reply_ack();
        self.send(&[header.map(u32::to_ne_bytes).as_flattened(), body].concat(), &descriptors);
        drop(descriptors);
        let end = self.serve();
        let replies = self.drain();
        if self.whole && end.is_none() {
            assert!(replies.iter().all(|(request, _)| *request == header[0]), "{replies:?} to {header:?}");
            assert!(replies.len() <= 1, "{replies:?} to {header:?}");
            // The crate stops acknowledging with the very SET_PROTOCOL_FEATURES that takes REPLY_ACK back.
            let exempt = header[0] == u32::from(FrontendReq::SET_PROTOCOL_FEATURES);
            assert!(exempt || !(need_reply && acks) || replies.len() == 1, "no ack of {header:?}");
        }
        end
    }

    /// What can be passed over a socket and is not always what the message wants.
    fn descriptor(&self, kind: u8) -> Option<OwnedFd> {
        let anything = |path| File::options().read(true).open(path).ok().map(OwnedFd::from);
        match kind % 8 {
            0..=1 => self.memory.as_fd().try_clone_to_owned().ok(),
            2..=3 => self.events[usize::from(kind % 2)].as_fd().try_clone_to_owned().ok(),
            4 => anything("/dev/null"),
            5 => anything("/"),
            6 => rustix::pipe::pipe().ok().map(|(read, _)| read),
            _ => self.ours.as_fd().try_clone_to_owned().ok(),
        }
    }

    fn send(&self, bytes: &[u8], descriptors: &[OwnedFd]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        if !borrowed.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&borrowed)));
        }
        // The session may have hung up, and then nothing more is to be learned.
        let _ = rustix::net::sendmsg(&self.theirs, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    }

    /// The session takes what has arrived.
    fn serve(&mut self) -> Option<End> {
        let end = loop {
            match arrival(self.ours).unwrap() {
                Arrival::Message(header) => match self.session.message(&header) {
                    Ok(None) => {}
                    Ok(Some(end)) => break Some(end),
                    Err(error) => break Some(End::Socket(error)),
                },
                Arrival::Crowded(header) => break Some(End::crowded(&header)),
                Arrival::End => break Some(End::Closed),
                Arrival::Nothing | Arrival::Part => break None,
            }
        };
        self.look();
        end
    }

    /// What an operator sees can be had at any time.
    fn look(&self) {
        self.handler.follow_up();
        let view = self.handler.view();
        assert_eq!(view.ring_reports(&self.nic.queues).len(), self.nic.queues.len());
        assert!(view.report(&self.handler.last_nodes()).is_object());
        match view.link(&self.nic.queues) {
            LinkState::Up => {}
            LinkState::Impaired(why) | LinkState::Down(why) | LinkState::Stopped(why) | LinkState::Gone(why) => {
                assert!(!why.is_empty());
            }
        }
    }

    /// Takes the replies that have come: number and length of each.
    fn drain(&mut self) -> Vec<(u32, usize)> {
        let mut bytes = Vec::new();
        // Ends with WouldBlock, or with the end of the connection.
        let _ = (&self.theirs).read_to_end(&mut bytes);
        let (mut rest, mut replies) = (bytes.as_slice(), Vec::new());
        while !rest.is_empty() {
            let mut header = Input(rest);
            let (request, flags, size) = (header.u32(), header.u32(), header.u32() as usize);
            assert!(flags == REPLY && HEADER_BYTES + size <= rest.len(), "no reply: {rest:?}");
            replies.push((request, size));
            rest = &rest[HEADER_BYTES + size..];
        }
        replies
    }

    /// Every queue is received from once, and what comes is sent back to the same guest.
    fn shards(&mut self) {
        for queue in &self.receive {
            let transmit = &self.transmit;
            let mut got = None;
            let mut process = |batch: &mut Batch<'_>| {
                assert!(got.replace(batch.len()).is_none_or(|before| before <= BATCH_FRAMES));
                let picks: Vec<u8> = (0..batch.len() as u8).collect();
                let mut outcome = Outcome::new();
                transmit.transmit(batch, &picks, &mut outcome);
                assert_eq!(outcome.delivered.checked_shr(batch.len() as u32).unwrap_or(0), 0);
            };
            queue.disarm();
            if let Received::Frames(count) = queue.receive(&mut self.heads, &mut process) {
                assert!(count >= got.unwrap_or(0));
            }
            queue.arm();
        }
    }
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn slice(&mut self, len: usize) -> &'a [u8] {
        let (slice, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        slice
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let slice = self.slice(N);
        std::array::from_fn(|i| slice.get(i).copied().unwrap_or(0))
    }

    fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.take())
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }
}

/// Every file of `fuzz/seeds/control`: cases that were thought of, and those that a fuzzer found.
#[cfg(test)]
#[test]
fn seeds_are_survived() {
    let mut count = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/control")).unwrap() {
        let path = entry.unwrap().path();
        let (end, link) = exercise(&std::fs::read(&path).unwrap());
        // A name begins with what it promises of the link, if it promises something.
        let name = path.file_name().unwrap().to_str().unwrap();
        let kept = match name.split_once('-') {
            Some(("up", _)) => link.is_up(),
            Some(("stopped", _)) => matches!(link, LinkState::Stopped(_)),
            _ => true,
        };
        assert!(kept, "{name}: {link:?}, {end}");
        count += 1;
    }
    assert!(count >= 10, "the seeds are gone");
}

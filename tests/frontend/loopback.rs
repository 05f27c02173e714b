//! A reference back end in a thread, to prove the front end without a daemon: vhost-user messages by hand, rings by
//! the `virtio-queue` crate. Whatever a pair transmits comes back on the same pair.
//!
//! It is simple rather than fast, and believes what it is told; it records each request for tests of message order.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::message::{self, Message, NEED_REPLY, NO_FD, REPLY, VERSION};
use super::session::{Session, feature, protocol, request};

/// Everything that this back end can do.
pub const FEATURES: u64 = feature::MTU
    | feature::MRG_RXBUF
    | feature::MQ
    | feature::ANY_LAYOUT
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::PROTOCOL_FEATURES
    | feature::VERSION_1
    | feature::IN_ORDER;
const PROTOCOL: u64 =
    protocol::MQ | protocol::RARP | protocol::REPLY_ACK | protocol::NET_MTU | protocol::CONFIGURE_MEM_SLOTS;
const NO_INTERRUPT: u16 = 1;

/// A running back end.
pub struct Loopback {
    requests: Arc<Mutex<Vec<u32>>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Loopback {
    /// Starts one and returns the front end's side of its connection.
    pub fn start() -> (Self, Session) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let mut device = Device::new(requests.clone());
        let thread = std::thread::spawn(move || device.serve(&theirs));
        (Self { requests, thread: Some(thread) }, Session::new(ours).unwrap())
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<u32> {
        self.requests.lock().unwrap().clone()
    }

    /// Waits for its end, which is clean if the front end closed between two messages.
    pub fn join(mut self) -> io::Result<()> {
        self.thread.take().expect("joined once").join().expect("a back end that does not panic")
    }
}

#[derive(Clone, Copy)]
struct Mapping {
    gpa: u64,
    len: u64,
    uva: u64,
}

struct Vring {
    queue: Queue,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
    /// Used index up to which the driver was told.
    signalled: u16,
    /// Frames that wait for RX buffers, without header.
    backlog: VecDeque<Vec<u8>>,
}

struct Device {
    requests: Arc<Mutex<Vec<u32>>>,
    features: u64,
    memory: GuestMemoryMmap<()>,
    mappings: Vec<Mapping>,
    vrings: BTreeMap<u32, Vring>,
}

impl Device {
    fn new(requests: Arc<Mutex<Vec<u32>>>) -> Self {
        Self { requests, features: 0, memory: GuestMemoryMmap::new(), mappings: Vec::new(), vrings: BTreeMap::new() }
    }

    fn serve(&mut self, stream: &UnixStream) -> io::Result<()> {
        loop {
            if self.wait(stream) {
                let message = match Message::read(stream) {
                    Ok(message) => message,
                    Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                    Err(error) => return Err(error),
                };
                self.requests.lock().unwrap().push(message.request);
                self.answer(stream, message)?;
            }
            self.forward();
        }
    }

    /// Sleeps until there is a message (true) or a kick, whose counter it takes.
    fn wait(&self, stream: &UnixStream) -> bool {
        let kicks: Vec<_> = self.vrings.values().filter_map(|vring| vring.kick.as_ref()).collect();
        let mut fds = vec![PollFd::new(stream, PollFlags::IN)];
        fds.extend(kicks.iter().map(|kick| PollFd::new(*kick, PollFlags::IN)));
        poll(&mut fds, None).unwrap();
        for (kick, fd) in kicks.iter().zip(&fds[1..]) {
            if !fd.revents().is_empty() {
                let _ = rustix::io::read(kick, &mut [0; 8]);
            }
        }
        !fds[0].revents().is_empty()
    }

    fn answer(&mut self, stream: &UnixStream, mut message: Message) -> io::Result<()> {
        let reply = self.reply_to(&mut message);
        let payload = match reply {
            Some(payload) => payload,
            None if message.flags & NEED_REPLY != 0 => {
                let refused = message.request == request::NET_SET_MTU && message.u64()? > 9000;
                u64::from(refused).to_le_bytes().to_vec()
            }
            None => return Ok(()),
        };
        message::send(stream, &message::encode(message.request, VERSION | REPLY, &payload), &[])
    }

    /// Acts on a message; `Some` if it is one that has a reply of its own.
    fn reply_to(&mut self, message: &mut Message) -> Option<Vec<u8>> {
        let words: Vec<u64> =
            message.payload.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
        let word = words.first().copied().unwrap_or(0);
        let (index, number) = (word as u32, (word >> 32) as u32);
        match message.request {
            request::GET_FEATURES => return Some(FEATURES.to_le_bytes().to_vec()),
            request::GET_PROTOCOL_FEATURES => return Some(PROTOCOL.to_le_bytes().to_vec()),
            request::GET_QUEUE_NUM => return Some(128u64.to_le_bytes().to_vec()),
            request::GET_MAX_MEM_SLOTS => return Some(32u64.to_le_bytes().to_vec()),
            request::GET_VRING_BASE => {
                let vring = self.vring(index);
                vring.queue.set_ready(false);
                vring.kick = None;
                let base = u64::from(vring.queue.next_avail());
                return Some((base << 32 | u64::from(index)).to_le_bytes().to_vec());
            }
            request::SET_FEATURES => self.features = word,
            request::SET_MEM_TABLE => {
                self.memory = GuestMemoryMmap::new();
                self.mappings.clear();
                for (region, fd) in words[1..].chunks_exact(4).zip(message.fds.drain(..)) {
                    self.map(region, fd);
                }
            }
            request::ADD_MEM_REG => {
                let fd = message.fds.pop().expect("a region's descriptor");
                self.map(&words[1..], fd);
            }
            request::REM_MEM_REG => self.unmap(words[1]),
            request::SET_VRING_NUM => self.vring(index).queue.set_size(number as u16),
            request::SET_VRING_BASE => {
                let vring = self.vring(index);
                vring.queue.set_next_avail(number as u16);
                vring.queue.set_next_used(number as u16);
                vring.signalled = number as u16;
            }
            request::SET_VRING_ADDR => self.set_addresses(index, words[1], words[2], words[3]),
            request::SET_VRING_KICK => {
                assert!(word & NO_FD == 0, "this front end polls nothing");
                let event_idx = self.features & feature::EVENT_IDX != 0;
                let vring = self.vring(index);
                vring.kick = message.fds.pop();
                vring.queue.set_event_idx(event_idx);
                vring.queue.set_ready(true);
            }
            request::SET_VRING_CALL => self.vring(index).call = message.fds.pop(),
            request::SET_VRING_ENABLE => self.vring(index).enabled = number != 0,
            _ => {}
        }
        None
    }

    fn vring(&mut self, index: u32) -> &mut Vring {
        self.vrings.entry(index).or_insert_with(|| Vring {
            queue: Queue::new(32768).unwrap(),
            kick: None,
            call: None,
            enabled: false,
            signalled: 0,
            backlog: VecDeque::new(),
        })
    }

    /// `region` is GPA, length, UVA, offset. One that is mapped already stays, as QEMU 7.2 needs it.
    fn map(&mut self, region: &[u64], fd: OwnedFd) {
        let (gpa, len, uva, offset) = (region[0], region[1], region[2], region[3]);
        if self.mappings.iter().any(|mapping| mapping.gpa == gpa) {
            return;
        }
        let mapping = MmapRegion::from_file(FileOffset::new(fd.into(), offset), len as usize).unwrap();
        let mapped = GuestRegionMmap::new(mapping, GuestAddress(gpa)).unwrap();
        self.memory = self.memory.insert_region(Arc::new(mapped)).unwrap();
        self.mappings.push(Mapping { gpa, len, uva });
    }

    fn unmap(&mut self, gpa: u64) {
        let Some(at) = self.mappings.iter().position(|mapping| mapping.gpa == gpa) else { return };
        let mapping = self.mappings.remove(at);
        self.memory = self.memory.remove_region(GuestAddress(gpa), mapping.len).unwrap().0;
    }

    fn set_addresses(&mut self, index: u32, desc: u64, used: u64, avail: u64) {
        let gpa = |uva: u64| {
            let home = self.mappings.iter().find(|home| uva >= home.uva && uva - home.uva < home.len);
            home.map(|home| uva - home.uva + home.gpa).expect("a ring inside the memory table")
        };
        let [desc, used, avail] = [desc, used, avail].map(gpa);
        let queue = &mut self.vring(index).queue;
        queue.try_set_desc_table_address(GuestAddress(desc)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(avail)).unwrap();
    }

    /// Moves what every TX ring has to the RX ring before it.
    fn forward(&mut self) {
        let header = super::driver::header_len(self.features);
        let mergeable = self.features & feature::MRG_RXBUF != 0;
        for index in (0..256).step_by(2) {
            let frames = match self.vrings.get_mut(&(index + 1)) {
                Some(tx) if tx.queue.ready() => tx.take_frames(&self.memory, header),
                _ => Vec::new(),
            };
            let Some(rx) = self.vrings.get_mut(&index) else { continue };
            if rx.enabled {
                rx.backlog.extend(frames);
                if rx.queue.ready() {
                    rx.deliver(&self.memory, header, mergeable);
                }
            }
        }
    }
}

impl Vring {
    fn take_frames(&mut self, memory: &GuestMemoryMmap<()>, header: usize) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        loop {
            self.queue.disable_notification(memory).unwrap();
            while let Some(chain) = self.queue.pop_descriptor_chain(memory) {
                let head = chain.head_index();
                let mut bytes = Vec::new();
                for desc in chain {
                    assert!(!desc.is_write_only(), "a writable TX descriptor");
                    let mut part = vec![0; desc.len() as usize];
                    memory.read_slice(&mut part, desc.addr()).unwrap();
                    bytes.extend(part);
                }
                frames.push(bytes.split_off(header));
                self.publish(memory, &[(head, 0)]);
            }
            if !self.queue.enable_notification(memory).unwrap() {
                break;
            }
        }
        self.signal(memory);
        frames
    }

    /// Delivers the backlog as far as there are buffers; a frame that does not fit one buffer without MRG_RXBUF is lost.
    fn deliver(&mut self, memory: &GuestMemoryMmap<()>, header: usize, mergeable: bool) {
        while let Some(frame) = self.backlog.front() {
            let mut bytes = vec![0; header];
            bytes.extend_from_slice(frame);
            let mut written = 0;
            let mut used = Vec::new();
            let start = self.queue.next_avail();
            while written < bytes.len() && (mergeable || used.is_empty()) {
                let Some(chain) = self.queue.pop_descriptor_chain(memory) else { break };
                let head = chain.head_index();
                let parts: Vec<_> = chain.map(|desc| (desc.addr(), desc.len() as usize)).collect();
                let room: usize = parts.iter().map(|part| part.1).sum();
                let len = room.min(bytes.len() - written);
                used.push((head, parts, written, len));
                written += len;
            }
            if used.is_empty() || (mergeable && written < bytes.len()) {
                self.queue.set_next_avail(start);
                break;
            }
            self.backlog.pop_front();
            if written < bytes.len() {
                self.queue.set_next_avail(start);
                continue;
            }
            if header == 12 {
                bytes[10..12].copy_from_slice(&(used.len() as u16).to_le_bytes());
            }
            for (_, parts, from, len) in &used {
                let (mut from, end) = (*from, from + len);
                for (addr, room) in parts {
                    let part = (*room).min(end - from);
                    memory.write_slice(&bytes[from..from + part], *addr).unwrap();
                    from += part;
                }
            }
            let used: Vec<_> = used.iter().map(|(head, _, _, len)| (*head, *len as u32)).collect();
            self.publish(memory, &used);
        }
        // Kicks are always wanted on RX; `enable_notification` moves avail_event on.
        let _ = self.queue.enable_notification(memory).unwrap();
        self.signal(memory);
    }

    /// Publishes entries with one store of the index: `add_used` has one store per entry, and a driver must never see
    /// half a frame (virtio 1.2, 5.1.6.4.1).
    fn publish(&mut self, memory: &GuestMemoryMmap<()>, entries: &[(u16, u32)]) {
        let mut idx = self.queue.next_used();
        for (head, len) in entries {
            let slot = u64::from(idx % self.queue.size());
            let entry = u64::from(*len) << 32 | u64::from(*head);
            memory.write_obj(entry, GuestAddress(self.queue.used_ring() + 4 + 8 * slot)).unwrap();
            idx = idx.wrapping_add(1);
        }
        memory.store(idx, GuestAddress(self.queue.used_ring() + 2), Ordering::Release).unwrap();
        self.queue.set_next_used(idx);
    }

    /// Interrupts by EVENT_IDX or by the flag, whichever is negotiated; the crate's `needs_notification` knows only
    /// the former.
    fn signal(&mut self, memory: &GuestMemoryMmap<()>) {
        fence(Ordering::SeqCst);
        let avail = self.queue.avail_ring();
        let word = |offset| memory.load::<u16>(GuestAddress(avail + offset), Ordering::Relaxed).unwrap();
        let (new, old) = (self.queue.next_used(), self.signalled);
        let wanted = if self.queue.event_idx_enabled() {
            let event = word(4 + 2 * u64::from(self.queue.size()));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            new != old && word(0) & NO_INTERRUPT == 0
        };
        self.signalled = new;
        if let Some(call) = self.call.as_ref().filter(|_| wanted) {
            let _ = rustix::io::write(call.as_fd(), &1u64.to_ne_bytes());
        }
    }
}

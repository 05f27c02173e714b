//! The guest's virtio-net driver on one side of its rings: [`TxQueue`] and [`RxQueue`] put frames and their headers over
//! [`Queue`], and panic on half a frame.

use std::time::Instant;

use super::queue::{Queue, Used, wait_used};
use super::ring::{Desc, Ring};
use super::session::feature;

/// How the bytes of header and frame lie over descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// All in one descriptor, as modern drivers with ANY_LAYOUT or VERSION_1 do.
    Joined,
    /// The header in a descriptor of its own, as legacy drivers must.
    HeaderApart,
    /// Descriptors of at most this many bytes, wherever they cut.
    Pieces(u32),
}

impl Shape {
    /// The lengths of the descriptors for `header` + `body` bytes.
    fn cut(self, header: u32, body: u32) -> Vec<u32> {
        match self {
            Shape::HeaderApart if body > 0 => vec![header, body],
            Shape::Joined | Shape::HeaderApart => vec![header + body],
            Shape::Pieces(most) => {
                let whole = header + body;
                (0..whole).step_by(most as usize).map(|at| most.min(whole - at)).collect()
            }
        }
    }
}

/// Length of the virtio-net header: `num_buffers` is there with MRG_RXBUF or VERSION_1 (virtio 1.2, 5.1.6.1).
pub fn header_len(features: u64) -> usize {
    if features & (feature::MRG_RXBUF | feature::VERSION_1 | feature::RING_PACKED) == 0 { 10 } else { 12 }
}

/// What a TX or RX queue is made with.
#[derive(Clone, Copy, Debug)]
pub struct QueueLayout {
    pub size: u16,
    pub shape: Shape,
    pub indirect: bool,
    /// Bytes of one buffer, header included.
    pub buffer: u32,
}

/// A transmit queue.
pub struct TxQueue {
    pub queue: Queue,
    header_len: usize,
    layout: QueueLayout,
    buffers: u64,
}

impl TxQueue {
    pub fn new(ring: Ring, features: u64, layout: QueueLayout) -> Self {
        let buffers = ring.ram.alloc(u64::from(layout.size) * u64::from(layout.buffer), 64);
        let queue = Queue::new(ring, features, layout.indirect);
        Self { queue, header_len: header_len(features), layout, buffers }
    }

    pub fn reset(&mut self, features: u64) {
        self.queue.reset(features);
        self.header_len = header_len(features);
    }

    /// Where the buffer of `head` lies.
    pub fn buffer_of(&self, head: u16) -> u64 {
        self.buffers + u64::from(head) * u64::from(self.layout.buffer)
    }

    /// Puts one frame under a zero header, unpublished; false if the ring is full.
    pub fn queue_frame(&mut self, frame: &[u8]) -> bool {
        let header = [0; 12];
        self.queue_bytes(&header[..self.header_len], frame)
    }

    /// The same with a header of the caller's, of any length.
    pub fn queue_bytes(&mut self, header: &[u8], frame: &[u8]) -> bool {
        self.reclaim();
        let Some(head) = self.queue.next_head() else { return false };
        let whole = (header.len() + frame.len()) as u32;
        assert!(whole <= self.layout.buffer, "{whole} bytes for a buffer of {}", self.layout.buffer);
        let mut at = self.buffer_of(head);
        self.queue.ring.ram.write(at, header);
        self.queue.ring.ram.write(at + header.len() as u64, frame);
        let mut buffers = Vec::new();
        for len in self.layout.shape.cut(header.len() as u32, frame.len() as u32) {
            buffers.push(Desc::readable(at, len));
            at += u64::from(len);
        }
        self.queue.add(&buffers, self.layout.indirect).is_some()
    }

    /// Sends one frame now; false if the ring is full.
    pub fn send(&mut self, frame: &[u8]) -> bool {
        let queued = self.queue_frame(frame);
        self.queue.publish();
        queued
    }

    /// Frees the buffers that the device is done with; how many.
    pub fn reclaim(&mut self) -> usize {
        let used = self.queue.collect();
        for Used { head, len } in &used {
            // A device writes nothing into a readable buffer; `collect` has checked it against zero.
            debug_assert!(len.is_none_or(|len| len == 0), "TX head {head}");
        }
        used.len()
    }

    /// Waits until the device is done with every frame; false if it is not by `end`.
    pub fn drain(&mut self, end: Instant) -> bool {
        loop {
            self.reclaim();
            if self.queue.outstanding() == 0 {
                return true;
            }
            if !wait_used([&mut self.queue], end) {
                return false;
            }
        }
    }
}

/// A frame as the guest got it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    pub header: Vec<u8>,
    pub frame: Vec<u8>,
    /// Buffers that it took.
    pub buffers: usize,
}

impl Received {
    /// The `num_buffers` field, if the header has one.
    pub fn num_buffers(&self) -> Option<u16> {
        self.header.get(10..12).map(|field| u16::from_le_bytes([field[0], field[1]]))
    }
}

/// A receive queue.
pub struct RxQueue {
    pub queue: Queue,
    header_len: usize,
    mergeable: bool,
    layout: QueueLayout,
    buffers: u64,
}

impl RxQueue {
    /// An empty queue; [`RxQueue::fill`] posts its buffers.
    pub fn new(ring: Ring, features: u64, layout: QueueLayout) -> Self {
        let buffers = ring.ram.alloc(u64::from(layout.size) * u64::from(layout.buffer), 64);
        let queue = Queue::new(ring, features, layout.indirect);
        let mergeable = features & feature::MRG_RXBUF != 0;
        Self { queue, header_len: header_len(features), mergeable, layout, buffers }
    }

    pub fn reset(&mut self, features: u64) {
        self.queue.reset(features);
        self.header_len = header_len(features);
        self.mergeable = features & feature::MRG_RXBUF != 0;
    }

    /// Posts as many buffers as there are descriptors, then publishes.
    pub fn fill(&mut self) {
        self.post(usize::MAX);
    }

    /// Posts at most `most` buffers, then publishes; how many.
    pub fn post(&mut self, most: usize) -> usize {
        let cuts = self.layout.shape.cut(self.header_len as u32, self.layout.buffer - self.header_len as u32);
        let mut posted = 0;
        while posted < most {
            let Some(head) = self.queue.next_head() else { break };
            let mut at = self.buffer_of(head);
            let mut buffers = Vec::with_capacity(cuts.len());
            for len in &cuts {
                buffers.push(Desc::writable(at, *len));
                at += u64::from(*len);
            }
            if self.queue.add(&buffers, self.layout.indirect).is_none() {
                break;
            }
            posted += 1;
        }
        self.queue.publish();
        posted
    }

    pub fn buffer_of(&self, head: u16) -> u64 {
        self.buffers + u64::from(head) * u64::from(self.layout.buffer)
    }

    /// Takes the frames that are there, without posting new buffers.
    pub fn take(&mut self) -> Vec<Received> {
        let mut used = self.queue.collect().into_iter();
        let mut frames = Vec::new();
        while let Some(first) = used.next() {
            let mut bytes = self.bytes_of(first);
            let header_len = self.header_len;
            assert!(bytes.len() >= header_len, "RX buffer used with {} bytes, less than a header", bytes.len());
            let mut frame = bytes.split_off(header_len);
            let mut buffers = 1;
            if self.mergeable {
                let announced = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
                assert!(announced > 0, "num_buffers is zero");
                while buffers < announced {
                    // virtio 1.2, 5.1.6.4.1: all but the last buffer are used up.
                    let filled = header_len + frame.len() == buffers * self.layout.buffer as usize;
                    assert!(filled, "frame goes on after {} of {buffers} buffers' bytes", frame.len());
                    let next = used.next();
                    let next = next.unwrap_or_else(|| panic!("{buffers} of {announced} buffers of a frame published"));
                    frame.extend(self.bytes_of(next));
                    buffers += 1;
                }
            }
            frames.push(Received { header: bytes, frame, buffers });
        }
        frames
    }

    /// Takes the frames that are there and posts their buffers again.
    pub fn poll(&mut self) -> Vec<Received> {
        let frames = self.take();
        if !frames.is_empty() {
            self.fill();
        }
        frames
    }

    /// Waits for `count` frames, posting buffers as they free up; fewer only if `end` passes.
    pub fn receive(&mut self, count: usize, end: Instant) -> Vec<Received> {
        let mut frames = self.poll();
        while frames.len() < count && wait_used([&mut self.queue], end) {
            frames.extend(self.poll());
        }
        frames
    }

    fn bytes_of(&self, used: Used) -> Vec<u8> {
        // Skipped by an IN_ORDER device: it has then written all of it.
        let len = used.len.unwrap_or(self.layout.buffer);
        self.queue.ring.ram.bytes(self.buffer_of(used.head), len as usize)
    }
}

//! What the tests of all port kinds share: batches made of plain bytes, and a shard's wake that counts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::event::{Timespec, epoll};

use super::{Outcome, Receive, Received, Transmit, Wake};
use crate::frame::{Batch, heads};
use crate::ident::PortIndex;
use crate::limits::VNET_HEADER_BYTES;
use crate::mem::Span;

/// All bytes of frame `index`.
pub(crate) fn bytes(batch: &Batch<'_>, index: usize) -> Vec<u8> {
    let head_len = usize::from(batch.frames()[index].head_len);
    let mut all = batch.head(index).bytes[VNET_HEADER_BYTES..][..head_len].to_vec();
    for piece in batch.tail(index) {
        let mut more = vec![0; piece.len()];
        piece.read(&mut more);
        all.extend(more);
    }
    all
}

/// Runs `f` with a batch of `frames`, each in three pieces as a guest might scatter it.
pub(crate) fn with_batch<R>(frames: &[Vec<u8>], f: impl FnOnce(&Batch<'_>) -> R) -> R {
    with_batch_of(PortIndex(0), frames, f)
}

fn with_batch_of<R>(port: PortIndex, frames: &[Vec<u8>], f: impl FnOnce(&Batch<'_>) -> R) -> R {
    let mut copies = frames.to_vec();
    let mut heads = heads();
    let mut batch = Batch::new(&mut heads, 0);
    batch.port = port;
    for frame in &mut copies {
        let len = frame.len();
        let (first, rest) = Span::from_buffer(frame).split_at(len / 3);
        let (second, third) = rest.split_at(len / 3);
        batch.push(len, &[first, second, third]);
    }
    f(&batch)
}

/// Transmits all of `frames`, at most 64, as one batch.
pub(crate) fn transmit(to: &dyn Transmit, frames: &[Vec<u8>]) -> Outcome {
    transmit_from(PortIndex(0), to, frames)
}

/// The same of another port than the first.
pub(crate) fn transmit_from(port: PortIndex, to: &dyn Transmit, frames: &[Vec<u8>]) -> Outcome {
    let picks: Vec<u8> = (0..frames.len() as u8).collect();
    let mut outcome = Outcome::new();
    with_batch_of(port, frames, |batch| to.transmit(batch, &picks, &mut outcome));
    outcome
}

/// Receives until there is nothing.
pub(crate) fn receive_all(from: &dyn Receive) -> Vec<Vec<u8>> {
    let mut heads = heads();
    let mut got = Vec::new();
    loop {
        let before = got.len();
        let mut process = |batch: &mut Batch<'_>| got.extend((0..batch.len()).map(|index| bytes(batch, index)));
        let received = from.receive(&mut heads, &mut process);
        match received {
            Received::Nothing => {
                assert_eq!(got.len(), before, "a batch was lent, yet nothing received");
                return got;
            }
            Received::Frames(count) => assert_eq!(count, got.len() - before),
        }
    }
}

/// A shard's wake: counts calls, and waits for watched descriptors with an epoll set, edge-triggered.
pub(crate) struct Shard {
    wakes: AtomicUsize,
    epoll: OwnedFd,
}

impl Shard {
    pub(crate) fn new() -> Arc<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll set");
        Arc::new(Self { wakes: AtomicUsize::new(0), epoll })
    }

    /// How often it was woken since it was last asked.
    pub(crate) fn wakes(&self) -> usize {
        self.wakes.swap(0, Ordering::SeqCst)
    }

    /// Whether a watched descriptor announced something within `seconds`.
    pub(crate) fn wait(&self, seconds: i64) -> bool {
        let mut events = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        let timeout = Timespec { tv_sec: seconds, tv_nsec: 0 };
        epoll::wait(&self.epoll, &mut events[..], Some(&timeout)).expect("a wait") > 0
    }
}

impl Wake for Shard {
    fn wake(&self) {
        self.wakes.fetch_add(1, Ordering::SeqCst);
    }

    fn watch(&self, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(&self.epoll, fd.as_fd(), epoll::EventData::new_u64(1), flags)?)
    }

    fn unwatch(&self, fd: BorrowedFd<'_>) {
        epoll::delete(&self.epoll, fd).expect("an unwatch of what is watched");
    }
}

//! The thread that gives frames to the host: [`Writer`].
//!
//! What the host does with a frame it does in the thread that writes it, with softirqs off: its bridges, its filters, its sockets, and
//! all who wait for those. How long that takes is up to whoever has set them up, who needs no right on the switch: 0.5 s where
//! a socket of an unprivileged user has five million waiters, 6.5 s behind filters that a container has on its own interface. On a
//! shard's thread all ports of that shard waited for it. So shards copy frames ([`super::backlog`]), which costs 50 ns for 1500
//! bytes where writing them takes 1 to 2 us, and this thread, which has none of the shards' CPUs where others are left, writes them.
//! What is slow then costs the frames of that interface, which are dropped as `host-busy` when the backlog is full.
//!
//! Invariant: frames are written in the order in which they came into the backlog.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::Thread;
use std::time::Duration;

use super::backlog::{Backlog, Records};
use crate::limits::VNET_HEADER_BYTES;
use crate::port::Lost;
use crate::port::batch_lock::micros;
use crate::sys::cpu;

/// Bytes of its stack.
const STACK_BYTES: usize = 64 * 1024;

/// How long frames are refused at once after the interface was found down or gone, in microseconds: those that are in the backlog by
/// then are lost.
const REFUSED_MICROS: u64 = 100_000;

/// How long the end of a port waits for the thread, which the host may have for long.
const PATIENCE: Duration = Duration::from_secs(1);

/// What shards have of it.
pub(super) struct Outgoing {
    pub(super) backlog: Backlog,
    counters: Counters,
    /// Until when frames are refused at once, by [`cpu::cycles`]; 0 if they are not.
    refused_until: AtomicU64,
    ends: AtomicBool,
}

/// What became of the frames that were written.
#[derive(Default)]
struct Counters {
    transmitted: AtomicU64,
    lost: AtomicU64,
    lost_bytes: AtomicU64,
    /// The last error as an errno, 0 before the first.
    last_error: AtomicI32,
}

/// The thread, as its port has it.
pub(super) struct Writer {
    outgoing: Arc<Outgoing>,
    thread: Thread,
    /// Disconnected when the thread has ended.
    ended: Mutex<Receiver<()>>,
}

impl Writer {
    /// Starts it for `tun`, which it closes when it ends.
    ///
    /// # Errors
    /// The kernel has no thread.
    pub(super) fn start(tun: OwnedFd, name: &str) -> io::Result<Self> {
        let outgoing = Arc::new(Outgoing {
            backlog: Backlog::new(),
            counters: Counters::default(),
            refused_until: AtomicU64::new(0),
            ends: AtomicBool::new(false),
        });
        let ((alive, ended), taken, own) = (channel::<()>(), Records::new(), Arc::clone(&outgoing));
        let run = move || {
            own.run(&tun, taken);
            drop(tun);
            drop(alive);
        };
        let thread = std::thread::Builder::new().name(format!("tap-{name}")).stack_size(STACK_BYTES).spawn(run)?;
        Ok(Self { outgoing, thread: thread.thread().clone(), ended: Mutex::new(ended) })
    }

    /// What shards have of it.
    #[inline]
    pub(super) fn outgoing(&self) -> &Outgoing {
        &self.outgoing
    }

    /// Has it look at the backlog.
    #[inline]
    pub(super) fn wake(&self) {
        self.thread.unpark();
    }

    /// Has it end, with what is in the backlog lost. Waits for that, unless the host has it for long: then it ends when it comes back.
    pub(super) fn end(&self, name: &str) {
        self.outgoing.ends.store(true, Ordering::SeqCst);
        self.thread.unpark();
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        if ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            log::warn!("{name}: the host takes long for a frame: the interface is closed when it is done with that");
        }
    }
}

impl Outgoing {
    /// Whether frames are refused at once: the interface was down or gone a moment ago.
    #[inline]
    pub(super) fn refuses(&self) -> bool {
        let until = self.refused_until.load(Ordering::Relaxed);
        until != 0 && crate::port::earlier(cpu::cycles(), until)
    }

    /// How many frames the host has taken, and its last error as an errno, 0 before the first.
    pub(super) fn did(&self) -> (u64, i32) {
        let Counters { transmitted, last_error, .. } = &self.counters;
        (transmitted.load(Ordering::Relaxed), last_error.load(Ordering::Relaxed))
    }

    /// Frames that shards have put into the backlog and that the host did not take.
    pub(super) fn lost(&self) -> Lost {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Lost { frames: count(&self.counters.lost), bytes: count(&self.counters.lost_bytes) }
    }

    fn run(&self, tun: &OwnedFd, mut taken: Records) {
        while !self.ends.load(Ordering::SeqCst) {
            if !self.backlog.take(&mut taken) {
                std::thread::park();
                continue;
            }
            for record in taken.iter() {
                if self.ends.load(Ordering::Relaxed) {
                    break;
                }
                self.write(tun, record);
            }
            taken.clear();
        }
    }

    fn write(&self, tun: &OwnedFd, record: &[u8]) {
        let Counters { transmitted, lost, lost_bytes, last_error } = &self.counters;
        let Err(error) = rustix::io::write(tun.as_fd(), record) else {
            transmitted.fetch_add(1, Ordering::Relaxed);
            self.refused_until.store(0, Ordering::Relaxed);
            return;
        };
        lost.fetch_add(1, Ordering::Relaxed);
        lost_bytes.fetch_add(record.len().saturating_sub(VNET_HEADER_BYTES) as u64, Ordering::Relaxed);
        last_error.store(error.raw_os_error(), Ordering::Relaxed);
        // EIO: it is down; EBADFD: it was deleted (tun_get_user in drivers/net/tun.c). Anything else is about that frame.
        if matches!(error.raw_os_error(), libc::EIO | libc::EBADFD) {
            let until = cpu::cycles().wrapping_add(micros(REFUSED_MICROS)).max(1);
            self.refused_until.store(until, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Read;
    use std::time::Instant;

    use super::*;
    use crate::limits::TAP_BACKLOG_FRAMES;

    const RECORD_BYTES: usize = 1000;

    /// Has a record wait that begins with `number`; whether there was room.
    fn put(writer: &Writer, number: u32) -> bool {
        let mut waiting = writer.outgoing().backlog.enter(RECORD_BYTES as u64).unwrap();
        let Some(room) = waiting.room(RECORD_BYTES) else { return false };
        room.fill(0);
        room[..4].copy_from_slice(&number.to_be_bytes());
        waiting.keep(RECORD_BYTES);
        drop(waiting);
        writer.wake();
        true
    }

    #[test]
    fn who_puts_frames_there_does_not_wait_for_a_host_that_takes_none() {
        // A pipe takes 64 KiB, and then holds up whoever writes.
        let (mut host, tun) = std::io::pipe().unwrap();
        let writer = Writer::start(tun.into(), "pipe").unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut number = 0;
        // The writer takes the first list, and then is in the pipe with it: another list full is all that there is room for.
        while put(&writer, number) || number < 66 {
            number += 1;
            assert!(number <= 66 + 2 * TAP_BACKLOG_FRAMES as u32, "it is bounded");
            assert!(Instant::now() < deadline);
        }
        // Later there is room again, and all that there was room for comes, in order.
        let mut record = [0; RECORD_BYTES];
        for expected in 0..number {
            host.read_exact(&mut record).unwrap();
            assert_eq!(u32::from_be_bytes(*record.first_chunk().unwrap()), expected);
        }
        assert!(put(&writer, number));
        host.read_exact(&mut record).unwrap();
        assert_eq!((record[3], writer.outgoing().lost()), (number as u8, Lost::default()));
        writer.end("pipe");
        assert_eq!(host.read(&mut record).unwrap(), 0, "the descriptor is closed");
    }

    #[test]
    fn an_end_does_not_wait_for_a_host_that_takes_long_and_what_waits_then_is_not_written() {
        let (mut host, tun) = std::io::pipe().unwrap();
        let writer = Writer::start(tun.into(), "pipe").unwrap();
        let put = (0..200).filter(|&number| put(&writer, number)).count();
        assert_eq!(put, 200);
        // It is somewhere in the first 70 of them.
        writer.end("pipe");
        let mut rest = Vec::new();
        host.read_to_end(&mut rest).unwrap();
        assert!(rest.len() < 200 * RECORD_BYTES, "{} bytes", rest.len());
    }
}

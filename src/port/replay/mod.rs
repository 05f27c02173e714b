//! A port that sends the frames of a capture file: [`Replay`]. Reproduces what was once seen on a wire.
//!
//! The file is read and checked whole when the port is made. Frames go out one per interval of a timer, whose descriptor
//! is also what wakes the shard, so nothing here looks at a clock. The times in the file are not used. What is
//! transmitted to the port is swallowed.

mod capture;

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime};

pub use capture::CaptureError;

use super::null::Sink;
use super::store::FrameStore;
use super::watch::Watch;
use super::{LinkState, Port, Receive, Received, Transmit, Wake};
use crate::frame::{Batch, Heads};
use crate::limits::{BATCH_FRAMES, REPLAY_BYTES};

/// What a [`Replay`] port sends, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplayConfig {
    /// A pcap or pcapng file with Ethernet frames.
    pub file: PathBuf,
    /// Time from one frame to the next; zero sends as fast as the shard polls.
    pub interval: Duration,
    /// Whether to begin again after the last frame.
    pub repeat: bool,
}

/// Why a capture file cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The file cannot be opened or read.
    #[error("cannot read capture file {}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// A directory, a device, a pipe.
    #[error("{} is not a regular file", .0.display())]
    NotRegular(PathBuf),
    /// More than is held in memory.
    #[error("capture file {} is longer than {REPLAY_BYTES} bytes: cut it with `editcap -c` or `tcpdump -c`", .0.display())]
    TooLarge(PathBuf),
    /// A file that has no frame.
    #[error("capture file {} has no frames", .0.display())]
    Empty(PathBuf),
    /// The contents are not what they should be.
    #[error("cannot replay {}", file.display())]
    Capture {
        /// The file.
        file: PathBuf,
        /// What is wrong, and where.
        source: CaptureError,
    },
    /// No timer to be had.
    #[error("cannot make a timer for the replay")]
    Timer(#[source] std::io::Error),
}

/// A port that sends what is in a file.
pub struct Replay {
    file: PathBuf,
    queue: Arc<ReplayQueue>,
    sink: Arc<Sink>,
}

impl Replay {
    /// Reads the file; it is sent from the moment that a shard is attached.
    ///
    /// # Errors
    /// [`ReplayError`], if the file cannot be read, is not a complete capture of Ethernet frames, or has none.
    pub fn new(config: ReplayConfig) -> Result<Arc<Self>, ReplayError> {
        let ReplayConfig { file, interval, repeat } = config;
        let bytes = read(&file)?;
        let places = match capture::frames(&bytes) {
            Ok(places) if places.is_empty() => return Err(ReplayError::Empty(file)),
            Ok(places) => places,
            Err(source) => return Err(ReplayError::Capture { file, source }),
        };
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)
            .map_err(|error| ReplayError::Timer(error.into()))?;
        let playing = Playing { store: FrameStore::over(bytes, places), due: 0, started: false, sent: 0 };
        let queue = ReplayQueue { timer, interval, repeat, playing: Mutex::new(playing), watch: Watch::default() };
        Ok(Arc::new(Self { file, queue: Arc::new(queue), sink: Arc::default() }))
    }
}

impl Port for Replay {
    fn receive_queues(&self) -> Vec<Arc<dyn Receive>> {
        vec![self.queue.clone()]
    }

    fn transmit_side(&self) -> Arc<dyn Transmit> {
        self.sink.clone()
    }

    fn link(&self) -> LinkState {
        LinkState::Up
    }

    fn detail(&self) -> serde_json::Value {
        let playing = self.queue.playing();
        serde_json::json!({
            "file": self.file.display().to_string(),
            "file-frames": playing.store.len(),
            "sent-frames": playing.sent,
            "finished": !self.queue.repeat && playing.store.pending() == 0,
            "swallowed-frames": self.sink.frames(),
        })
    }
}

impl Drop for Replay {
    fn drop(&mut self) {
        self.queue.attach(None);
    }
}

/// The receive queue: the file's frames, let out by a timer.
struct ReplayQueue {
    timer: OwnedFd,
    interval: Duration,
    repeat: bool,
    playing: Mutex<Playing>,
    watch: Watch,
}

/// How far the replay has come.
struct Playing {
    store: FrameStore,
    /// Frames whose time has come and that were not sent yet.
    due: u64,
    started: bool,
    sent: u64,
}

impl ReplayQueue {
    fn playing(&self) -> MutexGuard<'_, Playing> {
        self.playing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the replay going, if it is not: a tick per interval, the first at once.
    fn start(&self) {
        if std::mem::replace(&mut self.playing().started, true) || self.interval.is_zero() {
            return;
        }
        // An interval beyond what the kernel can count (292 billion years) has no second frame.
        let it_interval = Timespec::try_from(self.interval).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        // A first expiry of zero would disarm the timer (timerfd_settime(2)).
        let timer = Itimerspec { it_interval, it_value: Timespec { tv_sec: 0, tv_nsec: 1 } };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer) {
            log::error!("the timer of a replay port cannot be set, so it sends nothing: {error}");
        }
    }

    /// Whether there is anything left to send, now or later.
    fn finished(&self, playing: &Playing) -> bool {
        !self.repeat && playing.store.pending() == 0
    }

    /// Frames whose time has come, after a look at the timer.
    fn due(&self, playing: &mut Playing) -> u64 {
        if self.interval.is_zero() {
            return u64::MAX;
        }
        let mut ticks = [0; 8];
        // Reading also sets a periodic timer going again: one that nobody reads expires only once (fs/timerfd.c).
        if rustix::io::read(&self.timer, &mut ticks) == Ok(ticks.len()) {
            playing.due = playing.due.saturating_add(u64::from_ne_bytes(ticks));
        }
        playing.due
    }
}

impl Receive for ReplayQueue {
    fn receive(&self, heads: &mut Heads, process: &mut dyn FnMut(&mut Batch<'_>)) -> Received {
        let playing = &mut *self.playing();
        if !playing.started || self.finished(playing) {
            return Received::Nothing;
        }
        let due = self.due(playing);
        if due == 0 {
            return Received::Nothing;
        }
        if playing.store.pending() == 0 {
            playing.store.rewind();
        }
        let mut batch = playing.store.lend(due.min(BATCH_FRAMES as u64) as usize, heads);
        let frames = batch.len();
        process(&mut batch);
        let (dealt_with, flooding) = (batch.dealt_with(), batch.flooding());
        drop(batch);
        playing.store.keep(frames, dealt_with, flooding);
        playing.due = playing.due.saturating_sub(dealt_with as u64);
        playing.sent += dealt_with as u64;
        Received::Frames(dealt_with)
    }

    fn arm(&self) -> bool {
        let playing = self.playing();
        if !playing.started || self.finished(&playing) {
            return true;
        }
        let mut timer = [PollFd::new(&self.timer, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let expired = poll(&mut timer, Some(&now)).is_ok_and(|ready| ready > 0);
        !expired && playing.due == 0 && !self.interval.is_zero()
    }

    /// Nothing to tell: the timer has only as many edges as there are frames.
    fn disarm(&self) {}

    fn attach(&self, wake: Option<Arc<dyn Wake>>) {
        if wake.is_some() {
            self.start();
        }
        self.watch.hand_over(wake, Some(self.timer.as_fd()), "a replay port");
    }
}

/// The bytes of `file`, if it is a regular file of bearable length. Never waits, as opening a pipe would.
fn read(file: &Path) -> Result<Vec<u8>, ReplayError> {
    let failed = |source| ReplayError::Read { file: file.into(), source };
    let opened = std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(file).map_err(failed)?;
    if !opened.metadata().map_err(failed)?.is_file() {
        return Err(ReplayError::NotRegular(file.into()));
    }
    let mut bytes = Vec::new();
    opened.take(REPLAY_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > REPLAY_BYTES {
        return Err(ReplayError::TooLarge(file.into()));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests;

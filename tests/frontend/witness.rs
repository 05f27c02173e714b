//! A healthy pair of NICs that talk to each other, in lock step, while something else goes wrong on the same daemon.
//! They must lose nothing: each frame is answered for, byte by byte, before the next ones leave.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::frame::{assert_same, frame};
use super::nic::{Nic, NicConfig, meet};

/// Frames in flight at once, well below the size of a ring.
const BURST: usize = 16;

/// The pair, running in a thread of its own.
pub struct Witness {
    stop: Arc<AtomicBool>,
    frames: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Witness {
    /// Connects both and starts to talk.
    #[track_caller]
    pub fn start(a: &Path, b: &Path) -> Self {
        let mut nics = [Nic::up(a, &NicConfig::default()), Nic::up(b, &NicConfig::default())];
        let [first, second] = &mut nics;
        meet(first, second);
        let stop = Arc::new(AtomicBool::new(false));
        let frames = Arc::new(AtomicU64::new(0));
        let (told, count) = (stop.clone(), frames.clone());
        let thread = std::thread::spawn(move || {
            let mut round = 0;
            while !told.load(Ordering::Relaxed) {
                exchange(&mut nics, round);
                count.fetch_add(2 * BURST as u64, Ordering::Relaxed);
                round += 1;
                // A load that one core can spare for, beside the test proper.
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        let witness = Self { stop, frames, thread: Some(thread) };
        witness.keeps_going();
        witness
    }

    /// Waits until further frames have made it: the switch is alive now. Panics if the pair has lost any.
    #[track_caller]
    pub fn keeps_going(&self) {
        let goal = self.frames.load(Ordering::Relaxed) + 8 * BURST as u64;
        super::eventually("the healthy pair goes on", || {
            let lost = self.thread.as_ref().is_none_or(|thread| thread.is_finished());
            assert!(!lost, "the healthy pair has lost frames");
            (self.frames.load(Ordering::Relaxed) >= goal).then_some(())
        });
    }

    /// Ends the talk; how many frames made it. Panics if any did not.
    pub fn finish(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("finished once");
        assert!(thread.join().is_ok(), "the healthy pair has lost frames");
        self.frames.load(Ordering::Relaxed)
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A burst each way.
fn exchange(nics: &mut [Nic; 2], round: u64) {
    for from in [0, 1] {
        let (source, target) = (nics[from].mac, nics[1 - from].mac);
        let seed = |at: usize| (round * 2 + from as u64) * BURST as u64 + at as u64;
        let len = |at: usize| 60 + (seed(at) as usize * 37) % 1400;
        let sent: Vec<_> = (0..BURST).map(|at| frame(target, source, len(at), seed(at))).collect();
        for frame in &sent {
            nics[from].send(frame);
        }
        let got = nics[1 - from].receive(BURST);
        assert_eq!(got.len(), BURST, "frames that nobody sent");
        for ((_, got), sent) in got.iter().zip(&sent) {
            assert_same(&got.frame, sent, "healthy pair");
        }
    }
}

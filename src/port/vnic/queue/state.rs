//! What the lock of a queue protects: [`State`], and the ring in service, [`Running`].

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use super::super::moderation::{Decision, Moderation};
use super::super::offence::Offence;
use super::super::relay::lease::PeerEvent;
use super::Shared;
use super::published::Settings;
use crate::frame::{Flooding, Needs};
use crate::ident::MacAddr;
use crate::mem::{DirtyLog, GuestMemory};
use crate::port::{Flush, earlier};
use crate::ring::{Ring, RingFault};
use crate::sys::cpu;
use crate::sys::doorbell::{Pace, Rang};
use crate::sys::sigbus;

/// The part of a second from which on an interrupt took more than interrupts take: 100 us.
const EXCESSIVE: u64 = 10_000;

/// What the mutex of a [`super::Queue`] protects.
pub(in crate::port::vnic) struct State {
    /// The ring, while it runs.
    pub running: Option<Running>,
    /// The guest uses the queue (SET_VRING_ENABLE).
    pub enabled: bool,
    /// Why the ring was taken out of service, and the index it had then.
    pub fault: Option<(RingFault, u16)>,
    /// MAC addresses to announce, as frames that the port seems to send.
    pub announcements: Vec<MacAddr>,
    /// How far the first of them is.
    pub announced: Flooding,
    /// The interrupt of a ring that a shard took out of service: for the session to close.
    pub(super) leftover: Option<Arc<PeerEvent>>,
    /// The guest was asked to kick and the shard does not poll.
    rests: bool,
    /// It was woken from rest and has not had a batch since.
    kicked: bool,
    moderation: Moderation,
    pace: Pace,
    /// Cycles that interrupting the guest took, beyond what that takes, since somebody asked.
    excess: u64,
    shared: Arc<Shared>,
}

/// A ring in service.
pub(in crate::port::vnic) struct Running {
    pub ring: Ring,
    pub memory: Arc<GuestMemory>,
    /// Bytes of the virtio-net header: 12 or 10.
    pub header: usize,
    /// A frame may span several chains.
    pub mergeable: bool,
    /// What of offloads the guest's driver may leave to us when it sends.
    pub may: Needs,
    /// How far the ring's next frame is.
    pub flooding: Flooding,
    /// What of offloads the guest's driver can do when it receives, as negotiated.
    pub(super) negotiated: Needs,
    /// Where to note what is written, while the guest is being migrated.
    pub log: Option<Arc<DirtyLog>>,
    /// The areas of the ring that the device writes: guest-physical addresses and lengths.
    pub(super) written: [(u64, u64); 2],
    pub(super) call: Option<Arc<PeerEvent>>,
    /// The call held its ringer up and is not rung again. It stays open until the session closes it: closing what a peer gave us
    /// may take as long as the peer likes.
    pub(super) muted: bool,
    /// Whether the memory or the log lacks pages.
    pub(super) loss: Loss,
}

/// Whether pages of what a ring uses were found missing, as of so many faults of the whole process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loss {
    faults: u32,
    lost: bool,
}

impl Loss {
    /// Nobody has looked yet.
    pub(super) fn unknown() -> Self {
        Self { faults: sigbus::faults().wrapping_sub(1), lost: false }
    }
}

impl State {
    /// No ring.
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            running: None,
            enabled: false,
            fault: None,
            announcements: Vec::new(),
            announced: Flooding::default(),
            leftover: None,
            rests: false,
            kicked: false,
            moderation: Moderation::default(),
            pace: Pace::default(),
            excess: 0,
            shared,
        }
    }

    /// Whether the queue may rest, as far as that depends on what its shard can be woken by.
    pub fn is_heard(&self) -> bool {
        !self.shared.wakeup.is_deaf()
    }

    /// Notes whether the queue rests from now on: the guest has to kick.
    pub fn note_rest(&mut self, rests: bool) {
        self.kicked |= self.rests && !rests;
        self.rests = rests;
    }

    /// Gives buffers back that the guest filled, and interrupts it if it wants that.
    #[inline]
    pub fn publish(&mut self) {
        let Some(wanted) = self.publish_ring() else { return };
        let kicked = std::mem::take(&mut self.kicked);
        let counters = &self.shared.published.counters;
        counters.kicks_suppressed.add(u64::from(!kicked));
        match wanted {
            true => self.call(),
            false => counters.calls_suppressed.add(1),
        }
    }

    /// Gives the guest buffers with `frames` in them, and interrupts it if it wants that, now or later: returns when an
    /// interrupt is due that is held back.
    #[inline]
    pub fn publish_frames(&mut self, frames: u32) -> Option<u64> {
        let Some(wanted) = self.publish_ring() else { return self.moderation.due() };
        self.moderation.set_level(self.shared.settings.latency());
        let counters = &self.shared.published.counters;
        if self.moderation.due().is_some() {
            counters.calls_coalesced.add(1);
        }
        match self.moderation.given(frames, wanted, cpu::cycles) {
            Decision::None => counters.calls_suppressed.add(1),
            Decision::Call => self.call(),
            Decision::Hold(_) => {}
        }
        self.moderation.due()
    }

    /// Publishes what was completed; returns whether the guest wants an interrupt for it, or `None` if it was nothing.
    #[inline]
    fn publish_ring(&mut self) -> Option<bool> {
        let running = self.running.as_mut()?;
        let wanted = running.ring.publish()?;
        running.log_ring();
        Some(wanted)
    }

    /// Interrupts the guest.
    fn call(&mut self) {
        if self.running.is_some() {
            self.shared.published.counters.calls.add(1);
            self.signal();
        }
    }

    /// Interrupts the guest, uncounted. A call that holds its ringer up is not rung again, and the session is told, which ends
    /// the connection.
    #[inline]
    pub(super) fn signal(&mut self) {
        let Some(running) = &mut self.running else { return };
        let Some(call) = running.call.as_ref().filter(|_| !running.muted) else { return };
        let rang = self.pace.ring(call.as_fd());
        if self.pace.took() > cpu::cycles_per_second() / EXCESSIVE {
            self.excess += self.pace.took();
        }
        if rang != Rang::Done {
            running.muted = true;
            self.accuse(rang);
        }
    }

    /// Rings an eventfd that is not the ring's call, for a session: one that blocks holds up nobody else.
    pub(super) fn ring(&mut self, bell: BorrowedFd<'_>) -> Rang {
        let rang = self.pace.ring(bell);
        if rang == Rang::Slow {
            self.accuse(rang);
        }
        rang
    }

    #[cold]
    fn accuse(&self, rang: Rang) {
        self.shared.docket.enter(if rang == Rang::Slow { Offence::Slow } else { Offence::Blocked });
    }

    /// Cycles that interrupting the guest took, beyond what that takes, since this was asked last: they are the guest's, whoever
    /// has sent the frames.
    #[inline]
    pub fn take_excess(&mut self) -> u64 {
        std::mem::take(&mut self.excess)
    }

    /// Sends the interrupt that is held back, if `which` names it; returns when it is due otherwise.
    pub fn flush(&mut self, which: Flush) -> Option<u64> {
        let due = self.moderation.due()?;
        self.moderation.set_level(self.shared.settings.latency());
        let waits = match which {
            Flush::Due(now) => earlier(now, due),
            Flush::Idle(now) => self.moderation.is_patient() && earlier(now, due),
            Flush::All => false,
        };
        if waits {
            return Some(due);
        }
        self.moderation.called(cpu::cycles());
        self.call();
        None
    }

    /// Takes the ring out of service. What a shard must not do with what is left of it is left to the session: to close the call,
    /// and to end the wait for the kick, whose lock its front end can hold for 100 ms. Until then a kick wakes a shard for
    /// nothing.
    pub(super) fn fail(&mut self, fault: RingFault) {
        self.flush(Flush::All);
        let running = self.running.take();
        let index = running.as_ref().map_or(0, |running| running.ring.base());
        self.leftover = running.and_then(|running| running.call);
        self.fault = Some((fault, index));
    }

    /// Ends the service of the ring.
    pub(super) fn take_running(&mut self) -> Option<Running> {
        self.flush(Flush::All);
        self.shared.wakeup.end();
        self.running.take()
    }
}

impl Running {
    /// Whether pages of the memory or of the log were found missing. Nothing is to be done with the ring then, until its session
    /// has stopped it or has given it others: each page that is touched may cost a fault, and a session may be long in coming.
    #[inline]
    pub fn is_lost(&mut self) -> bool {
        let faults = sigbus::faults();
        if faults != self.loss.faults {
            self.look_for_loss(faults);
        }
        self.loss.lost
    }

    #[cold]
    fn look_for_loss(&mut self, faults: u32) {
        let lost = self.memory.failed() || self.log.as_ref().is_some_and(|log| log.failed());
        self.loss = Loss { faults, lost };
    }

    /// What of offloads the guest is left with when it receives, of those that its driver can do.
    #[inline]
    pub fn accepts(&self, settings: &Settings) -> Needs {
        self.negotiated.within(settings.offloads())
    }

    /// Notes that the device's areas of the ring were written. All of them: three pages for a ring of 1024, most of them
    /// marked already, while a migration lasts.
    #[inline]
    pub fn log_ring(&self) {
        if let Some(log) = &self.log {
            self.written.iter().for_each(|&(guest, len)| log.mark(guest, len));
        }
    }

    /// Asks the driver to notify from now on; returns whether the ring may rest.
    pub fn arm(&mut self) -> Result<bool, RingFault> {
        let armed = self.ring.arm();
        self.log_ring();
        armed
    }

    /// Tells the driver that notifications are not needed.
    pub fn disarm(&mut self) {
        self.ring.disarm();
        self.log_ring();
    }
}

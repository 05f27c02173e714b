//! A port to the host's own network stack, through a TAP interface: [`Tap`].
//!
//! What the host sends out of the interface is received here, what is transmitted here the host receives. Frames cross
//! with a virtio-net header in front (`IFF_VNET_HDR`, linux/if_tun.h), which is a head's own form: the kernel takes frames with
//! offloads as we have them. In the other direction we tell it which we take (`TUNSETOFFLOAD`), and check what it says like
//! what a guest says.
//!
//! Transmitting is copying into a [`backlog`], a list for each sender, which a thread of the port's own writes out in turns ([`writer`]):
//! what the host does with a frame it does in the thread that writes, for as long as it likes, and at its sender's cost ([`account`]).
//!
//! Reading is one system call per frame into a buffer that the queue's lock guards ([`reading`]). The descriptor is watched
//! edge-triggered, and an edge says only that something came in at some time, so [`Receive::receive`] reads until there
//! is nothing and [`Receive::arm`] looks once more.
//!
//! Whatever the kernel may have somebody wait for is left to one thread ([`keeper`]), which also opens the interface: until it has,
//! the port is down.
//!
//! The descriptor belongs to the [`Tap`]: when that is dropped it closes, whoever still has a queue or the transmit side,
//! and the kernel removes the interface unless it is persistent. No lock on the descriptor is held while a batch is
//! lent, so that one port's end waits for no other port.

mod account;
mod backlog;
mod keeper;
mod offloads;
mod piece;
mod reading;
mod writer;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, TryLockError};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};

use self::backlog::{Denied, Grant};
pub use self::keeper::Keeper;
use self::keeper::{Rounds, Sight};
use self::offloads::Offloads;
use self::piece::Spans;
use self::reading::Reading;
use self::writer::{Outgoing, Writer};
use super::watch::Watch;
use super::{Handover, LinkState, Outcome, Port, Receive, Received, Transmit, Wake};
use crate::frame::{Batch, Heads, Needs};
use crate::limits::VNET_HEADER_BYTES;
use crate::mem::Cursor;
use crate::sys::tap::{self, InterfaceControl, InterfaceName, InterfaceNameError};
use crate::verdict::DropReason;

/// Which interface a [`Tap`] port is, and how it is set up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapConfig {
    /// The interface's name on the host. Made if there is none.
    pub interface: String,
    /// Its MTU in bytes; unless given, what it has (1500 when it is new).
    pub mtu: Option<u16>,
}

/// Why a TAP interface cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name is none.
    #[error(transparent)]
    Name(#[from] InterfaceNameError),
    /// The kernel has no TAP driver.
    #[error("/dev/net/tun is missing: load the driver with `modprobe tun`; in a container, pass the device through")]
    DriverMissing(#[source] io::Error),
    /// The device is there and cannot be opened.
    #[error("cannot open /dev/net/tun: give the daemon's user read and write access to it")]
    Open(#[source] io::Error),
    /// No right to make, attach or change the interface.
    #[error(
        "no permission to {action} {interface}: give the daemon CAP_NET_ADMIN, \
         or make the interface for its user beforehand: `ip tuntap add dev {interface} mode tap user USER`, \
         then `ip link set {interface} up` with the MTU you want"
    )]
    Permission {
        /// What was tried.
        action: &'static str,
        /// With which interface.
        interface: InterfaceName,
        /// What the kernel says.
        source: io::Error,
    },
    /// Another process, or another port, has it.
    #[error("TAP interface {0} is in use by another port or process: stop that one, or give this port another name")]
    Busy(InterfaceName),
    /// Something else has the name.
    #[error("{0} exists and is not a TAP interface with one queue: use another name, or remove it: `ip link del {0}`")]
    OtherKind(InterfaceName),
    /// The kernel refuses the MTU.
    #[error("{interface} cannot have an MTU of {mtu}: a TAP interface takes 68 to 65521")]
    Mtu {
        /// The interface.
        interface: InterfaceName,
        /// The MTU, in bytes.
        mtu: u16,
        /// What the kernel says.
        source: io::Error,
    },
    /// The kernel refuses something that it grants on every host that we know.
    #[error("cannot {action} {interface}")]
    Refused {
        /// What was tried.
        action: &'static str,
        /// With which interface.
        interface: InterfaceName,
        /// What the kernel says.
        source: io::Error,
    },
}

/// A port whose far end is the host's network stack.
pub struct Tap(Arc<Interface>);

impl Tap {
    /// Has `keeper` open the interface, in its network namespace; make it if there is none; set its MTU and bring it up. Waits
    /// for that no longer than until `deadline`: the port is up when it is done.
    ///
    /// # Errors
    /// [`TapError`], which says what to do.
    pub fn new(config: &TapConfig, keeper: &Keeper, deadline: Instant) -> Result<Arc<Self>, TapError> {
        let tap = Self::unopened(config, keeper.rounds())?;
        keeper.rounds().add(&tap.0);
        tap.0.wait_until_opened(deadline)?;
        Ok(tap)
    }

    fn unopened(config: &TapConfig, rounds: &Arc<Rounds>) -> Result<Arc<Self>, TapError> {
        let name: InterfaceName = config.interface.parse()?;
        let control = InterfaceControl::open().map_err(|source| refused("look up", name, source))?;
        Ok(Arc::new(Self(Arc::new(Interface {
            name,
            mtu: config.mtu,
            device: RwLock::default(),
            outgoing: Outgoing::new(),
            control,
            reading: Mutex::new(Reading::new()),
            watch: Watch::default(),
            counters: Counters::default(),
            kernel: Mutex::default(),
            sight: Mutex::default(),
            seen: Condvar::new(),
            wish: Mutex::default(),
            rounds: Arc::clone(rounds),
        }))))
    }
}

impl Port for Tap {
    fn receive_queues(&self) -> Vec<Arc<dyn Receive>> {
        vec![self.0.clone()]
    }

    fn transmit_side(&self) -> Arc<dyn Transmit> {
        self.0.clone()
    }

    fn link(&self) -> LinkState {
        self.0.link()
    }

    fn set_offloads(&self, offloads: Needs) {
        *self.0.wish.lock().unwrap_or_else(PoisonError::into_inner) = Some(offloads);
        self.0.rounds.ring();
    }

    fn handover(&self) -> Handover {
        self.0.outgoing.handover()
    }

    fn detail(&self) -> serde_json::Value {
        let counters = &self.0.counters;
        let (interface, persistent, mtu) = self.0.facts();
        let Handover { frames, refused, late, .. } = self.handover();
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let errors = [self.0.outgoing.last_error(), counters.last_error.load(Ordering::Relaxed)];
        let last_error = errors.into_iter().find(|&errno| errno != 0);
        serde_json::json!({
            "interface": interface.as_str(),
            "mtu": mtu,
            "persistent": persistent,
            "received-frames": count(&counters.received),
            "transmitted-frames": frames,
            "refused-frames": count(&counters.refused) + refused + late,
            "read-errors": count(&counters.read_errors),
            "last-error": last_error.map(|errno| io::Error::from_raw_os_error(errno).to_string()),
        })
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let mut ended = self.0.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        *ended = true;
        let device = self.0.device.write().unwrap_or_else(PoisonError::into_inner).take();
        drop(ended);
        if let Some(device) = device {
            self.0.watch.hand_over(None, Some(device.tun.as_fd()), self.0.name.as_str());
            device.writer.end(self.0.name.as_str());
        }
    }
}

/// The interface, as its queue, its transmit side and the keeper share it.
struct Interface {
    name: InterfaceName,
    /// The MTU that it is to have.
    mtu: Option<u16>,
    /// `None` until it was opened, and once the port has ended.
    device: RwLock<Option<Device>>,
    /// What waits for the writer.
    outgoing: Arc<Outgoing>,
    control: InterfaceControl,
    reading: Mutex<Reading>,
    watch: Watch,
    counters: Counters,
    /// Held by who waits for the kernel, so that whoever ends the port waits for him without having shards wait behind him for the
    /// device; whether it has ended.
    kernel: Mutex<bool>,
    sight: Mutex<Sight>,
    /// Something else is in `sight`.
    seen: Condvar,
    /// Offloads that are to be used and are not yet.
    wish: Mutex<Option<Needs>>,
    rounds: Arc<Rounds>,
}

/// The interface, opened.
struct Device {
    tun: OwnedFd,
    offloads: Offloads,
    writer: Writer,
}

/// What the interface did, in frames.
#[derive(Default)]
struct Counters {
    received: AtomicU64,
    /// Frames that did not get into the backlog.
    refused: AtomicU64,
    read_errors: AtomicU64,
    /// The last error of a read as an errno, 0 before the first.
    last_error: AtomicI32,
}

impl Interface {
    fn device(&self) -> RwLockReadGuard<'_, Option<Device>> {
        self.device.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The device, for whoever waits for nobody: not while it is put there or taken away, which may itself wait for a shard that a
    /// sender's memory holds up.
    #[inline]
    fn glance(&self) -> Option<RwLockReadGuard<'_, Option<Device>>> {
        match self.device.try_read() {
            Ok(device) => Some(device),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn reading(&self) -> MutexGuard<'_, Reading> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the interface, in the calling thread's network namespace.
    fn open(&self) -> Result<(), TapError> {
        let name = self.name;
        let tun = open(&name)?;
        if let Some(mtu) = self.mtu {
            set_mtu(&self.control, name, mtu)?;
        }
        bring_up(&self.control, name)?;
        let offloads = Offloads::ask(tun.as_fd()).map_err(|source| refused("set up the offloads of", name, source))?;
        let writer = tun.try_clone().and_then(|tun| Writer::start(&self.outgoing, tun, name.as_str()));
        let writer = writer.map_err(|source| refused("start a thread for", name, source))?;
        let mut device = self.device.write().unwrap_or_else(PoisonError::into_inner);
        self.watch.begin(device.insert(Device { tun, offloads, writer }).tun.as_fd(), name.as_str());
        Ok(())
    }

    /// Reads one frame into `room`; `None` if there is none.
    fn read(&self, tun: BorrowedFd<'_>, room: &mut [u8]) -> Option<usize> {
        match rustix::io::read(tun, room) {
            Ok(len) => Some(len),
            Err(rustix::io::Errno::AGAIN) => None,
            Err(error) => {
                self.counters.read_errors.fetch_add(1, Ordering::Relaxed);
                self.counters.last_error.store(error.raw_os_error(), Ordering::Relaxed);
                None
            }
        }
    }
}

impl Device {
    /// Makes records of the picked frames; returns how many frames that were.
    #[inline]
    fn put_all(&self, grant: &mut Grant<'_>, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) -> usize {
        let before = outcome.delivered;
        for &pick in picks {
            match self.put(grant, batch, pick, outcome) {
                Ok(()) => outcome.deliver(pick),
                Err(reason) => outcome.refuse(pick, reason),
            }
        }
        (outcome.delivered ^ before).count_ones() as usize
    }

    /// Makes a record of one frame, as it is, or of the complete frames that it becomes if the host lacks what it needs.
    #[inline]
    fn put(&self, grant: &mut Grant<'_>, batch: &Batch<'_>, pick: u8, outcome: &mut Outcome) -> Result<(), DropReason> {
        let index = usize::from(pick);
        let Some(frame) = batch.frames().get(index) else { return Ok(()) };
        if !frame.needs.met_by(self.offloads.accepts()) {
            return self.offloads.put(grant, batch, index, outcome);
        }
        let len = frame.len as usize;
        let fill = |spans: Spans<'_>| {
            let mut to = Cursor::new(&spans);
            to.write(&batch.head(index).bytes[..VNET_HEADER_BYTES]);
            batch.source(index).copy(len, &mut to);
        };
        grant.put(VNET_HEADER_BYTES + len, fill).then_some(()).ok_or(DropReason::HostBusy)
    }
}

impl Receive for Interface {
    fn receive(&self, heads: &mut Heads, process: &mut dyn FnMut(&mut Batch<'_>)) -> Received {
        let mut reading = self.reading();
        let read = |device: &Device| {
            let received = reading.fill(|room| self.read(device.tun.as_fd(), room));
            self.counters.received.fetch_add(received as u64, Ordering::Relaxed);
            device.offloads.may()
        };
        let device = self.glance();
        let may = device.as_deref().and_then(Option::as_ref).map(read);
        drop(device);
        let Some(may) = may.filter(|_| reading.is_pending()) else {
            return Received::Nothing;
        };
        let mut batch = reading.lend(heads, may);
        process(&mut batch);
        let (dealt_with, flooding) = (batch.dealt_with(), batch.flooding());
        drop(batch);
        reading.note(dealt_with, flooding);
        Received::Frames(dealt_with)
    }

    fn arm(&self) -> bool {
        let Some(device) = self.glance() else { return false };
        // The queue is woken when it is opened.
        let Some(device) = &*device else { return true };
        if self.reading().is_pending() {
            return false;
        }
        let mut readable = [PollFd::new(&device.tun, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A deleted interface answers POLLERR for good: nothing to stay awake for.
        let ready = poll(&mut readable, Some(&now)).is_ok() && readable[0].revents().contains(PollFlags::IN);
        !ready
    }

    /// The kernel cannot be told; the edges of a queue that is polled lie in an epoll set that nobody waits for.
    fn disarm(&self) {}

    fn attach(&self, wake: Option<Arc<dyn Wake>>) {
        let device = self.device();
        self.watch.hand_over(wake, device.as_ref().map(|device| device.tun.as_fd()), self.name.as_str());
    }
}

impl Transmit for Interface {
    fn transmit(&self, batch: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
        let device = self.glance();
        let Some(device) = device.as_deref().and_then(Option::as_ref) else {
            return outcome.refuse_all(picks, DropReason::LinkDown);
        };
        outcome.later = true;
        let granted = match self.outgoing.refuses() {
            true => Err(DropReason::HostRefused),
            false => self.outgoing.backlog.grant(batch.port, lens(batch, picks)).map_err(|denied| match denied {
                Denied::Occupied => DropReason::ReceiverBusy,
                Denied::Shut => DropReason::HostBusy,
            }),
        };
        let put = match granted {
            Ok(mut grant) => {
                let put = device.put_all(&mut grant, batch, picks, outcome);
                if self.outgoing.backlog.admit(grant) {
                    device.writer.wake();
                }
                put
            }
            Err(reason) => {
                outcome.refuse_all(picks, reason);
                0
            }
        };
        if put < picks.len() {
            self.counters.refused.fetch_add((picks.len() - put) as u64, Ordering::Relaxed);
        }
    }
}

/// Lengths of the records that the picked frames become.
fn lens(batch: &Batch<'_>, picks: &[u8]) -> impl Iterator<Item = usize> {
    let len = |&pick: &u8| batch.frames().get(usize::from(pick)).map_or(0, |frame| frame.len as usize);
    picks.iter().map(move |pick| VNET_HEADER_BYTES + len(pick))
}

/// A descriptor that is attached to TAP interface `name` and has headers in our form.
fn open(name: &InterfaceName) -> Result<OwnedFd, TapError> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let tun = rustix::fs::open("/dev/net/tun", flags, Mode::empty()).map_err(|errno| match errno {
        // ENODEV and ENXIO: the node is there, the module behind it is not.
        rustix::io::Errno::NOENT | rustix::io::Errno::NODEV | rustix::io::Errno::NXIO => {
            TapError::DriverMissing(errno.into())
        }
        _ => TapError::Open(errno.into()),
    })?;
    tap::attach(tun.as_fd(), name).map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::Busy(*name),
        Some(libc::EINVAL) => TapError::OtherKind(*name),
        _ => refused("attach to", *name, source),
    })?;
    // A kernel that does not know the call has the CPU's own order, which is little-endian wherever we run.
    let _ = tap::set_header_little_endian(tun.as_fd());
    tap::set_header_len(tun.as_fd(), VNET_HEADER_BYTES)
        .map_err(|source| refused("set up the headers of", *name, source))?;
    Ok(tun)
}

/// Gives the interface its MTU, unless it has it: an interface that was made for us may be all that we may touch.
fn set_mtu(control: &InterfaceControl, name: InterfaceName, mtu: u16) -> Result<(), TapError> {
    if control.mtu(&name).is_ok_and(|now| now == u32::from(mtu)) {
        return Ok(());
    }
    control.set_mtu(&name, mtu).map_err(|source| match source.raw_os_error() {
        Some(libc::EINVAL) => TapError::Mtu { interface: name, mtu, source },
        _ => refused("set the MTU of", name, source),
    })
}

/// Brings the interface up, unless it is.
fn bring_up(control: &InterfaceControl, name: InterfaceName) -> Result<(), TapError> {
    let flags = control.flags(&name).map_err(|source| refused("look up", name, source))?;
    if flags & libc::IFF_UP != 0 {
        return Ok(());
    }
    control.set_flags(&name, flags | libc::IFF_UP).map_err(|source| refused("bring up", name, source))
}

fn refused(action: &'static str, interface: InterfaceName, source: io::Error) -> TapError {
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => TapError::Permission { action, interface, source },
        _ => TapError::Refused { action, interface, source },
    }
}

#[cfg(test)]
mod tests;

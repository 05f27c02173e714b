//! One virtio-net device as its VMM and its driver hold it: the vhost-user connection, its memory, its rings, and the
//! frames that it sends for ever.
//!
//! Messages come in the order of DPDK's virtio-user. They go through the `vhost` crate's front end, but for the base of a
//! packed ring, whose wrap counters do not fit into the crate's 16 bits.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use thiserror::Error;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::frames::{self, HEADER, Sizes};
use crate::interrupt;
use crate::memory::Memory;
use crate::ring::{Buffer, Direction, Form, Habit, Ring};

const MRG_RXBUF: u64 = 1 << 15;
const MQ: u64 = 1 << 22;
const ANY_LAYOUT: u64 = 1 << 27;
const VERSION_1: u64 = 1 << 32;
const RING_PACKED: u64 = 1 << 34;
const IN_ORDER: u64 = 1 << 35;

/// How long the switch may take to make a socket, or to connect to ours.
const PATIENCE: Duration = Duration::from_secs(20);

/// Between two attempts to meet it.
const RETRY: Duration = Duration::from_micros(500);

/// What every guest posts at least: a full frame and its header.
const LEAST_BUFFER: usize = 2048;

/// Where the switch is met.
#[derive(Clone, Debug)]
pub enum Door {
    /// The switch listens there.
    Connect(PathBuf),
    /// The switch will connect there.
    Listen(PathBuf),
}

/// A [`Door`] that is open.
#[derive(Debug)]
pub enum Meeting {
    /// The switch listens there.
    Connect(PathBuf),
    /// The switch connects to this, which is there.
    Listen(UnixListener, PathBuf),
}

/// A device's settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Queue pairs.
    pub queues: usize,
    /// Entries of each ring.
    pub ring: u16,
    /// Packed rings.
    pub packed: bool,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// Mergeable receive buffers.
    pub mergeable: bool,
    /// What the driver does to its rings.
    pub habit: Habit,
    /// Lengths of its frames.
    pub sizes: Sizes,
    /// Memory on huge pages, if there are any.
    pub huge: bool,
}

/// Why a NIC did not come up.
#[derive(Debug, Error)]
pub enum NicError {
    /// The switch never made its socket, or never connected to ours.
    #[error("no switch at {path} within {} s", PATIENCE.as_secs())]
    NobodyThere {
        /// The socket.
        path: PathBuf,
        /// The last attempt's failure.
        source: io::Error,
    },
    /// Our own side of it.
    #[error("{what}")]
    Own {
        /// What could not be done.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A message was refused or not answered.
    #[error("the switch did not take {message}: {source}")]
    Message {
        /// The message.
        message: &'static str,
        /// What the `vhost` crate has to say.
        source: vhost::Error,
    },
    /// The switch does not offer what was asked for.
    #[error("the switch offers features {offered:#x}, and {missing:#x} were asked for as well")]
    Features {
        /// What it offers.
        offered: u64,
        /// What it lacks.
        missing: u64,
    },
}

/// A queue pair, with its doorbells.
#[derive(Debug)]
pub struct Pair {
    /// Frames from the switch.
    pub receive: Ring,
    /// Frames to the switch.
    pub transmit: Ring,
    receive_kick: EventFd,
    transmit_kick: EventFd,
    calls: [EventFd; 2],
}

/// A connected device whose rings run.
pub struct Nic {
    /// Its number, which its addresses have in them.
    pub port: usize,
    /// Its queue pairs.
    pub pairs: Vec<Pair>,
    /// For each pair, where each transmit slot's buffer is.
    pub slots: Vec<Vec<Buffer>>,
    /// For each pair, where each receive slot's buffer is.
    pub receive_slots: Vec<Vec<Buffer>>,
    /// Its memory; after the rings, which point into it.
    pub memory: Memory,
    features: u64,
    frontend: Frontend,
}

impl Settings {
    fn features(&self) -> u64 {
        let flag = |on: bool, bit: u64| if on { bit } else { 0 };
        VERSION_1
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | flag(self.mergeable, MRG_RXBUF)
            | flag(self.queues > 1, MQ)
            | flag(self.packed, RING_PACKED)
            | flag(self.in_order, IN_ORDER)
    }

    fn form(&self) -> Form {
        if self.packed { Form::Packed { in_order: self.in_order } } else { Form::Split }
    }

    /// Bytes from one buffer to the next: an odd number of cache lines, so that neighbours fall into different sets.
    fn stride(least: usize) -> usize {
        (least.div_ceil(64) | 1) * 64
    }

    fn receive_len(&self) -> usize {
        (HEADER + self.sizes.longest()).max(LEAST_BUFFER)
    }

    fn transmit_len(&self) -> usize {
        HEADER + self.sizes.longest()
    }

    /// Bytes of memory one device needs.
    pub fn memory(&self) -> usize {
        let buffers = Self::stride(self.receive_len()) + Self::stride(self.transmit_len());
        self.queues * (usize::from(self.ring) * (buffers + 2 * 32) + 8 * 4096)
    }
}

impl Pair {
    /// Asks for an interrupt with each batch that comes in.
    pub fn want_interrupts(&mut self) {
        self.receive.want_interrupts();
    }

    /// Whether an interrupt came since the last look.
    pub fn was_interrupted(&self) -> bool {
        self.calls[0].read().is_ok()
    }

    /// Tells the switch of receive buffers, if it asked for that.
    #[inline]
    pub fn kick_receive(&self) {
        if self.receive.wants_kick() {
            ring_bell(&self.receive_kick);
        }
    }

    /// Tells the switch of frames, if it asked for that.
    #[inline]
    pub fn kick_transmit(&self) {
        if self.transmit.wants_kick() {
            ring_bell(&self.transmit_kick);
        }
    }
}

#[cold]
fn ring_bell(bell: &EventFd) {
    // Fails only when the counter is full, and then the bell is ringing.
    let _ = bell.write(1);
}

impl Nic {
    /// Connects device `port`, whose frames go to `peer`, and offers all of its receive buffers.
    pub fn connect(port: usize, peer: usize, meeting: &Meeting, settings: &Settings) -> Result<Self, NicError> {
        let stream = meeting.wait()?;
        let own = |what| move |source| NicError::Own { what, source };
        let mut memory = Memory::new(settings.memory(), settings.huge).map_err(own("no memory to share"))?;
        let (mut pairs, mut slots, mut receive_slots) = (Vec::new(), Vec::new(), Vec::new());
        for queue in 0..settings.queues {
            let (pair, transmit, receive) =
                pair(&mut memory, settings, port, peer, queue).map_err(own("no event descriptors"))?;
            pairs.push(pair);
            slots.push(transmit);
            receive_slots.push(receive);
        }
        let frontend = Frontend::from_stream(stream, 2 * settings.queues as u64);
        let mut nic = Self { port, pairs, slots, receive_slots, memory, features: settings.features(), frontend };
        nic.introduce()?;
        nic.start()?;
        for pair in &mut nic.pairs {
            pair.receive.offer(settings.ring);
            ring_bell(&pair.receive_kick);
        }
        Ok(nic)
    }

    /// Comes back to a switch that was started again, with rings as they are: what it had not given back is to be done.
    /// Split rings only, whose used index says where that is.
    pub fn reconnect(&mut self, meeting: &Meeting) -> Result<(), NicError> {
        self.frontend = Frontend::from_stream(meeting.wait()?, 2 * self.pairs.len() as u64);
        self.introduce()?;
        self.start()?;
        for pair in &self.pairs {
            ring_bell(&pair.receive_kick);
            ring_bell(&pair.transmit_kick);
        }
        Ok(())
    }

    /// Negotiates features and protocol features.
    fn introduce(&mut self) -> Result<(), NicError> {
        self.frontend.set_owner().map_err(refused("SET_OWNER"))?;
        let offered = self.frontend.get_features().map_err(refused("GET_FEATURES"))?;
        self.features |= offered & ANY_LAYOUT;
        let missing = self.features & !offered;
        if missing != 0 {
            return Err(NicError::Features { offered, missing });
        }
        let queues = self.pairs.len();
        let wanted = if queues > 1 { VhostUserProtocolFeatures::MQ } else { VhostUserProtocolFeatures::empty() };
        let offered = self.frontend.get_protocol_features().map_err(refused_vu("GET_PROTOCOL_FEATURES"))?;
        self.frontend.set_protocol_features(offered & wanted).map_err(refused_vu("SET_PROTOCOL_FEATURES"))?;
        if queues > 1 {
            self.frontend.get_queue_num().map_err(refused_vu("GET_QUEUE_NUM"))?;
        }
        Ok(())
    }

    /// Tells memory and rings, and enables them.
    fn start(&mut self) -> Result<(), NicError> {
        for (index, pair) in self.pairs.iter().enumerate() {
            for (nth, call) in pair.calls.iter().enumerate() {
                self.frontend.set_vring_call(2 * index + nth, call).map_err(refused("SET_VRING_CALL"))?;
            }
        }
        self.frontend.set_features(self.features).map_err(refused("SET_FEATURES"))?;
        self.frontend.set_mem_table(&[self.memory.region()]).map_err(refused("SET_MEM_TABLE"))?;
        for index in 0..self.pairs.len() {
            let pair = &self.pairs[index];
            self.start_ring(2 * index, &pair.receive, &pair.receive_kick)?;
            self.start_ring(2 * index + 1, &pair.transmit, &pair.transmit_kick)?;
        }
        for index in 0..2 * self.pairs.len() {
            self.frontend.set_vring_enable(index, true).map_err(refused_vu("SET_VRING_ENABLE"))?;
        }
        // An answer means that all before it is done.
        self.frontend.get_features().map_err(refused("GET_FEATURES"))?;
        Ok(())
    }

    fn start_ring(&self, index: usize, ring: &Ring, kick: &EventFd) -> Result<(), NicError> {
        let (size, [desc, driver, device]) = ring.place();
        self.frontend.set_vring_num(index, size).map_err(refused("SET_VRING_NUM"))?;
        match ring.form() {
            Form::Split => self.frontend.set_vring_base(index, ring.used_index()).map_err(refused("SET_VRING_BASE"))?,
            Form::Packed { .. } => self.packed_base(index)?,
        }
        let config = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: self.memory.user(desc),
            used_ring_addr: self.memory.user(device),
            avail_ring_addr: self.memory.user(driver),
            log_addr: None,
        };
        self.frontend.set_vring_addr(index, &config).map_err(refused("SET_VRING_ADDR"))?;
        self.frontend.set_vring_kick(index, kick).map_err(refused("SET_VRING_KICK"))
    }

    /// SET_VRING_BASE of a packed ring that starts: both indices 0, both wrap counters 1 (bits 15 and 31).
    #[allow(unsafe_code, reason = "the crate lends its socket only as a number")]
    fn packed_base(&self, index: usize) -> Result<(), NicError> {
        const SET_VRING_BASE: u32 = 10;
        const VERSION: u32 = 1;
        let words = [SET_VRING_BASE, VERSION, 8, index as u32, 0x8000_8000];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        // SAFETY: the front end owns the descriptor and outlives this use; ManuallyDrop keeps it open.
        let mut stream = std::mem::ManuallyDrop::new(unsafe { UnixStream::from_raw_fd(self.frontend.as_raw_fd()) });
        stream.write_all(&bytes).map_err(|source| NicError::Own { what: "SET_VRING_BASE was not sent", source })
    }
}

/// One queue pair's rings, buffers and frames.
fn pair(
    memory: &mut Memory,
    settings: &Settings,
    port: usize,
    peer: usize,
    queue: usize,
) -> io::Result<(Pair, Vec<Buffer>, Vec<Buffer>)> {
    let mut buffers = |len: usize, lens: &dyn Fn(usize) -> usize| -> Vec<Buffer> {
        let stride = Settings::stride(len);
        let start = memory.take(stride * usize::from(settings.ring), 4096);
        (0..usize::from(settings.ring))
            .map(|slot| Buffer { offset: start + slot * stride, len: lens(slot) as u32 })
            .collect()
    };
    let receive = buffers(settings.receive_len(), &|_| settings.receive_len());
    let transmit = buffers(settings.transmit_len(), &|slot| HEADER + settings.sizes.of(slot));
    for buffer in &transmit {
        let len = buffer.len as usize - HEADER;
        let frame = frames::udp(frames::mac(peer, 0), frames::mac(port, 0), queue as u16, len);
        memory.write(buffer.offset + HEADER, &frame);
    }
    let bell = || EventFd::new(EFD_NONBLOCK);
    let rings = Pair {
        receive: Ring::new(memory, settings.form(), Direction::Receive, &receive, settings.habit),
        transmit: Ring::new(memory, settings.form(), Direction::Transmit, &transmit, settings.habit),
        receive_kick: bell()?,
        transmit_kick: bell()?,
        calls: [bell()?, bell()?],
    };
    Ok((rings, transmit, receive))
}

impl Door {
    /// Gets ready to meet the switch, which may connect from here on.
    pub fn open(&self) -> Result<Meeting, NicError> {
        Ok(match self {
            Self::Connect(path) => Meeting::Connect(path.clone()),
            Self::Listen(path) => {
                let _ = std::fs::remove_file(path);
                let own = |source| NicError::Own { what: "cannot listen for the switch", source };
                let listener = UnixListener::bind(path).map_err(own)?;
                listener.set_nonblocking(true).map_err(own)?;
                Meeting::Listen(listener, path.clone())
            }
        })
    }
}

impl Meeting {
    /// The connection, as soon as there is one.
    pub fn wait(&self) -> Result<UnixStream, NicError> {
        let end = Instant::now() + PATIENCE;
        loop {
            let (met, path) = match self {
                Self::Connect(path) => (UnixStream::connect(path), path),
                Self::Listen(listener, path) => (listener.accept().map(|(stream, _)| stream), path),
            };
            match met {
                Ok(stream) => {
                    stream
                        .set_nonblocking(false)
                        .map_err(|source| NicError::Own { what: "cannot wait for answers", source })?;
                    return Ok(stream);
                }
                Err(source) if Instant::now() > end || interrupt::came() => {
                    return Err(NicError::NobodyThere { path: path.clone(), source });
                }
                Err(_) => std::thread::sleep(RETRY),
            }
        }
    }
}

fn refused(message: &'static str) -> impl Fn(vhost::Error) -> NicError {
    move |source| NicError::Message { message, source }
}

fn refused_vu(message: &'static str) -> impl Fn(vhost::Error) -> NicError {
    refused(message)
}

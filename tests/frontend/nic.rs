//! A whole virtio-net device of one guest: connection, memory, queue pairs and driver, up and running in one call.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::DEADLINE;
use super::driver::{QueueLayout, Received, RxQueue, Shape, TxQueue};
use super::frame::{assert_same, frame, mac};
use super::queue::{Queue, wait_used};
use super::ram::{GuestRam, Region};
use super::ring::Ring;
use super::session::{Session, feature, is_closed};
use super::vmm::{Kind, Vmm, Vring};

/// What a Linux guest of today acks.
pub const LINUX: u64 = feature::MRG_RXBUF
    | feature::GUEST_ANNOUNCE
    | feature::MQ
    | feature::ANY_LAYOUT
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX
    | feature::VERSION_1;

/// What a NIC is made with.
#[derive(Clone)]
pub struct NicConfig {
    pub kind: Kind,
    /// Features that the guest acks if they are offered.
    pub features: u64,
    /// Protocol features that the VMM may use, of those that it knows.
    pub protocol: u64,
    pub pairs: usize,
    /// Pairs that the guest enables at its start.
    pub enabled_pairs: usize,
    pub size: u16,
    /// Put every chain into an indirect table, if the feature is acked.
    pub indirect: bool,
    pub shape: Shape,
    pub rx_shape: Shape,
    pub tx_buffer: u32,
    pub rx_buffer: u32,
    pub mtu: Option<u16>,
    /// Memory to use; fresh memory if none.
    pub ram: Option<Arc<GuestRam>>,
    /// Cut the connection after so many bytes sent.
    pub cut_after: Option<usize>,
}

impl Default for NicConfig {
    fn default() -> Self {
        Self {
            kind: Kind::Qemu10,
            features: LINUX,
            protocol: u64::MAX,
            pairs: 1,
            enabled_pairs: 1,
            size: 256,
            indirect: false,
            shape: Shape::Joined,
            rx_shape: Shape::Joined,
            tx_buffer: 2048,
            rx_buffer: 2048,
            mtu: None,
            ram: None,
            cut_after: None,
        }
    }
}

impl NicConfig {
    pub fn of(kind: Kind) -> Self {
        Self { kind, ..Self::default() }
    }

    fn layout(&self, shape: Shape, buffer: u32) -> QueueLayout {
        QueueLayout { size: self.size, shape, indirect: self.indirect, buffer }
    }

    fn rx_layout(&self) -> QueueLayout {
        self.layout(self.rx_shape, self.rx_buffer)
    }

    fn tx_layout(&self) -> QueueLayout {
        self.layout(self.shape, self.tx_buffer)
    }

    fn memory(&self) -> Arc<GuestRam> {
        let ring = 64 * u64::from(self.size) + 16384;
        let buffers = u64::from(self.size) * u64::from(self.tx_buffer + self.rx_buffer + 2 * 1024);
        let len = (self.pairs as u64 * (2 * ring + buffers) + (4 << 20)).next_multiple_of(2 << 20);
        match self.kind {
            Kind::Dpdk => GuestRam::dpdk(len),
            _ => GuestRam::qemu(len.max(32 << 20)),
        }
    }
}

/// The two queues of a pair.
pub struct Pair {
    pub rx: RxQueue,
    pub tx: TxQueue,
}

/// A running NIC.
pub struct Nic {
    /// Its address, which no other NIC of this process has.
    pub mac: [u8; 6],
    pub vmm: Vmm,
    pub pairs: Vec<Pair>,
    config: NicConfig,
}

impl Nic {
    /// Connects to a back end's socket and brings the NIC up. A back end that still sees the last front end there closes
    /// the connection at once; then it is tried again.
    #[track_caller]
    pub fn up(path: &Path, config: &NicConfig) -> Self {
        let nic = super::eventually(&format!("a connection to {}", path.display()), || {
            match Session::connect(path).and_then(|session| Self::prepare(session, config)) {
                Ok(nic) => Some(nic),
                Err(error) if is_closed(&error) || error.kind() == ErrorKind::NotFound => None,
                Err(error) => panic!("{:?} NIC: {error}", config.kind),
            }
        });
        nic.run().unwrap_or_else(|error| panic!("{:?} NIC: {error}", config.kind))
    }

    /// Brings a NIC up over a connection.
    pub fn start(session: Session, config: &NicConfig) -> io::Result<Self> {
        Self::prepare(session, config)?.run()
    }

    fn run(mut self) -> io::Result<Self> {
        for pair in &mut self.pairs {
            pair.rx.fill();
        }
        self.vmm.probe()?;
        self.vmm.start()?;
        self.vmm.settle()?;
        Ok(self)
    }

    /// Negotiates and lays the rings out, empty; nothing is started.
    pub fn prepare(session: Session, config: &NicConfig) -> io::Result<Self> {
        if let Some(bytes) = config.cut_after {
            session.cut_after(bytes);
        }
        let ram = config.ram.clone().unwrap_or_else(|| config.memory());
        let (kind, pairs) = (config.kind, config.pairs);
        let mut vmm = Vmm::create(kind, session, ram.clone(), pairs, config.features, config.protocol)?;
        vmm.mtu = config.mtu;
        vmm.enabled_pairs = config.enabled_pairs;
        static NICS: AtomicU32 = AtomicU32::new(1);
        let mac = mac(NICS.fetch_add(1, Ordering::Relaxed));
        let mut nic = Self { mac, vmm, pairs: Vec::new(), config: config.clone() };
        let features = nic.vmm.features;
        nic.config.features &= features;
        for _ in 0..pairs {
            let rx = RxQueue::new(Ring::alloc(&ram, config.size), features, nic.config.rx_layout());
            let tx = TxQueue::new(Ring::alloc(&ram, config.size), features, nic.config.tx_layout());
            nic.vmm.vrings.extend([vring(&rx.queue), vring(&tx.queue)]);
            nic.pairs.push(Pair { rx, tx });
        }
        nic.vmm.begin_anew();
        Ok(nic)
    }

    pub fn features(&self) -> u64 {
        self.vmm.features
    }

    pub fn session(&self) -> &Session {
        &self.vmm.session
    }

    /// Sends one frame on pair 0, waiting for room.
    #[track_caller]
    pub fn send(&mut self, frame: &[u8]) {
        self.send_on(0, frame);
    }

    #[track_caller]
    pub fn send_on(&mut self, pair: usize, frame: &[u8]) {
        let end = Instant::now() + DEADLINE;
        let tx = &mut self.pairs[pair].tx;
        while !tx.send(frame) {
            assert!(wait_used([&mut tx.queue], end), "no room in TX ring {pair} within {DEADLINE:?}");
        }
    }

    /// Sends one frame on pair 0 behind a virtio-net header of the caller's, waiting for room.
    #[track_caller]
    pub fn send_behind(&mut self, header: &[u8], frame: &[u8]) {
        let end = Instant::now() + DEADLINE;
        let tx = &mut self.pairs[0].tx;
        while !tx.queue_bytes(header, frame) {
            assert!(wait_used([&mut tx.queue], end), "no room in TX ring 0 within {DEADLINE:?}");
        }
        tx.queue.publish();
    }

    /// Waits until the back end has taken every frame.
    #[track_caller]
    pub fn drain(&mut self) {
        let end = Instant::now() + DEADLINE;
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            let done = pair.tx.drain(end);
            assert!(done, "TX ring {index}: {} frames not taken", pair.tx.queue.outstanding());
        }
    }

    /// The next `count` frames of whatever pairs, or a panic.
    #[track_caller]
    pub fn receive(&mut self, count: usize) -> Vec<(usize, Received)> {
        let frames = self.gather(count, Instant::now() + DEADLINE);
        assert!(frames.len() >= count, "{} of {count} frames", frames.len());
        frames
    }

    #[track_caller]
    pub fn receive_on(&mut self, pair: usize, count: usize) -> Vec<Received> {
        let frames = self.pairs[pair].rx.receive(count, Instant::now() + DEADLINE);
        assert!(frames.len() >= count, "{} of {count} frames on RX ring {pair}", frames.len());
        frames
    }

    /// Waits for `count` frames of whatever pairs; fewer if `end` passes. Each comes with its pair.
    pub fn gather(&mut self, count: usize, end: Instant) -> Vec<(usize, Received)> {
        let mut frames = self.poll();
        while frames.len() < count && wait_used(self.pairs.iter_mut().map(|pair| &mut pair.rx.queue), end) {
            frames.extend(self.poll());
        }
        frames
    }

    /// What has arrived on any pair, without waiting.
    pub fn poll(&mut self) -> Vec<(usize, Received)> {
        let pairs = self.pairs.iter_mut().enumerate();
        pairs.flat_map(|(index, pair)| pair.rx.poll().into_iter().map(move |frame| (index, frame))).collect()
    }

    /// QMP `stop`, or the first half of `set_link off`.
    pub fn stop(&mut self) -> io::Result<()> {
        self.vmm.stop()
    }

    /// QMP `cont`, or `set_link on`.
    pub fn cont(&mut self) -> io::Result<()> {
        self.vmm.start()?;
        self.vmm.settle()
    }

    /// The guest reboots, or its driver is bound again: new rings at the same place, perhaps other features.
    pub fn rebind(&mut self, want: u64) -> io::Result<()> {
        self.vmm.reset()?;
        self.vmm.features = self.vmm.offered & (want | feature::PROTOCOL_FEATURES);
        self.vmm.begin_anew();
        for pair in &mut self.pairs {
            pair.rx.reset(self.vmm.features);
            pair.tx.reset(self.vmm.features);
            pair.rx.fill();
        }
        self.vmm.enabled_pairs = self.config.enabled_pairs;
        self.vmm.probe()?;
        self.vmm.start()?;
        self.vmm.settle()
    }

    /// The connection breaks; the guest notices nothing and goes on with its rings.
    pub fn disconnect(&self) {
        let _ = self.session().stream().shutdown(Shutdown::Both);
    }

    /// Connects again after [`Nic::disconnect`] or the back end's end: QEMU takes each ring's base from its used index and
    /// starts at once. A packed ring has no such index: QEMU repeats what it said at the last start.
    #[track_caller]
    pub fn reconnect(&mut self, path: &Path) {
        self.disconnect();
        let (config, pairs) = (self.config.clone(), self.pairs.len());
        let mut vmm = super::eventually(&format!("a new connection to {}", path.display()), || {
            let session = Session::connect(path).ok()?;
            let ram = self.vmm.ram.clone();
            Vmm::create(config.kind, session, ram, pairs, config.features, config.protocol).ok()
        });
        let lost = self.vmm.features & !vmm.features;
        assert!(lost == 0, "the back end came back without features {lost:#x}");
        vmm.features = self.vmm.features;
        vmm.mtu = self.vmm.mtu;
        vmm.enabled_pairs = self.vmm.enabled_pairs;
        vmm.vrings = std::mem::take(&mut self.vmm.vrings);
        if vmm.features & feature::RING_PACKED == 0 {
            for vring in &mut vmm.vrings {
                vring.base = vring.ring.used_idx();
            }
        }
        self.vmm = vmm;
        self.vmm.start().and_then(|()| self.vmm.settle()).expect("rings started again");
    }

    pub fn set_pairs(&mut self, pairs: usize) -> io::Result<()> {
        self.vmm.set_pairs(pairs)?;
        self.vmm.settle()
    }

    pub fn plug(&mut self, region: Region) -> io::Result<()> {
        self.vmm.plug(region)
    }

    pub fn unplug(&mut self, gpa: u64) -> io::Result<()> {
        self.vmm.unplug(gpa)
    }
}

fn vring(queue: &Queue) -> Vring {
    let Queue { ring, kick, call, .. } = queue;
    Vring { ring: ring.clone(), kick: kick.clone(), call: call.clone(), base: 0 }
}

/// Sends small frames both ways until each NIC has heard the other, then takes what is left of them: the back end has
/// started and enabled the rings, and a switch between them has learned both addresses.
#[track_caller]
pub fn meet(a: &mut Nic, b: &mut Nic) {
    greet(a, b);
    greet(b, a);
}

#[track_caller]
fn greet(from: &mut Nic, to: &mut Nic) {
    let mut sent = 0;
    super::eventually("a NIC hears another", || {
        sent += 1;
        from.send(&frame(to.mac, from.mac, 60, sent));
        from.drain();
        let heard = to.gather(1, Instant::now() + Duration::from_millis(20));
        (!heard.is_empty()).then_some(())
    });
    // All are under way; when the last is there, so are they.
    let last = frame(to.mac, from.mac, 61, sent);
    from.send(&last);
    super::eventually("the last frame of a greeting", || {
        to.receive(1).iter().any(|(_, got)| got.frame == last).then_some(())
    });
}

/// Sends `count` frames each way and checks every byte; frames of one sender's queue arrive in order.
#[track_caller]
pub fn exchange(a: &mut Nic, b: &mut Nic, count: usize) {
    carry(a, b, count);
    carry(b, a, count);
}

/// One way of [`exchange`], on pair 0 of the sender.
#[track_caller]
pub fn carry(from: &mut Nic, to: &mut Nic, count: usize) {
    let burst = usize::from(from.config.size.min(to.config.size)).div_ceil(4).min(16);
    for start in (0..count).step_by(burst) {
        let sent: Vec<_> = (start..count.min(start + burst))
            .map(|at| frame(to.mac, from.mac, 14 + at * 97 % 1500, at as u64))
            .collect();
        for frame in &sent {
            from.send(frame);
        }
        let got = to.receive(sent.len());
        assert_eq!(got.len(), sent.len(), "frames that nobody sent");
        for ((_, got), sent) in got.iter().zip(&sent) {
            assert_same(&got.frame, sent, "exchange");
        }
    }
    from.drain();
}

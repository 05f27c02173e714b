//! Our ring beside virtio-queue's, on two copies of one guest's memory: whatever a correct driver does, both must take the
//! same chains with the same buffers, leave the same bytes in memory, and answer alike whether to notify. Where a driver
//! is not correct, ours may only be stricter, and the fault must say why.
//!
//! virtio-queue differs in three things that the tests allow for: it ends a malformed chain silently, which then looks like
//! a short one; it ignores NO_INTERRUPT; and it does not interrupt unconditionally the first time.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::mem::GuestMemory;
use crate::ring::driver::{DATA, DATA_BYTES, Descriptor, Driver, WRITE, buffer};
use crate::ring::{Chain, Chains, DeviceRing, Direction, Readable, RingFault, SplitRing, Writable};

/// The other device, with its copy of the guest's memory.
struct Reference {
    memory: GuestMemoryMmap,
    queue: Queue,
}

/// A chain as virtio-queue sees it.
struct Theirs {
    head: u16,
    buffers: Vec<(u64, u32)>,
    /// Whether the last descriptor said that there is no other: if not, the chain was malformed and is cut here.
    ended: bool,
}

impl Theirs {
    fn bytes(&self) -> u64 {
        self.buffers.iter().map(|&(_, len)| u64::from(len)).sum()
    }
}

impl Reference {
    fn new(driver: &Driver) -> Self {
        let config = driver.config;
        let ranges: Vec<_> = driver.memory.regions().iter().map(|r| (GuestAddress(r.guest), r.len as usize)).collect();
        let mut queue = Queue::new(config.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(config.descriptors)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(config.available)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(config.used)).unwrap();
        queue.set_next_avail(config.base);
        queue.set_next_used(driver.used_index());
        queue.set_event_idx(config.event_idx);
        queue.set_ready(true);
        let reference = Self { memory: GuestMemoryMmap::from_ranges(&ranges).unwrap(), queue };
        reference.copy_from(&driver.memory);
        assert!(reference.queue.is_valid(&reference.memory));
        reference
    }

    /// Makes the copy of the guest's memory anew.
    fn copy_from(&self, memory: &GuestMemory) {
        for (address, bytes) in contents(memory) {
            self.memory.write_slice(&bytes, GuestAddress(address)).unwrap();
        }
    }

    /// Asserts that the device left the same bytes in its copy as ours did.
    fn assert_same_memory(&self, memory: &GuestMemory) {
        for (address, bytes) in contents(memory) {
            let mut copy = vec![0; bytes.len()];
            self.memory.read_slice(&mut copy, GuestAddress(address)).unwrap();
            if bytes == copy {
                continue;
            }
            let differs = bytes.iter().zip(&copy).position(|(ours, theirs)| ours != theirs);
            assert_eq!(differs, None, "memory differs at this offset from {address:#x}");
        }
    }

    /// The next chain, or `None` if there is none or the available index is refused.
    fn pop(&mut self) -> Option<Theirs> {
        let chain = self.queue.pop_descriptor_chain(&self.memory)?;
        let head = chain.head_index();
        let (mut buffers, mut ended) = (Vec::new(), false);
        for descriptor in chain {
            buffers.push((descriptor.addr().0, descriptor.len()));
            ended = !descriptor.has_next();
        }
        Some(Theirs { head, buffers, ended })
    }
}

/// All of a guest's memory: addresses and bytes of its regions.
fn contents(memory: &GuestMemory) -> Vec<(u64, Vec<u8>)> {
    let all = |region: &std::sync::Arc<crate::mem::Region>| {
        let mut bytes = vec![0; region.len as usize];
        memory.span(region.guest, region.len as u32, &mut 0).unwrap().read(&mut bytes);
        (region.guest, bytes)
    };
    memory.regions().iter().map(all).collect()
}

/// Buffers as pieces of regions: none empty, none across two.
fn pieces(memory: &GuestMemory, buffers: &[(u64, u32)]) -> Vec<(u64, usize)> {
    let mut pieces = Vec::new();
    for &(mut address, mut left) in buffers {
        while left > 0 {
            let here = memory.span_up_to(address, left).expect("a correct driver's buffer").len();
            pieces.push((address, here));
            (address, left) = (address + here as u64, left - here as u32);
        }
    }
    pieces
}

/// One chain that the driver makes.
#[derive(Debug, Clone)]
struct Shape {
    /// Offset from [`DATA`] and length of each buffer.
    buffers: Vec<(u32, u32)>,
    /// How many of the buffers stand in the ring's own table; the others go into an indirect one, if `indirect`.
    direct: usize,
    indirect: bool,
    /// Offset of the indirect table in its slot.
    table: u64,
    /// What the device says it wrote.
    written: u32,
}

/// What happens between two looks of the devices.
#[derive(Debug, Clone)]
struct Round {
    offered: Vec<Shape>,
    limit: usize,
    given_back: usize,
    flags: u16,
    event: u16,
    arm: bool,
}

/// A run of a ring.
#[derive(Debug, Clone)]
struct Run {
    power: u32,
    base: u16,
    used: u16,
    event_idx: bool,
    /// An odd number: descriptors are used in steps of it, so that chains are not in order.
    stride: u16,
    rounds: Vec<Round>,
}

/// Indirect tables lie from here on, in slots around the border of the two regions for buffers.
const TABLES: u32 = DATA_BYTES as u32 - 2048;
/// How many slots there are: as many tables can be on the ring at once.
const TABLE_SLOTS: u64 = 20;
/// Bytes of a slot: a table of 12 descriptors, and some to lay it at odd addresses.
const TABLE_SLOT_BYTES: u64 = 204;

fn shape() -> impl Strategy<Value = Shape> {
    let end = 2 * DATA_BYTES as u32;
    let one = prop_oneof![
        8 => (0..TABLES - 2048, 1..2048u32),
        2 => (TABLES + 4096..end - 2048, 0..2048u32),
        // Across both regions, where no table of the same chain lies.
        1 => (0..TABLES, Just(end / 2)).prop_map(move |(at, len)| (at, len.min(end - at))),
        1 => (any::<u32>(), Just(0)),
    ];
    let buffers = prop::collection::vec(one, 1..12);
    (buffers, 0..12usize, any::<bool>(), 0..=TABLE_SLOT_BYTES - 192, any::<u32>())
        .prop_map(|(buffers, direct, indirect, table, written)| Shape { buffers, direct, indirect, table, written })
}

fn round() -> impl Strategy<Value = Round> {
    let limit = prop_oneof![Just(usize::MAX), 0..80usize];
    (prop::collection::vec(shape(), 0..40), limit, 0..4usize, 0..2u16, any::<u16>(), any::<bool>()).prop_map(
        |(offered, limit, given_back, flags, event, arm)| Round { offered, limit, given_back, flags, event, arm },
    )
}

fn run() -> impl Strategy<Value = Run> {
    let index = || prop_oneof![any::<u16>(), 65500..=65535u16];
    (0..=10u32, index(), index(), any::<bool>(), any::<u16>(), prop::collection::vec(round(), 1..8)).prop_map(
        |(power, base, used, event_idx, stride, rounds)| Run {
            power,
            base,
            used,
            event_idx,
            stride: stride | 1,
            rounds,
        },
    )
}

/// A correct driver: it uses free descriptors only and takes them back from the used ring.
struct Correct {
    driver: Driver,
    free: Vec<u16>,
    flag: u16,
    /// Chains on the ring, oldest first: their descriptors and whether they have a table.
    held: VecDeque<(Vec<u16>, bool)>,
    /// Tables made so far.
    tables: u64,
}

impl Correct {
    fn new(run: &Run, flag: u16) -> Self {
        let size = 1 << run.power;
        let mut driver = Driver::new(size, run.base);
        driver.config.event_idx = run.event_idx;
        driver.write(driver.config.used + 2, &run.used.to_le_bytes());
        driver.seen_used = run.used;
        let free = (0..size).map(|index| index.wrapping_mul(run.stride) & (size - 1)).collect();
        Self { driver, free, flag, held: VecDeque::new(), tables: 0 }
    }

    /// Makes a chain of `shape` available, if enough descriptors are free.
    fn offer(&mut self, shape: &Shape) -> bool {
        let all: Vec<_> =
            shape.buffers.iter().map(|&(at, len)| buffer(DATA + u64::from(at), len).with(self.flag)).collect();
        let indirect = shape.indirect && self.held.iter().filter(|(_, table)| *table).count() < TABLE_SLOTS as usize;
        let cut = if indirect { shape.direct.min(all.len() - 1) } else { all.len() };
        let (direct, rest) = all.split_at(cut);
        let mut chain = direct.to_vec();
        if cut + usize::from(indirect) > self.free.len() {
            return false;
        }
        if indirect {
            let last = rest.len() as u16 - 1;
            let link = |(at, entry): (u16, &Descriptor)| if at < last { entry.then(at + 1) } else { *entry };
            let table: Vec<_> = (0..).zip(rest).map(link).collect();
            let slot = self.tables % TABLE_SLOTS * TABLE_SLOT_BYTES;
            chain.push(self.driver.set_table(DATA + u64::from(TABLES) + slot + shape.table, &table));
            self.tables += 1;
        }
        let indexes = self.free.split_off(self.free.len() - chain.len());
        for (at, descriptor) in chain.iter().enumerate() {
            let linked = indexes.get(at + 1).map_or(*descriptor, |&next| descriptor.then(next));
            self.driver.set_descriptor(indexes[at], linked);
        }
        self.driver.push(indexes[0]);
        self.held.push_back((indexes, indirect));
        true
    }
}

/// Plays `run` on both devices.
fn play<D: Direction>(run: &Run) {
    let mut correct = Correct::new(run, if D::DEVICE_WRITES { WRITE } else { 0 });
    let mut ring = correct.driver.start();
    let mut reference = Reference::new(&correct.driver);
    let (mut written, mut interrupted) = (VecDeque::new(), false);
    for round in &run.rounds {
        for shape in &round.offered {
            if correct.offer(shape) {
                written.push_back(shape.written);
            }
        }
        let driver = &mut correct.driver;
        driver.set_available_index(driver.available);
        driver.set_flags(round.flags);
        driver.set_used_event(driver.seen_used.wrapping_add(round.event % 16).wrapping_sub(8));
        reference.copy_from(&driver.memory);
        let count = same_chains::<D>(driver, &mut ring, &mut reference, round);
        for _ in 0..count {
            let (indexes, _) = correct.held.pop_front().unwrap();
            let len = written.pop_front().unwrap();
            ring.complete(&Chain::unwalked(indexes[0]), len);
            reference.queue.add_used(&reference.memory, indexes[0], len).unwrap();
            correct.free.extend(indexes);
        }
        let (published, needed) = (ring.publish(), reference.queue.needs_notification(&reference.memory).unwrap());
        let expected = match count {
            0 => None,
            _ if !run.event_idx => Some(round.flags & 1 == 0),
            _ => Some(!std::mem::replace(&mut interrupted, true) || needed),
        };
        assert_eq!(published, expected);
        assert_eq!(correct.driver.take_used().len(), count);
        if round.arm {
            assert_ne!(ring.arm().unwrap(), reference.queue.enable_notification(&reference.memory).unwrap());
        } else {
            ring.disarm();
            reference.queue.disable_notification(&reference.memory).unwrap();
        }
        reference.assert_same_memory(&correct.driver.memory);
    }
}

/// Gathers a batch with both devices and compares; returns how many chains are to be completed.
fn same_chains<D: Direction>(driver: &Driver, ring: &mut SplitRing, reference: &mut Reference, round: &Round) -> usize {
    let mut chains = Chains::new();
    let count = ring.gather::<D>(&driver.memory, round.limit, &mut chains).unwrap();
    for chain in chains.list() {
        let theirs = reference.pop().unwrap();
        assert!(theirs.ended);
        assert_eq!(chain.head, theirs.head);
        assert_eq!(u64::from(chain.bytes), theirs.bytes());
        assert!(!chain.overlong);
        assert_eq!(driver.places(&chains, chain), pieces(&driver.memory, &theirs.buffers));
    }
    let back = round.given_back.min(count);
    ring.give_back(&chains.list()[chains.list().len() - back..]);
    (0..back).for_each(|_| QueueOwnedT::go_to_previous_position(&mut reference.queue));
    assert_eq!(ring.base(), reference.queue.next_avail());
    count - back
}

/// Bytes that a hostile driver changes: offset into the ring's region, and what to write there.
fn scribbles() -> impl Strategy<Value = Vec<(u16, u8)>> {
    prop::collection::vec((any::<u16>(), prop_oneof![any::<u8>(), 0..8u8]), 1..6)
}

/// Plays what a driver offers in one round, with some bytes of the ring changed.
fn spoil(run: &Run, scribbles: &[(u16, u8)]) {
    let mut correct = Correct::new(run, 0);
    let offered = run.rounds.iter().flat_map(|round| &round.offered).filter(|shape| correct.offer(shape)).count();
    let driver = &mut correct.driver;
    driver.set_available_index(driver.available);
    let ring_bytes = 16 * u64::from(driver.config.size) + 2 * u64::from(driver.config.size) + 6;
    for &(at, byte) in scribbles {
        driver.write(driver.config.descriptors + u64::from(at) % ring_bytes, &[byte]);
    }
    let (mut ring, mut reference) = (driver.start(), Reference::new(driver));
    // A spoiled index may offer the same chains over and over; a few batches are enough.
    for _ in 0..offered.div_ceil(8) + 2 {
        let mut chains = Chains::new();
        let result = ring.gather::<Readable>(&driver.memory, usize::MAX, &mut chains);
        for chain in chains.list() {
            let theirs = reference.pop().expect("what ours takes, theirs takes");
            assert_eq!(chain.head, theirs.head);
            if chain.bytes < u32::MAX {
                assert!(theirs.ended, "ours took a chain that theirs cut short");
                assert_eq!(u64::from(chain.bytes), theirs.bytes());
            }
            if !chain.overlong {
                assert_eq!(driver.places(&chains, chain), pieces(&driver.memory, &theirs.buffers));
            }
        }
        match result {
            Ok(0) => assert!(reference.pop().is_none(), "ours takes nothing where theirs takes a chain"),
            Ok(_) => {}
            Err(fault) => return stricter(fault, &mut reference),
        }
    }
}

/// Asserts that `fault` is one that virtio-queue sees as well, by cutting the chain, or one that it does not look for.
fn stricter(fault: RingFault, reference: &mut Reference) {
    let theirs = reference.pop();
    match fault {
        RingFault::AvailableJump { .. } => assert!(theirs.is_none()),
        RingFault::Head { head, .. } | RingFault::Next { head, .. } | RingFault::Loop { head, .. } => {
            let theirs = theirs.unwrap();
            assert_eq!(theirs.head, head);
            assert!(!theirs.ended, "{fault}: theirs has {:?}", theirs.buffers);
        }
        RingFault::Direction { head, .. } | RingFault::Indirect { head, .. } | RingFault::Unmapped { head, .. } => {
            assert_eq!(theirs.unwrap().head, head);
        }
        RingFault::MemoryGone => panic!("the memory is where it was"),
        RingFault::Overrun { .. } => panic!("only a packed ring has it"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    #[cfg_attr(miri, ignore = "virtio-queue's own accesses, and too many of them, are not what miri is for here")]
    fn a_correct_driver_sees_no_difference(run in run()) {
        play::<Readable>(&run);
        play::<Writable>(&run);
    }

    #[test]
    #[cfg_attr(miri, ignore = "as above")]
    fn with_a_spoiled_ring_ours_is_stricter_at_most(run in run(), scribbles in scribbles()) {
        spoil(&run, &scribbles);
    }
}

#[test]
#[cfg_attr(miri, ignore = "virtio-queue's own accesses are not what miri is for here")]
fn the_largest_ring_is_taken_alike() {
    let mut driver = Driver::new(32768, 65535);
    for index in 0..32768 {
        driver.set_descriptor(index, buffer(DATA + u64::from(index), 1 + u32::from(index % 7)));
    }
    driver.offer(&(0..32768).rev().collect::<Vec<_>>());
    let (mut ring, mut reference) = (driver.start(), Reference::new(&driver));
    let round = Round { offered: Vec::new(), limit: 60, given_back: 1, flags: 0, event: 0, arm: false };
    let mut taken = 0;
    while ring.pending().unwrap() > 1 {
        taken += same_chains::<Readable>(&driver, &mut ring, &mut reference, &round);
    }
    assert_eq!(taken, 32767);
}

//! The same buffers offered through a split and a packed ring: the same frames, the same lengths back, and a fault in one
//! where there is one in the other.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::sync::Arc;

use proptest::prelude::*;

use crate::ring::driver::{DATA, Descriptor, Driver, HOLE, INDIRECT, RINGS, WRITE, buffer};
use crate::ring::packed_driver::PackedDriver;
use crate::ring::{Chain, Chains, DeviceRing, Direction, PackedRing, Readable, RingFault, SplitRing, Writable};

/// One frame's buffers: some in the ring itself and then perhaps a table.
#[derive(Debug, Clone)]
struct Offer {
    direct: Vec<Descriptor>,
    table: Vec<Descriptor>,
}

impl Offer {
    fn slots(&self) -> usize {
        self.direct.len() + usize::from(!self.table.is_empty())
    }
}

/// A turn of both sides.
#[derive(Debug, Clone)]
struct Round {
    offers: Vec<Offer>,
    limit: usize,
    given_back: usize,
}

fn buffers(bad: bool) -> impl Strategy<Value = Descriptor> {
    let address = if bad { (DATA - 8..HOLE + 64).boxed() } else { (DATA..HOLE - 4096).boxed() };
    (address, prop_oneof![Just(0u32), 1..100u32, 1000..4096u32]).prop_map(|(address, len)| buffer(address, len))
}

fn rounds(bad: bool) -> impl Strategy<Value = Vec<Round>> {
    let some = |range| prop::collection::vec(buffers(bad), range);
    let offer = prop_oneof![
        4 => some(1..2).prop_map(|direct| Offer { direct, table: Vec::new() }),
        2 => some(1..5).prop_map(|direct| Offer { direct, table: Vec::new() }),
        2 => (some(0..3), some(1..6)).prop_map(|(direct, table)| Offer { direct, table }),
    ];
    let round = (prop::collection::vec(offer, 0..12), 0..70usize, 0..4usize)
        .prop_map(|(offers, limit, given_back)| Round { offers, limit, given_back });
    prop::collection::vec(round, 1..40)
}

/// Both rings and their drivers. Tables lie in memory at places that no buffer has: in the ring's own region, behind it.
struct Pair {
    split: Driver,
    packed: PackedDriver,
    rings: (SplitRing, PackedRing),
    /// Slots that the split ring's table has free, and those of frames that are with the device; and whether these have a table.
    free: VecDeque<u16>,
    held: VecDeque<(Vec<u16>, bool)>,
    tables: u64,
}

const SIZE: u16 = 64;

/// Places for tables. One that the device has is not written over: what there is behind the end of a new one is the packed
/// ring's alone.
const TABLES: u64 = 16;

impl Pair {
    fn new(base: u16) -> Self {
        let (split, packed) = (Driver::new(SIZE, base), PackedDriver::new(SIZE, base & 0x803f));
        let rings = (split.start(), packed.start());
        Self { split, packed, rings, free: (0..SIZE).collect(), held: VecDeque::new(), tables: 0 }
    }

    /// Makes a frame available in both; whether there was room.
    fn offer(&mut self, offer: &Offer, write: u16) -> bool {
        let tables = self.held.iter().filter(|(_, table)| *table).count() as u64;
        let table = !offer.table.is_empty();
        if offer.slots() > self.free.len() || table && tables == TABLES {
            return false;
        }
        let slots: Vec<_> = self.free.drain(..offer.slots()).collect();
        let direct = || offer.direct.iter().map(|descriptor| descriptor.with(write));
        let mut split: Vec<_> = direct().collect();
        let mut packed = split.clone();
        if table {
            self.tables += 1;
            let place = RINGS + 2048 + 96 * (self.tables % TABLES);
            let table: Vec<_> = offer.table.iter().map(|descriptor| descriptor.with(write)).collect();
            split.push(self.split.set_table(place, &linked(&table, &(0..).take(table.len()).collect::<Vec<_>>())));
            for (at, entry) in table.iter().enumerate() {
                self.packed.set_entry(place + 16 * at as u64, *entry);
            }
            packed.push(buffer(place, 16 * table.len() as u32).with(INDIRECT));
        }
        for (descriptor, slot) in linked(&split, &slots).into_iter().zip(&slots) {
            self.split.set_descriptor(*slot, descriptor);
        }
        self.split.offer(&slots[..1]);
        self.packed.offer(&packed, slots[0]);
        self.held.push_back((slots, table));
        true
    }

    /// One turn of the device in both; asserts that they are alike.
    fn turn<D: Direction>(&mut self, round: &Round) -> Result<(), RingFault> {
        let memories = (Arc::clone(&self.split.memory), Arc::clone(&self.packed.memory));
        let (mut a, mut b) = (Chains::new(), Chains::new());
        let one = self.rings.0.gather::<D>(&memories.0, round.limit, &mut a);
        let other = self.rings.1.gather::<D>(&memories.1, round.limit, &mut b);
        assert_eq!(one.is_ok(), other.is_ok(), "{one:?} {other:?}");
        assert_eq!(a.list().len(), b.list().len());
        for (x, y) in a.list().iter().zip(b.list()) {
            assert_eq!((x.head, x.bytes, x.overlong), (y.head, y.bytes, y.overlong));
            assert_eq!(self.split.places(&a, x), self.packed.places(&b, y));
        }
        let keep = a.list().len() - round.given_back.min(a.list().len());
        self.rings.0.give_back(&a.list()[keep..]);
        self.rings.1.give_back(&b.list()[keep..]);
        finish(&mut self.rings.0, &a.list()[..keep]);
        finish(&mut self.rings.1, &b.list()[..keep]);
        let used: Vec<_> = self.packed.take_used().into_iter().map(|(id, len)| (id.into(), len)).collect();
        assert_eq!(self.split.take_used(), used);
        assert_eq!(used.len(), keep);
        (0..keep).for_each(|_| self.free.extend(self.held.pop_front().unwrap().0));
        one.map(|_| ())
    }
}

fn finish<R: DeviceRing>(ring: &mut R, chains: &[Chain]) {
    chains.iter().for_each(|chain| ring.complete(chain, chain.bytes));
    assert_eq!(ring.publish().is_some(), !chains.is_empty());
}

/// The same descriptors, each followed by the next one of `slots`.
fn linked(descriptors: &[Descriptor], slots: &[u16]) -> Vec<Descriptor> {
    let next = slots.iter().skip(1).map(Some).chain([None]);
    descriptors.iter().zip(next).map(|(d, next)| next.map_or(*d, |&next| d.then(next))).collect()
}

fn play<D: Direction>(rounds: &[Round], base: u16) -> Result<(), RingFault> {
    let mut pair = Pair::new(base);
    for round in rounds {
        for offer in &round.offers {
            pair.offer(offer, if D::DEVICE_WRITES { WRITE } else { 0 });
        }
        pair.turn::<D>(round)?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: if cfg!(miri) { 2 } else { 256 }, ..ProptestConfig::default() })]

    #[test]
    fn frames_fare_alike_in_both_forms(rounds in rounds(false), base in any::<u16>()) {
        prop_assert_eq!(play::<Readable>(&rounds, base), Ok(()));
        prop_assert_eq!(play::<Writable>(&rounds, base), Ok(()));
    }

    #[test]
    fn faults_are_found_alike_in_both_forms(rounds in rounds(true), base in any::<u16>()) {
        let _ = play::<Readable>(&rounds, base);
        let _ = play::<Writable>(&rounds, base);
    }
}

//! Rules 1 and 15: whatever bytes are in the ring's memory, and whoever changes them meanwhile, nothing panics, every walk
//! ends, and every span lies in memory that the VM shares.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use crate::mem::GuestMemory;
use crate::ring::driver::{DATA, DATA_BYTES, Descriptor, Driver, INDIRECT, MORE, NEXT, RINGS, WRITE, buffer};
use crate::ring::exercise::{check_chain, exercise, exercise_packed};
use crate::ring::{Chains, DeviceRing, Direction, Readable, RingFault, SplitRing, Writable};

/// Fewer cases where each takes seconds.
fn config() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, cases: if cfg!(miri) { 4 } else { 512 }, ..ProptestConfig::default() }
}

/// The operations of an exercise, more often gathering than anything else.
fn operations() -> impl Strategy<Value = Vec<u8>> {
    let operation = prop_oneof![
        4 => any::<u8>().prop_map(|limit| vec![0, limit]),
        3 => any::<u8>().prop_map(|more| vec![7, more % 70]),
        3 => prop::collection::vec(any::<u8>(), 1..24),
        1 => any::<[u8; 3]>().prop_map(|[count, a, b]| vec![1, count, a, b, 2]),
    ];
    prop::collection::vec(operation, 1..20).prop_map(|all| all.concat())
}

/// Descriptors that are near to good ones.
fn descriptor() -> impl Strategy<Value = Vec<u8>> {
    let address = prop_oneof![0..0x20_9000u64, 0x1f_fff0..0x20_0010u64, any::<u64>(), (u64::MAX - 5000)..=u64::MAX];
    let len = prop_oneof![0..2000u32, (0..64u32).prop_map(|count| 16 * count), any::<u32>()];
    (address, len, prop_oneof![0..8u16, Just(0), Just(NEXT)], 0..40u16).prop_map(|(address, len, flags, next)| {
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        [address.to_le_bytes(), rest.to_le_bytes()].concat()
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn rule_15_any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..6000)) {
        exercise(&bytes);
        exercise_packed(&bytes);
    }

    #[test]
    fn rule_15_descriptors_near_to_good_ones_are_survived(
        (flags, base) in (0..8u8, any::<u16>()),
        table in prop::collection::vec(descriptor(), 32),
        heads in prop::collection::vec(0..34u8, 32),
        operations in operations(),
    ) {
        // 32 descriptors at 0, the available ring at 512, the used ring at 1024.
        let [low, high] = base.to_le_bytes();
        let mut bytes = vec![5, flags, low, high, 0, 1, 2, 0];
        bytes.extend((512 + 4 + 64u16).to_le_bytes());
        bytes.extend(table.concat());
        bytes.extend([0, 0, low, high]);
        bytes.extend(heads.iter().flat_map(|&head| [head, 0]));
        bytes.extend(&operations);
        exercise(&bytes);
        // As a packed ring of 31 the table's last descriptor lies behind it; event suppression lies where the rings were.
        let mut packed = vec![31, flags | low & 8, low, high, 0, 1, 2, 0];
        packed.extend((512u16).to_le_bytes());
        packed.extend(table.concat());
        packed.extend(operations);
        exercise_packed(&packed);
    }
}

/// Every file of `fuzz/seeds/ring` and `fuzz/seeds/packed`: cases that were thought of, and those that a fuzzer found.
#[test]
#[cfg_attr(miri, ignore = "reads files, which its isolation forbids")]
fn rule_15_seeds_are_survived() {
    let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds");
    for (target, exercise) in [("ring", exercise as fn(&[u8]) -> _), ("packed", exercise_packed)] {
        let mut count = 0;
        for entry in std::fs::read_dir(format!("{seeds}/{target}")).unwrap() {
            let path = entry.unwrap().path();
            let fault = exercise(&std::fs::read(&path).unwrap());
            // A name that begins with "fault-" promises one, with "corpus-" nothing, and any other none.
            let name = path.file_name().unwrap().to_str().unwrap();
            let kept = fault.is_some() == name.starts_with("fault-") || name.starts_with("corpus-");
            assert!(kept, "{name}: {fault:?}");
            count += 1;
        }
        assert!(count >= 10, "the seeds are gone");
    }
}

/// Runs `hostile` again and again in a thread of its own while `device` runs.
fn beside(hostile: impl FnMut() + Send, device: impl FnOnce()) {
    /// Ends the other thread also when an assertion fails in this one.
    struct End<'a>(&'a AtomicBool);
    impl Drop for End<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (mut hostile, done) = (hostile, AtomicBool::new(false));
    std::thread::scope(|scope| {
        let _end = End(&done);
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                hostile();
            }
        });
        device();
    });
}

/// Gathers once and asserts what must hold; a fault starts the ring anew.
fn turn<D: Direction>(driver: &Driver, ring: &mut SplitRing) -> Result<usize, RingFault> {
    let mut chains = Chains::new();
    let result = ring.gather::<D>(&driver.memory, usize::MAX, &mut chains);
    for chain in chains.list() {
        check_chain(&driver.memory, &chains, chain);
        chains.pieces(chain).iter().for_each(|piece| _ = piece.read(&mut [0; 64]));
        ring.complete(chain, chain.bytes);
    }
    ring.publish();
    if result.is_err() {
        let config = crate::ring::RingConfig { base: ring.base(), ..driver.config };
        *ring = SplitRing::start(config, Arc::clone(&driver.memory)).unwrap();
    }
    result
}

#[test]
#[cfg_attr(miri, ignore = "races on purpose")]
fn rule_01_a_descriptor_that_changes_under_the_walk_is_read_once() {
    let mut driver = Driver::new(4, 0);
    // Each is good; the address of one with the length of the other is not mapped.
    let (long, last) = (buffer(DATA, DATA_BYTES as u32), buffer(MORE + DATA_BYTES as u64 - 16, 16));
    driver.set_descriptor(0, long);
    let table = driver.set_table(DATA + 64, &[long]);
    driver.set_descriptor(1, table);
    let memory = Arc::clone(&driver.memory);
    let at = |address: u64| memory.span(address, 16, &mut 0).unwrap();
    let (direct, indirect) = (at(RINGS), at(DATA + 64));
    let flip = |descriptor: Descriptor| {
        for span in [direct, indirect] {
            span.write(&descriptor.address.to_le_bytes());
            span.split_at(8).1.write(&descriptor.len.to_le_bytes());
        }
    };
    beside(
        || [long, last].into_iter().for_each(flip),
        || {
            let mut ring = driver.start();
            for _ in 0..10_000 {
                driver.offer(&[0, 1]);
                while let Ok(1..) = turn::<Readable>(&driver, &mut ring) {}
                driver.available = ring.base();
            }
        },
    );
}

/// A small generator of numbers, so that the hostile thread is fast and needs no crate.
fn xorshift(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Writes something almost sensible somewhere into the ring or into the tables at the beginning of [`DATA`].
fn scribble(memory: &GuestMemory, state: &mut u64) {
    let (place, value) = (xorshift(state), xorshift(state));
    let target = if place & 1 == 0 { RINGS } else { DATA } + (place >> 8) % 1024;
    let word = match place >> 1 & 7 {
        0 => value,
        1 => DATA + value % (2 * DATA_BYTES as u64 + 64),
        2 => DATA,
        3..6 => (value % 512) | (value & (u64::from(NEXT | WRITE | INDIRECT) << 32)) | (value & (31 << 48)),
        _ => value % 64,
    };
    let target = if place & 32 == 0 { target & !7 } else { target };
    memory.span(target, 8, &mut 0).unwrap().write(&word.to_le_bytes());
}

#[test]
#[cfg_attr(miri, ignore = "races on purpose")]
fn rule_01_a_ring_that_is_scribbled_over_meanwhile_is_survived() {
    let driver = Driver::with_event_index(32, 65000);
    let (memory, mut state) = (Arc::clone(&driver.memory), 0x9e37_79b9_7f4a_7c15);
    beside(
        || scribble(&memory, &mut state),
        || {
            let (mut ring, mut chains, mut faults) = (driver.start(), 0, 0);
            for round in 0..60_000u16 {
                if round % 64 == 0 {
                    // Good again, or all that is left in the end are faults; and the other thread has its turn on one CPU.
                    (0..32).for_each(|index| driver.set_descriptor(index, buffer(DATA + 2048, 64)));
                    (0..32).for_each(|slot| driver.write(driver.config.available + 4 + 2 * slot, &[slot as u8, 0]));
                    std::thread::yield_now();
                }
                driver.set_available_index(ring.base().wrapping_add(round % 5));
                let readable = round & 512 == 0;
                let turned =
                    if readable { turn::<Readable>(&driver, &mut ring) } else { turn::<Writable>(&driver, &mut ring) };
                match turned {
                    Ok(count) => chains += count,
                    Err(_) => faults += 1,
                }
                _ = ring.arm();
            }
            assert!(chains > 0 && faults > 0, "{chains} chains, {faults} faults");
        },
    );
}

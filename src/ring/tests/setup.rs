//! How a ring starts: which sizes, places and alignments are refused, and what a change of the memory map does to it.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use crate::mem::{GuestMemory, Region};
use crate::ring::driver::{DATA, Driver, HOLE, MORE, buffer, memory};
use crate::ring::exercise::mapping;
use crate::ring::{DeviceRing, Readable, RingError, RingFault, SplitRing};

#[test]
fn only_powers_of_two_up_to_32768_are_sizes() {
    let driver = Driver::new(256, 0);
    for size in [0, 3, 255, 257, 32769, 49152, 65535] {
        let mut config = driver.config;
        config.size = size;
        assert_eq!(SplitRing::start(config, memory(256)).unwrap_err(), RingError::Size(size));
    }
    for power in 0..=15 {
        assert_eq!(Driver::new(1 << power, 0).start().size(), 1 << power);
    }
}

#[test]
fn every_area_must_lie_in_one_region_whole() {
    let driver = Driver::new(256, 0);
    // One byte too far, across two adjoining regions, in a hole, at the end of all addresses.
    for address in [HOLE - 16, MORE - 16, HOLE, 0, u64::MAX - 15, !4095] {
        for (area, len) in [("descriptor", 4096), ("available", 518), ("used", 2054)] {
            let mut config = driver.config;
            match area {
                "descriptor" => config.descriptors = address,
                "available" => config.available = address,
                _ => config.used = address,
            }
            let error = SplitRing::start(config, Arc::clone(&driver.memory)).unwrap_err();
            assert_eq!(error, RingError::Unmapped { area, address, len });
        }
    }
    let mut config = driver.config;
    config.used = HOLE - 2056;
    assert!(SplitRing::start(config, Arc::clone(&driver.memory)).is_ok(), "the last byte of a region is in it");
}

#[test]
fn areas_must_be_aligned() {
    let driver = Driver::new(16, 0);
    let refused = |config| SplitRing::start(config, Arc::clone(&driver.memory)).unwrap_err();
    let (mut table, mut available, mut used) = (driver.config, driver.config, driver.config);
    table.descriptors = DATA + 8;
    available.available = DATA + 1;
    used.used = DATA + 2;
    let misaligned = |area, address, align| RingError::Misaligned { area, address, align };
    assert_eq!(refused(table), misaligned("descriptor", DATA + 8, 16));
    assert_eq!(refused(available), misaligned("available", DATA + 1, 2));
    assert_eq!(refused(used), misaligned("used", DATA + 2, 4));
}

#[test]
fn a_map_without_the_ring_stops_it_and_one_with_it_goes_on() {
    let mut driver = Driver::new(16, 65535);
    let mut ring = driver.start();
    driver.offer_one(buffer(DATA, 64));
    let regions = driver.memory.regions();
    let without = Arc::new(GuestMemory::new(regions[1..].to_vec()));
    assert_eq!(ring.set_memory(&without), Err(RingFault::MemoryGone));
    let moved = Region::new(0, 0, mapping(4096));
    let more = Arc::new(GuestMemory::new(regions.iter().cloned().chain([Arc::new(moved)]).collect()));
    ring.set_memory(&more).unwrap();
    let chains = driver.gather::<Readable>(&mut ring).unwrap();
    assert_eq!(driver.places(&chains, &chains.list()[0]), [(DATA, 64)]);
    assert_eq!(ring.base(), 0);
}

//! A front end that sends any messages with any descriptors: `port::vnic::exercise` says how the bytes are read and what
//! is asserted of every answer and of what is left afterwards.

#![no_main]

use std::sync::Once;

use libfuzzer_sys::fuzz_target;
use linecard::port::vnic::exercise::exercise;

/// Descriptors of this process.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc is there").count()
}

/// What a process opens for memory of its first front end, and keeps.
static FIRST: Once = Once::new();

fuzz_target!(|bytes: &[u8]| {
    FIRST.call_once(|| drop(exercise(include_bytes!("../seeds/control/up-exchange"))));
    let before = descriptors();
    exercise(bytes);
    assert_eq!(descriptors(), before, "descriptors of the front end stay open");
});

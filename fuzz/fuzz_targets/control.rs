//! A front end that sends any messages with any descriptors: `port::vnic::exercise` says how the bytes are read and what
//! is asserted of every answer and of what is left afterwards.

#![no_main]

use libfuzzer_sys::fuzz_target;

/// Descriptors of this process.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc is there").count()
}

fuzz_target!(|bytes: &[u8]| {
    let before = descriptors();
    linecard::port::vnic::exercise::exercise(bytes);
    assert_eq!(descriptors(), before, "descriptors of the front end stay open");
});

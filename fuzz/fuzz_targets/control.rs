//! A front end that sends any messages with any descriptors: `port::vnic::exercise` says how the bytes are read and what
//! is asserted of every answer and of what is left afterwards.

#![no_main]

use std::sync::Once;
use std::time::{Duration, Instant};

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
    // Whoever watches how long a thread is held up by a front end's memory has a file of /proc open for a moment, at any time.
    let end = Instant::now() + Duration::from_secs(10);
    while descriptors() > before && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(descriptors() <= before, "descriptors of the front end stay open");
});

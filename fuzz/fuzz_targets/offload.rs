//! Any virtio-net header before any frame, to any receiver: see `linecard::offload::exercise`, which asserts.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| linecard::offload::exercise::exercise(input));

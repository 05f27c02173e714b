//! A packed ring whose memory, setting and operations are any bytes: `ring::exercise` says how they are read and what is
//! asserted of every span, every chain and every place in the ring.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // A fault is a good end; what matters is that there is one.
    let _ = linecard::ring::exercise::exercise_packed(bytes);
});

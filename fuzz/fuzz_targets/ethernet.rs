//! Frames of any bytes through the Ethernet parser and the switch: `switch::exercise` says how the bytes are read and what is
//! asserted.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| linecard::switch::exercise::exercise(bytes));

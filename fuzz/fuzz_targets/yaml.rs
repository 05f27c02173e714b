//! A configuration file of any bytes: `config::exercise` says what is asserted of every plan and every diagnostic.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // A refusal is a good end; what matters is that it can be shown.
    let _ = linecard::config::exercise::exercise(bytes);
});

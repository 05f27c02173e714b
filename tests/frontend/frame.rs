//! Ethernet frames whose every byte follows from a seed, so that the receiver can check all of them.

use std::fmt::Write as _;

/// EtherType of test frames: IEEE 802 local experimental 1.
pub const ETHERTYPE: u16 = 0x88b5;
/// The shortest frame that is one: two addresses and an EtherType.
pub const SHORTEST: usize = 14;
pub const BROADCAST: [u8; 6] = [0xff; 6];

/// A locally administered address, one per number.
pub fn mac(number: u32) -> [u8; 6] {
    let [a, b, c, d] = number.to_be_bytes();
    [0x02, 0x11, a, b, c, d]
}

/// A frame of `len` bytes, [`SHORTEST`] at least, with a payload that `seed` determines.
pub fn frame(to: [u8; 6], from: [u8; 6], len: usize, seed: u64) -> Vec<u8> {
    assert!(len >= SHORTEST, "a frame of {len} bytes has no header");
    let mut frame = Vec::with_capacity(len.next_multiple_of(8) + 8);
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&from);
    frame.extend_from_slice(&ETHERTYPE.to_be_bytes());
    // splitmix64: any byte lost, moved or repeated shows.
    let mut state = seed;
    while frame.len() < len {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mix = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mix = (mix ^ (mix >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        frame.extend_from_slice(&(mix ^ (mix >> 31)).to_le_bytes());
    }
    frame.truncate(len);
    frame
}

/// Panics with the first difference unless both are the same frame.
#[track_caller]
pub fn assert_same(got: &[u8], sent: &[u8], what: &str) {
    if got == sent {
        return;
    }
    let at = got.iter().zip(sent).position(|(a, b)| a != b).unwrap_or(got.len().min(sent.len()));
    let hex = |bytes: &[u8]| {
        bytes.iter().skip(at).take(16).fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x} ");
            text
        })
    };
    panic!(
        "{what}: got {} bytes, sent {}; from byte {at}: {}instead of {}",
        got.len(),
        sent.len(),
        hex(got),
        hex(sent)
    );
}

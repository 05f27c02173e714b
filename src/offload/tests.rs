//! Every rule of [`super::admit`], and the rewrite against an implementation of its own that is as plain as can be.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::exercise::{Admitted, exercise, send};
use super::sketch::{Made, Sketch, naive_sum, sketches};
use super::{Rewrite, admit};
use crate::frame::{Batch, Needs, heads};
use crate::limits::{GSO_SIZE_MIN, USO_SEGMENTS};
use crate::mem::Span;
use crate::verdict::{DropReason, Verdict};
use crate::wire::virtio_net::{GSO_ECN, GSO_NONE, GSO_TCPV6, GSO_UDP_L4, NEEDS_CSUM, VnetHeader};

/// The segments of `made`, made one by one from its parts.
fn segments(sketch: &Sketch, made: &Made) -> Vec<Vec<u8>> {
    let chunks: Vec<&[u8]> = sketch.payload.chunks(usize::from(sketch.gso_size)).collect();
    let mut segments = Vec::new();
    for (index, chunk) in chunks.iter().enumerate() {
        let (first, last) = (index == 0, index + 1 == chunks.len());
        let mut flags = sketch.flags;
        if !first {
            flags &= 0x7f;
        }
        if !last {
            flags &= !0x09;
        }
        let one = Sketch {
            payload: chunk.to_vec(),
            flags,
            sequence: sketch.sequence.wrapping_add(index as u32 * u32::from(sketch.gso_size)),
            identification: sketch.identification.wrapping_add(index as u16),
            ..sketch.clone()
        };
        let mut bytes = one.make().bytes;
        if !sketch.v6 {
            let header = &mut bytes[made.network..made.transport];
            header[10..12].fill(0);
            let sum = !(naive_sum(header, 0) as u16);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        let offset = if sketch.udp { 6 } else { 16 };
        complete(&mut bytes, made.transport, offset);
        let checksum = &mut bytes[made.transport + offset..][..2];
        if !sketch.udp && checksum == [0xff, 0xff] {
            checksum.fill(0);
        }
        segments.push(bytes);
    }
    segments
}

/// Completes a checksum as a receiver of a partial one would.
fn complete(bytes: &mut [u8], start: usize, offset: usize) {
    let sum = match !(naive_sum(&bytes[start..], 0) as u16) {
        0 => 0xffff,
        sum => sum,
    };
    bytes[start + offset..][..2].copy_from_slice(&sum.to_be_bytes());
}

fn all() -> Needs {
    Needs::ALL
}

fn dropped(admitted: &Admitted) -> Option<DropReason> {
    match admitted.verdict {
        Verdict::Drop(reason) => Some(reason),
        _ => None,
    }
}

/// Sends a frame of the default sketch with a header that `change` has changed.
fn lie(change: impl FnOnce(&mut VnetHeader)) -> Admitted {
    let mut made = Sketch::default().make();
    change(&mut made.header);
    send(&made.bytes, made.header, all(), Needs::NONE, 4096)
}

#[test]
fn a_legal_frame_is_admitted_with_a_header_of_our_own() {
    let sketch = Sketch { flags: 0x90, ..Sketch::default() };
    let made = sketch.make();
    let sent = send(&made.bytes, made.header, all(), Needs::NONE, 4096);
    let expected = VnetHeader { hdr_len: 66, num_buffers: 1, ..made.header };
    assert_eq!((sent.verdict, sent.header), (Verdict::Pending, expected));
    assert_eq!(sent.needs, Needs::CSUM.and(Needs::TSO4).and(Needs::ECN));
    assert_eq!((sent.wire_len, sent.frames.len()), (66 + 1448, 4));
}

#[test]
fn a_header_that_asks_for_nothing_is_plain_whatever_else_it_says() {
    let sent = lie(|header| (header.flags, header.gso_type) = (0xfe, GSO_NONE));
    assert_eq!((sent.verdict, sent.needs, sent.header), (Verdict::Pending, Needs::NONE, VnetHeader::PLAIN));
}

#[test]
fn what_was_not_negotiated_is_refused() {
    let refused = Some(DropReason::OffloadNotNegotiated);
    let sketches = [
        (Sketch::default(), Needs::TSO4),
        (Sketch { v6: true, ..Sketch::default() }, Needs::TSO6),
        (Sketch { udp: true, ..Sketch::default() }, Needs::USO4.and(Needs::USO6)),
        (Sketch { flags: 0x80, ..Sketch::default() }, Needs::ECN),
        (Sketch::default(), Needs::CSUM),
    ];
    for (sketch, needed) in sketches {
        let made = sketch.make();
        let without = Needs::from_bits(all().bits() & !needed.bits());
        assert_eq!(dropped(&send(&made.bytes, made.header, without, all(), 4096)), refused, "{sketch:?}");
        assert_eq!(dropped(&send(&made.bytes, made.header, all(), all(), 4096)), None);
    }
    for never in [2, 3, 6, 0x7f, 3 | GSO_ECN] {
        assert_eq!(dropped(&lie(|header| header.gso_type = never)), refused, "type {never}");
    }
}

#[test]
fn a_checksum_lies_behind_the_addresses_and_within_the_frame() {
    let invalid = Some(DropReason::ChecksumInvalid);
    let len = Sketch::default().make().bytes.len() as u16;
    let at = |start, offset| {
        lie(|header| (header.gso_type, header.csum_start, header.csum_offset) = (GSO_NONE, start, offset))
    };
    for (start, offset) in [(0, 16), (13, 16), (len - 17, 16), (len, 0), (0xffff, 0xffff), (34, len - 35), (34, 0xffff)]
    {
        assert_eq!(dropped(&at(start, offset)), invalid, "{start} + {offset} of {len}");
    }
    for (start, offset) in [(14, 0), (14, 16), (len - 18, 16), (34, len - 36)] {
        let sent = at(start, offset);
        assert_eq!((dropped(&sent), sent.frames.len()), (None, 1), "{start} + {offset} of {len}");
        assert_eq!(sent.needs.met_by(all()), offset == 16, "an unusual place is left to no receiver");
    }
}

#[test]
fn segmentation_has_to_be_possible() {
    let invalid = Some(DropReason::GsoInvalid);
    assert_eq!(dropped(&lie(|header| header.flags = 0)), invalid, "no checksum asked for");
    assert_eq!(dropped(&lie(|header| header.gso_type = GSO_ECN)), invalid, "ECN of nothing");
    assert_eq!(dropped(&lie(|header| header.gso_type = GSO_UDP_L4 | GSO_ECN)), invalid, "ECN of UDP");
    for size in [0, 1, GSO_SIZE_MIN - 1] {
        assert_eq!(dropped(&lie(|header| header.gso_size = size)), invalid, "size {size}");
    }
    assert_eq!(dropped(&lie(|header| header.gso_size = GSO_SIZE_MIN)), None);
    for other in [GSO_TCPV6, GSO_UDP_L4] {
        assert_eq!(dropped(&lie(|header| header.gso_type = other)), invalid, "type {other} of TCP over IPv4");
    }
    for (start, offset) in [(35, 16), (33, 16), (34, 6), (14, 16)] {
        let sent = lie(|header| (header.csum_start, header.csum_offset) = (start, offset));
        assert_eq!(dropped(&sent), invalid, "the checksum is elsewhere: {start} + {offset}");
    }
}

#[test]
fn the_frame_has_to_be_what_its_type_says() {
    let made = Sketch::default().make();
    let with = |at: usize, byte: u8| {
        let mut bytes = made.bytes.clone();
        bytes[at] = byte;
        dropped(&send(&bytes, made.header, all(), all(), 4096))
    };
    let invalid = Some(DropReason::GsoInvalid);
    assert_eq!(with(0, 0x50), None);
    for (at, byte, what) in [
        (13, 6, "not IP"),
        (14, 0x55, "IP of another version"),
        (14, 0x44, "an IP header of 16 bytes"),
        (14, 0x46, "options where TCP is said to be"),
        (20, 0x20, "a fragment with more to come"),
        (21, 1, "a later fragment"),
        (23, 17, "UDP"),
        (46, 0x40, "a TCP header of 16 bytes"),
    ] {
        assert_eq!(with(at, byte), invalid, "{what}");
    }
    let cut = |len: usize| dropped(&send(&made.bytes[..len], made.header, all(), all(), 4096));
    assert_eq!((cut(52), cut(65), cut(66)), (invalid, invalid, None), "TCP's header has to be there");
    let six = Sketch { v6: true, network_options: vec![0], ..Sketch::default() }.make();
    let mut fragment = six.bytes.clone();
    fragment[14 + 6] = 44;
    assert_eq!(dropped(&send(&fragment, six.header, all(), all(), 4096)), invalid);
}

#[test]
fn a_frame_of_one_segment_is_not_segmented() {
    for len in [0, 1, 1448, 1449] {
        let made = Sketch { payload: vec![7; len], ..Sketch::default() }.make();
        let sent = send(&made.bytes, made.header, all(), Needs::NONE, 4096);
        assert_eq!((sent.needs.is_gso(), sent.frames.len()), (len > 1448, 1 + len / 1449), "{len}");
        assert_eq!(sent.header.gso_size, if len > 1448 { 1448 } else { 0 });
    }
}

#[test]
fn an_ip_packet_has_at_most_64_kib() {
    let made = |len| Sketch { udp: true, payload: vec![1; len], ..Sketch::default() }.make();
    let sent = |made: &Made| dropped(&send(&made.bytes, made.header, all(), all(), 4096));
    assert_eq!(sent(&made(65_535 - 28)), None);
    assert_eq!(sent(&made(65_535 - 27)), Some(DropReason::GsoInvalid));
}

#[test]
fn headers_beyond_the_head_are_left_to_no_receiver_and_found_by_the_rewrite() {
    let sketch = Sketch { v6: true, network_options: vec![3, 3], ..Sketch::default() };
    let made = sketch.make();
    assert!(made.payload > 116);
    let sent = send(&made.bytes, made.header, all(), all().within(Needs::TSO6), 4096);
    assert!(!sent.needs.met_by(all()));
    let frames: Vec<_> = sent.frames.into_iter().map(|(_, bytes)| bytes).collect();
    assert_eq!(frames, segments(&sketch, &made));
    // Those that are not what was said, and those that go on for ever, are not admitted.
    let mut wrong = made.bytes.clone();
    wrong[made.transport + 12] = 0x10;
    let endless = Sketch { v6: true, network_options: vec![20, 20], ..Sketch::default() }.make();
    for (bytes, header) in [(wrong, made.header), (endless.bytes, endless.header)] {
        let sent = send(&bytes, header, all(), Needs::NONE, 4096);
        assert_eq!(sent.verdict, Verdict::Drop(DropReason::GsoInvalid));
    }
}

#[test]
fn headers_that_grow_after_the_mtu_was_looked_at_are_refused() {
    let made = Sketch { v6: true, network_options: vec![7], transport_options: 0, ..Sketch::default() }.make();
    let (mut memory, mut heads) = (made.bytes.clone(), heads());
    let span = Span::from_buffer(&mut memory);
    let mut batch = Batch::new(&mut heads, 0);
    admit(&mut batch, made.bytes.len(), &[span], &made.header.to_bytes(), all());
    assert_eq!(batch.frames()[0].wire_len(batch.head(0)) as usize, made.payload + 1448);
    assert!(Rewrite::of(&batch, 0, Needs::NONE).is_ok());
    // Its sender makes 60 bytes of TCP's 20.
    span.split_at(made.transport + 12).1.write(&[0xf0]);
    assert_eq!(Rewrite::of(&batch, 0, Needs::NONE).unwrap_err(), DropReason::GsoInvalid);
}

#[test]
fn datagrams_may_be_short_and_there_are_not_many() {
    let sketch = |datagrams| Sketch { udp: true, gso_size: 10, payload: vec![7; 10 * datagrams], ..Sketch::default() };
    let made = sketch(USO_SEGMENTS).make();
    let sent = send(&made.bytes, made.header, all(), Needs::NONE, 700);
    let frames: Vec<_> = sent.frames.into_iter().map(|(_, bytes)| bytes).collect();
    assert_eq!(frames, segments(&sketch(USO_SEGMENTS), &made));
    let made = sketch(USO_SEGMENTS + 1).make();
    let sent = send(&made.bytes, made.header, all(), Needs::NONE, 700);
    assert_eq!(sent.verdict, Verdict::Drop(DropReason::GsoInvalid));
}

#[test]
fn a_receiver_that_completes_checksums_gets_partial_ones() {
    for (v6, udp) in [(false, false), (false, true), (true, false), (true, true)] {
        let sketch = Sketch { v6, udp, ..Sketch::default() };
        let made = sketch.make();
        let sent = send(&made.bytes, made.header, all(), Needs::CSUM, 700);
        let mut frames = Vec::new();
        for (header, mut bytes) in sent.frames {
            let place = (header.csum_start, header.csum_offset);
            assert_eq!((header.flags, place), (NEEDS_CSUM, (made.header.csum_start, made.header.csum_offset)));
            complete(&mut bytes, made.transport, usize::from(header.csum_offset));
            frames.push(bytes);
        }
        assert_eq!(frames, segments(&sketch, &made));
    }
}

#[test]
fn seeds_are_survived() {
    let mut count = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/offload")).unwrap() {
        exercise(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count >= 10, "the seeds are gone");
}

proptest! {
    #[test]
    fn segments_are_those_of_a_plain_implementation(sketch in sketches(), piece in 200..5000usize) {
        let made = sketch.make();
        prop_assume!(made.payload <= 256);
        prop_assume!(!sketch.udp || sketch.payload.len() <= usize::from(sketch.gso_size) * USO_SEGMENTS);
        let sent = send(&made.bytes, made.header, all(), Needs::NONE, piece);
        prop_assert_eq!(sent.verdict, Verdict::Pending);
        let frames: Vec<_> = sent.frames.into_iter().map(|(_, bytes)| bytes).collect();
        if sent.needs.is_gso() {
            prop_assert_eq!(frames, segments(&sketch, &made));
        } else {
            prop_assert!(sketch.payload.len() <= usize::from(sketch.gso_size));
            let mut whole = made.bytes.clone();
            complete(&mut whole, made.transport, usize::from(made.header.csum_offset));
            prop_assert_eq!(frames, [whole]);
        }
    }

    #[test]
    fn any_header_before_any_frame(input in prop::collection::vec(any::<u8>(), 0..300)) {
        exercise(&input);
    }

    #[test]
    fn any_lie_about_a_legal_frame(
        sketch in sketches(),
        (may, accepts) in any::<(u8, u8)>(),
        bytes in prop::collection::vec((0..160usize, any::<u8>()), 0..4),
        field in 0..24usize,
        value in any::<u8>(),
    ) {
        let mut made = sketch.make();
        for (at, byte) in bytes {
            if let Some(place) = made.bytes.get_mut(at) {
                *place = byte;
            }
        }
        let mut header = made.header.to_bytes();
        if let Some(place) = header.get_mut(field) {
            *place = value;
        }
        let accepts = Needs::from_bits(accepts).within(all());
        send(&made.bytes, VnetHeader::from_bytes(&header), Needs::from_bits(may).within(all()), accepts, 1000);
    }
}

//! What merges and what does not. That what merged can be segmented into what was sent is asserted by [`merge`].

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::exercise::merge;
use crate::frame::Needs;
use crate::offload::exercise::send;
use crate::offload::sketch::{Made, Sketch, naive_sum, sketches};
use crate::wire::virtio_net::{GSO_NONE, GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM, VnetHeader};

/// The frames that a sender makes that cannot segment, and completes checksums or leaves them out.
fn segments(made: &Made, partial: bool) -> Vec<(VnetHeader, Vec<u8>)> {
    let accepts = if partial { Needs::CSUM } else { Needs::NONE };
    send(&made.bytes, made.header, Needs::ALL, accepts, 4096).frames
}

/// Which frames come out together.
fn groups(frames: &[(VnetHeader, Vec<u8>)]) -> Vec<Vec<u8>> {
    merge(frames, Needs::ALL, 1500).into_iter().map(|(indices, ..)| indices).collect()
}

/// Sets a number in frame `index` and corrects IPv4's checksum and, of complete frames, TCP's.
fn change(frames: &mut [(VnetHeader, Vec<u8>)], index: usize, at: usize, number: u16) {
    let bytes = &mut frames[index].1;
    let old = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
    bytes[at..at + 2].copy_from_slice(&number.to_be_bytes());
    // RFC 1624: HC' = ~(~HC + ~m + m').
    for (range, field) in [(14..34, 24), (26..usize::MAX, 50)] {
        if range.contains(&at) {
            let sum = u16::from_be_bytes([bytes[field], bytes[field + 1]]);
            let sum = u32::from(!sum) + u32::from(!old) + u32::from(number);
            let sum = (sum & 0xffff) + (sum >> 16);
            let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
            bytes[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        }
    }
}

/// Four segments over IPv4, headers of 66 bytes, the last one short and without PSH.
fn four(partial: bool) -> Vec<(VnetHeader, Vec<u8>)> {
    let frames = segments(&Sketch::default().make(), partial);
    assert_eq!(frames.len(), 4);
    frames
}

#[test]
fn segments_of_a_stream_become_the_frame_that_they_were() {
    for (v6, partial, tags) in [(false, false, 0), (false, true, 1), (true, false, 2), (true, true, 0)] {
        let made = Sketch { v6, tags, flags: 0x18, ..Sketch::default() }.make();
        let got = merge(&segments(&made, partial), Needs::ALL, 700);
        assert_eq!(got.len(), 1);
        let (indices, header, mut bytes) = got.into_iter().next().unwrap();
        assert_eq!(indices, [0, 1, 2, 3]);
        let expected = VnetHeader {
            flags: NEEDS_CSUM,
            gso_type: if v6 { GSO_TCPV6 } else { GSO_TCPV4 },
            hdr_len: made.payload as u16,
            num_buffers: 1,
            ..made.header
        };
        assert_eq!(header, expected);
        if !v6 {
            // The sketch leaves IPv4's checksum out, as a driver may not.
            bytes[made.network + 10..][..2].copy_from_slice(&made.bytes[made.network + 10..][..2]);
        }
        assert!(bytes == made.bytes, "v6 {v6}, partial {partial}");
    }
}

#[test]
fn flows_that_alternate_merge_each_for_itself() {
    let mut frames = Vec::new();
    let other = segments(&Sketch { v6: true, ..Sketch::default() }.make(), true);
    for (a, b) in four(false).into_iter().zip(other) {
        frames.extend([a, b]);
    }
    let udp = Sketch { udp: true, payload: vec![1; 100], ..Sketch::default() }.make();
    frames.insert(3, (VnetHeader { gso_type: GSO_NONE, ..udp.header }, udp.bytes));
    assert_eq!(groups(&frames), [vec![3], vec![0, 2, 5, 7], vec![1, 4, 6, 8]]);
}

#[test]
fn nothing_merges_for_a_receiver_that_cannot() {
    for accepts in [Needs::CSUM, Needs::CSUM.and(Needs::TSO6), Needs::NONE] {
        assert_eq!(merge(&four(true), accepts, 1500).len(), 4);
    }
}

#[test]
fn a_header_that_differs_keeps_segments_apart_and_in_order() {
    // Where, the number there, what it is. The third of four segments has it.
    for (at, number, what) in [
        (14, 0x4510, "type of service"),
        (20, 0x0000, "may be fragmented"),
        (22, 0x3f06, "time to live"),
        (34, 0x9c41, "source port: another flow"),
        (42, 0x0103, "acknowledged number"),
        (46, 0x8050, "ECE"),
        (46, 0x8014, "RST"),
        (46, 0x8012, "SYN"),
        (46, 0x8030, "URG"),
        (46, 0x8000, "no ACK"),
        (46, 0x8090, "CWR"),
        (46, 0x8110, "AE (RFC 9768)"),
        (48, 0xfffe, "window"),
        (52, 1, "urgent pointer"),
        (54, 0x0801, "options"),
    ] {
        for partial in [false, true] {
            let mut frames = four(partial);
            change(&mut frames, 2, at, number);
            let got = groups(&frames);
            assert!(!got.iter().any(|group| group.len() > 1 && group.contains(&2)), "{what}: {got:?}");
            if at != 34 {
                assert_eq!(got, [vec![0, 1], vec![2], vec![3]], "{what}");
            }
        }
    }
    let mut frames = four(true);
    frames[2].1[5] ^= 1;
    assert!(!groups(&frames).contains(&vec![0, 1, 2, 3]), "another station's");
}

#[test]
fn a_segment_that_may_be_fragmented_has_an_identification_that_counts() {
    let mut frames = four(true);
    for index in 0..4 {
        change(&mut frames, index, 20, 0);
    }
    assert_eq!(groups(&frames), [[0, 1, 2, 3]]);
    change(&mut frames, 2, 18, 77);
    assert_eq!(groups(&frames), [vec![0, 1], vec![2], vec![3]]);
}

#[test]
fn a_gap_or_a_repetition_ends_a_frame() {
    let all = four(false);
    let pick = |indices: &[usize]| groups(&indices.iter().map(|&index| all[index].clone()).collect::<Vec<_>>());
    assert_eq!(pick(&[0, 2, 3]), [vec![0], vec![1, 2]]);
    assert_eq!(pick(&[0, 1, 1, 2]), [vec![0, 1], vec![2, 3]]);
    assert_eq!(pick(&[1, 0, 2]), [[0], [1], [2]]);
    assert_eq!(pick(&[2, 3, 0, 1]), [[0, 1], [2, 3]]);
}

#[test]
fn push_and_fin_end_a_frame_and_are_kept() {
    for flag in [0x18, 0x11, 0x19] {
        let mut frames = four(false);
        change(&mut frames, 1, 46, 0x8000 | flag);
        let got = merge(&frames, Needs::ALL, 1500);
        assert_eq!(got.iter().map(|(indices, ..)| &indices[..]).collect::<Vec<_>>(), [&[0, 1][..], &[2, 3]]);
        assert_eq!((got[0].2[47], got[1].2[47]), (flag as u8, 0x10));
        change(&mut frames, 0, 46, 0x8000 | flag);
        assert_eq!(groups(&frames), [vec![0], vec![1], vec![2, 3]]);
    }
}

#[test]
fn acknowledgements_fragments_and_segments_of_a_few_bytes_stay_alone() {
    let mut ack = Sketch { payload: Vec::new(), ..Sketch::default() }.make();
    ack.header.gso_type = GSO_NONE;
    // IPv4's checksum is right in what the switch segmented.
    let first = four(true).remove(0);
    ack.bytes[24..26].copy_from_slice(&first.1[24..26]);
    assert_eq!(groups(&vec![(ack.header, ack.bytes); 3]), [[0], [1], [2]]);
    let mut frames = four(true);
    change(&mut frames, 1, 20, 0x2000);
    assert_eq!(groups(&frames), [vec![0], vec![1], vec![2, 3]], "what is not known to be of a flow ends all");
    let short = Sketch { gso_size: 48, payload: vec![3; 96], ..Sketch::default() }.make();
    assert_eq!(groups(&segments(&short, true)), [[0, 1]]);
    let shorter: Vec<_> = segments(&short, true)
        .into_iter()
        .map(|(header, mut bytes)| {
            bytes.pop();
            (header, bytes)
        })
        .collect();
    assert_eq!(groups(&shorter), [[0], [1]], "IP says that there is more");
    let mut wrong = four(true);
    wrong[1].1[24] ^= 1;
    assert_eq!(groups(&wrong), [vec![0], vec![1], vec![2, 3]], "IPv4's checksum");
}

#[test]
fn a_large_frame_or_one_whose_checksum_is_elsewhere_stays_alone() {
    // Three frames of one stream without a gap, none longer than the one before.
    let frame = |offset: u32, len: usize, gso_size: u16| {
        let sequence = Sketch::default().sequence.wrapping_add(offset);
        let made = Sketch { payload: vec![1; len], sequence, gso_size, ..Sketch::default() }.make();
        let (mut header, mut bytes) = (made.header, made.bytes);
        let sum = checksum(&bytes[14..34]);
        bytes[24..26].copy_from_slice(&sum);
        if len <= usize::from(gso_size) {
            (header.gso_type, header.gso_size) = (GSO_NONE, 0);
        }
        (header, bytes)
    };
    assert_eq!(groups(&[frame(0, 1000, 1448), frame(1000, 1000, 1448)]), [[0, 1]]);
    assert_eq!(groups(&[frame(0, 3000, 1448), frame(3000, 1000, 1448), frame(4000, 900, 500)]), [[0], [1], [2]]);
    for (start, offset) in [(30, 20), (34, 6), (38, 16)] {
        let mut frames = four(true);
        (frames[1].0.csum_start, frames[1].0.csum_offset) = (start, offset);
        assert_eq!(groups(&frames), [vec![0], vec![1], vec![2, 3]], "{start} + {offset}");
    }
}

/// IPv4's, over a header that has one already, which is not counted.
fn checksum(header: &[u8]) -> [u8; 2] {
    let mut header = header.to_vec();
    header[10..12].fill(0);
    (!(naive_sum(&header, 0) as u16)).to_be_bytes()
}

#[test]
fn a_later_fragment_is_of_no_known_flow() {
    let mut frames = four(true);
    change(&mut frames, 2, 20, 1);
    assert_eq!(groups(&frames), [vec![0, 1], vec![2], vec![3]]);
}

#[test]
fn a_damaged_segment_spoils_the_frame_only_if_it_has_a_checksum() {
    let mut frames = four(false);
    frames[2].1[1000] ^= 0x40;
    assert_eq!(groups(&frames), Vec::<Vec<u8>>::new(), "its frames are delivered as they came, by who had it merged");
    let mut frames = four(true);
    frames[2].1[1000] ^= 0x40;
    assert_eq!(groups(&frames), [[0, 1, 2, 3]]);
}

#[test]
fn a_merged_frame_is_an_ip_packet_and_no_longer() {
    let sketch =
        |len: usize| Sketch { payload: vec![9; len], transport_options: 0, gso_size: 1460, ..Sketch::default() };
    let mut frames = segments(&sketch(44 * 1460).make(), true);
    // What the first frame cannot take: 65,535 bytes are 44 segments and 1,255 bytes.
    let mut more = Sketch { sequence: sketch(0).sequence.wrapping_add(44 * 1460), ..sketch(2 * 1460) };
    more.identification = sketch(0).identification.wrapping_add(44);
    frames.extend(segments(&more.make(), true));
    let got = groups(&frames);
    assert_eq!(got.iter().map(Vec::len).collect::<Vec<_>>(), [44, 2]);
}

#[test]
fn more_flows_than_are_kept_open_lose_nothing() {
    let mut frames = Vec::new();
    for segment in 0..3 {
        for flow in 0..12 {
            let mut own = four(true);
            change(&mut own, segment, 34, 1000 + flow);
            frames.push(own.remove(segment));
        }
    }
    // That each frame is delivered once is asserted there; here that flows stay in order.
    let order: Vec<u8> = groups(&frames).concat();
    for flow in 0..12 {
        let own: Vec<u8> = order.iter().copied().filter(|index| index % 12 == flow).collect();
        assert_eq!(own, [flow, flow + 12, flow + 24]);
    }
}

proptest! {
    #[test]
    fn whatever_is_segmented_and_merged_comes_to_the_same(
        sketch in sketches(),
        partial: bool,
        piece in 200..5000usize,
        lies in prop::collection::vec((0..12usize, 0..140usize, any::<u8>()), 0..3),
        order in prop::collection::vec((0..12usize, 0..12usize), 0..3),
    ) {
        let made = sketch.make();
        prop_assume!(made.payload <= 256);
        let mut frames = segments(&made, partial);
        for (index, at, byte) in lies {
            if let Some(place) = frames.get_mut(index).and_then(|(_, bytes)| bytes.get_mut(at)) {
                *place = byte;
            }
        }
        // Lost, come twice, overtaken.
        for (from, to) in order {
            if from < frames.len() {
                let frame = if from % 2 == 0 { frames.remove(from) } else { frames[from].clone() };
                if to < frames.len() {
                    frames.insert(to, frame);
                }
            }
        }
        merge(&frames, Needs::ALL, piece);
    }

    #[test]
    fn a_whole_stream_merges(v6: bool, partial: bool, tags in 0..3usize, options in 0..9usize, len in 1449..20_000usize) {
        let made = Sketch { v6, tags, transport_options: options, payload: vec![5; len], ..Sketch::default() }.make();
        let frames = segments(&made, partial);
        prop_assert_eq!(groups(&frames).len(), 1, "{} segments", frames.len());
    }
}

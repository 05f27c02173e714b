//! Any virtio-net header before any frame, for any receiver, with everything asserted that must hold whatever they are:
//! [`exercise`], which also has the segments of such frames merged again, some of them changed, lost or repeated. The fuzz
//! target `offload` calls it, and so do the tests, with the seeds of `fuzz/seeds/offload`.

#![allow(clippy::unwrap_used)]

use super::gro::exercise::merge;
use super::{Rewrite, admit};
use crate::frame::{Batch, Needs, heads};
use crate::limits::{BATCH_FRAMES, FRAME_MAX_BYTES, GSO_SIZE_MIN, VNET_HEADER_BYTES};
use crate::mem::{Cursor, Span};
use crate::verdict::Verdict;
use crate::wire::virtio_net::{self, NEEDS_CSUM, VnetHeader};

/// What stands around every frame that is written, and must stay.
pub(super) const CANARY: u8 = 0xc5;

/// What came of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    /// Pending, or why it was dropped.
    pub verdict: Verdict,
    /// What it needs.
    pub needs: Needs,
    /// What a receiver that meets them is told.
    pub header: VnetHeader,
    /// What the MTU is compared with.
    pub wire_len: u32,
    /// What a receiver gets that does not; as many as could be made.
    pub frames: Vec<(VnetHeader, Vec<u8>)>,
}

/// Sends `bytes` behind `header`, from a sender that may ask for `may` and whose memory it lies in pieces of up to `piece`
/// bytes in, to a receiver with as scattered buffers that can do `accepts`.
pub fn send(bytes: &[u8], header: VnetHeader, may: Needs, accepts: Needs, piece: usize) -> Admitted {
    let mut memory = bytes.to_vec();
    let pieces: Vec<Span<'_>> = memory.chunks_mut(piece.max(1)).map(Span::from_buffer).take(500).collect();
    let len = pieces.iter().map(Span::len).sum();
    let mut heads = heads();
    let mut batch = Batch::new(&mut heads, 0);
    admit(&mut batch, len, &pieces, &header.to_bytes(), may);
    let frame = batch.frames()[0];
    let head = batch.head(0);
    let mut admitted = Admitted {
        verdict: frame.verdict,
        needs: frame.needs,
        header: head.header(),
        wire_len: frame.wire_len(head),
        frames: Vec::new(),
    };
    assert_eq!(frame.len as usize, len);
    if frame.verdict != Verdict::Pending {
        return admitted;
    }
    assert!(admitted.wire_len <= frame.len);
    check_header(&admitted, len, may);
    if !frame.needs.met_by(accepts) {
        // The sender has changed nothing since.
        admitted.frames = write_all(Rewrite::of(&batch, 0, accepts).unwrap(), accepts, piece);
        let longest = admitted.frames.iter().map(|(_, bytes)| bytes.len()).max();
        assert_eq!(longest, Some(frame.wire_len(head) as usize), "what the MTU is compared with");
    }
    admitted
}

/// What a receiver is told is true of the frame, and was negotiated.
fn check_header(admitted: &Admitted, len: usize, may: Needs) {
    let Admitted { needs, header, .. } = admitted;
    if needs.is_none() {
        return assert_eq!(*header, VnetHeader::PLAIN);
    }
    assert!(needs.within(Needs::ALL).met_by(may.and(Needs::USO6.when(Needs::USO4.met_by(may)))));
    assert_eq!((header.flags, header.num_buffers), (NEEDS_CSUM, 1));
    let (start, offset) = (usize::from(header.csum_start), usize::from(header.csum_offset));
    assert!(start >= 14 && start + offset + 2 <= len);
    if needs.is_gso() {
        let least = if header.kind() == virtio_net::GSO_UDP_L4 { 1 } else { GSO_SIZE_MIN };
        assert!(header.gso_type != 0 && header.gso_size >= least);
        assert!(usize::from(header.hdr_len) > start && usize::from(header.hdr_len) < len);
    } else {
        assert_eq!((header.gso_type, header.gso_size, header.hdr_len), (0, 0, 0));
    }
}

/// Writes all frames of `rewrite`, each into buffers that hold it and no byte more.
fn write_all(mut rewrite: Rewrite<'_, '_>, accepts: Needs, piece: usize) -> Vec<(VnetHeader, Vec<u8>)> {
    let mut frames = Vec::new();
    while let Some(len) = rewrite.next_len() {
        let mut memory = vec![CANARY; VNET_HEADER_BYTES + len + 32];
        let (room, canary) = memory.split_at_mut(VNET_HEADER_BYTES + len);
        let pieces: Vec<Span<'_>> = room.chunks_mut(piece.max(7)).map(Span::from_buffer).collect();
        let chains = frames.len() as u16 + 1;
        rewrite.write(VNET_HEADER_BYTES, chains, Cursor::new(&pieces));
        assert!(canary.iter().all(|&byte| byte == CANARY), "written beyond the buffers");
        let header = VnetHeader::from_bytes(memory.first_chunk().unwrap());
        assert_eq!((header.num_buffers, header.gso_type, header.gso_size), (chains, 0, 0));
        assert!(header.flags == 0 || header.flags == NEEDS_CSUM && Needs::CSUM.met_by(accepts));
        frames.push((header, memory[VNET_HEADER_BYTES..VNET_HEADER_BYTES + len].to_vec()));
        assert!(frames.len() <= FRAME_MAX_BYTES / usize::from(GSO_SIZE_MIN) + 1, "one frame becomes too many");
    }
    assert!(rewrite.is_segmentation() || frames.len() == 1);
    frames
}

/// Does to one of `frames` what a network does: nothing, a byte becomes another, it is lost, or it comes twice.
fn change(frames: &mut Vec<(VnetHeader, Vec<u8>)>, what: u8, at: usize, byte: u8) {
    let index = usize::from(what & 0x3f) % frames.len().max(1);
    match (what >> 6, frames.get_mut(index)) {
        (1, Some((_, bytes))) => {
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
        }
        (2, Some(_)) => drop(frames.remove(index)),
        (3, Some(frame)) => {
            let twice = frame.clone();
            frames.insert(at % (index + 1), twice);
        }
        _ => {}
    }
}

/// Reads what to do from `input`: what the sender may ask for, what the receiver can do, how memory is scattered, the
/// header, and the frame, the last byte of which is repeated as often as two bytes before it say.
pub fn exercise(input: &[u8]) {
    let Some((&[may, accepts, piece, a, b], rest)) = input.split_first_chunk() else { return };
    let Some((header, frame)) = rest.split_first_chunk::<VNET_HEADER_BYTES>() else { return };
    let repeat = usize::from(u16::from_le_bytes([a, b]));
    let mut frame = frame.to_vec();
    frame.extend(std::iter::repeat_n(*frame.last().unwrap_or(&0), repeat));
    frame.truncate(FRAME_MAX_BYTES);
    let (may, accepts) = (Needs::from_bits(may).within(Needs::ALL), Needs::from_bits(accepts).within(Needs::ALL));
    let piece = usize::from(piece) * BATCH_FRAMES + 1;
    let header = VnetHeader::from_bytes(header);
    // Its segments may be merged again, and so may they beside the frame itself.
    let segments = send(&frame, header, Needs::ALL, Needs::NONE, piece.max(200)).frames;
    let mut all: Vec<_> = segments.into_iter().take(BATCH_FRAMES - 4).chain([(header, frame.clone())]).collect();
    for edit in rest.rchunks_exact(3).take(3) {
        change(&mut all, edit[0], edit[1].into(), edit[2]);
    }
    merge(&all, accepts, piece);
    let sent = send(&frame, header, may, accepts, piece.max(200));
    if sent.needs.is_gso() && !sent.frames.is_empty() {
        let headers: Vec<usize> = sent.frames.iter().map(|(_, bytes)| bytes.len()).collect();
        let (last, others) = headers.split_last().unwrap();
        assert!(others.windows(2).all(|pair| pair[0] == pair[1]) && others.iter().all(|len| len >= last));
    }
}

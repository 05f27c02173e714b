//! Any frames one after the other, to a receiver that has them merged, with everything asserted that must hold whatever they
//! are: [`merge`].

#![allow(clippy::unwrap_used)]

use super::{Group, Merger};
use crate::frame::{Batch, Needs, heads};
use crate::limits::{BATCH_FRAMES, VNET_HEADER_BYTES};
use crate::mem::{Cursor, Span};
use crate::offload::admit;
use crate::offload::exercise::{CANARY, send};
use crate::verdict::Verdict;
use crate::wire::ethernet::{EtherType, Ethernet};
use crate::wire::virtio_net::{self, NEEDS_CSUM, VnetHeader};

/// Sends `frames`, each behind its header, as one batch to a receiver that can do `accepts` and has them merged where they
/// can be. Returns what it gets, with the indices of the frames that are in it; of a frame that is damaged nothing more.
///
/// Whatever is merged is segmented again, and has to come to what was sent.
pub fn merge(frames: &[(VnetHeader, Vec<u8>)], accepts: Needs, piece: usize) -> Vec<(Vec<u8>, VnetHeader, Vec<u8>)> {
    let mut memory: Vec<Vec<u8>> = frames.iter().map(|(_, bytes)| bytes.clone()).collect();
    let mut heads = heads();
    let mut batch = Batch::new(&mut heads, 0);
    for ((header, _), bytes) in frames.iter().zip(&mut memory).take(BATCH_FRAMES) {
        let len = bytes.len();
        let pieces: Vec<Span<'_>> = bytes.chunks_mut(piece.max(len / 8 + 1)).map(Span::from_buffer).collect();
        admit(&mut batch, len, &pieces, &header.to_bytes(), Needs::ALL);
    }
    let picks: Vec<u8> =
        (0..batch.len() as u8).filter(|&i| batch.frames()[usize::from(i)].verdict == Verdict::Pending).collect();
    let (mut delivered, mut seen) = (Vec::new(), Vec::<u8>::new());
    let flow_of = |index: u8| flow(&frames[usize::from(index)].1);
    let mut merger = Merger::new(accepts);
    let mut each = |group| -> Result<(), std::convert::Infallible> {
        match group {
            Group::Single(index) => {
                seen.push(index);
                let (header, bytes) = (batch.head(usize::from(index)).header(), &frames[usize::from(index)].1);
                delivered.push((vec![index], header, bytes.clone()));
            }
            Group::Merge(merge) => {
                seen.extend(merge.frames());
                let mut memory = vec![CANARY; VNET_HEADER_BYTES + merge.frame_len() + 32];
                let (room, canary) = memory.split_at_mut(VNET_HEADER_BYTES + merge.frame_len());
                let pieces: Vec<Span<'_>> = room.chunks_mut(piece.max(7)).map(Span::from_buffer).collect();
                let whole = merge.write(&batch, VNET_HEADER_BYTES, 1, Cursor::new(&pieces));
                assert!(canary.iter().all(|&byte| byte == CANARY), "written beyond the buffers");
                if whole {
                    let (header, bytes) = memory.split_first_chunk().unwrap();
                    let (header, bytes) = (VnetHeader::from_bytes(header), bytes[..merge.frame_len()].to_vec());
                    check_merge(merge.frames(), frames, header, &bytes);
                    delivered.push((merge.frames().to_vec(), header, bytes));
                }
            }
        }
        Ok(())
    };
    for &index in &picks {
        merger.take(&batch, index, true, &mut each).unwrap();
    }
    merger.finish(&mut each).unwrap();
    for (at, &one) in seen.iter().enumerate() {
        let of_its_flow = |other: &&u8| flow_of(**other).is_some_and(|flow| Some(flow) == flow_of(one));
        assert!(seen[..at].iter().filter(of_its_flow).all(|&before| before < one), "a flow is out of order: {seen:?}");
    }
    seen.sort_unstable();
    assert_eq!(seen, picks, "each frame is delivered once");
    delivered
}

/// A merged frame, segmented, is the frames that it was made of: but for checksums that their sender had left out, for the two
/// ways to write a checksum of zero, and for the identification of IPv4 packets that nobody may fragment.
fn check_merge(indices: &[u8], frames: &[(VnetHeader, Vec<u8>)], header: VnetHeader, bytes: &[u8]) {
    assert!(indices.len() > 1 && indices.windows(2).all(|pair| pair[0] < pair[1]));
    let segments = send(bytes, header, Needs::ALL, Needs::NONE, 4096).frames;
    assert_eq!(segments.len(), indices.len());
    let (transport, v4) = (usize::from(header.csum_start), header.kind() == virtio_net::GSO_TCPV4);
    for (&index, (_, segment)) in indices.iter().zip(&segments) {
        let (mut sent, mut segment) = (frames[usize::from(index)].1.clone(), segment.clone());
        for bytes in [&mut sent, &mut segment] {
            let mut normal = |at: usize, ignored: bool| {
                if ignored || bytes[at..at + 2] == [0xff, 0xff] {
                    bytes[at..at + 2].fill(0);
                }
            };
            normal(transport + 16, frames[usize::from(index)].0.flags & NEEDS_CSUM != 0);
            if v4 {
                let unfragmentable = frames[usize::from(index)].1[transport - 14] & 0x40 != 0;
                normal(transport - 16, unfragmentable);
                normal(transport - 10, unfragmentable);
            }
        }
        assert!(sent == segment, "frame {index} of {indices:?} is another one after merging and segmenting");
    }
}

/// Stations, tags, addresses and ports of a TCP packet that has neither options nor extension headers.
fn flow(bytes: &[u8]) -> Option<Vec<u8>> {
    let ethernet = Ethernet::parse(bytes).ok()?;
    let network = ethernet.header_len();
    let (first, protocol, addresses, transport) = match ethernet.ether_type() {
        EtherType::IPV4 => (0x45, 9, 12, 20),
        EtherType::IPV6 => (bytes.get(network)? & 0x0f | 0x60, 6, 8, 40),
        _ => return None,
    };
    let is_tcp = *bytes.get(network)? == first && *bytes.get(network + protocol)? == 6;
    let ends = bytes.get(network + addresses..network + transport + 4)?;
    is_tcp.then(|| [&bytes[..network], ends].concat())
}

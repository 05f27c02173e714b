//! What a sender says about a frame, checked: [`admit`].
//!
//! Each field of the virtio-net header is a claim that some later program would believe: this switch, the receiver's
//! driver, the host's kernel. The ways in which they were wrong about it are CVEs: `csum_start` beyond the frame
//! (CVE-2024-11614), a `gso_size` of zero or one (CVE-2019-11479), a type that is not the frame's, a `hdr_len` that is
//! believed (CVE-2024-43817, CVE-2024-43897). So what leaves here is a header of our own making, each field of it derived
//! from what was checked:
//!
//! - NEEDS_CSUM: the two bytes lie behind the Ethernet header and within the frame. That holds whatever the rest of the
//!   frame is, and is all that completing a checksum takes. A checksum at another offset than TCP's or UDP's is left to no
//!   receiver.
//! - Segmentation: the type was negotiated, a checksum is asked for, segments are not too small; the frame is TCP or UDP
//!   over the IP that the type says, with its header where the checksum begins and wholly within the frame. `hdr_len` is
//!   what was found, so the length of the longest segment, which an MTU is compared with, is exact. A frame with no more
//!   payload than one segment is not to be segmented.
//! - Flags that mean nothing to a device are dropped; `num_buffers` is ours.
//!
//! Everything that is decided on is in the head, which is what receivers get: a guest that rewrites its frame meanwhile
//! changes payload. Where the headers of a frame to be segmented do not fit a head, no receiver gets it as it is, and the
//! rewrite refuses it if their length is another by then.

use super::layout::{Layout, LayoutError, TCP_CHECKSUM, UDP_BYTES, UDP_CHECKSUM};
use crate::frame::{Batch, Needs};
use crate::limits::{FRAME_MIN_BYTES, GSO_HEADER_BYTES, GSO_SIZE_MIN, USO_SEGMENTS, VNET_HEADER_BYTES};
use crate::mem::Span;
use crate::verdict::{DropReason, Verdict};
use crate::wire::ip::Version;
use crate::wire::virtio_net::{self, NEEDS_CSUM, VnetHeader};

/// Adds the frame of `len` bytes in `pieces` to `batch`, whose sender wrote `header` before it and may ask for `may`. What
/// cannot be so is added as dropped. The caller has made sure of [`Batch::has_room`].
///
/// For any header; one that [asks for nothing](VnetHeader::asks_nothing) has a shorter way, [`Batch::push`].
pub fn admit<'m>(batch: &mut Batch<'m>, len: usize, pieces: &[Span<'m>], header: &[u8; VNET_HEADER_BYTES], may: Needs) {
    let header = VnetHeader::from_bytes(header);
    match claims(&header, len, may) {
        Err(reason) => batch.push_dropped(len, reason),
        Ok(needs) if needs.is_gso() => {
            batch.push_long(len, pieces);
            admit_gso(batch, header, needs);
        }
        Ok(needs) => {
            batch.push(len, pieces);
            if let Some((frame, head)) = batch.last()
                && !needs.is_none()
            {
                head.set_header(checksum_only(&header));
                frame.needs = needs;
            }
        }
    }
}

/// Checks what can be checked without the frame, but for its length; returns what the frame needs if the rest is right.
fn claims(header: &VnetHeader, len: usize, may: Needs) -> Result<Needs, DropReason> {
    if header.flags & NEEDS_CSUM == 0 && header.gso_type == virtio_net::GSO_NONE {
        return Ok(Needs::NONE);
    }
    // All offloads stand on this one.
    if !Needs::CSUM.met_by(may) {
        return Err(DropReason::OffloadNotNegotiated);
    }
    let gso = if header.gso_type == virtio_net::GSO_NONE { Needs::NONE } else { gso_claims(header, len, may)? };
    if header.flags & NEEDS_CSUM == 0 {
        return Err(DropReason::GsoInvalid);
    }
    let (start, offset) = (usize::from(header.csum_start), usize::from(header.csum_offset));
    if start < FRAME_MIN_BYTES || start + offset + 2 > len {
        return Err(DropReason::ChecksumInvalid);
    }
    let usual = matches!(offset, TCP_CHECKSUM | UDP_CHECKSUM);
    Ok(gso.and(Needs::CSUM).and(Needs::ENGINE.when(!usual)))
}

/// The part of [`claims`] that is about segmentation. USO over IPv4 and IPv6 is one type: which it is shows in the frame.
fn gso_claims(header: &VnetHeader, len: usize, may: Needs) -> Result<Needs, DropReason> {
    let ecn = header.gso_type & virtio_net::GSO_ECN != 0;
    let (needs, allowed) = match header.kind() {
        virtio_net::GSO_TCPV4 => (Needs::TSO4, Needs::TSO4.met_by(may)),
        virtio_net::GSO_TCPV6 => (Needs::TSO6, Needs::TSO6.met_by(may)),
        virtio_net::GSO_UDP_L4 if !ecn => (Needs::USO4, Needs::USO4.met_by(may)),
        virtio_net::GSO_NONE | virtio_net::GSO_UDP_L4 => return Err(DropReason::GsoInvalid),
        // UDP fragmentation, which is never offered, and types that are not there yet.
        _ => return Err(DropReason::OffloadNotNegotiated),
    };
    if !allowed || ecn && !Needs::ECN.met_by(may) {
        return Err(DropReason::OffloadNotNegotiated);
    }
    // Datagrams are as short as their program makes them, so what is bounded is how many there are.
    let small = match header.kind() {
        virtio_net::GSO_UDP_L4 => {
            let payload = len.saturating_sub(usize::from(header.csum_start) + UDP_BYTES);
            payload > usize::from(header.gso_size) * USO_SEGMENTS
        }
        _ => header.gso_size < GSO_SIZE_MIN,
    };
    if small || header.gso_size == 0 {
        return Err(DropReason::GsoInvalid);
    }
    Ok(needs.and(Needs::ECN.when(ecn)))
}

/// Looks at the headers of the frame that was added last, which is to be segmented, and says what they come to.
fn admit_gso(batch: &mut Batch<'_>, header: VnetHeader, mut needs: Needs) {
    let Some(index) = batch.len().checked_sub(1) else { return };
    let found = headers(batch, index, &header);
    let Some((frame, head)) = batch.last() else { return };
    if frame.verdict != Verdict::Pending {
        return;
    }
    let layout = match found {
        Ok(layout) => layout,
        Err(error) => {
            frame.verdict = Verdict::Drop(error.into());
            return;
        }
    };
    if frame.len as usize - layout.payload <= usize::from(header.gso_size) {
        head.set_header(checksum_only(&header));
        frame.needs = Needs::CSUM;
        return;
    }
    if header.kind() == virtio_net::GSO_UDP_L4 && layout.version == Version::V6 {
        needs = Needs::CSUM.and(Needs::USO6);
    }
    let VnetHeader { gso_type, gso_size, csum_start, csum_offset, .. } = header;
    let (flags, hdr_len, num_buffers) = (NEEDS_CSUM, layout.payload as u16, 1);
    head.set_header(VnetHeader { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers });
    frame.needs = needs.and(Needs::ENGINE.when(layout.payload > usize::from(frame.head_len)));
    batch.count_gso();
}

/// Where the headers of frame `index` are. Those that the frame's head does not hold are read from its sender's memory, where
/// they may change: the rewrite reads them again, and goes on only if they still end where is noted now.
fn headers(batch: &Batch<'_>, index: usize, header: &VnetHeader) -> Result<Layout, LayoutError> {
    let frame = &batch.frames()[index];
    let copied = batch.head(index).bytes_of(frame);
    let layout = match Layout::of(copied, header) {
        Err(LayoutError::Truncated) if copied.len() < frame.len as usize => {
            let mut deep = [0; GSO_HEADER_BYTES];
            let read = batch.source(index).read(&mut deep);
            Layout::of(&deep[..read], header)?
        }
        found => found?,
    };
    // No IP packet is longer, so neither the lengths of its segments nor sums of them overflow.
    if frame.len as usize - layout.network > usize::from(u16::MAX) {
        return Err(LayoutError::TooLong);
    }
    Ok(layout)
}

/// What of `header` a frame keeps that is not to be segmented.
fn checksum_only(header: &VnetHeader) -> VnetHeader {
    VnetHeader {
        flags: NEEDS_CSUM,
        csum_start: header.csum_start,
        csum_offset: header.csum_offset,
        ..VnetHeader::PLAIN
    }
}

//! Where the frames of a capture file lie: [`frames`], for classic pcap (draft-ietf-opsawg-pcap) and pcapng
//! (draft-ietf-opsawg-pcapng).
//!
//! Strict, because what is replayed is meant to be what was captured: a file that ends early, is not Ethernet, or has
//! incomplete frames is refused with the reason. Bytes in, places out; no I/O, and no input panics.

use std::ops::Range;

use crate::limits::FRAME_MAX_BYTES;

/// Why bytes are not a capture that can be replayed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CaptureError {
    /// Neither format's magic number.
    #[error("not a pcap or pcapng file")]
    Unknown,
    /// The bytes end where more are announced.
    #[error("the file ends at byte {0}, in the middle of a record")]
    Truncated(usize),
    /// A version of the format that we do not know.
    #[error("version {major}.{minor} of the file format is unknown")]
    Version {
        /// First part.
        major: u16,
        /// Second part.
        minor: u16,
    },
    /// Frames of another kind.
    #[error("link type {0} is not Ethernet (1): capture on an Ethernet interface, not on `any`, and without FCS")]
    LinkType(u32),
    /// A frame that was cut short when it was captured.
    #[error("frame {frame} was captured incomplete, {captured} of {original} bytes: capture with `tcpdump -s 0`")]
    Snapped {
        /// Number of the frame, from 1.
        frame: usize,
        /// Bytes in the file.
        captured: u32,
        /// Bytes that it had.
        original: u32,
    },
    /// A frame longer than any can be.
    #[error("frame {frame} has {len} bytes, at most {FRAME_MAX_BYTES} are possible")]
    TooLong {
        /// Number of the frame, from 1.
        frame: usize,
        /// Its length in bytes.
        len: u32,
    },
    /// Something that the format does not allow.
    #[error("byte {at}: {what}")]
    Malformed {
        /// Offset of the block or record in the file.
        at: usize,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// The places of all frames in `file`, in order.
///
/// # Errors
/// [`CaptureError`]. The file has at most 4 GiB, or it is refused as truncated.
pub(super) fn frames(file: &[u8]) -> Result<Vec<Range<u32>>, CaptureError> {
    let mut found = Found(Vec::new());
    let magic = file.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    match magic.ok_or(CaptureError::Unknown)? {
        // Microseconds and nanoseconds, of which we need neither.
        0xa1b2_c3d4 | 0xa1b2_3c4d => pcap(Cursor { file, at: 4, end: file.len(), big: false }, &mut found)?,
        0xd4c3_b2a1 | 0x4d3c_b2a1 => pcap(Cursor { file, at: 4, end: file.len(), big: true }, &mut found)?,
        SECTION_HEADER => pcapng(file, &mut found)?,
        _ => return Err(CaptureError::Unknown),
    }
    Ok(found.0)
}

/// Frames found so far.
struct Found(Vec<Range<u32>>);

impl Found {
    /// Notes the frame of `captured` bytes at the cursor, which had `original` bytes on the wire, and steps over it.
    fn frame(&mut self, cursor: &mut Cursor<'_>, captured: u32, original: u32) -> Result<(), CaptureError> {
        let frame = self.0.len() + 1;
        if captured as usize > FRAME_MAX_BYTES {
            return Err(CaptureError::TooLong { frame, len: captured });
        }
        if captured > original {
            let what = "a frame with more bytes captured than it had";
            return Err(CaptureError::Malformed { at: cursor.at, what });
        }
        if captured < original {
            return Err(CaptureError::Snapped { frame, captured, original });
        }
        let start = cursor.at;
        cursor.skip(captured as usize)?;
        let place = |at: usize| u32::try_from(at).map_err(|_| CaptureError::Truncated(at));
        self.0.push(place(start)?..place(cursor.at)?);
        Ok(())
    }
}

/// The file header after its magic number (version, 8 reserved bytes, snapshot length, link type), then records.
fn pcap(mut cursor: Cursor<'_>, found: &mut Found) -> Result<(), CaptureError> {
    let (major, minor) = (cursor.u16()?, cursor.u16()?);
    if (major, minor) != (2, 4) {
        return Err(CaptureError::Version { major, minor });
    }
    cursor.skip(12)?;
    ethernet(cursor.u32()?)?;
    while cursor.left() > 0 {
        cursor.skip(8)?; // The time.
        let (captured, original) = (cursor.u32()?, cursor.u32()?);
        found.frame(&mut cursor, captured, original)?;
    }
    Ok(())
}

/// Blocks of a type, a length, a body and the length again; sections, each with a byte order and interfaces of its own.
fn pcapng(file: &[u8], found: &mut Found) -> Result<(), CaptureError> {
    let mut section = Section { big: false, interfaces: 0 };
    let mut at = 0;
    while at < file.len() {
        let mut cursor = Cursor { file, at, end: file.len(), big: section.big };
        let kind = cursor.u32()?;
        if kind == SECTION_HEADER {
            section = Section { big: byte_order(&cursor)?, interfaces: 0 };
            cursor.big = section.big;
        }
        let len = cursor.u32()? as usize;
        if len < 12 || !len.is_multiple_of(4) {
            return Err(CaptureError::Malformed {
                at,
                what: "the length of a block is not a multiple of 4 from 12 on",
            });
        }
        if len > file.len() - at {
            return Err(CaptureError::Truncated(file.len()));
        }
        let mut trailer = Cursor { at: at + len - 4, ..cursor };
        if trailer.u32()? as usize != len {
            return Err(CaptureError::Malformed { at, what: "a block's two lengths differ" });
        }
        cursor.end = at + len - 4;
        section.block(kind, cursor, found).map_err(|error| within_block(error, at, cursor.end))?;
        at += len;
    }
    Ok(())
}

/// What is known of the section that is being read.
struct Section {
    big: bool,
    interfaces: u32,
}

impl Section {
    /// One block's body, section 4 of the draft. Blocks that describe something else are stepped over, as it asks.
    fn block(&mut self, kind: u32, mut cursor: Cursor<'_>, found: &mut Found) -> Result<(), CaptureError> {
        let at = cursor.at - 8;
        match kind {
            SECTION_HEADER => {
                cursor.skip(4)?; // The byte-order magic, read already.
                let (major, minor) = (cursor.u16()?, cursor.u16()?);
                // 1.2 is 1.0 (section 4.1: "some pcapng file writers have used 2").
                if major != 1 || !matches!(minor, 0 | 2) {
                    return Err(CaptureError::Version { major, minor });
                }
                cursor.skip(8) // The section's length, which may be unknown.
            }
            INTERFACE_DESCRIPTION => {
                let link_type = cursor.u16()?;
                self.interfaces += 1;
                ethernet(u32::from(link_type))
            }
            ENHANCED_PACKET => {
                let interface = cursor.u32()?;
                self.has_interface(interface, at)?;
                cursor.skip(8)?; // The time.
                let (captured, original) = (cursor.u32()?, cursor.u32()?);
                found.frame(&mut cursor, captured, original)
            }
            OBSOLETE_PACKET => {
                let interface = cursor.u16()?;
                self.has_interface(u32::from(interface), at)?;
                cursor.skip(10)?; // The drop count and the time.
                let (captured, original) = (cursor.u32()?, cursor.u32()?);
                found.frame(&mut cursor, captured, original)
            }
            SIMPLE_PACKET => {
                self.has_interface(0, at)?;
                let original = cursor.u32()?;
                // It does not say how much was captured, but padding is at most 3 bytes (section 4.4).
                let captured = original.min(cursor.left() as u32);
                found.frame(&mut cursor, captured, original)
            }
            _ => Ok(()),
        }
    }

    fn has_interface(&self, interface: u32, at: usize) -> Result<(), CaptureError> {
        let what = "a packet block of an interface that was not described";
        if interface < self.interfaces { Ok(()) } else { Err(CaptureError::Malformed { at, what }) }
    }
}

/// Block types: draft-ietf-opsawg-pcapng, section 11.1; the section header's reads the same in both byte orders.
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const OBSOLETE_PACKET: u32 = 2;
const SIMPLE_PACKET: u32 = 3;
const ENHANCED_PACKET: u32 = 6;

/// Whether the section whose length the cursor is at is big-endian: its byte-order magic follows that length.
fn byte_order(cursor: &Cursor<'_>) -> Result<bool, CaptureError> {
    let mut magic = Cursor { big: false, ..*cursor };
    magic.skip(4)?;
    match magic.u32()? {
        0x1a2b_3c4d => Ok(false),
        0x4d3c_2b1a => Ok(true),
        _ => Err(CaptureError::Malformed { at: cursor.at - 4, what: "a section header without byte-order magic" }),
    }
}

/// A body that ends too early is a bad block, not a bad end of the file.
fn within_block(error: CaptureError, at: usize, end: usize) -> CaptureError {
    match error {
        CaptureError::Truncated(seen) if seen == end => {
            CaptureError::Malformed { at, what: "a block is shorter than what it says it has" }
        }
        other => other,
    }
}

fn ethernet(link_type: u32) -> Result<(), CaptureError> {
    if link_type == 1 { Ok(()) } else { Err(CaptureError::LinkType(link_type)) }
}

/// A place in the file, and how far may be read from there.
#[derive(Clone, Copy)]
struct Cursor<'f> {
    file: &'f [u8],
    at: usize,
    end: usize,
    big: bool,
}

impl Cursor<'_> {
    fn left(&self) -> usize {
        self.end.saturating_sub(self.at)
    }

    fn skip(&mut self, bytes: usize) -> Result<(), CaptureError> {
        if bytes > self.left() {
            return Err(CaptureError::Truncated(self.end));
        }
        self.at += bytes;
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], CaptureError> {
        let start = self.at;
        self.skip(N)?;
        let bytes = self.file.get(start..).and_then(|rest| rest.first_chunk());
        bytes.copied().ok_or(CaptureError::Truncated(self.end))
    }

    fn u16(&mut self) -> Result<u16, CaptureError> {
        let bytes = self.take()?;
        Ok(if self.big { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
    }

    fn u32(&mut self) -> Result<u32, CaptureError> {
        let bytes = self.take()?;
        Ok(if self.big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    }
}

//! One vhost-user message: header, payload, file descriptors (vhost-user protocol, "Message Specification").
//!
//! Nothing is checked on the way out, so that tests can lie about every field: a size that is not the payload's, any
//! number of descriptors, only the first bytes of a message.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

/// Length of the header: request, flags, size.
pub const HEADER: usize = 12;
/// Protocol version 1, in the low two bits of the flags.
pub const VERSION: u32 = 1;
/// The message is a reply.
pub const REPLY: u32 = 1 << 2;
/// The sender wants an acknowledgement (needs REPLY_ACK).
pub const NEED_REPLY: u32 = 1 << 3;
/// `SET_VRING_KICK` and its like carry no descriptor.
pub const NO_FD: u64 = 1 << 8;

/// As many descriptors as Linux passes in one message (`SCM_MAX_FD`).
const MOST_FDS: usize = 253;

/// A message as it was read.
#[derive(Debug)]
pub struct Message {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The payload as one u64.
    pub fn u64(&self) -> io::Result<u64> {
        let bytes = self.payload.as_slice().try_into();
        bytes.map(u64::from_le_bytes).map_err(|_| {
            let text = format!("reply to request {} has {} payload bytes, not 8", self.request, self.payload.len());
            io::Error::new(ErrorKind::InvalidData, text)
        })
    }

    /// Reads one message; `UnexpectedEof` when the other side closed, `TimedOut` by the stream's read timeout.
    pub fn read(stream: &UnixStream) -> io::Result<Self> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER];
        fill(stream, &mut header, &mut fds)?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mut payload = vec![0; word(8) as usize];
        fill(stream, &mut payload, &mut fds)?;
        Ok(Self { request: word(0), flags: word(4), payload, fds })
    }
}

/// The bytes of a message whose size field is right.
pub fn encode(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    encode_with_size(request, flags, payload.len() as u32, payload)
}

/// The bytes of a message that claims `size` payload bytes.
pub fn encode_with_size(request: u32, flags: u32, size: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + payload.len());
    for word in [request, flags, size] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// Sends all of `bytes`; the descriptors go with the first of them.
pub fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)), "{} descriptors in one message", fds.len());
    }
    let mut sent = 0;
    while sent < bytes.len() {
        sent += sendmsg(stream, &[IoSlice::new(&bytes[sent..])], &mut control, SendFlags::NOSIGNAL)?;
        control.clear();
    }
    Ok(())
}

fn fill(stream: &UnixStream, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<()> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut have = 0;
    while have < buffer.len() {
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut buffer[have..])];
        let got = match recvmsg(stream.as_fd(), &mut into, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(got) => got.bytes,
            Err(rustix::io::Errno::INTR) => continue,
            Err(rustix::io::Errno::AGAIN) => return Err(io::Error::new(ErrorKind::TimedOut, "no answer in time")),
            Err(error) => return Err(error.into()),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if got == 0 {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "the other side closed the connection"));
        }
        have += got;
    }
    Ok(())
}

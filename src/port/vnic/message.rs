//! vhost-user messages as far as this side reads and answers them itself: the header, what has arrived, and the ack.
//!
//! The `vhost` crate reads a message with two blocking calls and gives up on one that comes in pieces. So nothing is read
//! before all of it is there; until then the header is only peeked at. Peeking loses no descriptors: the kernel hands them
//! out with the first byte that is really read.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use vhost::vhost_user::message::FrontendReq;

use crate::limits::VHOST_USER_BODY_BYTES;

/// Bytes of a message header (vhost-user, "Header").
pub(super) const HEADER_BYTES: usize = 12;

const VERSION_MASK: u32 = 0x3;
const VERSION: u32 = 0x1;
const FLAG_REPLY: u32 = 0x4;
const FLAG_NEED_REPLY: u32 = 0x8;

/// A message's number, which need not be one that anybody knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request(pub u32);

impl Request {
    pub(super) const SET_VRING_ENABLE: Self = Self(18);
    pub(super) const SEND_RARP: Self = Self(19);
    pub(super) const NET_SET_MTU: Self = Self(20);

    /// Whether a refusal leaves the front end waiting for a reply that never comes.
    pub(super) fn wants_answer(self) -> bool {
        matches!(self.known(), Some(FrontendReq::GET_VRING_BASE | FrontendReq::SET_LOG_BASE))
    }

    /// The request as the crate knows it.
    pub(super) fn known(self) -> Option<FrontendReq> {
        FrontendReq::try_from(self.0).ok()
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.known() {
            Some(request) => write!(f, "{request:?}"),
            None => write!(f, "request {}", self.0),
        }
    }
}

/// A message header, in the byte order of this machine (as the protocol has it).
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) request: Request,
    flags: u32,
    size: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j, k, l] = *bytes;
        Self {
            request: Request(u32::from_ne_bytes([a, b, c, d])),
            flags: u32::from_ne_bytes([e, f, g, h]),
            size: u32::from_ne_bytes([i, j, k, l]),
        }
    }

    /// Whether it is a request of protocol version 1 whose body we are willing to read.
    pub(super) fn is_sound(&self) -> bool {
        self.flags & VERSION_MASK == VERSION
            && self.flags & FLAG_REPLY == 0
            && self.size as usize <= VHOST_USER_BODY_BYTES
    }

    /// Bytes of the body that follows.
    pub(super) fn body_bytes(&self) -> usize {
        self.size as usize
    }

    /// Whether the front end asks for an ack.
    pub(super) fn needs_reply(&self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }
}

/// What lies in a connection's receive buffer.
#[derive(Debug)]
pub(super) enum Arrival {
    /// Nothing.
    Nothing,
    /// Less than a message.
    Part,
    /// At least one whole message, or a header that is not [sound](Header::is_sound).
    Message(Header),
    /// A whole message with more descriptors than the `vhost` crate takes. It would read the message, fail over the
    /// descriptors and wait for the next one as if nothing had come.
    Crowded(Header),
    /// The end of the connection.
    End,
}

/// Descriptors that the `vhost` crate takes with a message (its MAX_ATTACHED_FD_ENTRIES): those of a memory table.
pub(super) const DESCRIPTORS: usize = 32;

/// Looks at what has arrived, without taking anything.
pub(super) fn arrival(stream: &UnixStream) -> io::Result<Arrival> {
    let mut bytes = [0; HEADER_BYTES];
    let crowded = match peek(stream, &mut bytes, &mut RecvAncillaryBuffer::default()) {
        Ok((0, _)) => return Ok(Arrival::End),
        Ok((HEADER_BYTES, truncated)) => truncated,
        Ok(_) => return Ok(Arrival::Part),
        Err(Errno::AGAIN) => return Ok(Arrival::Nothing),
        Err(errno) => return Err(errno.into()),
    };
    let header = Header::parse(&bytes);
    let here = rustix::io::ioctl_fionread(stream)?;
    if header.is_sound() && here < HEADER_BYTES as u64 + u64::from(header.size) {
        return Ok(Arrival::Part);
    }
    // Descriptors were cut off, as there was no room for any: see whether there are too many.
    let crowded = crowded && descriptors_to_come(stream)? > DESCRIPTORS;
    Ok(if crowded { Arrival::Crowded(header) } else { Arrival::Message(header) })
}

/// How many descriptors come with the next message; somewhat more than [`DESCRIPTORS`] stands for any number above that.
/// Peeking receives copies of them, which are closed here.
fn descriptors_to_come(stream: &UnixStream) -> rustix::io::Result<usize> {
    let mut room = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut received = RecvAncillaryBuffer::new(&mut room);
    let (_, truncated) = peek(stream, &mut [0; HEADER_BYTES], &mut received)?;
    let count = |message| if let RecvAncillaryMessage::ScmRights(rights) = message { rights.count() } else { 0 };
    Ok(received.drain().map(count).sum::<usize>() + usize::from(truncated))
}

/// Looks at the next bytes without taking them; returns how many there were, and whether descriptors had no room.
fn peek(
    stream: &UnixStream,
    bytes: &mut [u8],
    descriptors: &mut RecvAncillaryBuffer<'_>,
) -> rustix::io::Result<(usize, bool)> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let peeked = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(stream, &mut [std::io::IoSliceMut::new(bytes)], descriptors, flags)
    })?;
    Ok((peeked.bytes, peeked.flags.contains(ReturnFlags::CTRUNC)))
}

/// Takes a message that has arrived as a whole and returns its body. Descriptors that came with it are closed: the kernel
/// drops what a plain read does not ask for (unix(7), "SCM_RIGHTS").
pub(super) fn take(mut stream: &UnixStream, header: &Header) -> io::Result<Vec<u8>> {
    let mut message = vec![0; HEADER_BYTES + header.size as usize];
    stream.read_exact(&mut message)?;
    message.drain(..HEADER_BYTES);
    Ok(message)
}

/// Acknowledges `header`'s request: zero for done, one for refused (vhost-user, "REPLY_ACK").
pub(super) fn acknowledge(mut stream: &UnixStream, header: &Header, done: bool) -> io::Result<()> {
    let mut message = [0; HEADER_BYTES + 8];
    message[0..4].copy_from_slice(&header.request.0.to_ne_bytes());
    message[4..8].copy_from_slice(&(VERSION | FLAG_REPLY).to_ne_bytes());
    message[8..12].copy_from_slice(&8u32.to_ne_bytes());
    message[12..].copy_from_slice(&u64::from(!done).to_ne_bytes());
    stream.write_all(&message)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
        [request, flags, size].iter().flat_map(|word| word.to_ne_bytes()).collect()
    }

    #[test]
    fn messages_are_seen_only_when_they_are_whole() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        assert!(matches!(arrival(&ours).unwrap(), Arrival::Nothing));
        let message = [header(39, 0x9, 8), vec![7; 8]].concat();
        theirs.write_all(&message[..5]).unwrap();
        assert!(matches!(arrival(&ours).unwrap(), Arrival::Part));
        theirs.write_all(&message[5..19]).unwrap();
        assert!(matches!(arrival(&ours).unwrap(), Arrival::Part));
        theirs.write_all(&message[19..]).unwrap();
        theirs.write_all(&header(1, 0x1, 0)).unwrap();
        let Arrival::Message(status) = arrival(&ours).unwrap() else { panic!("not whole") };
        assert!(status.is_sound() && status.needs_reply());
        assert_eq!(take(&ours, &status).unwrap(), [7; 8]);
        let Arrival::Message(next) = arrival(&ours).unwrap() else { panic!("the next one is there") };
        assert_eq!(next.request.to_string(), "GET_FEATURES");
        assert_eq!(take(&ours, &next).unwrap(), [0; 0]);
        drop(theirs);
        assert!(matches!(arrival(&ours).unwrap(), Arrival::End));
    }

    #[test]
    fn a_message_may_have_as_many_descriptors_as_the_crate_takes() {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        use std::os::fd::AsFd;
        for (count, crowded) in [(0, false), (1, false), (32, false), (33, true), (253, true)] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let descriptors = vec![theirs.as_fd(); count];
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(count == 0 || control.push(SendAncillaryMessage::ScmRights(&descriptors)));
            let bytes = header(12, 0x9, 0);
            sendmsg(&theirs, &[std::io::IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
            let arrival = arrival(&ours).unwrap();
            assert_eq!(matches!(arrival, Arrival::Crowded(_)), crowded, "{count}: {arrival:?}");
            assert_eq!(matches!(arrival, Arrival::Message(_)), !crowded, "{count}: {arrival:?}");
        }
    }

    #[test]
    fn unsound_headers_do_not_wait_for_a_body() {
        for (flags, size) in [(0x2, 0), (0x5, 0), (0x1, 5000), (0x1, u32::MAX)] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(&header(1, flags, size)).unwrap();
            let Arrival::Message(header) = arrival(&ours).unwrap() else { panic!("{flags:#x} {size}") };
            assert!(!header.is_sound());
        }
        assert_eq!(Request(4711).to_string(), "request 4711");
    }
}

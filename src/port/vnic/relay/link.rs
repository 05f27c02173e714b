//! One connection in the relay: [`Link`], between a front end and the session that serves it.
//!
//! From the front end, bytes are taken message by message, never across the end of one: the kernel joins what lies in a stream's
//! buffer up to the next descriptors, and they would come to the session with an earlier message than their own. A message and
//! its descriptors leave with one sendmsg(2); of one that stops in the middle, what there is. Towards the front end there are
//! bytes only.
//!
//! Nothing here waits: what cannot be sent stays, and nothing more is read before it is gone, so a front end that does not read
//! holds up its session as if there were nobody between them, and the other way round.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use arrayvec::ArrayVec;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    Shutdown,
};

use super::super::message::{DESCRIPTORS, HEADER_BYTES, Header};
use super::vetting::{self, AT_ONCE};

/// Messages that are taken from one front end before the others have their turn.
const TURN: usize = 16;

/// Bytes that are taken from a session at once; replies are shorter.
const REPLY_BYTES: usize = 4096;

/// Descriptors with one message, in however many pieces, after which it is not read to its end.
const MOST: usize = 4 * AT_ONCE;

/// How a step of a link ended.
#[derive(Debug)]
pub(super) enum Step {
    /// There is nothing to be done before something happens at one of its sockets, or it had its turn.
    Waits,
    /// These came with a message, and have to be looked at first: [`Link::resume`].
    Look(Vec<OwnedFd>),
    /// One of its ends is gone for good.
    Ended,
}

/// A connection.
pub(super) struct Link {
    pub(super) port: u64,
    front_end: OwnedFd,
    session: OwnedFd,
    /// The message that is being read, without what of it was sent on.
    message: Vec<u8>,
    /// Its header, as far as it was read.
    header: ArrayVec<u8, HEADER_BYTES>,
    /// What its body lacks; nothing while the header is not whole.
    body: usize,
    /// What came with it.
    descriptors: Vec<OwnedFd>,
    /// It is whole, or no more of it has come: it is to be sent.
    sending: bool,
    /// Its descriptors are being looked at.
    pub(super) looking: bool,
    /// Nothing more is read: what came is no message, or the front end has ended.
    deaf: bool,
    reply: Vec<u8>,
}

impl Link {
    pub(super) fn new(port: u64, front_end: OwnedFd, session: OwnedFd) -> Self {
        Self {
            port,
            front_end,
            session,
            message: Vec::new(),
            header: ArrayVec::new(),
            body: 0,
            descriptors: Vec::new(),
            sending: false,
            looking: false,
            deaf: false,
            reply: Vec::new(),
        }
    }

    /// Its two sockets: the front end's and the session's.
    pub(super) fn sockets(&self) -> [BorrowedFd<'_>; 2] {
        [self.front_end.as_fd(), self.session.as_fd()]
    }

    /// What to wait for at each of them: that it has something, and that it takes something.
    pub(super) fn interest(&self) -> [(bool, bool); 2] {
        let (reads, replies) = (!self.sending && !self.deaf, self.has_replies());
        [(reads, replies), (!replies, self.sending && !self.looking)]
    }

    /// Goes on with a message whose descriptors were looked at: these take their places.
    pub(super) fn resume(&mut self, descriptors: Vec<OwnedFd>) {
        self.descriptors = descriptors;
        self.looking = false;
    }

    /// Moves what can be moved.
    pub(super) fn step(&mut self) -> Step {
        if !self.reply_on() {
            return Step::Ended;
        }
        for _ in 0..TURN {
            match self.step_on() {
                Ok(true) => {}
                Ok(false) => break,
                Err(end) => return end,
            }
        }
        Step::Waits
    }

    /// Gives replies to the front end; `false` if the session has ended.
    fn reply_on(&mut self) -> bool {
        loop {
            if self.reply.is_empty() {
                let mut bytes = [0; REPLY_BYTES];
                match rustix::net::recv(&self.session, &mut bytes, RecvFlags::DONTWAIT) {
                    Ok((0, _)) => return false,
                    Ok((taken, _)) => self.reply.extend_from_slice(&bytes[..taken]),
                    Err(Errno::AGAIN | Errno::INTR) => return true,
                    Err(_) => return false,
                }
            }
            match rustix::net::send(&self.front_end, &self.reply, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => drop(self.reply.drain(..sent)),
                Err(Errno::AGAIN | Errno::INTR) => return true,
                // It does not listen any more; what it has sent is still read.
                Err(_) => self.reply.clear(),
            }
        }
    }

    /// Reads or sends a part of a message; `false` if that cannot be now.
    fn step_on(&mut self) -> Result<bool, Step> {
        if self.looking {
            return Ok(false);
        }
        if self.sending {
            return self.send_on();
        }
        if self.deaf {
            return Ok(false);
        }
        match self.read_on() {
            Ok(0) => {
                self.deaf = true;
                self.sending = !self.message.is_empty();
                if !self.sending {
                    let _ = rustix::net::shutdown(&self.session, Shutdown::Write);
                }
            }
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(true),
            // Half a message is shown to the session, which waits for the rest of it as long as it sees fit.
            Err(Errno::AGAIN) if self.message.is_empty() => return Ok(false),
            Err(Errno::AGAIN) => self.sending = true,
            // Reset: the front end has left without reading our replies.
            Err(_) => return Err(Step::Ended),
        }
        self.look_first()
    }

    /// Reads up to the end of the message, or of its header. Returns how many bytes that were.
    fn read_on(&mut self) -> rustix::io::Result<usize> {
        let missing = if self.header.is_full() { self.body } else { self.header.remaining_capacity() };
        let begun = self.message.len();
        self.message.resize(begun + missing, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(AT_ONCE))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut self.message[begun..])];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = rustix::net::recvmsg(&self.front_end, &mut into, &mut ancillary, flags);
        let taken = received.as_ref().map_or(0, |received| received.bytes);
        self.message.truncate(begun + taken);
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                self.descriptors.extend(rights);
            }
        }
        received?;
        self.take_in(begun);
        Ok(taken)
    }

    /// Notes how far the message is, of which what is behind `begun` is new.
    fn take_in(&mut self, begun: usize) {
        let new = &self.message[begun..];
        if self.header.is_full() {
            self.body -= new.len();
        } else {
            self.header.extend(new.iter().copied().take(self.header.remaining_capacity()));
            let Some(header) = self.header.first_chunk().filter(|_| !new.is_empty()) else { return };
            let header = Header::parse(header);
            if !header.is_sound() {
                // What follows is no message, and the session will say so.
                (self.deaf, self.sending) = (true, true);
                return;
            }
            self.body = header.body_bytes();
        }
        if self.body == 0 {
            self.header.clear();
            self.sending = true;
        }
    }

    /// Descriptors of a message that is to be sent are looked at before.
    fn look_first(&mut self) -> Result<bool, Step> {
        if self.descriptors.len() > MOST {
            return Err(Step::Ended);
        }
        if !self.sending || self.descriptors.iter().all(vetting::is_eventfd) {
            return Ok(true);
        }
        self.looking = true;
        Err(Step::Look(std::mem::take(&mut self.descriptors)))
    }

    fn send_on(&mut self) -> Result<bool, Step> {
        let Some(sent) = self.send() else { return Err(Step::Ended) };
        match sent {
            Ok(sent) => {
                // They went with the first byte.
                self.descriptors.clear();
                self.message.drain(..sent);
                self.sending = !self.message.is_empty();
                if !self.sending && self.deaf {
                    let _ = rustix::net::shutdown(&self.session, Shutdown::Write);
                }
                Ok(true)
            }
            Err(Errno::INTR) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(_) => Err(Step::Ended),
        }
    }

    /// Sends what there is of the message, with its descriptors; nothing if these do not fit.
    fn send(&self) -> Option<rustix::io::Result<usize>> {
        // One more than a message may have says the same as any other number.
        let descriptors: ArrayVec<BorrowedFd<'_>, { DESCRIPTORS + 1 }> =
            self.descriptors.iter().map(AsFd::as_fd).take(DESCRIPTORS + 1).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS + 1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fits = descriptors.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        fits.then(|| rustix::net::sendmsg(&self.session, &[IoSlice::new(&self.message)], &mut ancillary, flags))
    }

    /// Whether replies wait for a front end that does not read.
    pub(super) fn has_replies(&self) -> bool {
        !self.reply.is_empty()
    }

    /// Ends the session's connection. The front end's comes back, and descriptors that nobody has looked at: neither may be
    /// closed where somebody waits.
    pub(super) fn end(self) -> (OwnedFd, Vec<OwnedFd>) {
        let _ = rustix::net::shutdown(&self.session, Shutdown::Both);
        (self.front_end, self.descriptors)
    }
}

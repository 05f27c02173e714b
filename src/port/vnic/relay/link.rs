//! One connection in the relay: [`Link`], between a front end and the session that serves it.
//!
//! From the front end, bytes are taken message by message, never across the end of one: the kernel joins what lies in a stream's
//! buffer up to the next descriptors, and they would come to the session with an earlier message than their own. A message and
//! its descriptors leave with one sendmsg(2); of one that stops in the middle, what there is. Towards the front end there are
//! bytes only.
//!
//! Nothing here waits: what cannot be sent stays, and nothing more is read before it is gone, so a front end that does not read
//! holds up its session as if there were nobody between them, and the other way round.
//!
//! Descriptors are closed elsewhere, eventfds too: the kernel takes the last one of a file out of all epoll sets that it is in, and
//! waits for whoever is in one of those, who may be in a page fault that never ends (fs/eventpoll.c, eventpoll_release_file). Those
//! that were passed on are closed when the daemon has none of them any more ([`Kept`]).
//!
//! What a front end can have is time: whatever is done at its socket wakes all who wait for the other end. So each message is
//! measured, and a link that takes too much ([`Toll`]) is dropped, unless that is forgiven ([`super::pacing`]): nothing more is done at
//! that socket until the daemon, which keeps the port out, has ended the session.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use arrayvec::ArrayVec;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, Shutdown,
};

use super::super::message::{DESCRIPTORS, HEADER_BYTES, Header};
use super::kept::Kept;
use super::vetting::{self, MOST_AT_ONCE};
use crate::sys::toll::{AT_ONCE, Toll, thread_time};

/// Messages that are taken from one front end before the others have their turn.
const TURN: usize = 16;

/// Bytes that are taken from a session at once; replies are shorter.
const REPLY_BYTES: usize = 4096;

/// Descriptors with one message, in however many pieces: one that has more than it may, and brings more, is not read on.
pub(super) const MOST: usize = DESCRIPTORS + MOST_AT_ONCE;

/// How a step of a link ended.
#[derive(Debug)]
pub(super) enum Step {
    /// There is nothing to be done before something happens at one of its sockets, or it had its turn.
    Waits,
    /// These came with a message, and have to be looked at first: [`Link::resume`].
    Look(Vec<OwnedFd>),
    /// These files went with a message, and have to be closed before the next is read: [`Link::resume`]. Their pages are somebody's
    /// who may want them back.
    Close(Vec<OwnedFd>),
    /// Using the front end's socket takes too much, and is not done any more.
    Costly,
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
    /// Its descriptors are being looked at or closed.
    busy: bool,
    /// They were looked at, so not all of them are eventfds.
    looked: bool,
    /// Eventfds that were sent on.
    pub(super) kept: Kept,
    /// There is room for the descriptors of another message.
    pub(super) has_room: bool,
    /// Nothing more is read: what came is no message, or the front end has ended.
    deaf: bool,
    reply: Vec<u8>,
    /// What the front end's messages, and replies to it, have taken; and what those did that are under way.
    toll: Toll,
    spent: Duration,
    /// That was too much.
    dropped: bool,
}

impl Link {
    pub(super) fn new(port: u64, front_end: OwnedFd, session: OwnedFd, kept: Kept) -> Self {
        Self {
            port,
            front_end,
            session,
            message: Vec::new(),
            header: ArrayVec::new(),
            body: 0,
            descriptors: Vec::new(),
            sending: false,
            busy: false,
            looked: false,
            kept,
            has_room: true,
            deaf: false,
            reply: Vec::new(),
            toll: Toll::default(),
            spent: Duration::ZERO,
            dropped: false,
        }
    }

    /// Its two sockets: the front end's and the session's.
    pub(super) fn sockets(&self) -> [BorrowedFd<'_>; 2] {
        [self.front_end.as_fd(), self.session.as_fd()]
    }

    /// What to wait for at each of them: that it has something, and that it takes something.
    pub(super) fn interest(&self) -> [(bool, bool); 2] {
        if self.dropped {
            return [(false, false), (true, false)];
        }
        let (reads, replies) = (self.may_read() && !self.sending && !self.busy, self.has_replies());
        [(reads, replies), (!replies, self.sending && !self.busy)]
    }

    /// Goes on with a message whose descriptors were looked at, these taking their places, or behind one whose were closed.
    pub(super) fn resume(&mut self, descriptors: Vec<OwnedFd>) {
        self.looked = !descriptors.is_empty();
        self.descriptors = descriptors;
        self.busy = false;
    }

    /// Moves what can be moved. What takes too much ends that, unless it is forgiven.
    pub(super) fn step(&mut self, mut forgives: impl FnMut() -> bool) -> Step {
        for _ in 0..TURN {
            let before = thread_time();
            let moved = if self.dropped { self.waste_reply() } else { self.move_on() };
            self.spent += thread_time().saturating_sub(before);
            if self.costs_too_much(matches!(moved, Ok(true) | Err(Step::Close(_)))) && !forgives() {
                self.dropped = true;
                if let Err(Step::Look(descriptors) | Step::Close(descriptors)) = moved {
                    self.descriptors = descriptors;
                }
                return Step::Costly;
            }
            match moved {
                Ok(true) => {}
                Ok(false) => break,
                Err(end) => return end,
            }
        }
        Step::Waits
    }

    /// Whether what was spent on a message and a reply is too much. That is known when they are through, or earlier: only some of
    /// the calls that they take wake anybody.
    fn costs_too_much(&mut self, moved: bool) -> bool {
        let through = moved && self.message.is_empty() && self.reply.is_empty();
        let known = !self.dropped && (through || self.spent >= AT_ONCE);
        known && self.toll.charge_at_once(std::mem::take(&mut self.spent))
    }

    /// Moves a reply, or else a part of a message; `false` if neither can be now.
    fn move_on(&mut self) -> Result<bool, Step> {
        if self.reply_on()? { Ok(true) } else { self.step_on() }
    }

    /// Takes a reply that nobody gets any more.
    fn waste_reply(&mut self) -> Result<bool, Step> {
        self.reply.clear();
        self.take_reply()
    }

    /// Takes a reply from the session; `false` if there is none.
    fn take_reply(&mut self) -> Result<bool, Step> {
        let mut bytes = [0; REPLY_BYTES];
        match rustix::net::recv(&self.session, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Err(Step::Ended),
            Ok((taken, _)) => {
                self.reply.extend_from_slice(&bytes[..taken]);
                Ok(true)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(_) => Err(Step::Ended),
        }
    }

    /// Gives a reply to the front end, as far as it goes; `false` if there is none, or it takes none now.
    fn reply_on(&mut self) -> Result<bool, Step> {
        if self.reply.is_empty() && !self.take_reply()? {
            return Ok(false);
        }
        match rustix::net::send(&self.front_end, &self.reply, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => drop(self.reply.drain(..sent)),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            // It does not listen any more; what it has sent is still read.
            Err(_) => self.reply.clear(),
        }
        Ok(true)
    }

    /// Whether there may be more of the front end's messages.
    fn may_read(&self) -> bool {
        let begun = !self.message.is_empty() || !self.header.is_empty();
        !self.deaf && self.has_room && (begun || !self.kept.is_full())
    }

    /// Reads or sends a part of a message; `false` if that cannot be now.
    fn step_on(&mut self) -> Result<bool, Step> {
        if self.busy {
            return Ok(false);
        }
        if self.sending {
            return self.send_on();
        }
        if !self.may_read() {
            // What there is of a message is shown, as when the rest has not come.
            self.sending = !self.message.is_empty();
            return if self.sending { self.look_first() } else { Ok(false) };
        }
        if self.descriptors.len() + self.kept.of_message() > DESCRIPTORS && self.brings_more() {
            return Err(Step::Ended);
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

    /// Whether descriptors come with what is read next. None is taken.
    fn brings_more(&self) -> bool {
        let (mut byte, mut no_space) = ([0], RecvAncillaryBuffer::default());
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let peeked = rustix::net::recvmsg(&self.front_end, &mut [IoSliceMut::new(&mut byte)], &mut no_space, flags);
        peeked.is_ok_and(|peeked| peeked.flags.contains(ReturnFlags::CTRUNC))
    }

    /// Reads up to the end of the message, or of its header. Returns how many bytes that were.
    fn read_on(&mut self) -> rustix::io::Result<usize> {
        let missing = if self.header.is_full() { self.body } else { self.header.remaining_capacity() };
        let begun = self.message.len();
        self.message.resize(begun + missing, 0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_AT_ONCE))];
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
        if !self.sending || self.descriptors.iter().all(vetting::is_eventfd) {
            return Ok(true);
        }
        self.busy = true;
        Err(Step::Look(std::mem::take(&mut self.descriptors)))
    }

    fn send_on(&mut self) -> Result<bool, Step> {
        let Some(sent) = self.send() else { return Err(Step::Ended) };
        match sent {
            Ok(sent) => {
                self.message.drain(..sent);
                self.sending = !self.message.is_empty();
                if !self.sending && self.deaf {
                    let _ = rustix::net::shutdown(&self.session, Shutdown::Write);
                }
                // What the next may bring is asked for first.
                self.has_room &= self.descriptors.is_empty();
                // They went with the first byte.
                let files = self.keep_events();
                if !self.sending && self.header.is_empty() {
                    self.kept.next_message();
                }
                self.busy = !files.is_empty();
                if self.busy { Err(Step::Close(files)) } else { Ok(true) }
            }
            Err(Errno::INTR) => Ok(true),
            Err(Errno::AGAIN) => Ok(false),
            Err(_) => Err(Step::Ended),
        }
    }

    /// Keeps the eventfds of what was sent on. The files come back.
    fn keep_events(&mut self) -> Vec<OwnedFd> {
        let descriptors = std::mem::take(&mut self.descriptors);
        let looked = std::mem::take(&mut self.looked);
        let (events, files) = descriptors.into_iter().partition(|sent| !looked || vetting::is_eventfd(sent));
        self.kept.keep(events);
        files
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

    /// How many descriptors it has.
    pub(super) fn descriptors(&self) -> usize {
        self.sockets().len() + self.descriptors.len() + self.kept.len()
    }

    /// Whether replies wait for a front end that does not read.
    pub(super) fn has_replies(&self) -> bool {
        !self.reply.is_empty()
    }

    /// Ends the session's connection. The front end's comes back, and descriptors: neither may be closed where somebody waits. What
    /// is kept stays so.
    pub(super) fn end(self) -> (OwnedFd, Vec<OwnedFd>, Kept) {
        let _ = rustix::net::shutdown(&self.session, Shutdown::Both);
        (self.front_end, self.descriptors, self.kept)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    /// Moves a message that takes too much; returns whether the session got it.
    fn moves_a_costly_message(forgives: bool) -> (Step, bool) {
        let ((mut front_end, ours), (mut session, far)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
        let (lease, _daemons) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        let mut link = Link::new(1, ours.into(), far.into(), Kept::new(lease, 2));
        // GET_FEATURES, version 1, without a body.
        front_end.write_all(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        link.spent = AT_ONCE;
        let step = link.step(|| forgives);
        session.set_nonblocking(true).unwrap();
        (step, session.read(&mut [0; 64]).is_ok_and(|read| read == HEADER_BYTES))
    }

    #[test]
    fn a_message_that_takes_too_much_goes_on_if_it_is_forgiven() {
        assert!(matches!(moves_a_costly_message(true), (Step::Waits, true)));
        assert!(matches!(moves_a_costly_message(false), (Step::Costly, false)));
    }
}

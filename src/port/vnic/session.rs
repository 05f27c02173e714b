//! One connection of a front end, from its first message to its last: [`serve`].
//!
//! The thread sleeps in poll(2) on the socket and on the port's attention event. It peeks at each message and hands it to
//! the `vhost` crate's loop, except for those that the loop answers by ending the connection: SET_VRING_ENABLE (QEMU sends
//! it when the device is made, long before the first SET_FEATURES), SEND_RARP, NET_SET_MTU, and whatever we did not offer
//! or nobody knows. A thread for each connection, and not one for all: the crate's sends and receives block, so a front end
//! that does not read would hold up every other.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::FrontendReq as Req;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::attendance::{Attendance, TURN};
use super::handler::Handler;
use super::message::{self, Arrival, Header, Request};
use super::nic::{Mode, Nic};
use super::offence::Offence;
use super::relay;
use crate::port::rate_limit::log_limited;
use crate::sys::mapping_turn::in_faults;

/// How long a front end that connected to us may keep silent before it makes room for others.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);

/// How long the rest of a message may take. Front ends send each with one system call. Tests have less patience.
const REST_OF_MESSAGE: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 3000 });

/// How often to look for the rest of a message: poll(2) cannot wait for "more than this".
const REST_POLL: Duration = Duration::from_millis(10);

/// Why a connection ended.
#[derive(Debug)]
pub(super) enum End {
    /// The front end closed it.
    Closed,
    /// The port is being removed.
    Removed,
    /// Nothing came after the connection was made.
    Silent,
    /// Nothing of what it may have sent was read, for all that others have sent.
    Unread,
    /// It held others up.
    Offence(Offence),
    /// A message stopped in the middle.
    HalfMessage,
    /// A message that cannot be understood, or that has no answer.
    Broken(Request, String),
    /// The socket failed.
    Socket(io::Error),
    /// A bug of ours; the panic is in the log.
    Panicked,
}

impl End {
    /// A message that came with more descriptors than any may have.
    pub(super) fn crowded(header: &Header) -> Self {
        Self::Broken(header.request, "more than 32 descriptors came with it".into())
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the front end closed the connection"),
            Self::Removed => f.write_str("the port was removed"),
            Self::Silent => write!(f, "the front end sent nothing for {} s", FIRST_MESSAGE.as_secs()),
            Self::Unread => {
                let seconds = FIRST_MESSAGE.as_secs();
                write!(f, "no message was read for {seconds} s: descriptors of other ports fill the relay")
            }
            Self::Offence(offence) => write!(f, "the front end {offence}"),
            Self::HalfMessage => write!(f, "the front end sent half a message and no more"),
            Self::Broken(request, reason) => write!(f, "the front end sent a broken {request}: {reason}"),
            Self::Socket(error) => write!(f, "the socket failed: {error}"),
            Self::Panicked => f.write_str("a bug in Linecard ended the connection; the log has it"),
        }
    }
}

/// Serves the connection until it ends. `stopping` is set, and the stream shut down, to end it from this side.
pub(super) fn serve(stream: &UnixStream, nic: &Nic, handler: &Arc<Handler>, stopping: &AtomicBool) -> End {
    Session::new(stream, nic, handler).and_then(|mut session| session.run(stopping)).unwrap_or_else(End::Socket)
}

/// A connection that is being served.
pub(super) struct Session<'a> {
    stream: &'a UnixStream,
    nic: &'a Nic,
    handler: &'a Arc<Handler>,
    backend: BackendReqHandler<Handler>,
}

impl<'a> Session<'a> {
    /// A connection from which nothing was read yet.
    pub(super) fn new(stream: &'a UnixStream, nic: &'a Nic, handler: &'a Arc<Handler>) -> io::Result<Self> {
        let backend = BackendReqHandler::from_stream(stream.try_clone()?, Arc::clone(handler));
        Ok(Self { stream, nic, handler, backend })
    }

    /// Serves until the connection ends.
    pub(super) fn run(&mut self, stopping: &AtomicBool) -> io::Result<End> {
        // Only who connects to us can keep others out by saying nothing; whom we connect to may take its time.
        let mut deadline = (self.nic.config.mode == Mode::Server).then_some((FIRST_MESSAGE, End::Silent));
        let mut attendance = Attendance::new(Instant::now());
        loop {
            attendance.turn(Instant::now());
            let arrival = message::arrival(self.stream)?;
            if stopping.load(Ordering::Acquire) {
                return Ok(End::Removed);
            }
            if let Some(offence) = self.offence() {
                return Ok(End::Offence(offence));
            }
            let part = match arrival {
                Arrival::End => return Ok(End::Closed),
                Arrival::Message(header) => {
                    deadline = None;
                    self.look();
                    if let Some(end) = self.message(&header)? {
                        return Ok(end);
                    }
                    self.handler.follow_up();
                    self.slow_down();
                    continue;
                }
                Arrival::Crowded(header) => return Ok(End::crowded(&header)),
                Arrival::Nothing => false,
                Arrival::Part => true,
            };
            if part && !matches!(deadline, Some((_, End::HalfMessage))) {
                deadline = Some((attendance.total() + REST_OF_MESSAGE, End::HalfMessage));
            }
            if let Some((_, end)) = deadline.take_if(|(at, _)| *at <= attendance.total()) {
                let unread = matches!(end, End::Silent) && relay::is_crowded();
                return Ok(if unread { End::Unread } else { end });
            }
            let left = deadline.as_ref().map(|(at, _)| at.saturating_sub(attendance.total()).min(TURN));
            if self.wait(part, left)? {
                return Ok(End::HalfMessage);
            }
        }
    }

    /// What the front end did since this was asked last, for which it is sent away. What is forgiven it is told in the log.
    fn offence(&self) -> Option<Offence> {
        if let Some(held) = self.nic.docket.take_held_up() {
            log_limited!(self.nic.log, log::Level::Warn, "{}: {held}", self.nic.config.name);
        }
        let kept_waiting = || self.nic.was_kept_waiting().then_some(Offence::Mapping);
        self.nic.docket.take().or_else(kept_waiting)
    }

    /// Has a front end wait that has memory mapped and unmapped in a loop, or that sends whatever it sends in one, and nobody but
    /// itself with it; at most for the regions of one message, 32 times 10 ms, so that the port can still be removed soon.
    fn slow_down(&self) {
        self.nic.messages.spend(1);
        std::thread::sleep(self.nic.mappings.debt().max(self.nic.messages.debt()));
    }

    /// Sleeps until there is something to do, or for as long as is `left`. `true`: a message has begun, and its sender is gone.
    fn wait(&self, part: bool, left: Option<Duration>) -> io::Result<bool> {
        // What is here already would wake poll at once, so wait for the end of the stream and look again soon.
        let (events, left) = match part {
            true => (PollFlags::RDHUP, Some(REST_POLL)),
            false => (PollFlags::IN, left),
        };
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let attention = &*self.nic.attention;
        let mut fds = [PollFd::new(self.stream, events), PollFd::new(attention, PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        if fds[1].revents().contains(PollFlags::IN) {
            self.look();
            self.handler.follow_up();
        }
        let gone = fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP);
        // The rest may have come together with the end of the stream.
        Ok(part && gone && matches!(message::arrival(self.stream)?, Arrival::Part))
    }

    /// Deals with what the port's attention is asked for. Before each message as well: a front end that keeps sending some would
    /// keep a port going that has lost its memory.
    fn look(&self) {
        if self.nic.attention.drain() > 0 {
            in_faults(|| self.handler.device().attend());
        }
    }

    /// Handles one message, which has arrived as a whole; `Some` ends the connection.
    pub(super) fn message(&mut self, header: &Header) -> io::Result<Option<End>> {
        let end = in_faults(|| self.handle(header));
        self.handler.next_message();
        end
    }

    fn handle(&mut self, header: &Header) -> io::Result<Option<End>> {
        let request = header.request;
        if !header.is_sound() {
            return Ok(Some(End::Broken(request, "its header is not one of a request of protocol version 1".into())));
        }
        if !crate_takes(request) {
            let body = message::take(self.stream, header)?;
            let done = self.handler.serve(request, &body);
            self.handler.take_refused();
            if header.needs_reply() && self.handler.device().has_reply_ack() {
                message::acknowledge(self.stream, header, done)?;
            }
            return Ok(None);
        }
        let result = self.backend.handle_request();
        let refused = self.handler.take_refused();
        Ok(match result {
            Ok(()) => None,
            // The crate has acknowledged the refusal, and the message is read: the next one follows.
            Err(_) if refused && !request.wants_answer() => None,
            Err(Error::Disconnected | Error::SocketBroken(_)) => Some(End::Closed),
            Err(error) => Some(End::Broken(request, error.to_string())),
        })
    }
}

/// Whether the crate's loop can take a request without ending the connection over it.
fn crate_takes(request: Request) -> bool {
    matches!(
        request.known(),
        Some(
            Req::GET_FEATURES
                | Req::SET_FEATURES
                | Req::SET_OWNER
                | Req::RESET_OWNER
                | Req::SET_MEM_TABLE
                | Req::SET_VRING_NUM
                | Req::SET_VRING_ADDR
                | Req::SET_VRING_BASE
                | Req::GET_VRING_BASE
                | Req::SET_VRING_KICK
                | Req::SET_VRING_CALL
                | Req::SET_VRING_ERR
                | Req::GET_PROTOCOL_FEATURES
                | Req::SET_PROTOCOL_FEATURES
                | Req::GET_QUEUE_NUM
                | Req::GET_MAX_MEM_SLOTS
                | Req::ADD_MEM_REG
                | Req::REM_MEM_REG
                | Req::SET_LOG_BASE
        )
    )
}

//! How a port in client mode comes to its VM: [`Dialler`], a thread for each such port, which looks for the VM's socket again and
//! again and serves the connection itself.
//!
//! The socket's directory is the VM's. Whoever may read it can hold its lock for as long as he likes (fs/readdir.c: iterate_dir
//! copies names to him under it), and a link on the way may lead to a file system that never answers. A thread that looks for a name
//! there may then never come back, whatever signal it gets, so it is one that serves nobody else and that nobody waits for. It
//! is there from the port's first moment: while another port's VM keeps the kernel from starting threads (`sys/mapping_turn.rs`),
//! this one finds its own. The acceptor's thread starts it, because whoever opens ports may not wait for that.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::attachment::{Attachment, STACK_BYTES};
use super::offence::Offence;
use crate::port::rate_limit::log_limited;
use crate::sys::socket::peer;
use crate::sys::socket_file;
use crate::sys::toll::{Pardon, Toll, thread_time};

/// How long to wait before looking again: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// A port that looks for its VM.
pub(super) struct Dialler {
    attachment: Arc<Attachment>,
    stopped: Mutex<bool>,
    stops: Condvar,
}

/// What came of looking once.
enum Found {
    /// Nothing.
    Nobody,
    /// A VM, which was connected for so long.
    Vm(Duration),
    /// Somebody who is to be left alone for so long.
    Offender(Duration),
}

impl Dialler {
    pub(super) fn new(attachment: Arc<Attachment>) -> Arc<Self> {
        let (stopped, stops) = Default::default();
        Arc::new(Self { attachment, stopped, stops })
    }

    /// Starts the thread.
    pub(super) fn start(self: &Arc<Self>) -> io::Result<()> {
        let dialler = Arc::clone(self);
        let name = format!("vhost-{}", self.attachment.nic().config.name);
        std::thread::Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || dialler.run()).map(drop)
    }

    /// Has the thread end, when it can. Does not wait for that.
    pub(super) fn stop(&self) {
        *self.stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stops.notify_all();
    }

    /// Whether it was stopped before this time had passed.
    fn stopped_within(&self, time: Duration) -> bool {
        let stopped = self.stopped.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.stops.wait_timeout_while(stopped, time, |stopped| !*stopped);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn run(&self) {
        let (mut toll, mut pardon) = (Toll::default(), Pardon::default());
        let (mut next, mut rest) = (BACK_OFF.0, Duration::ZERO);
        while !self.stopped_within(rest) {
            let found = self.look(&mut toll, &mut pardon);
            if let Found::Offender(time) = found {
                rest = time;
                continue;
            }
            if matches!(found, Found::Vm(lasted) if lasted > BACK_OFF.1) {
                next = BACK_OFF.0;
            }
            rest = next;
            next = (2 * next).min(BACK_OFF.1);
        }
    }

    /// Looks for the VM once, and serves it if it is there.
    fn look(&self, toll: &mut Toll, pardon: &mut Pardon) -> Found {
        if !self.attachment.is_open() {
            return Found::Nobody;
        }
        let before = thread_time();
        let connected = self.attachment.while_looking(socket_file::connect);
        // Connecting wakes all who wait for the VM's socket, with interrupts off.
        let costly = toll.charge_at_once(thread_time().saturating_sub(before));
        if costly && !pardon.grant(Instant::now()) {
            connected.into_iter().for_each(|stream| self.attachment.send_away(stream));
            return Found::Offender(self.attachment.keep_away(Offence::SlowSocket));
        }
        match connected.and_then(|stream| self.stranger(stream)) {
            Ok(stream) => self.attachment.serve(stream).map_or(Found::Nobody, Found::Vm),
            Err(error) => {
                let nic = self.attachment.nic();
                let path = nic.config.socket.display();
                if self.attachment.note_waiting(format!("looking for the VM at {path}: {error}")) {
                    log_limited!(nic.log, log::Level::Info, "{}: looking for the VM: {error}", nic.config.name);
                }
                Found::Nobody
            }
        }
    }

    /// A connection to somebody else than this process: a port that sat at the far end of another one would keep that one's VM out.
    fn stranger(&self, stream: UnixStream) -> io::Result<UnixStream> {
        // unix(7), SO_PEERCRED: who called listen(2).
        let owner = peer(&stream)?.pid;
        if u32::try_from(owner) == Ok(std::process::id()) {
            self.attachment.send_away(stream);
            return Err(io::Error::other("linecardd itself listens there: the VM has to make a socket of its own"));
        }
        Ok(stream)
    }
}

//! QEMU's control socket (docs/interop/qmp-spec): one command at a time, and the events seen on the way.
//! Replies are read under a read timeout; the end of the connection is the end of QEMU and ends every wait.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::wait::STEP;
use crate::{Error, Result};

/// A connection to one guest's QMP socket, after the handshake.
#[derive(Debug)]
pub struct Qmp {
    guest: String,
    stream: BufReader<UnixStream>,
    /// Bytes of a line that a timeout cut short.
    partial: Vec<u8>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Greets QEMU on a fresh connection.
    pub fn new(guest: &str, stream: UnixStream) -> Result<Qmp> {
        let mut qmp = Qmp {
            guest: guest.to_owned(),
            stream: BufReader::new(stream),
            partial: Vec::new(),
            events: VecDeque::new(),
        };
        qmp.read(Instant::now() + STEP, "greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command, "arguments": arguments }).to_string();
        request.push('\n');
        let sent = self.stream.get_mut().write_all(request.as_bytes());
        sent.map_err(Error::io(format!("{}: send QMP {command}", self.guest)))?;
        let deadline = Instant::now() + STEP;
        loop {
            let mut reply = self.read(deadline, command)?;
            if reply.get("event").is_some() {
                self.events.push_back(reply);
            } else if let Some(error) = reply.get("error") {
                let reason = error["desc"].as_str().unwrap_or("no description").to_owned();
                return Err(Error::Qmp { guest: self.guest.clone(), command: command.to_owned(), reason });
            } else {
                return Ok(reply["return"].take());
            }
        }
    }

    /// Waits for the next event of this name and takes it; earlier events of other names are kept.
    pub fn wait_event(&mut self, name: &str, deadline: Duration) -> Result<Value> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(at) = self.events.iter().position(|event| event["event"] == name) {
                return Ok(self.events.remove(at).unwrap_or_default());
            }
            let message = self.read(end, name)?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            }
        }
    }

    fn read(&mut self, end: Instant, what: &str) -> Result<Value> {
        loop {
            // A read timeout of zero would mean none.
            let left = end.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            let set = self.stream.get_ref().set_read_timeout(Some(left));
            set.map_err(Error::io(format!("{}: QMP socket", self.guest)))?;
            match self.stream.read_until(b'\n', &mut self.partial) {
                Ok(0) => return Err(Error::Unexpected(format!("{}: QEMU is gone, waiting for {what}", self.guest))),
                Ok(_) => {
                    let line = std::mem::take(&mut self.partial);
                    return serde_json::from_slice(&line)
                        .map_err(|e| Error::Unexpected(format!("{}: QMP sent {line:?}: {e}", self.guest)));
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    let what = format!("QMP {what} from {}", self.guest);
                    return Err(Error::Timeout { what, after: STEP });
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io(format!("{}: read QMP {what}", self.guest))(e)),
            }
        }
    }
}

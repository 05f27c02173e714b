//! A vhost-user connection as the front end holds it: one method per message, replies checked, every read bounded by
//! [`DEADLINE`].
//!
//! Errors keep apart what tests care about: `UnexpectedEof`, `BrokenPipe` and `ConnectionReset` mean that the back end
//! closed the connection ([`is_closed`]), `TimedOut` that it did not answer, `Other` that it refused with a NACK
//! ([`is_nack`]). [`Session::raw`] sends whatever the caller makes up.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::doorbell::Doorbell;
use super::ram::Region;
use super::ring::Ring;
use super::{DEADLINE, message};
use message::{Message, NEED_REPLY, REPLY, VERSION};

/// Request numbers (vhost-user protocol, "Front-end message types").
#[rustfmt::skip]
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SEND_RARP: u32 = 19;
    pub const NET_SET_MTU: u32 = 20;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const IOTLB_MSG: u32 = 22;
    pub const SET_VRING_ENDIAN: u32 = 23;
    pub const GET_CONFIG: u32 = 24;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// Virtio feature bits (virtio 1.2, 5.1.3 and 6) and the vhost-user one, 30.
#[rustfmt::skip]
pub mod feature {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MTU: u64 = 1 << 3;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const GUEST_ECN: u64 = 1 << 9;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const HOST_ECN: u64 = 1 << 13;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const CTRL_VQ: u64 = 1 << 17;
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    pub const MQ: u64 = 1 << 22;
    pub const LOG_ALL: u64 = 1 << 26;
    pub const ANY_LAYOUT: u64 = 1 << 27;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const RING_PACKED: u64 = 1 << 34;
    pub const IN_ORDER: u64 = 1 << 35;
    pub const GUEST_USO4: u64 = 1 << 54;
    pub const GUEST_USO6: u64 = 1 << 55;
    pub const HOST_USO: u64 = 1 << 56;

    /// All that a guest may leave to the switch, and all that it can do for the switch.
    pub const HOST_OFFLOADS: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO;
    pub const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;
}

/// vhost-user protocol feature bits.
#[rustfmt::skip]
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const RARP: u64 = 1 << 2;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const NET_MTU: u64 = 1 << 4;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// Whether `error` says that the back end closed the connection.
pub fn is_closed(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::BrokenPipe | ErrorKind::ConnectionReset)
}

/// Whether `error` is the back end's refusal of a message that it answered.
pub fn is_nack(error: &io::Error) -> bool {
    error.kind() == ErrorKind::Other
}

/// One connection.
pub struct Session {
    stream: UnixStream,
    /// REPLY_ACK is negotiated: only then NEED_REPLY is set and an answer awaited.
    pub reply_ack: Cell<bool>,
    /// Bytes that may still be sent before the connection is cut, for tests that leave half-way.
    fuse: Cell<Option<usize>>,
}

impl Session {
    pub fn connect(path: &Path) -> io::Result<Self> {
        UnixStream::connect(path).and_then(Self::new)
    }

    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        Ok(Self { stream, reply_ack: Cell::new(false), fuse: Cell::new(None) })
    }

    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Cuts the connection after `bytes` more bytes, in the middle of a message if it comes so.
    pub fn cut_after(&self, bytes: usize) {
        self.fuse.set(Some(bytes));
    }

    /// Sends bytes as they are.
    pub fn raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let Some(left) = self.fuse.get() else { return message::send(&self.stream, bytes, fds) };
        let part = bytes.len().min(left);
        if part > 0 {
            message::send(&self.stream, &bytes[..part], fds)?;
        }
        self.fuse.set(Some(left - part));
        if part == bytes.len() {
            return Ok(());
        }
        self.stream.shutdown(std::net::Shutdown::Both)?;
        Err(io::Error::new(ErrorKind::ConnectionAborted, "cut by the test"))
    }

    /// Reads one message, whatever it is.
    pub fn read(&self) -> io::Result<Message> {
        Message::read(&self.stream)
    }

    /// Reads until the back end closes, at most `patience`; true if it did.
    pub fn closes_within(&self, patience: Duration) -> bool {
        self.stream.set_read_timeout(Some(patience)).expect("a timeout above zero");
        let closed = loop {
            match self.read() {
                Ok(_) => {}
                Err(error) => break is_closed(&error),
            }
        };
        self.stream.set_read_timeout(Some(DEADLINE)).expect("a timeout above zero");
        closed
    }

    /// Sends a request and reads its reply.
    pub fn ask(&self, request: u32, payload: &[u8]) -> io::Result<Message> {
        self.raw(&message::encode(request, VERSION, payload), &[])?;
        self.reply_to(request)
    }

    pub fn ask_u64(&self, request: u32) -> io::Result<u64> {
        self.ask(request, &[])?.u64()
    }

    /// Sends a message; with `ack`, and REPLY_ACK negotiated, waits for the answer. A NACK is an error.
    pub fn tell(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>], ack: bool) -> io::Result<()> {
        let ack = ack && self.reply_ack.get();
        let flags = if ack { VERSION | NEED_REPLY } else { VERSION };
        self.raw(&message::encode(request, flags, payload), fds)?;
        if !ack {
            return Ok(());
        }
        match self.reply_to(request)?.u64()? {
            0 => Ok(()),
            code => Err(io::Error::other(format!("the back end refused request {request} with {code}"))),
        }
    }

    fn reply_to(&self, request: u32) -> io::Result<Message> {
        let reply = self.read()?;
        let right = reply.request == request && reply.flags & REPLY != 0 && reply.flags & 3 == VERSION;
        if !right {
            let text = format!("request {request} got {} with flags {:#x} as its reply", reply.request, reply.flags);
            return Err(io::Error::new(ErrorKind::InvalidData, text));
        }
        Ok(reply)
    }

    pub fn get_features(&self) -> io::Result<u64> {
        self.ask_u64(request::GET_FEATURES)
    }

    pub fn set_features(&self, bits: u64, ack: bool) -> io::Result<()> {
        self.tell(request::SET_FEATURES, &bits.to_le_bytes(), &[], ack)
    }

    pub fn get_protocol_features(&self) -> io::Result<u64> {
        self.ask_u64(request::GET_PROTOCOL_FEATURES)
    }

    /// Tells the protocol features and goes by them from here on.
    pub fn set_protocol_features(&self, bits: u64) -> io::Result<()> {
        self.tell(request::SET_PROTOCOL_FEATURES, &bits.to_le_bytes(), &[], false)?;
        self.reply_ack.set(bits & protocol::REPLY_ACK != 0);
        Ok(())
    }

    pub fn set_owner(&self, ack: bool) -> io::Result<()> {
        self.tell(request::SET_OWNER, &[], &[], ack)
    }

    pub fn set_mem_table(&self, regions: &[Region], ack: bool) -> io::Result<()> {
        let fds: Vec<_> = regions.iter().map(|region| region.file.as_fd()).collect();
        self.tell(request::SET_MEM_TABLE, &mem_table(regions), &fds, ack)
    }

    pub fn add_mem_reg(&self, region: &Region, ack: bool) -> io::Result<()> {
        self.tell(request::ADD_MEM_REG, &single_region(region), &[region.file.as_fd()], ack)
    }

    pub fn rem_mem_reg(&self, region: &Region, ack: bool) -> io::Result<()> {
        self.tell(request::REM_MEM_REG, &single_region(region), &[], ack)
    }

    pub fn set_vring_num(&self, index: u32, size: u32, ack: bool) -> io::Result<()> {
        self.tell(request::SET_VRING_NUM, &vring_state(index, size), &[], ack)
    }

    pub fn set_vring_base(&self, index: u32, base: u32, ack: bool) -> io::Result<()> {
        self.tell(request::SET_VRING_BASE, &vring_state(index, base), &[], ack)
    }

    /// Stops the ring; the reply is the index at which it goes on.
    pub fn get_vring_base(&self, index: u32) -> io::Result<u32> {
        let reply = self.ask(request::GET_VRING_BASE, &vring_state(index, 0))?.u64()?;
        if reply as u32 != index {
            return Err(io::Error::new(ErrorKind::InvalidData, format!("base of ring {index}, reply {reply:#x}")));
        }
        Ok((reply >> 32) as u32)
    }

    pub fn set_vring_addr(&self, index: u32, ring: &Ring, ack: bool) -> io::Result<()> {
        let [desc, used, avail] = [ring.desc, ring.used, ring.avail].map(|gpa| ring.ram.uva(gpa));
        self.tell(request::SET_VRING_ADDR, &vring_addr(index, desc, used, avail), &[], ack)
    }

    pub fn set_vring_kick(&self, index: u32, fd: &Doorbell, ack: bool) -> io::Result<()> {
        self.vring_fd(request::SET_VRING_KICK, index, fd, ack)
    }

    pub fn set_vring_call(&self, index: u32, fd: &Doorbell, ack: bool) -> io::Result<()> {
        self.vring_fd(request::SET_VRING_CALL, index, fd, ack)
    }

    pub fn set_vring_err(&self, index: u32, fd: &Doorbell, ack: bool) -> io::Result<()> {
        self.vring_fd(request::SET_VRING_ERR, index, fd, ack)
    }

    fn vring_fd(&self, request: u32, index: u32, fd: &Doorbell, ack: bool) -> io::Result<()> {
        self.tell(request, &u64::from(index).to_le_bytes(), &[fd.as_fd()], ack)
    }

    pub fn set_vring_enable(&self, index: u32, on: bool, ack: bool) -> io::Result<()> {
        self.tell(request::SET_VRING_ENABLE, &vring_state(index, on.into()), &[], ack)
    }

    /// `mac` in the order of the wire, in the low six bytes.
    pub fn send_rarp(&self, mac: [u8; 6], ack: bool) -> io::Result<()> {
        let mut payload = [0; 8];
        payload[..6].copy_from_slice(&mac);
        self.tell(request::SEND_RARP, &payload, &[], ack)
    }

    /// Shares a dirty log: `len` bytes from `offset` of `file`. Its reply says nothing but that it was taken.
    pub fn set_log_base(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        let payload = [len.to_le_bytes(), offset.to_le_bytes()].concat();
        self.raw(&message::encode(request::SET_LOG_BASE, VERSION, &payload), &[file.as_fd()])?;
        self.reply_to(request::SET_LOG_BASE).map(drop)
    }

    pub fn net_set_mtu(&self, mtu: u64, ack: bool) -> io::Result<()> {
        self.tell(request::NET_SET_MTU, &mtu.to_le_bytes(), &[], ack)
    }
}

/// Payload of `SET_MEM_TABLE`.
pub fn mem_table(regions: &[Region]) -> Vec<u8> {
    let mut bytes = words(&[regions.len() as u64]);
    for region in regions {
        bytes.extend(words(&[region.gpa, region.len, region.uva, region.offset]));
    }
    bytes
}

/// Payload of `ADD_MEM_REG` and `REM_MEM_REG`.
pub fn single_region(region: &Region) -> Vec<u8> {
    words(&[0, region.gpa, region.len, region.uva, region.offset])
}

/// Payload of the messages that carry a ring's index and a number.
pub fn vring_state(index: u32, number: u32) -> Vec<u8> {
    words(&[u64::from(number) << 32 | u64::from(index)])
}

/// Payload of `SET_VRING_ADDR`, without a log address.
pub fn vring_addr(index: u32, desc: u64, used: u64, avail: u64) -> Vec<u8> {
    words(&[u64::from(index), desc, used, avail, 0])
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

//! Streams whose receiver can tell every byte: the library behind `bin/payload`, which runs in guests and on the host.
//!
//! A stream is a row of blocks; block `n` has a length and a content that follow from `n` alone, and a hash over both,
//! so a receiver finds any changed, cut, repeated or swapped byte without being told what was sent. Hash and filler
//! work on 64-bit words because an emulated CPU pays per instruction. TCP carries blocks back to back, UDP one per
//! datagram; a UDP stream ends with a few marker blocks of no content.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, thread};

use serde_json::{Value, json};

/// Bytes before a block's content: magic and length (32 bits each), number, hash.
const HEADER: usize = 24;
const MAGIC: u32 = 0x4c43_5042;
const END: u64 = u64::MAX;
/// The longest block in a TCP stream: several segments, and more than one page of any buffer.
const TCP_BLOCK: usize = 16 * 1024;
/// The longest block in a datagram: what fits into an MTU of 1500.
const UDP_BLOCK: usize = 1472;
/// A datagram each 500 us: 16 Mbit/s, which two emulated guests on two shared cores keep up with.
const UDP_PACE: Duration = Duration::from_micros(500);
/// How long a side waits for the other before it gives up.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a receiver saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Blocks received whole.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Blocks whose bytes were not the ones sent.
    pub corrupt: u64,
    /// Blocks never received (UDP).
    pub lost: u64,
    /// Blocks received again or after a later one (UDP).
    pub late: u64,
}

impl Report {
    /// The report as the receiver prints it.
    pub fn to_json(self) -> Value {
        let Report { blocks, bytes, corrupt, lost, late } = self;
        json!({ "blocks": blocks, "bytes": bytes, "corrupt": corrupt, "lost": lost, "late": late })
    }

    /// Reads what a receiver printed.
    pub fn from_json(text: &str) -> Option<Report> {
        let value: Value = serde_json::from_str(text.trim()).ok()?;
        let field = |name: &str| value.get(name)?.as_u64();
        Some(Report {
            blocks: field("blocks")?,
            bytes: field("bytes")?,
            corrupt: field("corrupt")?,
            lost: field("lost")?,
            late: field("late")?,
        })
    }

    fn take(&mut self, number: u64, bytes: usize, expected: &mut u64) {
        if number < *expected {
            // It was counted as lost when a later block came first, unless it is a repetition.
            self.late += 1;
            self.lost = self.lost.saturating_sub(1);
        } else {
            self.lost += number - *expected;
            *expected = number + 1;
        }
        self.blocks += 1;
        self.bytes += bytes as u64;
    }
}

/// Sends a TCP stream to `address` until the file `stop` exists.
pub fn send_tcp(address: &str, stop: &Path) -> io::Result<()> {
    let start = Instant::now();
    let mut stream = loop {
        match TcpStream::connect(address) {
            Ok(stream) => break stream,
            Err(error) if start.elapsed() > PATIENCE => return Err(error),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    };
    for number in 0.. {
        if stop.exists() {
            break;
        }
        stream.write_all(&block(number, TCP_BLOCK))?;
    }
    Ok(())
}

/// Accepts one TCP stream on `port` and reads it to its end; `progress` gets the bytes so far now and then. Nothing is
/// read before the file `hold`, if one is named, is gone: until then the bytes stay where the NIC has put them.
pub fn receive_tcp(port: u16, progress: &Path, hold: Option<&Path>) -> io::Result<Report> {
    let (stream, _) = TcpListener::bind(("0.0.0.0", port))?.accept()?;
    wait_for_release(hold);
    let mut stream = io::BufReader::with_capacity(64 * 1024, stream);
    let (mut report, mut expected, mut noted) = (Report::default(), 0, Instant::now());
    let mut bytes = vec![0; TCP_BLOCK];
    loop {
        match stream.read_exact(&mut bytes[..HEADER]) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => break,
            other => other?,
        }
        let length = length(&bytes);
        if !(HEADER..=TCP_BLOCK).contains(&length) {
            report.corrupt += 1; // where the next block starts is lost with it
            break;
        }
        stream.read_exact(&mut bytes[HEADER..length])?;
        match verify(&bytes[..length], TCP_BLOCK) {
            // A TCP stream has every block in its place, whatever it says about itself.
            Some(number) if number == expected => report.take(number, length, &mut expected),
            _ => {
                report.corrupt += 1;
                expected += 1;
            }
        }
        note(progress, report.bytes, &mut noted);
    }
    Ok(report)
}

/// Sends datagrams to `address` until the file `stop` exists, then says so. A network that is down for a while is
/// part of what tests do, so errors of sending only cost time.
pub fn send_udp(address: &str, stop: &Path) -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(address)?;
    let mut next = Instant::now();
    for number in 0.. {
        if number % 32 == 0 && stop.exists() {
            break;
        }
        let _ = socket.send(&block(number, UDP_BLOCK));
        next = (next + UDP_PACE).max(Instant::now() - 16 * UDP_PACE);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    for _ in 0..20 {
        let _ = socket.send(&block(END, UDP_BLOCK));
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Receives datagrams on `port` until the sender says it is done, or nothing has come for long; `hold` as for TCP.
pub fn receive_udp(port: u16, progress: &Path, hold: Option<&Path>) -> io::Result<Report> {
    let socket = UdpSocket::bind(("0.0.0.0", port))?;
    wait_for_release(hold);
    socket.set_read_timeout(Some(PATIENCE))?;
    let (mut report, mut expected, mut noted) = (Report::default(), 0, Instant::now());
    let mut bytes = vec![0; 65536];
    loop {
        let length = socket.recv(&mut bytes)?;
        match verify(&bytes[..length], UDP_BLOCK) {
            Some(END) => return Ok(report),
            Some(number) => report.take(number, length, &mut expected),
            None => report.corrupt += 1,
        }
        note(progress, report.bytes, &mut noted);
    }
}

fn wait_for_release(hold: Option<&Path>) {
    while hold.is_some_and(Path::exists) {
        thread::sleep(Duration::from_millis(20));
    }
}

fn note(progress: &Path, bytes: u64, noted: &mut Instant) {
    if noted.elapsed() > Duration::from_millis(50) {
        *noted = Instant::now();
        // Only a hint to whoever watches: a missed one is followed by the next.
        let _ = fs::write(progress, bytes.to_string());
    }
}

/// Block `number` of a stream with blocks of up to `longest` bytes.
fn block(number: u64, longest: usize) -> Vec<u8> {
    let length = block_length(number, longest);
    let mut bytes = Vec::with_capacity(length + 8);
    bytes.extend_from_slice(&MAGIC.to_le_bytes());
    bytes.extend_from_slice(&(length as u32).to_le_bytes());
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&[0; 8]);
    let mut word = mix(number) | 1;
    while bytes.len() < length {
        // xorshift64: no period that a repeated page or segment could fit into.
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.truncate(length);
    let hash = hash(&bytes);
    bytes[16..24].copy_from_slice(&hash.to_le_bytes());
    bytes
}

/// The block's number, if its bytes are those of a block.
fn verify(bytes: &[u8], longest: usize) -> Option<u64> {
    if bytes.len() < HEADER || length(bytes) != bytes.len() || bytes[..4] != MAGIC.to_le_bytes() {
        return None;
    }
    let (number, sum) = (word(bytes, 8), word(bytes, 16));
    (block_length(number, longest) == bytes.len() && hash(bytes) == sum).then_some(number)
}

/// Lengths cover the whole range evenly, odd ones included, so that copies start and end everywhere.
fn block_length(number: u64, longest: usize) -> usize {
    if number == END { HEADER } else { HEADER + (mix(number) as usize) % (longest - HEADER + 1) }
}

fn length(bytes: &[u8]) -> usize {
    (word(bytes, 0) >> 32) as usize
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// The hash of a block without its hash field: each step is a bijection of the state, so one changed word always shows.
fn hash(block: &[u8]) -> u64 {
    let step = |sum: u64, word: u64| (sum ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    let (words, tail) = block[HEADER..].as_chunks::<8>();
    let head = step(step(block.len() as u64, word(block, 0)), word(block, 8));
    let sum = words.iter().fold(head, |sum, word| step(sum, u64::from_le_bytes(*word)));
    tail.iter().fold(sum, |sum, byte| step(sum, u64::from(*byte)))
}

/// SplitMix64's finalizer.
fn mix(number: u64) -> u64 {
    let mut x = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn any_changed_byte_shows() {
        for number in [0, 1, 77] {
            let good = block(number, 300);
            assert_eq!(verify(&good, 300), Some(number));
            for at in 0..good.len() {
                let mut bad = good.clone();
                bad[at] ^= 0x10;
                assert_eq!(verify(&bad, 300), None, "byte {at} of block {number}");
            }
            assert_eq!(verify(&good[..good.len() - 1], 300), None, "cut");
        }
    }

    #[test]
    fn loss_repetition_and_order_are_told_apart() {
        let (mut report, mut expected) = (Report::default(), 0);
        for number in [0, 3, 1, 4] {
            report.take(number, 10, &mut expected);
        }
        assert_eq!(report, Report { blocks: 4, bytes: 40, corrupt: 0, lost: 1, late: 1 });
    }

    #[test]
    fn a_report_survives_printing() {
        let report = Report { blocks: 1, bytes: 2, corrupt: 3, lost: 4, late: 5 };
        assert_eq!(Report::from_json(&report.to_json().to_string()), Some(report));
    }

    #[test]
    fn streams_cross_loopback_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (stop, progress) = (dir.path().join("stop"), dir.path().join("progress"));
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let report = thread::scope(|scope| {
            let receiver = scope.spawn(|| receive_tcp(port, &progress, None).unwrap());
            let sender = scope.spawn(|| send_tcp(&format!("127.0.0.1:{port}"), &stop).unwrap());
            while !progress.exists() {
                thread::sleep(Duration::from_millis(5));
            }
            fs::write(&stop, "").unwrap();
            sender.join().unwrap();
            receiver.join().unwrap()
        });
        assert!(report.bytes > 0 && report.corrupt == 0 && report.lost == 0, "{report:?}");
    }
}

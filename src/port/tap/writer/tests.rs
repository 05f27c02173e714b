//! The writer with a pipe in the host's place, which takes 64 KiB and then holds up whoever writes.

#![allow(clippy::unwrap_used)]

use std::io::{PipeReader, Read};
use std::time::Instant;

use super::*;
use crate::limits::TAP_PIECES;
use crate::mem::Cursor;

const RECORD_BYTES: usize = 1000;

/// Records that are in the pipe when it is full.
const IN_PIPE: u32 = 66;

/// Whatever a pipe takes is borne.
const PATIENT: Forbearance = Forbearance { allowance: Duration::from_secs(1000), late_micros: 1_000_000_000 };

fn start(forbearance: Forbearance) -> (PipeReader, Writer) {
    let (host, tun) = std::io::pipe().unwrap();
    let outgoing = Outgoing::with(forbearance);
    (host, Writer::start(&outgoing, tun.into(), "pipe").unwrap())
}

/// Has a record of `sender` wait that begins with `number`; whether there was room.
fn put(writer: &Writer, sender: u16, number: u32) -> bool {
    let Ok(mut grant) = writer.outgoing.backlog.grant(PortIndex(sender), [RECORD_BYTES].into_iter()) else {
        return false;
    };
    let (mut bytes, there) = ([0; RECORD_BYTES], number.to_be_bytes());
    bytes[..4].copy_from_slice(&there);
    bytes[4] = sender as u8;
    let there = grant.put(RECORD_BYTES, |spans| Cursor::new(&spans).write(&bytes));
    writer.outgoing.backlog.admit(grant);
    writer.wake();
    there
}

/// The next record that the host has: its sender and its number.
fn next(host: &mut PipeReader) -> (u8, u32) {
    let mut record = [0; RECORD_BYTES];
    host.read_exact(&mut record).unwrap();
    (record[4], u32::from_be_bytes(*record.first_chunk().unwrap()))
}

#[test]
fn who_puts_frames_there_does_not_wait_for_a_host_that_takes_none() {
    let (mut host, writer) = start(PATIENT);
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut number = 0;
    // The writer is in the pipe with one of the first; there is room for so many more as a sender may have.
    while put(&writer, 0, number) || number < IN_PIPE {
        number += 1;
        assert!(number <= IN_PIPE + TAP_PIECES as u32, "it is bounded");
        assert!(Instant::now() < deadline);
    }
    // Later there is room again, and all that there was room for comes, in order.
    for expected in 0..number {
        assert_eq!(next(&mut host), (0, expected));
    }
    while !put(&writer, 0, number) {
        std::thread::yield_now();
        assert!(Instant::now() < deadline);
    }
    assert_eq!(next(&mut host), (0, number));
    let all = u64::from(number) + 1;
    let bytes = all * (RECORD_BYTES - VNET_HEADER_BYTES) as u64;
    // It is counted after it was written.
    while writer.outgoing.handover() != (Handover { frames: all, bytes, refused: 0, late: 0 }) {
        assert!(Instant::now() < deadline, "{:?}", writer.outgoing.handover());
    }
    writer.end("pipe");
    assert_eq!(host.read(&mut [0]).unwrap(), 0, "the descriptor is closed");
}

#[test]
fn who_sends_a_lot_has_its_turns_and_others_have_theirs() {
    let (mut host, writer) = start(PATIENT);
    let hogs = [1, 2, 3];
    for number in 0..1000 {
        for hog in hogs {
            put(&writer, hog, number);
        }
    }
    // Who comes last and sends little does not wait for all that.
    for number in 0..3 {
        assert!(put(&writer, 9, number), "there is room for it");
    }
    let (mut got, mut own) = (Vec::new(), Vec::new());
    while own.len() < 3 {
        let record = next(&mut host);
        if record.0 == 9 {
            // Later ones wait for as long as the pipe kept the first one waiting.
            assert!(got.len() <= IN_PIPE as usize + 5 * TURN_FRAMES || !own.is_empty(), "after {} others", got.len());
            own.push(record.1);
        }
        got.push(record);
    }
    assert_eq!(own, [0, 1, 2]);
    for hog in hogs {
        assert!(got.iter().filter(|record| record.0 == hog as u8).map(|record| record.1).is_sorted());
    }
    writer.end("pipe");
}

#[test]
fn a_sender_whose_frames_take_the_host_long_is_shut_out_and_others_are_not() {
    let (mut host, writer) = start(Forbearance { late_micros: PATIENT.late_micros, ..FORBEARANCE });
    let put_all = |sender, count| (0..count).filter(|&number| put(&writer, sender, number)).count();
    assert_eq!(put_all(1, 100), 100);
    // It is in the pipe with one of them for longer than may be, which is forgiven once, for it did not run, and with one of the next.
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut written = 0;
    while writer.outgoing.charged_at.load(Ordering::Relaxed) == 0 {
        std::thread::sleep(3 * ALLOWANCE);
        for _ in 0..5 {
            assert!(written < 100 && next(&mut host) == (1, written));
            written += 1;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let refused = !put(&writer, 1, 200);
    // It may have been let in again by now, for the host of these tests may be slow as well.
    assert!(refused || writer.outgoing.shut.load(Ordering::Relaxed) == 0, "nothing more is taken of it");
    assert!(writer.outgoing.trouble().unwrap().contains("ms for one frame"));
    assert_eq!(put_all(2, 10), 10);
    let mut other = 0;
    while other < 10 {
        let (sender, number) = next(&mut host);
        if sender == 2 {
            assert_eq!(number, other);
            other += 1;
        }
    }
    while writer.outgoing.handover().late == 0 {
        assert!(Instant::now() < deadline, "what it had waiting is dropped");
    }
    // It is let in again after its time.
    while !put(&writer, 1, 300) {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
    while next(&mut host) != (1, 300) {}
    writer.end("pipe");
}

#[test]
fn what_has_waited_for_long_is_dropped() {
    let (_host, writer) = start(Forbearance { late_micros: 0, ..PATIENT });
    assert_eq!((0..50).filter(|&number| put(&writer, 0, number)).count(), 50);
    let deadline = Instant::now() + Duration::from_secs(60);
    while writer.outgoing.handover() != (Handover { late: 50, ..Handover::default() }) {
        assert!(Instant::now() < deadline, "{:?}", writer.outgoing.handover());
        std::thread::yield_now();
    }
    writer.end("pipe");
}

#[test]
fn an_end_does_not_wait_for_a_host_that_takes_long_and_what_waits_then_is_not_written() {
    let (mut host, writer) = start(PATIENT);
    assert_eq!((0..100).filter(|&number| put(&writer, 0, number)).count(), 100);
    // It is somewhere in the first 70 of them.
    writer.end("pipe");
    let mut rest = Vec::new();
    host.read_to_end(&mut rest).unwrap();
    assert!(rest.len() < 100 * RECORD_BYTES, "{} bytes", rest.len());
}

#[test]
fn whose_frame_took_several_turns_passes_as_many() {
    let mut lane = Lane { records: Pieces::default(), account: Account::new(ALLOWANCE), owes: 0, shut_until: None };
    for (turns, passed) in [(0, 0), (1, 0), (2, 1), (9, 8), (1000, MOST_TURNS_OWED)] {
        lane.had(micros(turns * TURN_MICROS));
        assert_eq!((0..).take_while(|_| lane.passes()).count() as u64, passed, "{turns}");
    }
}

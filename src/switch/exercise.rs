//! Frames of any bytes through the Ethernet parser and the switch, with everything asserted that must hold: [`exercise`]. The
//! fuzz target `ethernet` calls it, and so does the test below, with the seeds of `fuzz/seeds/ethernet`.
//!
//! The input is a list of frames, each a length byte, a byte that says which port sends it and how far the clock moves,
//! and as many bytes as the length says and there are. Whatever they are, nothing panics, every frame gets a verdict
//! that its port's network allows, and what the FDB counts is what it holds.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use super::{Fdb, NetworkRow, PortRow, Tables, process};
use crate::clock::Tick;
use crate::frame::{self, Batch};
use crate::ident::{NetworkIndex, PortIndex};
use crate::limits::BATCH_FRAMES;
use crate::mem::Span;
use crate::verdict::{DropReason, Verdict};
use crate::wire::ethernet::{Ethernet, HEADER_BYTES, TAGS};

/// Ports 0 to 3, of which 0 to 2 are in network 0 and 3 is alone in network 1; only port 0 has no MTU.
fn tables() -> Tables {
    let port = |network, mtu| Some(PortRow { network: NetworkIndex(network), mtu, macs: 8, storm: Arc::default() });
    let network = |members: &[u16]| {
        let members = members.iter().copied().map(PortIndex).collect();
        Some(NetworkRow { members, mac_age: Duration::from_secs(30), mac_limit: 12 })
    };
    Tables {
        ports: Box::new([port(0, None), port(0, Some(68)), port(0, Some(100)), port(1, Some(68))]),
        networks: Box::new([network(&[0, 1, 2]), network(&[3])]),
        fdb: Arc::new(Fdb::with_capacity(0, [1, 2])),
    }
}

/// Splits the next frame off: who sends it, how long the clock waits before, and its bytes.
fn next<'a>(input: &mut &'a [u8]) -> Option<(u16, u32, &'a [u8])> {
    let [len, who, rest @ ..] = *input else { return None };
    let (frame, rest) = rest.split_at(usize::from(*len).min(rest.len()));
    *input = rest;
    Some((u16::from(who % 5), u32::from(who >> 4) * 7, frame))
}

fn check(tables: &Tables, ingress: PortIndex, bytes: &[u8], verdict: Verdict) {
    let network = tables.port(ingress).map(|row| row.network);
    match verdict {
        Verdict::Pending => panic!("a frame without a verdict"),
        Verdict::Deliver(port) => {
            assert!(port != ingress, "a frame goes back where it came from");
            assert!(
                network.is_some() && tables.port(port).map(|row| row.network) == network,
                "a frame leaves its network"
            );
        }
        Verdict::Flood => assert_eq!(network, Some(NetworkIndex(0)), "network 1 has one member"),
        Verdict::Drop(DropReason::FrameTooShort) => assert!(bytes.len() < HEADER_BYTES),
        Verdict::Drop(_) => assert!(bytes.len() >= HEADER_BYTES),
    }
}

/// Takes the frames of `input` in turn.
pub fn exercise(mut input: &[u8]) {
    let (tables, mut heads, mut now) = (tables(), frame::heads(), 0);
    while let Some((port, wait, bytes)) = next(&mut input) {
        if let Ok(view) = Ethernet::parse(bytes) {
            assert!(view.tag_count() <= TAGS && view.tags().count() == view.tag_count());
            assert_eq!(view.header_len() + view.payload().len(), bytes.len());
        }
        now += wait;
        // The same frame fills the batch up to a third, so that the memo takes part.
        let mut copies = vec![bytes.to_vec(); BATCH_FRAMES / 3];
        let mut batch = Batch::new(&mut heads, 0);
        for copy in &mut copies {
            batch.push(copy.len(), &[Span::from_buffer(copy)]);
        }
        process(&tables, PortIndex(port), &mut batch, Tick(now));
        for frame in batch.frames() {
            check(&tables, PortIndex(port), bytes, frame.verdict);
            assert_eq!(frame.verdict, batch.frames()[0].verdict);
        }
        if wait > 0 {
            tables.sweep(Tick(now), |_| false);
        }
    }
    let entries: Vec<_> = tables.fdb.entries(Tick(now)).collect();
    assert_eq!(tables.fdb.len(), entries.len());
    assert!(entries.len() <= 24 && entries.iter().all(|entry| entry.mac.is_station()));
}

/// Every file of `fuzz/seeds/ethernet`: cases that were thought of, and those that a fuzzer found.
#[cfg(test)]
#[test]
#[cfg_attr(miri, ignore = "reads files, which its isolation forbids")]
fn seeds_are_survived() {
    let mut count = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/ethernet")).unwrap() {
        exercise(&std::fs::read(entry.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count >= 5, "the seeds are gone");
}

//! Offloads against the kernel: what it makes of a frame on its way from one TAP through a bridge to another that takes
//! none is what our own engine makes of the same frame, byte for byte.

use std::net::{TcpListener, TcpStream};

use proptest::test_runner::{Config, TestCaseError, TestRunner};

use super::*;
use crate::frame::heads;
use crate::limits::{HEAD_BYTES, USO_SEGMENTS};
use crate::offload::exercise::send;
use crate::offload::sketch::{Sketch, sketches};

/// A frame that is to be segmented, or completed, and the station that it is for.
fn transmit(side: &dyn Transmit, bytes: &[u8], header: VnetHeader) -> Outcome {
    let (mut bytes, mut heads, mut outcome) = (bytes.to_vec(), heads(), Outcome::new());
    let head = HEAD_BYTES.min(bytes.len());
    let (first, second) = bytes.split_at_mut(head);
    let pieces = [Span::from_buffer(first), Span::from_buffer(second)];
    let mut batch = Batch::new(&mut heads, 0);
    offload::admit(&mut batch, pieces.iter().map(Span::len).sum(), &pieces, &header.to_bytes(), Needs::ALL);
    side.transmit(&batch, &[0], &mut outcome);
    outcome
}

/// The frames of `sketch` as the kernel makes them, as we do, and what became of the one that was sent.
fn both(sketch: &Sketch, from: &Tap, to: &dyn Receive, shard: &Shard) -> (Vec<Vec<u8>>, Vec<Vec<u8>>, Outcome) {
    let mut made = sketch.make();
    made.bytes[..6].copy_from_slice(&STATION);
    if !sketch.v6 {
        // A bridge passes a packet with a wrong header checksum on, but does not repair it unless it segments.
        made.bytes[made.network + 10..made.network + 12].fill(0);
        let sum = checksum(&made.bytes[made.network..made.transport]);
        made.bytes[made.network + 10..made.network + 12].copy_from_slice(&sum.to_be_bytes());
    }
    let ours = send(&made.bytes, made.header, Needs::ALL, Needs::NONE, 4096);
    let ours: Vec<Vec<u8>> = ours.frames.into_iter().map(|(_, bytes)| bytes).collect();
    let outcome = transmit(&*from.transmit_side(), &made.bytes, made.header);
    if outcome.delivered == 0 {
        return (Vec::new(), ours, outcome);
    }
    (receive_to_station(to, shard, ours.len()), ours, outcome)
}

/// Two TAP ports on one bridge of the host, the second without offloads.
fn bridged() -> (Arc<Tap>, Arc<Tap>) {
    let (from, to) = (tap("lc0", Some(65_521)).unwrap(), tap("lc1", Some(65_521)).unwrap());
    set_offloads(&to, Needs::NONE);
    ip("link add lcbr type bridge");
    ip("link set lcbr up mtu 65521");
    for interface in ["lc0", "lc1"] {
        ip(&format!("link set {interface} master lcbr"));
    }
    (from, to)
}

#[test]
fn the_kernel_makes_the_same_frames_of_what_it_gets() {
    in_namespace(|| {
        let (from, to) = bridged();
        let (queue, shard) = (to.receive_queues().remove(0), Shard::new());
        queue.attach(Some(shard.clone()));
        let mut runner = TestRunner::new(Config { cases: 400, failure_persistence: None, ..Config::default() });
        let same = |mut sketch: Sketch| {
            // Kernels from 6.18 on take GSO_ECN for accurate ECN (RFC 9768), where each segment keeps CWR.
            sketch.flags &= 0x7f;
            if sketch.make().payload > 256 {
                return Err(TestCaseError::reject("headers that only the kernel takes"));
            }
            if sketch.udp && sketch.payload.len() > usize::from(sketch.gso_size) * USO_SEGMENTS {
                return Err(TestCaseError::reject("more datagrams than anybody sends at once"));
            }
            let (theirs, ours, outcome) = both(&sketch, &from, &*queue, &shard);
            if outcome.delivered == 0 {
                return Err(TestCaseError::fail("the kernel refuses it"));
            }
            if theirs != ours {
                let at = theirs.iter().zip(&ours).position(|(a, b)| a != b);
                let byte = at.and_then(|at| theirs[at].iter().zip(&ours[at]).position(|(a, b)| a != b));
                let frames = at.map(|at| (&theirs[at], &ours[at]));
                let (theirs, ours) = (theirs.len(), ours.len());
                let what = format!("{theirs} and {ours} frames; of {at:?} byte {byte:?} differs: {frames:x?}");
                return Err(TestCaseError::fail(what));
            }
            Ok(())
        };
        if let Err(error) = runner.run(&sketches(), same) {
            panic!("{error}");
        }
        assert_eq!(from.detail()["refused-frames"], 0);
    });
}

#[test]
fn a_host_that_is_left_with_no_offloads_gets_complete_frames() {
    in_namespace(|| {
        let (from, to) = bridged();
        set_offloads(&from, Needs::NONE);
        let (queue, shard) = (to.receive_queues().remove(0), Shard::new());
        queue.attach(Some(shard.clone()));
        for (v6, udp) in [(false, false), (false, true), (true, false), (true, true)] {
            let sketch = Sketch { v6, udp, ..Sketch::default() };
            let (theirs, ours, outcome) = both(&sketch, &from, &*queue, &shard);
            assert_eq!((outcome.delivered, outcome.segmented, ours.len()), (1, 1, 4));
            assert!(theirs == ours, "{sketch:?}");
        }
    });
}

#[test]
fn a_stream_of_the_host_comes_in_large_frames_and_is_what_it_was() {
    in_namespace(|| {
        // The host talks to itself in another namespace, through two ports and what is between them: nothing.
        let here = addressed("lc0");
        let (queue, shard) = (here.receive_queues().remove(0), Shard::new());
        queue.attach(Some(shard.clone()));
        let far = std::thread::spawn(|| {
            enter_fresh_network_namespace();
            let port = tap("lc1", None).unwrap();
            ip("addr add 192.0.2.2/24 dev lc1");
            ip("link set lc1 address 02:00:00:00:00:22");
            let listener = TcpListener::bind("192.0.2.2:9").unwrap();
            (port, listener)
        });
        let (there, listener) = far.join().unwrap();
        let back = there.receive_queues().remove(0);
        back.attach(Some(shard.clone()));
        let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        let expected = data.clone();
        let sender = std::thread::spawn(move || listener_reads(&listener));
        let writer = in_this_namespace_writes(data);
        let (mut large, mut heads) = (0u32, heads());
        let deadline = Instant::now() + Duration::from_secs(60);
        while !sender.is_finished() && Instant::now() < deadline {
            for (from, to) in [(&queue, &there), (&back, &here)] {
                let side = to.transmit_side();
                from.receive(&mut heads, &mut |batch| {
                    large += batch.frames().iter().filter(|frame| frame.needs.is_gso()).count() as u32;
                    let picks: Vec<u8> = (0..batch.len() as u8).collect();
                    side.transmit(batch, &picks, &mut Outcome::new());
                });
            }
            if queue.arm() && back.arm() {
                shard.wait(1);
            }
        }
        assert!(sender.join().unwrap() == expected);
        writer.join().unwrap();
        assert!(large > 10, "{large} large frames");
    });
}

/// Reads what comes over one connection.
fn listener_reads(listener: &TcpListener) -> Vec<u8> {
    let mut got = Vec::new();
    let (mut stream, _) = listener.accept().unwrap();
    std::io::Read::read_to_end(&mut stream, &mut got).unwrap();
    got
}

/// Connects from the calling thread's namespace and writes `data`. A thread that is started inherits the namespace.
fn in_this_namespace_writes(data: Vec<u8>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut stream = TcpStream::connect("192.0.2.2:9").unwrap();
        std::io::Write::write_all(&mut stream, &data).unwrap();
    })
}

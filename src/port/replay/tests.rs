//! The replay port's timing and contract, and the capture reader against files of our own making and against garbage.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::capture::{CaptureError, frames};
use super::*;
use crate::port::testing::{self, Shard};

/// A classic pcap file.
fn pcap(contents: &[Vec<u8>], big: bool) -> Vec<u8> {
    let n = |value: u32| if big { value.to_be_bytes() } else { value.to_le_bytes() };
    let half = |value: u16| if big { value.to_be_bytes() } else { value.to_le_bytes() };
    let mut file = [&n(0xa1b2_c3d4)[..], &half(2), &half(4), &[0; 8], &n(65_535), &n(1)].concat();
    for frame in contents {
        file.extend([n(7), n(8), n(frame.len() as u32), n(frame.len() as u32)].concat());
        file.extend(frame);
    }
    file
}

/// A pcapng file: a section header, an interface, a block of a kind that is to be stepped over, and the frames in turn as
/// enhanced, simple and obsolete packet blocks.
fn pcapng(contents: &[Vec<u8>], big: bool) -> Vec<u8> {
    let n = |value: u32| if big { value.to_be_bytes() } else { value.to_le_bytes() };
    let half = |value: u16| if big { value.to_be_bytes() } else { value.to_le_bytes() };
    let block = |kind: u32, body: &[u8]| {
        let padding = vec![0; body.len().next_multiple_of(4) - body.len()];
        let len = n((12 + body.len() + padding.len()) as u32);
        [&n(kind)[..], &len, body, &padding, &len].concat()
    };
    let mut file = block(0x0a0d_0d0a, &[&n(0x1a2b_3c4d)[..], &half(1), &half(0), &[0xff; 8]].concat());
    file.extend(block(1, &[&half(1)[..], &half(0), &n(65_535)].concat()));
    file.extend(block(0xbad, &[1, 2, 3, 4, 5]));
    for (i, frame) in contents.iter().enumerate() {
        let len = n(frame.len() as u32);
        file.extend(match i % 3 {
            0 => block(6, &[&n(0)[..], &[9; 8], &len, &len, frame].concat()),
            1 => block(3, &[&len[..], frame].concat()),
            _ => block(2, &[&half(0)[..], &half(3), &[9; 8], &len, &len, frame].concat()),
        });
    }
    file
}

fn contents(file: &[u8]) -> Result<Vec<Vec<u8>>, CaptureError> {
    let places = frames(file)?;
    Ok(places.into_iter().map(|place| file[place.start as usize..place.end as usize].to_vec()).collect())
}

proptest! {
    #[test]
    fn frames_are_found_in_both_formats_and_byte_orders(
        wanted in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20), big: bool,
    ) {
        prop_assert_eq!(&contents(&pcap(&wanted, big)).unwrap(), &wanted);
        prop_assert_eq!(&contents(&pcapng(&wanted, big)).unwrap(), &wanted);
        let two_sections = [pcapng(&wanted, big), pcapng(&wanted, !big)].concat();
        prop_assert_eq!(contents(&two_sections).unwrap(), [&wanted[..], &wanted].concat());
    }

    #[test]
    fn a_file_that_ends_early_has_fewer_frames_or_is_refused(
        wanted in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 1..5), cut: prop::sample::Index,
        ng: bool,
    ) {
        let file = if ng { pcapng(&wanted, false) } else { pcap(&wanted, false) };
        let cut = cut.index(file.len());
        if let Ok(found) = contents(&file[..cut]) {
            prop_assert!(found.len() < wanted.len() && wanted.starts_with(&found));
        }
    }

    #[test]
    fn garbage_does_not_panic_and_places_stay_in_order_within_the_file(
        wanted in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 1..5),
        harm in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8), ng: bool, big: bool,
    ) {
        let mut file = if ng { pcapng(&wanted, big) } else { pcap(&wanted, big) };
        for (at, byte) in harm {
            let at = at.index(file.len());
            file[at] = byte;
        }
        if let Ok(places) = frames(&file) {
            let mut end = 0;
            for place in places {
                prop_assert!(end <= place.start && place.start <= place.end);
                end = place.end;
            }
            prop_assert!(end as usize <= file.len());
        }
    }

    #[test]
    fn pure_garbage_does_not_panic(file in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = frames(&file);
    }
}

#[test]
fn files_that_are_not_what_was_captured_are_refused_with_the_reason() {
    let good = pcap(&[vec![1; 60]], false);
    let with = |file: &[u8], at: usize, bytes: &[u8]| {
        let mut file = file.to_vec();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        frames(&file).unwrap_err()
    };
    assert_eq!(frames(b"GIF89a"), Err(CaptureError::Unknown));
    assert_eq!(frames(b""), Err(CaptureError::Unknown));
    assert_eq!(with(&good, 6, &[3, 0]), CaptureError::Version { major: 2, minor: 3 });
    assert_eq!(with(&good, 20, &[113]), CaptureError::LinkType(113));
    assert_eq!(with(&good, 36, &[90]), CaptureError::Snapped { frame: 1, captured: 60, original: 90 });
    assert_eq!(with(&good, 32, &[0, 0, 2]), CaptureError::TooLong { frame: 1, len: 131_072 });
    assert_eq!(frames(&good[..80]), Err(CaptureError::Truncated(80)));
    let good = pcapng(&[vec![1; 60]], false);
    let (interface, packet) = (28, 28 + 20 + 20);
    assert!(matches!(with(&good, 8, &[0]), CaptureError::Malformed { at: 0, .. }));
    assert_eq!(with(&good, interface + 8, &[113]), CaptureError::LinkType(113));
    assert!(matches!(with(&good, interface + 4, &[21]), CaptureError::Malformed { at: 28, .. }));
    assert!(matches!(with(&good, interface + 16, &[24]), CaptureError::Malformed { at: 28, .. }));
    assert!(matches!(with(&good, packet + 8, &[1]), CaptureError::Malformed { .. }), "interface 1 of 1");
    assert!(matches!(with(&good, packet + 20, &[61]), CaptureError::Malformed { .. }), "more than it had");
    assert_eq!(with(&good, packet + 20, &[59]), CaptureError::Snapped { frame: 1, captured: 59, original: 60 });
    assert!(
        matches!(with(&good, packet + 20, &[200, 0, 0, 0, 200]), CaptureError::Malformed { .. }),
        "beyond its block"
    );
}

/// A replay of `frames`, its queue, and a shard that has it.
fn replay(frames: &[Vec<u8>], interval: Duration, repeat: bool) -> (Arc<Replay>, Arc<dyn Receive>, Arc<Shard>) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("frames.pcapng");
    std::fs::write(&file, pcapng(frames, false)).unwrap();
    let port = Replay::new(ReplayConfig { file, interval, repeat }).unwrap();
    let queue = port.receive_queues().remove(0);
    (port, queue, Shard::new())
}

fn numbered(count: u8) -> Vec<Vec<u8>> {
    (0..count).map(|i| vec![i; 60 + usize::from(i)]).collect()
}

/// Receives as a shard does, resting when the queue says that it may, until there are `count` frames.
fn receive_resting(queue: &dyn Receive, shard: &Shard, count: usize) -> Vec<Vec<u8>> {
    let mut got = Vec::new();
    while got.len() < count {
        got.extend(testing::receive_all(queue));
        if got.len() < count && queue.arm() {
            assert!(shard.wait(10), "the timer wakes the shard; {} of {count} frames came", got.len());
        }
        queue.disarm();
    }
    got
}

#[test]
fn frames_come_in_order_at_the_timers_pace_and_then_no_more() {
    let frames = numbered(5);
    let (port, queue, shard) = replay(&frames, Duration::from_millis(2), false);
    assert!(testing::receive_all(&*queue).is_empty() && queue.arm(), "nothing before a shard has the queue");
    queue.attach(Some(shard.clone()));
    assert_eq!(receive_resting(&*queue, &shard, 5), frames);
    assert!(testing::receive_all(&*queue).is_empty() && queue.arm());
    assert_eq!((&port.detail()["sent-frames"], &port.detail()["finished"]), (&5.into(), &true.into()));
    queue.attach(None);
}

#[test]
fn a_repeated_replay_begins_again_and_moves_between_shards() {
    let frames = numbered(3);
    let (port, queue, old) = replay(&frames, Duration::from_micros(500), true);
    queue.attach(Some(old.clone()));
    let mut got = receive_resting(&*queue, &old, 4);
    let new = Shard::new();
    queue.attach(Some(new.clone()));
    assert_eq!(new.wakes(), 1);
    got.extend(receive_resting(&*queue, &new, 8));
    for (i, frame) in got.iter().enumerate() {
        assert_eq!(frame, &frames[i % 3], "frame {i}");
    }
    assert_eq!(port.detail()["finished"], false);
}

#[test]
fn without_an_interval_frames_come_as_fast_as_they_are_polled_for() {
    let frames = numbered(100);
    let (port, queue, shard) = replay(&frames, Duration::ZERO, false);
    queue.attach(Some(shard.clone()));
    assert!(!queue.arm());
    assert_eq!(testing::receive_all(&*queue), frames);
    assert!(queue.arm());
    assert_eq!(testing::transmit(&*port.transmit_side(), &frames[..2]).delivered, 0b11);
    assert_eq!(port.detail()["swallowed-frames"], 2);
}

#[test]
fn what_cannot_be_replayed_is_refused_and_nothing_waits() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let new = |file: PathBuf| Replay::new(ReplayConfig { file, interval: Duration::ZERO, repeat: true }).err().unwrap();
    assert!(matches!(new(at("missing")), ReplayError::Read { .. }));
    assert!(matches!(new(directory.path().into()), ReplayError::NotRegular(_)));
    rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), 0o600.into()).unwrap();
    assert!(matches!(new(at("pipe")), ReplayError::NotRegular(_)));
    std::fs::write(at("empty"), pcap(&[], false)).unwrap();
    assert!(matches!(new(at("empty")), ReplayError::Empty(_)));
    std::fs::write(at("text"), "hello").unwrap();
    assert!(matches!(new(at("text")), ReplayError::Capture { source: CaptureError::Unknown, .. }));
    std::fs::File::create(at("huge")).unwrap().set_len(REPLAY_BYTES + 1).unwrap();
    assert!(matches!(new(at("huge")), ReplayError::TooLarge(_)));
}

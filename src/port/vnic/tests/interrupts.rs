//! Interrupts that are held back, all the way from the ring to the eventfd, and what else depends on how much a guest minds
//! delay.

use super::*;
use crate::frame::{Batch, Needs, heads};
use crate::mem::Span;
use crate::offload::sketch::Sketch;
use crate::offload::{admit, exercise};
use crate::port::testing::transmit;
use crate::port::{Flush, Outcome};

/// Where buffers are, and how long each is.
const BUFFERS: u64 = 0x8_0000;
const BUFFER: u64 = 2048;

/// A running guest RX ring with 128 buffers, and the one frame that is sent to it all the time.
pub(super) struct Rig {
    guest: Guest,
    pub(super) port: Arc<Vnic>,
    pub(super) qemu: Raw,
    _host: Host,
}

impl Rig {
    /// With no more than VERSION_1 and vhost-user's own: no event index, so the guest wants every interrupt.
    pub(super) fn new(latency: LatencySensitivity) -> Self {
        Self::with(latency, 0)
    }

    fn with(latency: LatencySensitivity, features: u64) -> Self {
        let (host, guest) = (Host::new(), Guest::new());
        let port = host.port("vm1");
        port.set_latency(latency);
        let mut qemu = host.connect("vm1");
        qemu.negotiate();
        assert!(qemu.done(Req::SET_FEATURES, &(1u64 << 32 | 1 << 30 | features).to_ne_bytes(), &[]));
        assert!(qemu.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
        let [descriptors, available, _] = areas(0);
        for index in 0..128u64 {
            let descriptor =
                [(BUFFERS + index * BUFFER).to_le_bytes().to_vec(), 2048u32.to_le_bytes().to_vec()].concat();
            guest.memory.write_all_at(&[descriptor, vec![2, 0, 0, 0]].concat(), descriptors + 16 * index).unwrap();
            for place in [index, index + 128] {
                guest.memory.write_all_at(&(index as u16).to_le_bytes(), available + 4 + 2 * place).unwrap();
            }
        }
        guest.memory.write_all_at(&128u16.to_le_bytes(), available + 2).unwrap();
        qemu.start(0, 0, &guest);
        assert!(qemu.done(Req::SET_VRING_ENABLE, &state(0, 1), &[]));
        guest.call.drain();
        Self { guest, port, qemu, _host: host }
    }

    /// Has the guest post all buffers again, those that were used.
    pub(super) fn post_again(&self) {
        let [_, available, used] = areas(0);
        let mut index = [0; 2];
        self.guest.memory.read_exact_at(&mut index, used + 2).unwrap();
        let posted = u16::from_le_bytes(index).wrapping_add(128);
        self.guest.memory.write_all_at(&posted.to_le_bytes(), available + 2).unwrap();
    }

    /// Gives the guest one frame; returns whether the interrupt for it is held back.
    pub(super) fn give(&self) -> bool {
        let outcome = transmit(&*self.port.transmit_side(), &[vec![7; 60]]);
        assert_eq!(outcome.delivered, 1);
        outcome.held.is_some()
    }

    pub(super) fn flush(&self, which: Flush) -> bool {
        self.port.transmit_side().flush(which).is_some()
    }

    fn counters(&self) -> Notifications {
        self.port.notifications()[0]
    }
}

/// Does what `attempt` does until it took less than the 500 us that an interrupt is held back, as it does unless the machine
/// takes the CPU away in the middle; then it must have succeeded. An attempt says when it began and whether it did.
fn undisturbed<T>(attempt: impl Fn() -> (u64, bool, T)) -> T {
    for _ in 0..1000 {
        let (began, succeeded, result) = attempt();
        let micros = crate::sys::cpu::cycles().wrapping_sub(began) / (crate::sys::cpu::cycles_per_second() / 1_000_000);
        if succeeded || micros < 500 {
            assert!(succeeded, "in {micros} us");
            return result;
        }
    }
    panic!("never undisturbed for 500 us");
}

/// A rig at `low` whose guest was interrupted just now, so that its next interrupt is held back; and one was, with `then`.
fn holding(then: impl Fn(&Rig) -> bool) -> Rig {
    undisturbed(|| {
        let rig = Rig::new(LatencySensitivity::Low);
        let now = crate::sys::cpu::cycles();
        let at_once = !rig.give() && rig.guest.call.drain() == 1;
        let held = rig.give() && then(&rig) && rig.guest.call.drain() == 0;
        (now, at_once && held, rig)
    })
}

#[test]
fn low_interrupts_a_guest_that_was_left_alone_and_then_holds_back_until_it_is_due_or_the_shard_ends() {
    let rig = holding(|rig| {
        let now = crate::sys::cpu::cycles();
        // There is time, and the level is patient.
        rig.give() && rig.give() && rig.flush(Flush::Due(now)) && rig.flush(Flush::Idle(now))
    });
    assert!(!rig.flush(Flush::All) && !rig.flush(Flush::All));
    assert_eq!(rig.guest.call.drain(), 1);
    let expected = Notifications { calls: 2, calls_coalesced: 2, ..Notifications::default() };
    assert_eq!(rig.counters(), expected);
    let rig = holding(|_| true);
    let later = crate::sys::cpu::cycles() + crate::sys::cpu::cycles_per_second();
    assert!(!rig.flush(Flush::Due(later)));
    assert_eq!(rig.guest.call.drain(), 1);
}

#[test]
fn a_guest_that_minds_delay_has_its_frames_as_they_came() {
    let made = Sketch { transport_options: 0, payload: vec![1; 900], gso_size: 450, ..Sketch::default() }.make();
    let segments = exercise::send(&made.bytes, made.header, Needs::ALL, Needs::NONE, 4096).frames;
    let segments: Vec<_> = segments.into_iter().map(|(_, bytes)| bytes).collect();
    assert_eq!(segments.len(), 2);
    let guest_csum_and_tso4 = 1 << 1 | 1 << 7;
    let levels = [
        (LatencySensitivity::Low, 2),
        (LatencySensitivity::Normal, 2),
        (LatencySensitivity::Medium, 2),
        (LatencySensitivity::High, 0),
    ];
    for (latency, merged) in levels {
        let rig = Rig::with(latency, guest_csum_and_tso4);
        let outcome = transmit(&*rig.port.transmit_side(), &segments);
        assert_eq!((outcome.delivered, outcome.merged), (0b11, merged), "{latency:?}");
    }
}

#[test]
fn a_ring_that_stops_owes_nothing() {
    let mut rig = holding(|_| true);
    rig.qemu.base(0);
    assert_eq!(rig.guest.call.drain(), 1);
    assert!(!rig.flush(Flush::All));
}

#[test]
fn a_guest_that_is_given_a_frame_at_a_time_is_interrupted_at_once_unless_it_is_patient() {
    for level in [LatencySensitivity::Normal, LatencySensitivity::Medium, LatencySensitivity::High] {
        let rig = Rig::new(level);
        for _ in 0..100 {
            assert!(!rig.give());
            assert_eq!(rig.guest.call.drain(), 1);
        }
        assert_eq!(rig.counters(), Notifications { calls: 100, ..Notifications::default() });
    }
}

#[test]
fn a_level_that_changes_lets_go_of_what_was_held_back() {
    let rig = holding(|_| true);
    rig.port.set_latency(LatencySensitivity::High);
    assert!(!rig.flush(Flush::Idle(crate::sys::cpu::cycles())));
    assert!(!rig.give());
    assert_eq!(rig.guest.call.drain(), 2);
}

#[test]
fn a_guest_that_gets_the_beginning_of_a_large_frame_is_interrupted_at_once() {
    let rig = holding(|_| true);
    // More segments than the ring has buffers.
    let made = Sketch { payload: vec![1; 15_000], gso_size: 100, ..Sketch::default() }.make();
    let (mut memory, mut heads, mut outcome) = (made.bytes.clone(), heads(), Outcome::new());
    let mut batch = Batch::new(&mut heads, 0);
    admit(&mut batch, made.bytes.len(), &[Span::from_buffer(&mut memory)], &made.header.to_bytes(), Needs::ALL);
    rig.port.transmit_side().transmit(&batch, &[0], &mut outcome);
    let given = 128 - 2;
    assert_eq!((outcome.delivered, outcome.cut), (1, (150 - given, u64::from(150 - given) * 100)));
    assert_eq!((outcome.held, rig.guest.call.drain()), (None, 1));
}

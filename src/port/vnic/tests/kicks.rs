//! Kicks, as the guest sends them and as they are counted.

use super::*;
use crate::port::Wake;
use crate::port::testing::{Shard, receive_all};
use crate::sys::toll::thread_time;

/// A guest whose TX ring runs; the frame in it is 60 zeros behind their header.
struct Rig {
    guest: Guest,
    port: Arc<Vnic>,
    qemu: Raw,
    offered: u16,
    _host: Host,
}

impl Rig {
    fn new() -> Self {
        let (host, guest) = (Host::new(), Guest::new());
        let port = host.port("vm1");
        let mut qemu = host.connect("vm1");
        qemu.negotiate();
        assert!(qemu.done(Req::SET_FEATURES, &(1u64 << 32 | 1 << 30).to_ne_bytes(), &[]));
        assert!(qemu.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
        // A front end that has had the eventfd for longer than we.
        guest.kick.signal();
        qemu.start(1, 0, &guest);
        assert!(qemu.done(Req::SET_VRING_ENABLE, &state(1, 1), &[]));
        let descriptor = [0x8_0000u64.to_le_bytes().to_vec(), 72u32.to_le_bytes().to_vec(), vec![0; 4]].concat();
        guest.memory.write_all_at(&descriptor, areas(1)[0]).unwrap();
        Self { guest, port, qemu, offered: 0, _host: host }
    }

    /// Has the guest offer a frame, without a kick.
    fn offer(&mut self) {
        self.offered += 1;
        self.guest.memory.write_all_at(&self.offered.to_le_bytes(), areas(1)[1] + 2).unwrap();
    }

    fn counters(&self) -> [u64; 2] {
        let of = self.port.notifications()[1];
        [of.kicks, of.kicks_suppressed]
    }
}

#[test]
fn all_kicks_of_the_guest_count_and_nothing_else_does() {
    let mut rig = Rig::new();
    let queue = Arc::clone(&rig.port.receive_queues()[0]);
    assert!(receive_all(&*queue).is_empty() && queue.arm());
    assert_eq!(rig.counters(), [0, 0], "what came before the ring started is not ours");
    // A control-side wake, and a frame that was there when the guest was asked to kick.
    queue.disarm();
    rig.offer();
    assert!(!queue.arm());
    queue.disarm();
    assert_eq!(rig.counters()[0], 0, "nobody kicked");
    assert_eq!(receive_all(&*queue).len(), 1);
    // From rest, by two kicks at once.
    assert!(queue.arm());
    rig.offer();
    rig.guest.kick.signal();
    rig.guest.kick.signal();
    let [_, spared] = rig.counters();
    queue.disarm();
    assert_eq!(receive_all(&*queue).len(), 1);
    assert_eq!(rig.counters(), [2, spared], "this batch was waited for");
    // While the shard polls.
    rig.offer();
    rig.guest.kick.signal();
    assert_eq!(receive_all(&*queue).len(), 1);
    assert_eq!(rig.counters(), [3, spared + 1]);
}

#[test]
fn a_batch_found_when_arming_fails_was_spared_its_kick() {
    let mut rig = Rig::new();
    let queue = Arc::clone(&rig.port.receive_queues()[0]);
    rig.offer();
    assert!(!queue.arm());
    queue.disarm();
    assert_eq!((receive_all(&*queue).len(), rig.counters()), (1, [0, 1]));
}

#[test]
fn kicks_outlive_the_eventfd_the_shard_and_the_ring() {
    let mut rig = Rig::new();
    let queue = Arc::clone(&rig.port.receive_queues()[0]);
    let shards = [Shard::new(), Shard::new()];
    queue.attach(Some(shards[0].clone()));
    rig.guest.kick.signal();
    queue.attach(Some(shards[1].clone()));
    assert_eq!(rig.counters()[0], 1, "another shard is no kick");
    let other = EventFd::new().unwrap();
    other.signal();
    assert!(rig.qemu.done(Req::SET_VRING_KICK, &1u64.to_ne_bytes(), &[other.as_fd()]));
    rig.guest.kick.signal();
    assert_eq!(rig.counters()[0], 1, "neither what the new one was at, nor what the old one is told now");
    other.signal();
    assert_eq!(rig.counters()[0], 2);
    assert_eq!(rig.qemu.base(1), 0);
    other.signal();
    assert_eq!(rig.counters()[0], 2);
}

#[test]
fn a_count_that_a_front_end_writes_is_no_number_of_kicks() {
    let rig = Rig::new();
    rig.guest.kick.signal();
    assert_eq!(rig.counters()[0], 1);
    // The most that an eventfd takes, all at once.
    rustix::io::write(rig.guest.kick.as_fd(), &(u64::MAX - 10).to_ne_bytes()).unwrap();
    let jumped = rig.counters()[0];
    assert!((1..1 << 40).contains(&jumped), "{jumped}");
    assert!(rig.guest.kick.drain() > 1 << 60);
    let after = rig.counters()[0];
    assert!((jumped..1 << 40).contains(&after), "{jumped} and then {after}");
    rig.guest.kick.signal();
    assert!((after + 1..1 << 40).contains(&rig.counters()[0]));
}

/// Beginning and ending to wait for an eventfd takes its lock, which its front end can hold for as long as it takes to wake a
/// million who wait for it.
#[test]
fn a_shard_that_finds_a_fault_leaves_the_kick_to_the_session() {
    let mut rig = Rig::new();
    let queue = Arc::clone(&rig.port.receive_queues()[0]);
    let shard = Shard::new();
    queue.attach(Some(shard.clone()));
    assert!(receive_all(&*queue).is_empty());
    rig.offered = 0x7000;
    rig.offer();
    assert!(receive_all(&*queue).is_empty());
    assert!(matches!(rig.port.link(), LinkState::Stopped(_)), "a ring cannot hold so many");
    rig.guest.kick.signal();
    assert!(shard.wait(0), "the shard has done with the kick what takes its lock");
    rig.qemu.base(1);
    rig.guest.kick.signal();
    assert!(!shard.wait(0), "the ring is stopped, and its shard still woken");
}

/// A shard that takes so much CPU time to begin, and to end, to wait for a kick, as one does where very many wait for that and its
/// front end kicks.
struct Slow(Arc<Shard>, [Duration; 2]);

impl Slow {
    fn spin(&self, which: usize) {
        let began = thread_time();
        while thread_time() - began < self.1[which] {}
    }
}

impl Wake for Slow {
    fn wake(&self) {
        self.0.wake();
    }

    fn watch(&self, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        self.spin(0);
        self.0.watch(fd)
    }

    fn unwatch(&self, fd: BorrowedFd<'_>) {
        self.spin(1);
        self.0.unwatch(fd);
    }
}

fn is_barred_for_kicks(port: &Vnic) -> bool {
    port.conduct().deed == Some("had its kicks take long to wait for")
}

#[test]
fn a_front_end_whose_kicks_take_long_to_wait_for_is_barred() {
    const LONG: Duration = Duration::from_millis(60);
    for times in [[LONG, Duration::ZERO], [Duration::ZERO, LONG], [LONG; 2]] {
        let mut rig = Rig::new();
        rig.port.receive_queues()[0].attach(Some(Arc::new(Slow(Shard::new(), times))));
        let mut changes = 0;
        while !is_barred_for_kicks(&rig.port) {
            changes += 1;
            assert!(changes < 100, "{times:?}");
            let kick = [rig.guest.kick.as_fd()];
            rig.qemu.send(Req::SET_VRING_KICK as u32, NEED_REPLY, &1u64.to_ne_bytes(), &kick);
            if rig.qemu.0.read_exact(&mut [0; 20]).is_err() {
                eventually("it is barred", || is_barred_for_kicks(&rig.port));
            }
        }
    }
}

#[test]
fn what_a_kick_takes_when_its_front_end_goes_is_held_against_it_as_well() {
    let rig = Rig::new();
    let time = Duration::from_millis(150);
    rig.port.receive_queues()[0].attach(Some(Arc::new(Slow(Shard::new(), [Duration::ZERO, time]))));
    assert!(rig.port.conduct().deed.is_none());
    drop(rig.qemu);
    eventually("it is barred", || is_barred_for_kicks(&rig.port));
}

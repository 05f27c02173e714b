//! Rings whose memory lacks pages, before their session has come to stop them.

use super::*;
use crate::frame::{Batch, heads};
use crate::mem::{DirtyLog, RegionRequest, SharedMemory};
use crate::port::testing::{Shard, transmit};
use crate::port::vnic::offence::Docket;
use crate::port::vnic::queue::{Queue, RingSetup};
use crate::port::vnic::receive::ReceiveQueue;
use crate::port::vnic::steering::Steering;
use crate::port::vnic::transmit::TransmitSide;
use crate::port::{Receive, Received};
use crate::verdict::DropReason;

/// Where buffers are, one on each page.
const BUFFERS: u64 = 0x8_0000;
const COUNT: u64 = 128;

/// Rings that no session serves: 0 with buffers for frames, 1 with frames.
struct Rig {
    guest: Guest,
    attention: Arc<EventFd>,
    queues: [Arc<Queue>; 2],
    steering: Arc<Steering>,
}

impl Rig {
    fn new() -> Self {
        let (guest, attention) = (Guest::new(), Arc::new(EventFd::new().unwrap()));
        let rig = |_| Arc::new(Queue::new(Arc::new(Docket::new(Arc::clone(&attention)))));
        let queues = [0, 1].map(rig);
        let rig = Self { guest, attention, queues, steering: Arc::new(Steering::new(1)) };
        let memory = rig.memory();
        for (ring, flags) in [(0, 2u16), (1, 0)] {
            let [descriptors, available, used] = areas(ring);
            for index in 0..COUNT {
                let address = (BUFFERS + 4096 * index).to_le_bytes();
                let descriptor = [&address[..], &72u32.to_le_bytes(), &flags.to_le_bytes(), &[0; 2]].concat();
                rig.guest.memory.write_all_at(&descriptor, descriptors + 16 * index).unwrap();
                rig.guest.memory.write_all_at(&(index as u16).to_le_bytes(), available + 4 + 2 * index).unwrap();
            }
            rig.guest.memory.write_all_at(&(COUNT as u16).to_le_bytes(), available + 2).unwrap();
            let queue = &rig.queues[ring as usize];
            let setup = RingSetup {
                size: RING as u16,
                descriptors,
                available,
                used,
                base: 0,
                features: 1 << 32,
                memory: Arc::clone(memory.memory()),
                kick: Arc::new(EventFd::new().unwrap().into()),
                call: None,
                log: None,
                record: None,
            };
            assert!(!queue.start(setup).unwrap());
            queue.enable(true);
        }
        rig
    }

    /// All that the guest shares, mapped anew.
    fn memory(&self) -> SharedMemory {
        let region = RegionRequest { guest: 0, user: USER, len: MEMORY, offset: 0 };
        let none = SharedMemory::new(Arc::clone(&self.attention), u64::MAX);
        none.with(region, self.guest.memory.try_clone().unwrap()).unwrap().unwrap()
    }

    /// Why so many frames to the guest were lost; `None` of each that was not.
    fn give(&self, frames: usize) -> Vec<Option<DropReason>> {
        let side = TransmitSide::new(vec![Arc::clone(&self.queues[0])], Arc::clone(&self.steering));
        let outcome = transmit(&side, &vec![vec![7; 60]; frames]);
        (0..frames).map(|at| (outcome.delivered & 1 << at == 0).then(|| outcome.reasons[at])).collect()
    }

    fn sending(&self) -> ReceiveQueue {
        ReceiveQueue::new(Arc::clone(&self.queues[1]), 0, Arc::clone(&self.steering))
    }

    fn take(&self) -> Received {
        self.sending().receive(&mut heads(), &mut |batch: &mut Batch<'_>| assert!(!batch.is_empty()))
    }
}

#[test]
fn a_ring_that_has_lost_memory_is_left_alone_after_one_visit_and_has_a_fault_for_each_page() {
    let rig = Rig::new();
    assert_eq!(rig.give(8), [None; 8]);
    rig.guest.memory.set_len(BUFFERS).unwrap();
    assert_eq!(rig.give(64), [None; 64], "what one visit does is lost");
    assert_eq!(rig.attention.drain(), 64);
    assert_eq!(rig.give(3), [Some(DropReason::RingFaulted); 3]);
    assert_eq!(rig.take(), Received::Nothing, "another ring in the same memory");
    assert!(rig.sending().arm(), "its shard need not look again");
    assert_eq!(rig.attention.drain(), 0, "nothing was touched");
    // Other memory is another matter, and the shard is told.
    rig.guest.memory.set_len(MEMORY).unwrap();
    let (healed, shard) = (rig.memory(), Shard::new());
    rig.sending().attach(Some(shard));
    rig.queues.iter().for_each(|queue| queue.set_memory(healed.memory()).unwrap());
    assert_eq!((rig.give(3), rig.take()), (vec![None; 3], Received::Frames(64)));
}

#[test]
fn a_ring_whose_log_has_lost_pages_waits_for_another_or_for_none() {
    let rig = Rig::new();
    let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC).unwrap());
    let log = |rig: &Rig| {
        file.set_len(4096).unwrap();
        Arc::new(DirtyLog::new(file.try_clone().unwrap(), 0, 4096, Arc::clone(&rig.attention)).unwrap())
    };
    for next in [Some(log(&rig)), None] {
        rig.queues[0].set_log(Some(log(&rig)));
        assert_eq!(rig.give(1), [None]);
        file.set_len(0).unwrap();
        assert_eq!(rig.give(1), [None]);
        assert_eq!(rig.give(1), [Some(DropReason::RingFaulted)]);
        file.set_len(4096).unwrap();
        rig.queues[0].set_log(next);
        assert_eq!(rig.give(1), [None]);
    }
}

//! Memory of a sender is met before anybody else's ring is.

use std::fs::File;

use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};
use vm_memory::FileOffset;
use vm_memory::mmap::MmapRegion;

use super::*;
use crate::mem::{GuestMemory, Region};

/// Pages that a frame lies on.
const PAGES: usize = 4;

/// A queue of one frame, in a file that has no pages but the first.
struct Sparse {
    file: File,
    memory: GuestMemory,
    sent: Mutex<bool>,
}

impl Sparse {
    fn new(from: MacAddr, to: MacAddr) -> Self {
        let file = File::from(memfd_create("sparse", MemfdFlags::CLOEXEC).unwrap());
        let len = PAGES * Span::PAGE_BYTES;
        ftruncate(&file, len as u64).unwrap();
        let mapped = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), len).unwrap();
        let memory = GuestMemory::new(vec![Arc::new(Region::new(0, 0, mapped))]);
        let head = frame(to, from, 64, 0);
        std::os::unix::fs::FileExt::write_all_at(&file, &head, 0).unwrap();
        Self { file, memory, sent: Mutex::default() }
    }

    /// Pages that the file has.
    fn pages(&self) -> usize {
        // In blocks of 512 bytes (stat(2)).
        fstat(&self.file).unwrap().st_blocks as usize / (Span::PAGE_BYTES / 512)
    }
}

impl Receive for Sparse {
    fn receive(&self, heads: &mut Heads, process: &mut dyn FnMut(&mut Batch<'_>)) -> Received {
        if std::mem::replace(&mut *self.sent.lock().unwrap(), true) {
            return Received::Nothing;
        }
        let mut batch = Batch::new(heads, 0);
        let len = PAGES * Span::PAGE_BYTES;
        batch.push(len, &[self.memory.span(0, len as u32, &mut 0).unwrap()]);
        assert_eq!(self.pages(), 1);
        process(&mut batch);
        Received::Frames(1)
    }

    fn arm(&self) -> bool {
        *self.sent.lock().unwrap()
    }

    fn disarm(&self) {}

    fn attach(&self, _: Option<Arc<dyn Wake>>) {}
}

/// A port that notes how many pages of the sender's file are there when it is given frames.
struct Witness {
    sender: Arc<Sparse>,
    saw: Mutex<Vec<usize>>,
}

impl Transmit for Witness {
    fn transmit(&self, _: &Batch<'_>, picks: &[u8], outcome: &mut Outcome) {
        self.saw.lock().unwrap().push(self.sender.pages());
        picks.iter().for_each(|&index| outcome.deliver(index));
    }
}

#[test]
fn pages_that_a_sender_has_not_touched_are_read_before_a_receiver_is_given_its_frame() {
    for to in [MacAddr::BROADCAST, mac(2)] {
        let rig = Rig::on(1, 3, IdlePolicy::Adaptive);
        rig.feeds[1].feed([frame(MacAddr::BROADCAST, mac(2), 64, 0)]);
        wait(|| rig.totals(1).rx_delivered == 1);
        let sender = Arc::new(Sparse::new(mac(1), to));
        let receivers = [1, 2].map(|port| {
            let witness = Arc::new(Witness { sender: Arc::clone(&sender), saw: Mutex::default() });
            held_up::publish_as(port, &rig, Arc::clone(&witness) as _);
            witness
        });
        rig.shards.attach(PortIndex(0), vec![sender], &LatencySensitivity::Normal.into()).unwrap();
        wait(|| rig.totals(0).rx_delivered == 1);
        let saw = receivers.map(|receiver| receiver.saw.lock().unwrap().clone());
        let second = if to == MacAddr::BROADCAST { vec![PAGES] } else { Vec::new() };
        assert_eq!(saw, [vec![PAGES], second], "to {to}");
    }
}

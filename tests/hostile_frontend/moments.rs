//! Memory that holds up whoever touches it for a moment, again and again: a hole in a small file that is mapped thousands of times
//! takes the kernel some milliseconds, and the front end punches one after the other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;

use super::Scene;
use super::frontend::eventually;
use super::frontend::frame::frame;
use super::frontend::nic::Nic;
use super::frontend::ram::Region;
use super::frontend::ring::Desc;
use super::mapping::Crowd;
use super::stalls::step_back;

/// What the port is barred for.
const WHY: &str = "held the switch up in the VM's memory again and again";

/// For how long at most holes are punched under a port's frames: a hundred times as long as it takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// Where its front end shares the file.
const GPA: u64 = 0x8_0000_0000;

/// Holes that are punched one after the other until this goes, with a short time between them.
struct Holes {
    crowd: Crowd,
    begun: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    puncher: Option<JoinHandle<()>>,
}

impl Holes {
    fn begin() -> Self {
        let (crowd, begun, stop) = (Crowd::new(), Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let ((file, len), count, stops) = (crowd.file(), begun.clone(), stop.clone());
        let puncher = std::thread::spawn(move || {
            step_back(false);
            while !stops.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_micros(500));
                count.fetch_add(1, Ordering::SeqCst);
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(&*file, how, 0, len).unwrap();
            }
        });
        Self { crowd, begun, stop, puncher: Some(puncher) }
    }

    /// The guest of `bad` sends to `peer` out of the file, one frame at a time, each once there is another hole, until its port is
    /// barred.
    fn under_frames_of(&self, bad: &mut Nic, scene: &mut Scene) {
        let (file, len) = self.crowd.file();
        bad.plug(Region { gpa: GPA, uva: 0x7777_0000_0000, len, offset: 0, file }).unwrap();
        let (ring, ram) = (bad.vmm.vrings[1].ring.clone(), bad.vmm.ram.clone());
        let head = ram.alloc(4096, 4096);
        ram.write(head, &[&[0; 12], &frame(scene.peer.mac, bad.mac, 64, 1)[..]].concat());
        let barred = scene.daemon.events("port-barred").len();
        let (mut last, mut number) = (0, 0);
        let (began, mut asked) = (Instant::now(), Instant::now());
        while began.elapsed() < PATIENCE {
            let begun = self.begun.load(Ordering::SeqCst);
            if begun != last && ring.used_idx() == ring.avail_idx() {
                (last, number) = (begun, (number + 1) % 16);
                ring.set_desc(0, Desc::readable(head, 76).then(1));
                ring.set_desc(1, Desc::readable(GPA + 8192 * number + 100, 1000));
                ring.offer(0);
                bad.vmm.vrings[1].kick.ring();
            }
            std::thread::sleep(Duration::from_micros(100));
            if asked.elapsed() > Duration::from_millis(500) {
                asked = Instant::now();
                scene.peer.poll();
                if scene.daemon.events("port-barred").len() > barred {
                    return;
                }
            }
        }
        panic!("nobody was barred: {:?}", scene.daemon.events("shard-stalled"));
    }
}

impl Drop for Holes {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.puncher.take().map(JoinHandle::join);
    }
}

#[test]
fn point_12_short_holes_one_after_the_other() {
    let mut scene = Scene::new();
    let holes = Holes::begin();
    // A hole is a long one where the machine does not let its puncher run. That costs the port its connection as well.
    let barred = (0..20).any(|_| {
        let mut bad = scene.nic();
        holes.under_frames_of(&mut bad, &mut scene);
        let why = scene.daemon.events("port-barred").pop().unwrap();
        why["reason"].as_str().unwrap().contains(WHY)
    });
    drop(holes);
    assert!(barred, "it was barred for single holes only: {:?}", scene.daemon.events("shard-stalled"));
    scene.expect_barred(WHY);
    let short = |stall: &serde_json::Value| stall["short-times"].as_u64() > Some(1);
    let stall = eventually("the many times are told", || scene.daemon.events("shard-stalled").into_iter().find(short));
    assert_eq!(stall["port"], "bad", "{stall}");
    assert!(stall["milliseconds"].as_u64() > Some(200), "{stall}");
    assert!(scene.daemon.events("port-barred").iter().all(|event| event["port"] == "bad"));
    scene.peer.poll();
    scene.expect_usable("short holes");
    scene.finish();
}

//! What of a batch is dealt with in one visit, where a frame may become many: [`bound`].
//!
//! A frame that is flooded is written once for each port of its network, and one that is to be segmented once for each of its
//! segments, whatever its sender had to write for it. So what a visit comes to is counted in frames written, and the batch ends
//! where that exceeds [`VISIT_WORK`]: the rest stays with its sender, who waits for it, and nobody else does. The count is what it comes
//! to at most: every port takes the frame, and none of them segments for itself. It is made of what the head says, so it is the
//! same whoever receives.
//!
//! That a sender of floods has fewer visits than others, because they take long, is the shard's doing; this is what bounds each
//! of them.

use super::Storm;
use super::storm::StormClass;
use crate::clock::Tick;
use crate::frame::{Batch, Frame, Head};
use crate::limits::{VISIT_PORT_WORK, VISIT_WORK};
use crate::verdict::{DropReason, Verdict};

/// Drops what its port may not have flooded, and cuts `batch` to what fits one visit. Flooded frames go to `members` ports.
#[inline(never)]
pub(super) fn bound(batch: &mut Batch<'_>, members: usize, storm: &Storm, now: Tick) {
    if batch.is_begun() && !is_same(batch) {
        batch.begin_anew();
    }
    let (mut visit, divisible) = (Visit { work: 0, ports: 0 }, batch.is_divisible());
    let mut refused = [0; 3];
    for index in 0..batch.len() {
        let begun = index == 0 && batch.is_begun();
        let ports = batch.flood_range(index, members);
        let (frame, head) = batch.decide(index);
        let (work, frames) = (work(frame, head), frame.wire_frames(head));
        if frame.verdict == Verdict::Flood {
            let class = StormClass::of(head.destination());
            if !begun && !storm.has_room(class, now) {
                frame.verdict = Verdict::Drop(DropReason::StormLimited);
                refused[class as usize] += 1;
                continue;
            }
            let fits = visit.fits(ports.len(), work) || !divisible;
            if !fits && index > 0 {
                batch.cut(index);
                break;
            }
            if !begun && !storm.take(class, frames, now) {
                frame.verdict = Verdict::Drop(DropReason::StormLimited);
                refused[class as usize] += 1;
                continue;
            }
            let served = if fits { ports.len() } else { Visit::most_ports(work) };
            visit.flood(served, work);
            if !fits {
                let destination = head.destination();
                batch.flood_in_part((ports.start + served) as u16, (destination, frames));
                break;
            }
        } else if frame.needs.is_gso() && matches!(frame.verdict, Verdict::Deliver(_)) {
            if visit.work + work > VISIT_WORK && index > 0 && divisible {
                batch.cut(index);
                break;
            }
            visit.work += work;
        }
    }
    batch.note_work(visit.work);
    storm.note_refused(refused);
}

/// Whether the first frame, which was begun, is still what was held against the port's bounds then.
fn is_same(batch: &Batch<'_>) -> bool {
    batch.frames().first().is_some_and(|frame| {
        let head = batch.head(0);
        frame.verdict == Verdict::Flood && batch.flooding().held_as == (head.destination(), frame.wire_frames(head))
    })
}

/// What a visit comes to so far.
struct Visit {
    work: u32,
    /// Ports that were flooded to.
    ports: usize,
}

impl Visit {
    /// What flooding a frame that comes to `work` at each of `ports` ports would come to; ports count the first time.
    fn cost(&self, ports: usize, work: u32) -> u32 {
        let anew = ports.saturating_sub(self.ports) as u32;
        work.saturating_mul(ports as u32).saturating_add(VISIT_PORT_WORK * anew)
    }

    fn fits(&self, ports: usize, work: u32) -> bool {
        self.work.saturating_add(self.cost(ports, work)) <= VISIT_WORK
    }

    fn flood(&mut self, ports: usize, work: u32) {
        self.work = self.work.saturating_add(self.cost(ports, work));
        self.ports = self.ports.max(ports);
    }

    /// To how many ports a frame that comes to `work` at each of them can be flooded in a visit of its own; one at least.
    fn most_ports(work: u32) -> usize {
        (VISIT_WORK / (VISIT_PORT_WORK + work)).max(1) as usize
    }
}

/// What writing a frame comes to: one for each segment, and one for each KiB of all of them.
fn work(frame: &Frame<'_>, head: &Head) -> u32 {
    let frames = frame.wire_frames(head);
    let headers = if frames > 1 { u32::from(head.header().hdr_len) * (frames - 1) } else { 0 };
    frames + (frame.len + headers) / 1024
}

#[cfg(test)]
mod tests;

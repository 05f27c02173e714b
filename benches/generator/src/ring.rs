//! The driver's side of a virtqueue whose buffers stay where they are: entry `i` of the ring is buffer `i` for ever, and
//! a buffer that comes back is offered again as it is.
//!
//! That works because every switch this drives gives buffers back in the order in which they were offered, which
//! `verify` checks. So a turn is two indices for a split ring (virtio 1.3, 2.7), and one store per entry for a packed one
//! (2.8), whose used entries overwrite what was offered; no buffer and no descriptor table is touched. A driver that
//! behaves like a guest's, and writes each descriptor again, is [`Habit::Rewrite`].

#![allow(unsafe_code, reason = "rings are shared with another process")]

use std::sync::atomic::{AtomicU16, Ordering, fence};

use crate::memory::Memory;

/// Descriptor flags.
const WRITE: u16 = 2;
/// Packed: made available when equal to the driver's wrap counter, used when equal to the device's (2.8.1).
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
/// Split `avail.flags` and `used.flags`: no interrupts, no kicks.
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;
/// Packed event flags: none wanted.
const EVENTS_OFF: u16 = 1;

/// What a driver does to an entry before it offers it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Habit {
    /// As little as the ring's form allows.
    Recycle,
    /// What a guest's driver does: reads the used entry, writes the descriptor.
    Rewrite,
}

/// A buffer as a descriptor names it.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Where it starts, as an offset into the NIC's memory.
    pub offset: usize,
    /// Bytes offered to the switch.
    pub len: u32,
}

/// Which way a ring's buffers go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The switch writes into them.
    Receive,
    /// The switch reads them.
    Transmit,
}

/// Where a ring lies and how its entries are.
#[derive(Debug)]
struct Layout {
    size: u16,
    /// Descriptor table or packed ring; available ring or driver's events; used ring or device's events.
    areas: [usize; 3],
    guest: Vec<u64>,
    lens: Vec<u32>,
    flags: u16,
    habit: Habit,
}

/// One ring with its books.
#[derive(Debug)]
pub struct Ring {
    layout: Layout,
    form: Form,
    desc: *mut u8,
    driver: *mut u8,
    device: *mut u8,
    /// Entries offered, and entries taken back, since the ring was made.
    offered: u64,
    taken: u64,
}

/// How the ring is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Virtio 1.3, 2.7.
    Split,
    /// Virtio 1.3, 2.8; `in_order` lets the device give back a run with its last entry only.
    Packed {
        /// VIRTIO_F_IN_ORDER was acked.
        in_order: bool,
    },
}

// SAFETY: the pointers go into the mapping that the NIC holds beside its rings; nothing about them is the thread's.
unsafe impl Send for Ring {}

impl Ring {
    /// A ring over `buffers`, one for each entry, none of them offered yet.
    pub fn new(memory: &mut Memory, form: Form, direction: Direction, buffers: &[Buffer], habit: Habit) -> Self {
        let size = u16::try_from(buffers.len()).unwrap_or(0);
        assert!(size.is_power_of_two() && size <= 1 << 15, "a ring of {}", buffers.len());
        let entries = usize::from(size);
        let areas = match form {
            Form::Split => [
                memory.take(16 * entries, 4096),
                memory.take(6 + 2 * entries, 4096),
                memory.take(6 + 8 * entries, 4096),
            ],
            Form::Packed { .. } => [memory.take(16 * entries, 4096), memory.take(4, 64), memory.take(4, 64)],
        };
        let layout = Layout {
            size,
            areas,
            guest: buffers.iter().map(|buffer| memory.guest(buffer.offset)).collect(),
            lens: buffers.iter().map(|buffer| buffer.len).collect(),
            flags: if direction == Direction::Receive { WRITE } else { 0 },
            habit,
        };
        let [desc, driver, device] = areas.map(|area| memory.at(area));
        let mut ring = Self { layout, form, desc, driver, device, offered: 0, taken: 0 };
        ring.lay_out();
        ring
    }

    /// Writes what stays: a split ring's descriptors and available entries, and that nobody need be interrupted.
    fn lay_out(&mut self) {
        match self.form {
            Form::Split => {
                for slot in 0..self.layout.size {
                    self.write_desc(slot);
                    // SAFETY: entry `slot` of an available ring of `size` entries, which `new` took.
                    unsafe { self.driver.cast::<u16>().add(2 + usize::from(slot)).write_volatile(slot) };
                }
                self.driver_word(0).store(NO_INTERRUPT, Ordering::Release);
            }
            Form::Packed { .. } => self.driver_word(1).store(EVENTS_OFF, Ordering::Release),
        }
    }

    /// Writes slot's whole descriptor; a split ring's has its flags in it, a packed one's get them apart.
    #[inline]
    fn write_desc(&mut self, slot: u16) {
        let layout = &self.layout;
        let at = usize::from(slot);
        let word = u64::from(layout.lens[at])
            | match self.form {
                Form::Split => u64::from(layout.flags) << 32,
                Form::Packed { .. } => u64::from(slot) << 32,
            };
        // SAFETY: descriptor `slot` of a table of `size`, aligned to 16 bytes as the area is to 4096.
        let desc = unsafe { self.desc.cast::<u64>().add(2 * at) };
        // SAFETY: both words of that descriptor. The device owns no part of it: it is not offered.
        unsafe {
            desc.write_volatile(layout.guest[at]);
            match self.form {
                Form::Split => desc.add(1).write_volatile(word),
                Form::Packed { .. } => {
                    desc.add(1).cast::<u32>().write_volatile(word as u32);
                    desc.add(1).cast::<u16>().add(2).write_volatile(slot);
                }
            }
        }
    }

    /// Entries that came back and were not taken yet; a device that lies can only make this wrong, not unsafe.
    #[inline]
    pub fn completed(&self) -> u16 {
        match self.form {
            Form::Split => self.device_word(1).load(Ordering::Acquire).wrapping_sub(self.taken as u16),
            Form::Packed { in_order } => self.completed_packed(in_order),
        }
    }

    #[inline]
    fn completed_packed(&self, in_order: bool) -> u16 {
        let (mut at, mut count) = (self.taken, 0);
        while count < self.outstanding() && self.is_used(at) {
            // With IN_ORDER one used entry may stand for a run, and names its last buffer.
            let run = if in_order { self.run_to(at, self.packed_id(at)) } else { 1 };
            at += u64::from(run);
            count += run;
        }
        count
    }

    /// Whether at least `bulk` entries came back, at the price of one look.
    #[inline]
    pub fn has_completed(&self, bulk: u16) -> bool {
        match self.form {
            Form::Packed { in_order: false } => {
                self.outstanding() >= bulk && self.is_used(self.taken + u64::from(bulk) - 1)
            }
            _ => self.completed() >= bulk,
        }
    }

    /// Entries on the device's side.
    #[inline]
    pub fn outstanding(&self) -> u16 {
        (self.offered - self.taken) as u16
    }

    /// The slot, and bytes written, of the `nth` completed entry; `None` if a run's end stands for it.
    #[inline]
    pub fn completion(&self, nth: u16) -> Option<(u16, u32)> {
        let at = self.taken + u64::from(nth);
        let slot = self.slot(at);
        match self.form {
            Form::Split => {
                // SAFETY: entry `slot` of the used ring, which has `size`; 4-byte aligned after flags and index.
                let entry = unsafe { self.device.add(4).cast::<u32>().add(2 * usize::from(slot)) };
                // SAFETY: both halves of that entry; the device published it with the index that was read before.
                let (id, len) = unsafe { (entry.read_volatile(), entry.add(1).read_volatile()) };
                Some((id as u16 & (self.layout.size - 1), len))
            }
            Form::Packed { .. } if !self.is_used(at) => None,
            Form::Packed { in_order } => {
                // SAFETY: the length word of descriptor `slot` of `size`.
                let len = unsafe { self.desc.cast::<u32>().add(4 * usize::from(slot) + 2).read_volatile() };
                // In order, the id of an entry that stands for a run is that of the run's end.
                Some((if in_order { slot } else { self.packed_id(at) & (self.layout.size - 1) }, len))
            }
        }
    }

    /// The slot of the `nth` completed entry, if buffers come back in order.
    #[inline]
    pub fn taken_slot(&self, nth: u16) -> u16 {
        self.slot(self.taken + u64::from(nth))
    }

    /// The slot that the `nth` entry after those offered will use.
    #[inline]
    pub fn next_slot(&self, nth: u16) -> u16 {
        self.slot(self.offered + u64::from(nth))
    }

    /// Takes `count` completed entries back and offers them again; the switch may need a kick then.
    #[inline]
    pub fn recycle(&mut self, count: u16) {
        if self.layout.habit == Habit::Rewrite {
            for nth in 0..count {
                std::hint::black_box(self.completion(nth));
            }
        }
        self.taken += u64::from(count);
        self.offer(count);
    }

    /// Takes `count` completed entries back, to keep them.
    #[inline]
    pub fn take(&mut self, count: u16) {
        self.taken += u64::from(count);
    }

    /// Offers the next `count` entries.
    #[inline]
    pub fn offer(&mut self, count: u16) {
        match self.form {
            Form::Split => {
                if self.layout.habit == Habit::Rewrite {
                    for nth in 0..count {
                        self.rewrite_split(self.next_slot(nth));
                    }
                }
                self.offered += u64::from(count);
                self.driver_word(1).store(self.offered as u16, Ordering::Release);
            }
            Form::Packed { .. } => self.offer_packed(count),
        }
    }

    #[inline]
    fn rewrite_split(&mut self, slot: u16) {
        self.write_desc(slot);
        // SAFETY: as in `lay_out`.
        unsafe { self.driver.cast::<u16>().add(2 + usize::from(slot)).write_volatile(slot) };
    }

    /// The first entry's flags go last: a device reads in order and stops there until then.
    #[inline]
    fn offer_packed(&mut self, count: u16) {
        let first = self.offered;
        for nth in (0..count).rev() {
            let at = first + u64::from(nth);
            let slot = self.slot(at);
            self.write_desc(slot);
            let flags = self.layout.flags | if self.wrap(at) { AVAIL } else { USED };
            self.packed_flags(slot).store(flags, Ordering::Release);
        }
        self.offered += u64::from(count);
    }

    /// Whether the switch wants to be told of what was just offered.
    #[inline]
    pub fn wants_kick(&self) -> bool {
        // The entries must be visible before the flags are read (2.7.13.4, 2.8.21.3), or both sides may wait.
        fence(Ordering::SeqCst);
        match self.form {
            Form::Split => self.device_word(0).load(Ordering::Relaxed) & NO_NOTIFY == 0,
            Form::Packed { .. } => self.device_word(1).load(Ordering::Relaxed) != EVENTS_OFF,
        }
    }

    /// Asks the switch to interrupt; the driver does not until then.
    pub fn want_interrupts(&mut self) {
        let word = if self.form == Form::Split { 0 } else { 1 };
        self.driver_word(word).store(0, Ordering::Release);
    }

    /// A split ring's used index: where a switch that starts over goes on.
    pub fn used_index(&self) -> u16 {
        self.device_word(1).load(Ordering::Acquire)
    }

    /// Sizes and places for the messages: entries; descriptors, driver's area, device's area.
    pub fn place(&self) -> (u16, [usize; 3]) {
        (self.layout.size, self.layout.areas)
    }

    /// The ring's form.
    pub fn form(&self) -> Form {
        self.form
    }

    /// The buffer's length that slot offers.
    pub fn set_len(&mut self, slot: u16, len: u32) {
        self.layout.lens[usize::from(slot)] = len;
    }

    #[inline]
    fn slot(&self, at: u64) -> u16 {
        at as u16 & (self.layout.size - 1)
    }

    /// The wrap counter of entry `at`: 1 in the first round (2.8.1).
    #[inline]
    fn wrap(&self, at: u64) -> bool {
        (at / u64::from(self.layout.size)).is_multiple_of(2)
    }

    #[inline]
    fn is_used(&self, at: u64) -> bool {
        let flags = self.packed_flags(self.slot(at)).load(Ordering::Acquire);
        let wrap = self.wrap(at);
        (flags & AVAIL != 0) == wrap && (flags & USED != 0) == wrap
    }

    #[inline]
    fn packed_id(&self, at: u64) -> u16 {
        // SAFETY: the id of a descriptor inside the ring.
        unsafe { self.desc.cast::<u16>().add(8 * usize::from(self.slot(at)) + 6).read_volatile() }
    }

    /// Entries from `at` to the one that has buffer `id`, both counted.
    #[inline]
    fn run_to(&self, at: u64, id: u16) -> u16 {
        (id.wrapping_sub(self.slot(at)) & (self.layout.size - 1)) + 1
    }

    #[inline]
    fn packed_flags(&self, slot: u16) -> &AtomicU16 {
        // SAFETY: the flags of a descriptor inside the ring, aligned to 2; both sides access them as a whole, and the
        // mapping lives as long as the NIC that holds this ring.
        unsafe { AtomicU16::from_ptr(self.desc.cast::<u16>().add(8 * usize::from(slot) + 7)) }
    }

    #[inline]
    fn driver_word(&self, nth: usize) -> &AtomicU16 {
        // SAFETY: word 0 or 1 of the driver's area, which has at least 4 bytes, is aligned, and is accessed as words.
        unsafe { AtomicU16::from_ptr(self.driver.cast::<u16>().add(nth)) }
    }

    #[inline]
    fn device_word(&self, nth: usize) -> &AtomicU16 {
        // SAFETY: as for `driver_word`, in the device's area.
        unsafe { AtomicU16::from_ptr(self.device.cast::<u16>().add(nth)) }
    }
}

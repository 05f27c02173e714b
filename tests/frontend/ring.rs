//! A split virtqueue (virtio 1.2, 2.7) as it lies in guest RAM: read and write access to every field, with no opinion
//! about what a driver may do. `queue.rs` behaves on top of it; hostile tests do not.

use std::sync::Arc;

use super::ram::GuestRam;

/// Descriptor flags.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`
pub const NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`
pub const NO_NOTIFY: u16 = 1;

/// Bytes of one descriptor.
pub const DESC_LEN: u64 = 16;

/// One descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Desc {
    pub fn readable(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: 0, next: 0 }
    }

    pub fn writable(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: WRITE, next: 0 }
    }

    /// The same descriptor, going on at `next`.
    pub fn then(self, next: u16) -> Self {
        Self { flags: self.flags | NEXT, next, ..self }
    }

    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

impl Desc {
    /// As an entry of a packed ring's indirect table: what would be `next` is an id there, which means nothing, and so is
    /// NEXT (virtio 1.2, 2.8.7).
    pub fn to_packed_entry(self) -> [u8; 16] {
        let mut bytes = self.to_bytes();
        bytes[12..14].copy_from_slice(&self.next.to_le_bytes());
        bytes[14..].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }
}

/// Where one ring lies.
#[derive(Clone)]
pub struct Ring {
    pub ram: Arc<GuestRam>,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
}

impl Ring {
    /// Takes room for a ring of `size` entries and zeroes it.
    pub fn alloc(ram: &Arc<GuestRam>, size: u16) -> Self {
        let entries = u64::from(size);
        let desc = ram.alloc(DESC_LEN * entries, 4096);
        let avail = ram.alloc(6 + 2 * entries, 4);
        let used = ram.alloc(6 + 8 * entries, 4096);
        let ring = Self { ram: ram.clone(), size, desc, avail, used };
        ring.clear();
        ring
    }

    /// Zeroes all three areas, as a driver does before it hands out a new ring.
    pub fn clear(&self) {
        let entries = u64::from(self.size);
        self.ram.zero(self.desc, DESC_LEN * entries);
        self.ram.zero(self.avail, 6 + 2 * entries);
        self.ram.zero(self.used, 6 + 8 * entries);
    }

    pub fn set_desc(&self, index: u16, desc: Desc) {
        self.ram.write(self.desc + DESC_LEN * u64::from(index), &desc.to_bytes());
    }

    pub fn avail_idx(&self) -> u16 {
        self.ram.load_u16(self.avail + 2)
    }

    pub fn set_avail_idx(&self, idx: u16) {
        self.ram.store_u16(self.avail + 2, idx);
    }

    /// Flags of the available ring, the driver's to write.
    pub fn set_avail_flags(&self, flags: u16) {
        self.ram.store_u16(self.avail, flags);
    }

    /// Writes the entry that index `idx` names, modulo the size.
    pub fn set_avail_entry(&self, idx: u16, head: u16) {
        self.ram.store_u16(self.avail + 4 + 2 * u64::from(idx % self.size), head);
    }

    pub fn avail_entry(&self, idx: u16) -> u16 {
        self.ram.load_u16(self.avail + 4 + 2 * u64::from(idx % self.size))
    }

    pub fn set_used_event(&self, idx: u16) {
        self.ram.store_u16(self.avail + 4 + 2 * u64::from(self.size), idx);
    }

    pub fn used_flags(&self) -> u16 {
        self.ram.load_u16(self.used)
    }

    pub fn used_idx(&self) -> u16 {
        self.ram.load_u16(self.used + 2)
    }

    /// The device's field; a VMM that serves the ring itself, and hostile tests, write it.
    pub fn set_used_idx(&self, idx: u16) {
        self.ram.store_u16(self.used + 2, idx);
    }

    /// The entry that index `idx` names, modulo the size: head and length.
    pub fn used_entry(&self, idx: u16) -> (u32, u32) {
        let at = self.used + 4 + 8 * u64::from(idx % self.size);
        (self.ram.u32(at), self.ram.u32(at + 4))
    }

    pub fn set_used_entry(&self, idx: u16, head: u32, len: u32) {
        let at = self.used + 4 + 8 * u64::from(idx % self.size);
        self.ram.write(at, &(u64::from(len) << 32 | u64::from(head)).to_le_bytes());
    }

    pub fn avail_event(&self) -> u16 {
        self.ram.load_u16(self.used + 4 + 8 * u64::from(self.size))
    }

    /// Makes `head` available and publishes it, with no bookkeeping.
    pub fn offer(&self, head: u16) {
        let idx = self.avail_idx();
        self.set_avail_entry(idx, head);
        self.set_avail_idx(idx.wrapping_add(1));
    }
}

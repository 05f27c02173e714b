//! A range of bytes in memory that somebody else may write at any moment: [`Span`].
//!
//! Guest memory must never be a Rust slice: the guest changes it under our hands, which the language forbids for `&[u8]`
//! and `&mut [u8]`. A span hands out copies only. Its lifetime is that of the mapping it points into, so a span cannot
//! outlive the memory, and every access is bounded by the span's own length.
//!
//! Copies are `ptr::copy` (memmove), because two spans may alias: a guest can post one buffer twice, and two hostile
//! front ends can share one file. The copies race with the guest's writes. What arrives may then be a mixture of old and
//! new bytes, never anything else: on the machines we run on a racing byte copy has no other effect, and no value that
//! was read is ever read again for a second decision.

#![allow(unsafe_code)] // The floor of the house: raw copies to and from guest memory.

use std::marker::PhantomData;

/// A bounded range of guest memory (or of a buffer of our own), readable and writable by copying.
#[derive(Clone, Copy)]
pub struct Span<'m> {
    address: *mut u8,
    len: u32,
    memory: PhantomData<&'m [u8]>,
}

// SAFETY: a span is an address and a length; all access goes through copies that tolerate concurrent writers, and `'m`
// keeps the memory mapped in whichever thread it is used.
unsafe impl Send for Span<'_> {}
// SAFETY: as above: shared use from several threads is what a span is for.
unsafe impl Sync for Span<'_> {}

impl<'m> Span<'m> {
    /// Bytes of the smallest page of any kernel we run on.
    pub const PAGE_BYTES: usize = 4096;

    /// The span of no bytes.
    pub const EMPTY: Self = Self { address: std::ptr::NonNull::dangling().as_ptr(), len: 0, memory: PhantomData };

    /// A span over raw memory.
    ///
    /// # Safety
    /// `address..address + len` must be mapped readable and writable for all of `'m`, pages of it that a peer's file loses
    /// included, and no Rust reference to any of it may be alive during `'m`.
    pub(crate) unsafe fn from_raw(address: *mut u8, len: u32) -> Self {
        Self { address, len, memory: PhantomData }
    }

    /// A span over a buffer of our own, so that what was read from a file descriptor travels like guest memory.
    pub fn from_buffer(buffer: &'m mut [u8]) -> Self {
        let len = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
        Self { address: buffer.as_mut_ptr(), len, memory: PhantomData }
    }

    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there are no bytes.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The first `at` bytes (fewer if there are fewer) and the rest.
    #[inline]
    pub fn split_at(self, at: usize) -> (Self, Self) {
        let at = at.min(self.len());
        // SAFETY: `at <= len`, so the new address is within the span or one past its end.
        let rest = unsafe { self.address.add(at) };
        let first = Self { len: at as u32, ..self };
        (first, Self { address: rest, len: self.len - at as u32, memory: PhantomData })
    }

    /// Copies bytes out, as many as both sides have; returns how many.
    #[inline]
    pub fn read(&self, to: &mut [u8]) -> usize {
        let len = self.len().min(to.len());
        // SAFETY: `len` bytes are mapped behind `address` for `'m` (from_raw's contract) and fit `to`; `copy` allows overlap.
        unsafe { std::ptr::copy(self.address, to.as_mut_ptr(), len) };
        len
    }

    /// Copies exactly `N` bytes out if there are that many: a copy of constant size, which the compiler lays out inline.
    #[inline]
    pub fn read_exact<const N: usize>(&self, to: &mut [u8; N]) -> bool {
        if self.len() < N {
            return false;
        }
        // SAFETY: at least `N` bytes are mapped behind `address` for `'m`, and `to` has `N`; `copy` allows overlap.
        unsafe { std::ptr::copy(self.address, to.as_mut_ptr(), N) };
        true
    }

    /// Copies bytes in, as many as both sides have; returns how many.
    #[inline]
    pub fn write(&self, from: &[u8]) -> usize {
        let len = self.len().min(from.len());
        // SAFETY: `len` bytes are mapped behind `address` for `'m` and `from` has as many; `copy` allows overlap.
        unsafe { std::ptr::copy(from.as_ptr(), self.address, len) };
        len
    }

    /// Copies exactly `N` bytes in if there is room: a copy of constant size, which the compiler lays out inline.
    #[inline]
    pub fn write_exact<const N: usize>(&self, from: &[u8; N]) -> bool {
        if self.len() < N {
            return false;
        }
        // SAFETY: at least `N` bytes are mapped behind `address` for `'m`, and `from` has `N`; `copy` allows overlap.
        unsafe { std::ptr::copy(from.as_ptr(), self.address, N) };
        true
    }

    /// Copies from this span into `to`, as many bytes as both have; returns how many. The one copy of a frame's payload.
    #[inline]
    pub fn copy_to(&self, to: Span<'_>) -> usize {
        let len = self.len().min(to.len());
        // SAFETY: both ranges are mapped for their lifetimes and at least `len` long; `copy` allows overlap.
        unsafe { std::ptr::copy(self.address, to.address, len) };
        len
    }

    /// Which bits tell the address of the last byte from that of the byte before `at`: a number below [`Self::PAGE_BYTES`] if and
    /// only if both are on one page. For a span that has them both.
    #[inline]
    pub fn distance(&self, at: usize) -> usize {
        let start = self.address.addr().wrapping_sub(1);
        start.wrapping_add(at) ^ start.wrapping_add(self.len())
    }

    /// Reads a byte of each page, so that whatever the kernel has to do for these pages is done now and not under somebody's
    /// lock. The CPU does not wait for one read before the next, so this is a prefetch as well.
    #[inline]
    pub fn touch(&self) {
        let mut at = 0;
        while at < self.len() {
            // SAFETY: `at < len`, so the byte is within the span, which is mapped for `'m` (from_raw's contract); a volatile
            // read of a byte that others may write is a read of some value of it, which is not used.
            let _ = unsafe { self.address.add(at).read_volatile() };
            // The first byte of the next page.
            at += Self::PAGE_BYTES - (self.address.addr() + at) % Self::PAGE_BYTES;
        }
    }

    /// Asks the CPU to fetch the first bytes for reading: two cache lines, because the first 76 bytes, a virtio-net header
    /// and a frame's head, lie across two wherever they begin. A hint without effect on what the program does.
    #[inline]
    pub fn prefetch(&self) {
        crate::sys::cpu::prefetch_read(self.address);
        crate::sys::cpu::prefetch_read(self.address.wrapping_add(CACHE_LINE_BYTES));
    }

    /// Asks the CPU to fetch the first bytes for writing; as [`Span::prefetch`].
    #[inline]
    pub fn prefetch_write(&self) {
        crate::sys::cpu::prefetch_write(self.address);
        crate::sys::cpu::prefetch_write(self.address.wrapping_add(CACHE_LINE_BYTES));
    }

    /// The span as an address and a length for a vectored system call (`writev`, `readv`).
    pub(crate) fn as_iovec(&self) -> libc::iovec {
        libc::iovec { iov_base: self.address.cast(), iov_len: self.len() }
    }
}

/// Bytes of a cache line on every CPU we run on; 128 on some aarch64, where the second hint is then spent in vain.
const CACHE_LINE_BYTES: usize = 64;

impl std::fmt::Debug for Span<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Span({} B)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_on_one_page_are_told_from_others() {
        let mut bytes = vec![0u8; 3 * Span::PAGE_BYTES];
        let to_page = bytes.as_ptr().addr().wrapping_neg() % Span::PAGE_BYTES;
        let page = Span::from_buffer(&mut bytes).split_at(to_page).1.split_at(2 * Span::PAGE_BYTES).0;
        let is_one = |from, at, len| page.split_at(from).1.split_at(len).0.distance(at) < Span::PAGE_BYTES;
        assert!(is_one(0, 1, 1) && is_one(0, 76, 4096) && is_one(4020, 76, 76) && is_one(4096, 76, 4096));
        assert!(is_one(0, 4096, 4096) && is_one(4095, 2, 4097));
        assert!(!is_one(0, 76, 4097) && !is_one(4020, 76, 77) && !is_one(0, 4096, 4097) && !is_one(4090, 1, 76));
    }

    #[test]
    fn copies_are_bounded_by_both_sides() {
        let (mut a, mut b) = ([1u8, 2, 3, 4], [0u8; 8]);
        let (from, to) = (Span::from_buffer(&mut a), Span::from_buffer(&mut b));
        let (first, rest) = from.split_at(3);
        assert_eq!((first.len(), rest.len(), from.split_at(9).1.len()), (3, 1, 0));
        assert_eq!(first.copy_to(to), 3);
        assert_eq!(rest.copy_to(to.split_at(7).1), 1);
        let mut out = [9u8; 10];
        assert_eq!(to.read(&mut out), 8);
        assert_eq!(out, [1, 2, 3, 0, 0, 0, 0, 4, 9, 9]);
        assert!(!to.read_exact(&mut [0; 9]) && !to.write_exact(&[0; 9]));
        assert_eq!(to.write(&[7; 20]), 8);
        assert_eq!(b, [7; 8]);
    }
}

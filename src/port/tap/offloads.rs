//! Offloads between the switch and the host's stack: [`Offloads`].
//!
//! The two directions differ. What the host may leave to us is what we asked it for (`TUNSETOFFLOAD`): it segments and
//! computes the rest before we read. What we leave to the host needs no asking: since 2.6.27 a TAP takes any frame with a
//! virtio-net header and does for the next interface what that cannot. The one exception is segmentation of UDP, known
//! since Linux 6.2; whether this kernel knows it shows when it is asked for it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU8, Ordering};

use super::backlog::Grant;
use super::piece::Spans;
use crate::frame::{Batch, Needs};
use crate::limits::VNET_HEADER_BYTES;
use crate::mem::Cursor;
use crate::offload::Rewrite;
use crate::port::Outcome;
use crate::sys::tap;
use crate::verdict::DropReason;

const USO: Needs = Needs::USO4.and(Needs::USO6);

/// What the host can do and what it is left with.
pub(super) struct Offloads {
    /// What this kernel knows.
    known: Needs,
    /// What of it the port's settings leave in use, [`Needs::bits`].
    used: AtomicU8,
}

impl Offloads {
    /// Asks the kernel for all that it knows.
    pub(super) fn ask(tun: BorrowedFd<'_>) -> io::Result<Self> {
        let without_uso = Needs::from_bits(Needs::ALL.bits() & !USO.bits());
        let known = match tap::set_offloads(tun, flags(Needs::ALL)) {
            Ok(()) => Needs::ALL,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tap::set_offloads(tun, flags(without_uso))?;
                without_uso
            }
            Err(error) => return Err(error),
        };
        Ok(Self { known, used: AtomicU8::new(known.bits()) })
    }

    /// Changes which are used, in both directions.
    pub(super) fn set(&self, tun: BorrowedFd<'_>, offloads: Needs) -> io::Result<()> {
        let used = self.known.within(offloads);
        self.used.store(used.bits(), Ordering::Relaxed);
        tap::set_offloads(tun, flags(used))
    }

    /// What the host takes as it is.
    #[inline]
    pub(super) fn accepts(&self) -> Needs {
        Needs::from_bits(self.used.load(Ordering::Relaxed))
    }

    /// What the host may leave to us. All that it knows: what it sent before a change may still wait to be read.
    #[inline]
    pub(super) fn may(&self) -> Needs {
        self.known
    }

    /// Makes records of the complete frames that frame `index` of `batch` becomes: of all of them, or none if there is no room for one.
    #[inline(never)]
    pub(super) fn put(
        &self,
        grant: &mut Grant<'_>,
        batch: &Batch<'_>,
        index: usize,
        outcome: &mut Outcome,
    ) -> Result<(), DropReason> {
        let mut rewrite = Rewrite::of(batch, index, self.accepts())?;
        let before = grant.len();
        while let Some(len) = rewrite.next_len() {
            let fill = |spans: Spans<'_>| rewrite.write(VNET_HEADER_BYTES, 1, Cursor::new(&spans));
            if !grant.put(VNET_HEADER_BYTES + len, fill) {
                grant.truncate(before);
                return Err(DropReason::HostBusy);
            }
        }
        outcome.rewritten(rewrite.is_segmentation());
        Ok(())
    }
}

/// `TUN_F_*` of linux/if_tun.h for what we take. All stand on the checksum, ECN on TCP segmentation, and the kernel takes
/// both kinds of USO or none.
fn flags(offloads: Needs) -> libc::c_uint {
    const CSUM: libc::c_uint = 0x01;
    let table = [(Needs::TSO4, 0x02), (Needs::TSO6, 0x04), (Needs::ECN, 0x08), (USO, 0x20 | 0x40)];
    if !Needs::CSUM.met_by(offloads) {
        return 0;
    }
    let tcp = !offloads.within(Needs::TSO4.and(Needs::TSO6)).is_none();
    let used = table.iter().filter(|(needs, _)| needs.met_by(offloads) && (tcp || *needs != Needs::ECN));
    used.fold(CSUM, |flags, (_, bits)| flags | bits)
}

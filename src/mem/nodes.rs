//! On which NUMA nodes guest memory lies: [`GuestMemory::nodes`], and what follows from it: [`NodePages::node`].
//!
//! Only pages that this process has touched are known, and none is touched to learn of it ([`crate::sys::numa`]), but for the
//! rings' descriptor tables, which are the guest's and there. So the
//! caller names the pages that matter, those in which rings lie and those that descriptors point at, which shards touch as
//! soon as frames flow. Some more are spread evenly over all of the memory: they are found where it is pinned or in huge
//! pages. All of them are asked for in one system call; 100 pages take it 20 us.

use std::collections::BTreeMap;

use super::GuestMemory;
use crate::sys::numa;

/// Places that are asked for beside those that the caller names.
const SPREAD: u64 = 64;

/// Of 16 pages, how many have to lie on one node for the memory to count as that node's. A VM whose memory is on two nodes
/// half and half is as near to one as to the other; with this much between "there" and "here" no sample error moves a port to
/// and fro.
const MOST_OF_16: u64 = 12;

/// How many pages of a sample lie on each NUMA node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodePages(BTreeMap<u16, u64>);

impl NodePages {
    /// The node where most of the memory lies; `None` if it is spread, or nothing is known.
    pub fn node(&self) -> Option<u16> {
        let all: u64 = self.0.values().sum();
        let most = self.0.iter().find(|(_, pages)| **pages * 16 >= all * MOST_OF_16);
        most.filter(|_| all > 0).map(|(node, _)| *node)
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Which nodes have how many of the pages, in percent.
    pub fn percent(&self) -> impl Iterator<Item = (u16, u64)> {
        let all: u64 = self.0.values().sum();
        self.0.iter().map(move |(node, pages)| (*node, pages * 100 / all.max(1)))
    }
}

impl FromIterator<u16> for NodePages {
    /// A sample: the node of each page.
    fn from_iter<I: IntoIterator<Item = u16>>(nodes: I) -> Self {
        let mut pages = BTreeMap::new();
        nodes.into_iter().for_each(|node| *pages.entry(node).or_default() += 1);
        Self(pages)
    }
}

impl GuestMemory {
    /// On which nodes the pages at these guest-physical addresses lie, and some more; those of them that are known. Nothing if
    /// the kernel does not tell.
    pub fn nodes(&self, named: impl Iterator<Item = u64>) -> NodePages {
        let mut hint = 0;
        let host = |guest: u64, hint: &mut usize| Some(self.span(guest, 1, hint)?.as_iovec().iov_base as usize);
        let mut places: Vec<usize> = named.filter_map(|guest| host(guest, &mut hint)).collect();
        let all: u64 = self.regions().iter().map(|region| region.len).sum();
        let step = all / SPREAD + 1;
        for region in self.regions() {
            let offsets = (0..region.len).step_by(usize::try_from(step).unwrap_or(usize::MAX));
            places.extend(offsets.map(|offset| region.host_address() + offset as usize));
        }
        numa::nodes_of(&places).map(|nodes| nodes.into_iter().flatten().collect()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::File;
    use std::os::linux::fs::MetadataExt;
    use std::sync::Arc;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;
    use crate::mem::{RegionRequest, SharedMemory};
    use crate::sys::eventfd::EventFd;

    #[test]
    fn memory_is_of_the_node_that_has_three_quarters_of_it() {
        let of = |zero: usize, one: usize| {
            let nodes = std::iter::repeat_n(0, zero).chain(std::iter::repeat_n(1, one));
            nodes.collect::<NodePages>().node()
        };
        assert_eq!([of(0, 0), of(1, 0), of(0, 1), of(12, 4), of(4, 12)], [None, Some(0), Some(1), Some(0), Some(1)]);
        assert_eq!([of(11, 5), of(5, 11), of(8, 8)], [None; 3]);
        let spread: NodePages = [0, 1, 1, 1, 1].into_iter().collect();
        assert_eq!(spread.percent().collect::<Vec<_>>(), [(0, 20), (1, 80)]);
    }

    #[test]
    fn pages_that_were_touched_are_found_and_no_page_is_made() {
        const LEN: u64 = 1 << 30;
        let file = File::from(memfd_create("nodes", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(LEN).unwrap();
        let shared = SharedMemory::new(Arc::new(EventFd::new().unwrap()), u64::MAX);
        let request = RegionRequest { guest: 0x10_0000, user: 0, len: LEN, offset: 0 };
        let shared = shared.with(request, file.try_clone().unwrap()).unwrap().unwrap();
        let memory = shared.memory();
        let named = || [0x10_0000 + 5 * 4096, 0x11_2345, 0, u64::MAX].into_iter();
        assert!(memory.nodes(named()).is_empty());
        assert_eq!(file.metadata().unwrap().st_blocks(), 0, "looking allocated what the VM had not");
        memory.span(0x11_2345, 1, &mut 0).unwrap().write(&[1]);
        let blocks = file.metadata().unwrap().st_blocks();
        let found = memory.nodes(named());
        assert_eq!(file.metadata().unwrap().st_blocks(), blocks);
        // The kernel tells, unless it has no NUMA or a container's filter says no.
        let local = [0u8; 1];
        if numa::nodes_of(&[local.as_ptr() as usize]).is_ok() {
            assert!(found.node().is_some(), "{found:?}");
        } else {
            assert!(found.is_empty());
        }
    }
}

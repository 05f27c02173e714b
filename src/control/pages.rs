//! Long lists, page by page: a [`Page`] of a list, and which FDB entries are on one.
//!
//! Guests fill the FDB, up to a million entries, so nobody gets all of it at once: a page costs one walk over it and room for what is
//! on the page. The FDB changes between two pages and may even be replaced by a larger one. So a page ends at a place in the order that
//! the list has, which means the same whatever became of the entry that was there.

use std::collections::BTreeMap;

use super::view::PortsView;
use crate::ident::{MacAddr, NetworkIndex};
use crate::limits::{FDB_PAGE, NETWORKS};

/// A part of a list.
#[derive(Debug)]
pub struct Page<T, P> {
    /// What is on it.
    pub items: Vec<T>,
    /// The place that it ends at, if there is more behind it.
    pub end: Option<P>,
}

/// A place in the list of FDB entries.
#[derive(Debug, Clone)]
pub struct FdbPlace {
    network: String,
    mac: MacAddr,
}

/// Networks in the order of their names, and FDB entries in that of their networks and addresses, each as one number.
pub(super) struct Order<'a> {
    names: Vec<&'a str>,
    /// Where in that order a network is, by its number.
    places: Vec<Option<u16>>,
}

impl<'a> Order<'a> {
    pub(super) fn of(view: &'a PortsView) -> Self {
        let numbered = view.networks.iter().filter_map(|(name, network)| Some((name.as_str(), network.number?)));
        Self::new(numbered)
    }

    /// The order of networks that come in it.
    fn new(networks: impl Iterator<Item = (&'a str, NetworkIndex)>) -> Self {
        let mut order = Self { names: Vec::new(), places: vec![None; NETWORKS] };
        for (name, number) in networks {
            let Some(place) = order.places.get_mut(usize::from(number.0)) else { continue };
            *place = u16::try_from(order.names.len()).ok();
            order.names.push(name);
        }
        order
    }

    /// The number of an entry, if its network is still there.
    pub(super) fn key(&self, network: NetworkIndex, mac: MacAddr) -> Option<u64> {
        let place = (*self.places.get(usize::from(network.0))?)?;
        Some((u64::from(place) << 48) | mac.to_bits())
    }

    /// The name of the network of an entry with this number.
    pub(super) fn network(&self, key: u64) -> &'a str {
        self.names.get((key >> 48) as usize).copied().unwrap_or_default()
    }

    pub(super) fn place(&self, key: u64) -> FdbPlace {
        FdbPlace { network: self.network(key).into(), mac: MacAddr::from_bits(key) }
    }

    /// The first number behind a place, whose network may be gone since.
    pub(super) fn behind(&self, FdbPlace { network, mac }: &FdbPlace) -> u64 {
        match self.names.binary_search(&network.as_str()) {
            Ok(place) => ((place as u64) << 48 | mac.to_bits()) + 1,
            Err(place) => (place as u64) << 48,
        }
    }
}

/// The entries of one page: those with the lowest numbers, in their order; and whether there are others. A station that was entered
/// twice, which lasts for a second at most, is there once.
pub(super) fn lowest<E>(entries: impl Iterator<Item = (u64, E)>) -> (Vec<(u64, E)>, bool) {
    let (mut lowest, mut more, mut highest) = (BTreeMap::new(), false, u64::MAX);
    for (key, entry) in entries {
        if key > highest {
            more = true;
            continue;
        }
        lowest.insert(key, entry);
        if lowest.len() > FDB_PAGE {
            more = true;
            lowest.pop_last();
        }
        if lowest.len() == FDB_PAGE {
            highest = lowest.last_key_value().map_or(u64::MAX, |(last, _)| *last);
        }
    }
    (lowest.into_iter().collect(), more)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn mac(bits: u64) -> MacAddr {
        MacAddr::from_bits(bits)
    }

    #[test]
    fn pages_are_in_order_and_come_to_the_whole_list() {
        let order = Order::new([("a", NetworkIndex(7)), ("b", NetworkIndex(3)), ("c", NetworkIndex(5))].into_iter());
        let (count, last) = (FDB_PAGE as u64 * 5 / 2, (1 << 48) - 1);
        // In no order, and each twice.
        let all = || {
            (0..2 * count).map(|n| n * 7919 % count).map(|n| {
                let network = NetworkIndex([7, 3, 9][(n % 3) as usize]);
                let mac = if n == 1 { last } else { n };
                (network, self::mac(mac))
            })
        };
        let (mut list, mut begin, mut pages) = (Vec::new(), 0, 0);
        loop {
            let keyed = all().filter_map(|(network, mac)| Some((order.key(network, mac)?, mac)));
            let (page, more) = lowest(keyed.filter(|(key, _)| *key >= begin));
            assert!(page.len() <= FDB_PAGE);
            pages += 1;
            list.extend(page.iter().map(|(key, mac)| (order.network(*key), *mac)));
            let Some((key, _)) = page.last().filter(|_| more) else { break };
            begin = order.behind(&order.place(*key));
        }
        let mut whole: Vec<_> = all()
            .filter_map(|(network, mac)| {
                Some((
                    match network.0 {
                        7 => "a",
                        3 => "b",
                        _ => return None,
                    },
                    mac,
                ))
            })
            .collect();
        whole.sort();
        whole.dedup();
        assert_eq!((list == whole, pages), (true, 2), "{} of {}", list.len(), whole.len());
    }

    #[test]
    fn a_place_stays_one_when_its_network_is_gone() {
        let networks = [("a", NetworkIndex(0)), ("c", NetworkIndex(1))];
        let order = Order::new(networks.into_iter());
        let behind = |network: &str, bits| order.behind(&FdbPlace { network: network.into(), mac: mac(bits) });
        let key = |network, bits| order.key(NetworkIndex(network), mac(bits)).unwrap();
        assert_eq!(behind("a", 5), key(0, 6));
        assert_eq!(behind("a", (1 << 48) - 1), key(1, 0), "the last address of a network");
        assert_eq!(behind("b", 5), key(1, 0));
        assert!(behind("d", 0) > key(1, (1 << 48) - 1));
        assert_eq!(order.key(NetworkIndex(9), mac(1)), None);
    }
}

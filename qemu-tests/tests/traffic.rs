//! Two guests on one network: pings and checksummed payload, over every shape of ring that QEMU can be told to use.

use qemu_tests::traffic::{Machine, advance_all, finish_all};
use qemu_tests::{Guest, Pair, Result, scenario};

/// Payload per stream and direction.
const BYTES: u64 = 1 << 20;

// Feature bits, virtio 1.3 sections 5.1.3 and 6.
const MRG_RXBUF: usize = 15;
const INDIRECT_DESC: usize = 28;
const EVENT_IDX: usize = 29;
const VERSION_1: usize = 32;
const RING_PACKED: usize = 34;

/// Boots guests with these device options, checks that each negotiated what its options ask for, and exchanges payload.
fn exchange(a: (&str, &[(usize, bool)]), b: (&str, &[(usize, bool)])) -> Result<()> {
    scenario(|s| {
        let pair = Pair::boot(s, |name, nic| nic.options(if name == "a" { a.0 } else { b.0 }), |_, guest| guest)?;
        let check = |guest: &Guest, (options, expected): (&str, &[(usize, bool)])| {
            expected.iter().try_for_each(|&(bit, on)| {
                assert_eq!(guest.negotiated(bit)?, on, "feature bit {bit} with {options}");
                Ok(())
            })
        };
        check(&pair.a, a)?;
        check(&pair.b, b)?;
        pair.exchange(BYTES)?;
        pair.balanced()
    })
}

#[test]
fn default_rings() -> Result<()> {
    exchange(
        ("", &[(MRG_RXBUF, true), (EVENT_IDX, true), (VERSION_1, true)]),
        ("indirect_desc=off", &[(INDIRECT_DESC, false)]),
    )
}

#[test]
fn legacy_device_with_its_10_byte_header_and_modern_one_without_mergeable_buffers() -> Result<()> {
    let legacy = "disable-legacy=off,disable-modern=on,mrg_rxbuf=off";
    exchange(
        (legacy, &[(VERSION_1, false), (MRG_RXBUF, false)]),
        ("mrg_rxbuf=off", &[(VERSION_1, true), (MRG_RXBUF, false)]),
    )
}

#[test]
fn in_order_offered_and_no_event_index() -> Result<()> {
    // Linux drivers before 6.18 leave the offer alone; DPDK's virtio-user takes it.
    exchange(("in_order=on", &[]), ("event_idx=off", &[(EVENT_IDX, false)]))
}

#[test]
fn packed_rings_with_and_without_event_index() -> Result<()> {
    exchange(
        ("packed=on", &[(RING_PACKED, true)]),
        ("packed=on,event_idx=off", &[(RING_PACKED, true), (EVENT_IDX, false)]),
    )
}

#[test]
fn a_packed_ring_without_mergeable_buffers_and_a_split_one() -> Result<()> {
    exchange(
        ("packed=on,in_order=on,mrg_rxbuf=off", &[(RING_PACKED, true), (MRG_RXBUF, false)]),
        ("indirect_desc=off", &[(RING_PACKED, false)]),
    )
}

#[test]
fn queue_pairs_change_under_traffic() -> Result<()> {
    queue_pairs_change("")
}

#[test]
fn queue_pairs_of_packed_rings_change_under_traffic() -> Result<()> {
    queue_pairs_change("packed=on")
}

fn queue_pairs_change(options: &str) -> Result<()> {
    scenario(|s| {
        let queues = |name: &str| if name == "a" { 4 } else { 2 };
        let pair = Pair::boot(s, |name, nic| nic.queues(queues(name)).options(options), |_, guest| guest.cpus(2))?;
        let flows = pair.flows()?;
        for (a, b) in [(4, 2), (1, 1), (2, 2), (4, 1), (3, 2)] {
            pair.a.sh(&format!("ethtool -L eth0 combined {a}"))?;
            pair.b.sh(&format!("ethtool -L eth0 combined {b}"))?;
            advance_all(&flows, BYTES / 8)?;
        }
        finish_all(flows, BYTES / 8)?;
        pair.ping()?;
        pair.balanced()
    })
}

//! What guests and their QEMU do to a running device: stop, lose their link, change drivers, reboot, plug memory.

use qemu_tests::traffic::{Machine, advance_all, finish_all};
use qemu_tests::wait::{self, STEP};
use qemu_tests::{Flow, Guest, Pair, Result, scenario};
use serde_json::json;

const BYTES: u64 = 1 << 18;

fn advance(flows: &[Flow<'_>]) -> Result<()> {
    advance_all(flows, BYTES)
}

#[test]
fn streams_survive_stop_link_loss_and_a_new_driver() -> Result<()> {
    scenario(|s| {
        let pair = Pair::plain(s)?;
        let flows = pair.flows()?;
        advance(&flows)?;

        for _ in 0..3 {
            pair.a.qmp("stop", json!({}))?;
            pair.b.sh("sleep 0.3")?;
            pair.a.qmp("cont", json!({}))?;
            advance(&flows)?;
        }
        for _ in 0..3 {
            pair.a.qmp("set_link", json!({ "name": "net1", "up": false }))?;
            wait::until_true("the guest to lose its carrier", STEP, || Ok(!pair.a.carrier()?))?;
            pair.a.qmp("set_link", json!({ "name": "net1", "up": true }))?;
            wait::until_true("the guest to see its carrier", STEP, || pair.a.carrier())?;
            advance(&flows)?;
        }
        for _ in 0..3 {
            pair.a.rebind_driver()?;
            advance(&flows)?;
        }
        finish_all(flows, BYTES)?;
        pair.balanced()
    })
}

#[test]
fn a_guest_reboots_under_traffic() -> Result<()> {
    scenario(|s| {
        let pair = Pair::boot(s, |_, nic| nic, |_, guest| guest.reboots())?;
        for _ in 0..3 {
            // Replies may stay away; the point is frames towards a ring that is being reset.
            let _noise = pair.b.start("ping -q -i 0.002 -s 1400 -c 100000 10.9.0.1")?;
            pair.a.reset()?;
            pair.b.sh("killall ping")?;
            pair.ping()?;
        }
        pair.exchange(BYTES)?;
        pair.balanced()
    })
}

/// Memory in MiB that the guest's kernel uses.
fn memory(guest: &Guest) -> Result<u64> {
    let kib = guest.sh("awk '/^MemTotal/ { print $2 }' /proc/meminfo")?;
    Ok(kib.trim().parse().unwrap_or(0) / 1024)
}

#[test]
fn memory_is_plugged_and_unplugged_under_traffic() -> Result<()> {
    scenario(|s| {
        let pair = Pair::boot(s, |_, nic| nic, |_, guest| guest.dimm_slots(4))?;
        // Movable memory is the kind that a guest can give back.
        pair.a.sh("echo online_movable > /sys/devices/system/memory/auto_online_blocks")?;
        let before = memory(&pair.a)?;
        let flows = pair.flows()?;
        for round in 0..2 {
            let (dimm, backend) = (format!("dimm{round}"), format!("memory{round}"));
            let backing =
                json!({ "qom-type": "memory-backend-memfd", "id": backend, "size": 256 << 20, "share": true });
            pair.a.qmp("object-add", backing)?;
            pair.a.qmp("device_add", json!({ "driver": "pc-dimm", "id": dimm, "memdev": backend }))?;
            wait::until_true("the guest to use its new memory", STEP, || Ok(memory(&pair.a)? >= before + 250))?;
            advance(&flows)?;

            pair.a.qmp("device_del", json!({ "id": dimm }))?;
            pair.a.with_qmp(|qmp| qmp.wait_event("DEVICE_DELETED", STEP))?;
            pair.a.qmp("object-del", json!({ "id": backend }))?;
            assert!(memory(&pair.a)? < before + 250);
            advance(&flows)?;
        }
        finish_all(flows, BYTES)?;
        pair.balanced()
    })
}

/// What a balloon takes are holes in the memory file, page by page, which the switch has mapped and is at work in the rest of.
#[test]
fn a_balloon_takes_and_gives_memory_under_traffic() -> Result<()> {
    scenario(|s| {
        let pair = Pair::boot(s, |_, nic| nic, |_, guest| guest.balloon())?;
        pair.a.sh("modprobe virtio_balloon")?;
        let flows = pair.flows()?;
        for mib in [200u64, 256, 180, 256] {
            pair.a.qmp("balloon", json!({ "value": mib << 20 }))?;
            wait::until_true("the balloon to take and give what was asked", STEP, || {
                let is = pair.a.qmp("query-balloon", json!({}))?;
                Ok(is["actual"].as_u64() == Some(mib << 20))
            })?;
            advance(&flows)?;
        }
        finish_all(flows, BYTES)?;
        pair.balanced()
    })
}

//! The VMM's half of a virtio-net device: which vhost-user messages are sent when, and in which order, by QEMU 7.2,
//! QEMU 10, DPDK's virtio-user and cloud-hypervisor. The orders were recorded from those programs.
//!
//! A [`Vmm`] knows the rings only by their addresses and eventfds; what is in them is the driver's.

use std::io;
use std::sync::Arc;

use super::doorbell::Doorbell;
use super::queue::Queue;
use super::ram::{GuestRam, Region};
use super::ring::Ring;
use super::session::{Session, feature, protocol, request};

/// Whose message orders to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Qemu72,
    Qemu10,
    Dpdk,
    CloudHypervisor,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Qemu72, Kind::Qemu10, Kind::Dpdk, Kind::CloudHypervisor];

    /// Protocol features that this front end can use.
    fn protocol_features(self) -> u64 {
        use protocol::*;
        match self {
            Kind::Qemu72 | Kind::Qemu10 => MQ | LOG_SHMFD | RARP | REPLY_ACK | NET_MTU | CONFIGURE_MEM_SLOTS,
            Kind::Dpdk => MQ | REPLY_ACK,
            Kind::CloudHypervisor => MQ | REPLY_ACK | CONFIGURE_MEM_SLOTS,
        }
    }

    /// Whether it asks for an acknowledgement of `request`, given REPLY_ACK.
    fn wants_ack(self, request: u32) -> bool {
        use request::*;
        match self {
            Kind::CloudHypervisor => true,
            Kind::Qemu10 if request == SET_VRING_ENABLE => true,
            _ => matches!(request, SET_MEM_TABLE | ADD_MEM_REG | REM_MEM_REG | NET_SET_MTU),
        }
    }

    fn is_qemu(self) -> bool {
        matches!(self, Kind::Qemu72 | Kind::Qemu10)
    }
}

/// One ring as the VMM knows it.
#[derive(Clone)]
pub struct Vring {
    pub ring: Ring,
    pub kick: Doorbell,
    pub call: Doorbell,
    /// Where it goes on at the next start.
    pub base: u16,
}

/// A device that is, or will be, connected to a back end.
pub struct Vmm {
    pub kind: Kind,
    pub session: Session,
    pub ram: Arc<GuestRam>,
    /// RX and TX of each pair, by ring index.
    pub vrings: Vec<Vring>,
    /// Virtio features that the guest acked.
    pub features: u64,
    /// What the back end offered, protocol features as negotiated.
    pub offered: u64,
    pub protocol: u64,
    /// The device's `host_mtu`, sent at every start if the guest acked MTU.
    pub mtu: Option<u16>,
    /// Pairs that the guest has enabled through its control queue.
    pub enabled_pairs: usize,
    /// Error eventfds by ring, which QEMU hands over when it creates the device.
    pub errs: Vec<Doorbell>,
    /// The memory table that the back end has, by CONFIGURE_MEM_SLOTS.
    slots: Vec<Region>,
}

impl Vmm {
    /// Negotiates over a fresh connection: `want` is what the guest would ack, `mask` what the VMM lets through of the
    /// protocol features. `pairs` are announced in advance, because QEMU walks over them here already.
    pub fn create(
        kind: Kind,
        session: Session,
        ram: Arc<GuestRam>,
        pairs: usize,
        want: u64,
        mask: u64,
    ) -> io::Result<Self> {
        let mut vmm = Self {
            kind,
            session,
            ram,
            vrings: Vec::new(),
            features: 0,
            offered: 0,
            protocol: 0,
            mtu: None,
            enabled_pairs: 1,
            errs: (0..2 * pairs).map(|_| Doorbell::new()).collect(),
            slots: Vec::new(),
        };
        match kind {
            Kind::Qemu72 | Kind::Qemu10 => vmm.create_qemu(pairs, mask)?,
            Kind::Dpdk | Kind::CloudHypervisor => vmm.create_owner_first(mask)?,
        }
        // Bit 30 is the VMM's own; the rest is the guest's choice.
        vmm.features = vmm.offered & (want | feature::PROTOCOL_FEATURES);
        Ok(vmm)
    }

    /// QEMU opens each pair as a device of its own; pair 0 asks for the limits and claims the session.
    fn create_qemu(&mut self, pairs: usize, mask: u64) -> io::Result<()> {
        let masked_call = Doorbell::new();
        for pair in 0..pairs {
            self.offered = self.session.get_features()?;
            if self.offered & feature::PROTOCOL_FEATURES != 0 {
                self.protocol = self.session.get_protocol_features()? & self.kind.protocol_features() & mask;
                self.session.set_protocol_features(self.protocol)?;
                if pair == 0 && self.has(protocol::MQ) {
                    self.check_queue_num(pairs)?;
                }
                if self.has(protocol::CONFIGURE_MEM_SLOTS) {
                    self.session.ask_u64(request::GET_MAX_MEM_SLOTS)?;
                }
            }
            if pair == 0 {
                self.session.set_owner(false)?;
            }
            self.session.get_features()?;
            for index in [2 * pair as u32, 2 * pair as u32 + 1] {
                self.session.set_vring_call(index, &masked_call, false)?;
                self.session.set_vring_err(index, &self.errs[index as usize], false)?;
            }
        }
        Ok(())
    }

    fn create_owner_first(&mut self, mask: u64) -> io::Result<()> {
        self.session.set_owner(false)?;
        self.offered = self.session.get_features()?;
        if self.offered & feature::PROTOCOL_FEATURES != 0 {
            self.protocol = self.session.get_protocol_features()? & self.kind.protocol_features() & mask;
            self.session.set_protocol_features(self.protocol)?;
            if self.has(protocol::MQ) {
                self.session.ask_u64(request::GET_QUEUE_NUM)?;
            }
        }
        Ok(())
    }

    fn check_queue_num(&self, pairs: usize) -> io::Result<()> {
        let most = self.session.ask_u64(request::GET_QUEUE_NUM)?;
        if most < pairs as u64 {
            return Err(io::Error::other(format!("the back end has {most} queues, {pairs} pairs are wanted")));
        }
        Ok(())
    }

    fn has(&self, bit: u64) -> bool {
        self.protocol & bit != 0
    }

    fn ack(&self, request: u32) -> bool {
        self.kind.wants_ack(request)
    }

    /// QEMU only: the device is realized (pair 0 enabled before any SET_FEATURES), then the guest's driver resets and
    /// probes it, which enables pair 0 again and again.
    pub fn probe(&self) -> io::Result<()> {
        if self.kind.is_qemu() {
            for _ in 0..3 {
                self.enable_rings(1)?;
            }
        }
        Ok(())
    }

    /// The guest sets DRIVER_OK, or the VM goes on: features, memory and rings, then the enabled pairs.
    pub fn start(&mut self) -> io::Result<()> {
        match self.kind {
            Kind::Qemu72 | Kind::Qemu10 => self.start_qemu(),
            Kind::Dpdk => self.start_dpdk(),
            Kind::CloudHypervisor => self.start_cloud_hypervisor(),
        }
    }

    fn start_qemu(&mut self) -> io::Result<()> {
        if let Some(mtu) = self.mtu.filter(|_| self.features & feature::MTU != 0 && self.has(protocol::NET_MTU)) {
            self.session.net_set_mtu(mtu.into(), self.ack(request::NET_SET_MTU))?;
        }
        for pair in 0..self.vrings.len() / 2 {
            if pair < self.enabled_pairs {
                self.enable_ring(2 * pair, true)?;
                self.enable_ring(2 * pair + 1, true)?;
            }
            self.session.set_features(self.features, false)?;
            // 7.2 repeats ADD_MEM_REG for every pair; 10 knows that memory is the session's.
            if pair == 0 || (self.kind == Kind::Qemu72 && self.has(protocol::CONFIGURE_MEM_SLOTS)) {
                self.send_memory(pair > 0)?;
            }
            for index in [2 * pair, 2 * pair + 1] {
                self.start_ring(index)?;
            }
        }
        self.enable_rings(self.enabled_pairs)
    }

    /// NUM, BASE, ADDR, KICK, CALL: QEMU's order.
    pub fn start_ring(&self, index: usize) -> io::Result<()> {
        let Vring { ring, kick, call, base, .. } = &self.vrings[index];
        let index = index as u32;
        self.session.set_vring_num(index, ring.size.into(), false)?;
        // QEMU has a half for each direction of a packed ring, and nothing in the second one for a split ring.
        let both = if self.is_packed() { u32::from(*base) << 16 } else { 0 };
        self.session.set_vring_base(index, both | u32::from(*base), false)?;
        self.session.set_vring_addr(index, ring, false)?;
        self.session.set_vring_kick(index, kick, false)?;
        self.session.set_vring_call(index, call, false)
    }

    /// DPDK goes over all RX rings before all TX rings, and enables pair 0 first.
    fn start_dpdk(&mut self) -> io::Result<()> {
        let order = self.rx_then_tx();
        for &index in &order {
            self.session.set_vring_call(index as u32, &self.vrings[index].call, false)?;
        }
        self.session.set_features(self.features, false)?;
        self.send_memory(false)?;
        for &index in &order {
            let Vring { ring, kick, base, .. } = &self.vrings[index];
            let index = index as u32;
            self.session.set_vring_num(index, ring.size.into(), false)?;
            self.session.set_vring_base(index, (*base).into(), false)?;
            self.session.set_vring_addr(index, ring, false)?;
            self.session.set_vring_kick(index, kick, false)?;
        }
        self.enable_rings(1)?;
        self.enable_rings(self.enabled_pairs)
    }

    fn rx_then_tx(&self) -> Vec<usize> {
        let rings = 0..self.vrings.len();
        rings.clone().step_by(2).chain(rings.skip(1).step_by(2)).collect()
    }

    /// cloud-hypervisor sets all sizes first, BASE after ADDR, and wants every message acknowledged.
    fn start_cloud_hypervisor(&mut self) -> io::Result<()> {
        self.session.set_features(self.features, true)?;
        self.send_memory(false)?;
        for (index, vring) in self.vrings.iter().enumerate() {
            self.session.set_vring_num(index as u32, vring.ring.size.into(), true)?;
        }
        for (index, Vring { ring, kick, call, base, .. }) in self.vrings.iter().enumerate() {
            let index = index as u32;
            self.session.set_vring_addr(index, ring, true)?;
            self.session.set_vring_base(index, (*base).into(), true)?;
            self.session.set_vring_call(index, call, true)?;
            self.session.set_vring_kick(index, kick, true)?;
        }
        self.enable_rings(self.enabled_pairs)
    }

    /// The whole table, or the slots that the back end lacks; `again` repeats slots that it has.
    pub fn send_memory(&mut self, again: bool) -> io::Result<()> {
        let regions = self.ram.regions();
        if !self.has(protocol::CONFIGURE_MEM_SLOTS) || !self.kind.is_qemu() {
            return self.session.set_mem_table(&regions, self.ack(request::SET_MEM_TABLE));
        }
        for region in regions {
            let known = self.slots.iter().any(|slot| slot.gpa == region.gpa);
            if again || !known {
                self.session.add_mem_reg(&region, self.ack(request::ADD_MEM_REG))?;
            }
            if !known {
                self.slots.push(region);
            }
        }
        Ok(())
    }

    /// Stops every ring and keeps its index; the VM is paused, its link is down, or its driver is gone.
    pub fn stop(&mut self) -> io::Result<()> {
        if self.kind == Kind::CloudHypervisor || self.kind == Kind::Dpdk {
            self.enable_rings(0)?;
        }
        for index in 0..self.vrings.len() {
            let base = self.session.get_vring_base(index as u32)?;
            if self.is_packed() {
                assert_eq!(base >> 16, base & 0xffff, "ring {index} has used all that it has taken");
            }
            self.vrings[index].base = base as u16;
        }
        Ok(())
    }

    /// The guest reboots or its driver is unbound: rings stopped, pair 0 enabled as after a reset. No RESET_OWNER.
    pub fn reset(&mut self) -> io::Result<()> {
        self.stop()?;
        self.enabled_pairs = 1;
        self.begin_anew();
        if self.kind.is_qemu() { self.enable_rings(1) } else { Ok(()) }
    }

    /// Has every ring begin where a new one of its form does.
    pub fn begin_anew(&mut self) {
        let base = Queue::first_base(self.features);
        self.vrings.iter_mut().for_each(|vring| vring.base = base);
    }

    fn is_packed(&self) -> bool {
        self.features & feature::RING_PACKED != 0
    }

    /// Returns when the back end has handled everything sent before: a question, because not every message of every
    /// front end is acknowledged.
    pub fn settle(&self) -> io::Result<()> {
        self.session.get_features().map(|_| ())
    }

    /// `ethtool -L combined PAIRS`: nothing but SET_VRING_ENABLE for every ring.
    pub fn set_pairs(&mut self, pairs: usize) -> io::Result<()> {
        self.enabled_pairs = pairs;
        self.enable_rings(pairs)
    }

    fn enable_rings(&self, pairs: usize) -> io::Result<()> {
        // Before the rings exist, QEMU already knows how many it will have; pair 0 is always there.
        for index in 0..self.vrings.len().max(2) {
            self.enable_ring(index, index / 2 < pairs)?;
        }
        Ok(())
    }

    fn enable_ring(&self, index: usize, on: bool) -> io::Result<()> {
        self.session.set_vring_enable(index as u32, on, self.ack(request::SET_VRING_ENABLE))?;
        if self.kind == Kind::Qemu10 && !self.has(protocol::REPLY_ACK) {
            // Its barrier when it cannot have an acknowledgement.
            self.session.get_features()?;
        }
        Ok(())
    }

    /// Memory hot-plug while the rings run. 7.2 tells it once per pair.
    pub fn plug(&mut self, region: Region) -> io::Result<()> {
        self.ram.plug(region);
        self.send_memory(false)?;
        if self.kind == Kind::Qemu72 && self.has(protocol::CONFIGURE_MEM_SLOTS) {
            for _ in 1..self.vrings.len() / 2 {
                let added = self.slots.last().expect("the region just sent");
                self.session.add_mem_reg(added, self.ack(request::ADD_MEM_REG))?;
            }
        }
        Ok(())
    }

    /// Memory unplug: after the acknowledgement the region is gone from here too.
    pub fn unplug(&mut self, gpa: u64) -> io::Result<()> {
        if !self.has(protocol::CONFIGURE_MEM_SLOTS) || !self.kind.is_qemu() {
            self.ram.unplug(gpa);
            return self.session.set_mem_table(&self.ram.regions(), self.ack(request::SET_MEM_TABLE));
        }
        let at = self.slots.iter().position(|slot| slot.gpa == gpa).expect("a slot at this address");
        let slot = self.slots.remove(at);
        let times = if self.kind == Kind::Qemu72 { self.vrings.len() / 2 } else { 1 };
        for _ in 0..times {
            self.session.rem_mem_reg(&slot, self.ack(request::REM_MEM_REG))?;
        }
        self.ram.unplug(gpa);
        Ok(())
    }
}

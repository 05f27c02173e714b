//! Live migration: a guest moves from one port to another under load, and not one byte is wrong.
//!
//! Every scenario prints how long the migration and the longest gap between replies took; nothing judges that.

use qemu_tests::agent::Job;
use qemu_tests::migration::{Destination, Pace, Summary};
use qemu_tests::nic::Mode;
use qemu_tests::traffic::{Machine, advance_all, checksum_errors, finish_all, ping_both};
use qemu_tests::wait::{self, STEP};
use qemu_tests::{Config, Daemon, Flow, Guest, Netns, Nic, Pings, Result, Scenario, scenario};

/// Payload per stream before and after each thing that happens.
const BYTES: u64 = 1 << 18;

/// The guest that moves, the one that stays, and the switch: ports `a`, `away` and `b`.
struct Stage {
    a: Guest,
    b: Guest,
    daemon: Daemon,
}

impl Stage {
    fn set(s: &Scenario, queues: u16, options: &str) -> Result<Stage> {
        let config = Config::new(s.dir()).vnic("a", Mode::Server, queues).vnic("away", Mode::Server, queues);
        let daemon = s.daemon(&config.vnic("b", Mode::Server, 1).yaml())?;
        let nic = Nic::new(&s.path("a.sock")).queues(queues).options(options);
        let [a, b] = s.boot([
            Guest::named("a").nic(nic).cpus(queues.min(2) as u8).reboots().address("10.9.0.1/24"),
            Guest::named("b").nic(Nic::new(&s.path("b.sock"))).address("10.9.0.2/24"),
        ])?;
        if queues > 1 {
            a.sh(&format!("ethtool -L eth0 combined {queues}"))?;
        }
        ping_both(&a, &b)?;
        Ok(Stage { a, b, daemon })
    }

    /// Checks on which port the switch knows the guest that moves.
    fn wait_at(&self, port: &str) -> Result<()> {
        wait::until_true(&format!("the guest to be known on port {port}"), STEP, || {
            Ok(port_of(&self.daemon, &Nic::default_mac("a", 1))? == port)
        })
    }

    /// Starts moving the guest, so slowly that it does not arrive, and waits until all of its memory was sent once.
    fn start_moving(&self, destination: &Destination) -> Result<()> {
        self.a.send_state(destination.uri(), Pace::TRICKLE)?;
        self.a.migration_rounds(1)
    }

    /// Has the guest that moves arrive.
    fn arrive(&self, destination: Destination) -> Result<()> {
        self.a.pace_migration(Pace::FULL)?;
        self.a.migration_ended("completed")?;
        self.a.arrive(destination)
    }

    fn balanced(&self) -> Result<()> {
        self.daemon.balanced(&["a", "away", "b"])
    }
}

fn port_of(daemon: &Daemon, mac: &str) -> Result<String> {
    let stations = daemon.json(&["fdb", "list"])?;
    let station = stations.as_array().into_iter().flatten().find(|station| station["mac"] == mac);
    Ok(station.and_then(|station| station["port"].as_str()).unwrap_or_default().to_owned())
}

/// A scenario that begins with the stage set.
fn on_stage(queues: u16, options: &str, act: impl FnOnce(&Scenario, Stage) -> Result<()>) -> Result<()> {
    scenario(|s| act(s, Stage::set(s, queues, options)?))
}

/// TCP and UDP streams in both directions that have begun to flow.
fn flowing<'m>(a: &'m dyn Machine, b: &'m dyn Machine) -> Result<Vec<Flow<'m>>> {
    let flows = Flow::all(a, b)?;
    advance(&flows)?;
    Ok(flows)
}

fn advance(flows: &[Flow<'_>]) -> Result<()> {
    advance_all(flows, BYTES)
}

/// Moves a guest to `destination` while `peer` pings it, sees the streams flow on, and reports it as `what`.
fn move_pinged(a: &Guest, destination: Destination, peer: &dyn Machine, flows: &[Flow<'_>], what: &str) -> Result<()> {
    let pings = Pings::start(peer, a)?;
    let summary = a.migrate(destination)?;
    advance(flows)?;
    let (Summary { total, downtime, mib, rounds }, replies) = (summary, pings.finish()?);
    println!(
        "{what}: {total:?}, {mib} MiB in {rounds} rounds, guest stopped for {downtime:?}; \
         {} of {} pings answered, longest gap {:?}",
        replies.received, replies.sent, replies.gap
    );
    Ok(())
}

/// There and back, with TCP, UDP and pings in both directions.
fn moves_under_load(queues: u16, options: &str) -> Result<()> {
    on_stage(queues, options, |s, stage| {
        let flows = flowing(&stage.a, &stage.b)?;
        for (round, port) in ["away", "a"].into_iter().enumerate() {
            let destination = stage.a.destination(s, &format!("a-{round}"), &[port])?;
            move_pinged(&stage.a, destination, &stage.b, &flows, &format!("{queues} queue pairs {options} to {port}"))?;
            stage.wait_at(port)?;
        }
        finish_all(flows, BYTES)?;
        ping_both(&stage.a, &stage.b)?;
        stage.balanced()
    })
}

#[test]
fn streams_survive_with_one_queue_pair() -> Result<()> {
    moves_under_load(1, "")
}

#[test]
fn streams_survive_with_two_queue_pairs() -> Result<()> {
    moves_under_load(2, "")
}

#[test]
fn streams_survive_with_four_queue_pairs() -> Result<()> {
    moves_under_load(4, "")
}

#[test]
fn streams_survive_with_a_packed_ring() -> Result<()> {
    moves_under_load(1, "packed=on")
}

#[test]
fn streams_survive_with_four_packed_queue_pairs() -> Result<()> {
    moves_under_load(4, "packed=on")
}

/// A guest that does not merge buffers gives the switch pieces of 64 KiB each, whatever is put into them.
#[test]
fn streams_survive_with_a_packed_ring_without_mergeable_buffers() -> Result<()> {
    moves_under_load(1, "packed=on,mrg_rxbuf=off")
}

#[test]
fn what_lies_unread_in_receive_buffers_moves_too() -> Result<()> {
    unread_bytes_move("")
}

#[test]
fn what_lies_unread_in_the_buffers_of_a_packed_ring_moves_too() -> Result<()> {
    unread_bytes_move("packed=on")
}

/// What the switch writes into a guest's memory is seen by QEMU only through the dirty log. Here it writes pages that were
/// sent long ago, and no CPU of the guest touches them before it runs at the destination.
fn unread_bytes_move(options: &str) -> Result<()> {
    on_stage(1, options, |s, stage| {
        for (round, port) in ["away", "a"].into_iter().enumerate() {
            let destination = stage.a.destination(s, &format!("a-{round}"), &[port])?;
            // So much is written meanwhile that the second round leaves time to slow down.
            let mill = stage.a.start("while [ ! -e /tmp/enough ]; do head -c 16000000 /dev/zero >/tmp/grist; done")?;
            stage.a.send_state(destination.uri(), Pace::BRISK)?;
            stage.a.migration_rounds(2)?;
            stage.a.pace_migration(Pace::TRICKLE)?;
            stage.a.sh("touch /tmp/enough")?;
            mill.output(STEP)?;
            stage.a.sh("rm /tmp/enough /tmp/grist")?;
            let flows = [Flow::held("tcp", &stage.b, &stage.a)?, Flow::held("udp", &stage.b, &stage.a)?];
            for flow in &flows {
                wait::until_true("bytes to lie in the guest", STEP, || Ok(flow.waiting()? > 2 * BYTES))?;
            }
            stage.arrive(destination)?;
            flows.iter().try_for_each(Flow::release)?;
            finish_all(flows.into(), BYTES)?;
            // A wrong byte that the guest's own checksum finds is lost, not corrupt: it must not come to that.
            assert_eq!(checksum_errors(&stage.a)?, 0);
        }
        stage.balanced()
    })
}

#[test]
fn a_cancelled_migration_can_be_tried_again() -> Result<()> {
    on_stage(2, "", |s, stage| {
        let flows = flowing(&stage.a, &stage.b)?;
        for round in 0..3 {
            let destination = stage.a.destination(s, &format!("no-{round}"), &["away"])?;
            destination.may_end();
            stage.start_moving(&destination)?;
            advance(&flows)?;
            assert_eq!(port_of(&stage.daemon, &Nic::default_mac("a", 1))?, "a", "nobody has announced anything");
            stage.a.cancel_migration()?;
            stage.a.migration_ended("cancelled")?;
            destination.kill();
            advance(&flows)?;
        }
        let destination = stage.a.destination(s, "yes", &["away"])?;
        move_pinged(&stage.a, destination, &stage.b, &flows, "after three that were cancelled")?;
        finish_all(flows, BYTES)?;
        stage.balanced()
    })
}

#[test]
fn the_source_goes_on_when_its_destination_fails() -> Result<()> {
    on_stage(2, "", |s, stage| {
        let flows = flowing(&stage.a, &stage.b)?;

        let dies = stage.a.destination(s, "dies", &["away"])?;
        stage.start_moving(&dies)?;
        dies.kill();
        stage.a.migration_ended("failed")?;
        advance(&flows)?;

        // Takes all memory, then finds a NIC whose state it cannot load: the source has stopped by then, and starts again.
        let other = stage.a.destination_like(s, "refuses", &["away"], |nic| nic.options("mrg_rxbuf=off"))?;
        other.may_end();
        stage.a.send_state(other.uri(), Pace::FULL)?;
        stage.a.migration_ended("failed")?;
        other.kill();
        advance(&flows)?;

        let works = stage.a.destination(s, "works", &["away"])?;
        move_pinged(&stage.a, works, &stage.b, &flows, "after two that failed")?;
        finish_all(flows, BYTES)?;
        stage.balanced()
    })
}

#[test]
fn a_guest_reboots_while_it_moves() -> Result<()> {
    on_stage(2, "", |s, stage| {
        let destination = stage.a.destination(s, "a-0", &["away"])?;
        stage.start_moving(&destination)?;
        stage.a.reset()?;
        ping_both(&stage.a, &stage.b)?;
        let flows = flowing(&stage.a, &stage.b)?;
        stage.arrive(destination)?;
        finish_all(flows, BYTES)?;
        stage.balanced()
    })
}

#[test]
fn the_daemon_restarts_while_a_guest_moves() -> Result<()> {
    on_stage(2, "", |s, mut stage| {
        let flows = flowing(&stage.a, &stage.b)?;
        let destination = stage.a.destination(s, "a-0", &["away"])?;
        stage.start_moving(&destination)?;
        stage.daemon.kill();
        stage.daemon.restart()?;
        advance(&flows)?;
        stage.arrive(destination)?;
        finish_all(flows, BYTES)?;
        stage.balanced()
    })
}

#[test]
fn a_guest_is_saved_to_a_file_and_restored() -> Result<()> {
    on_stage(2, "", |s, stage| {
        let file = s.path("saved").display().to_string();
        let flows = flowing(&stage.a, &stage.b)?;
        let to_file = format!("file:{file}");
        stage.a.save_and_restore(s, "a-0", &["a"], &to_file, &to_file)?;
        advance(&flows)?;
        stage.a.save_and_restore(s, "a-1", &["a"], &format!("exec:cat >{file}"), &format!("exec:cat {file}"))?;
        finish_all(flows, BYTES)?;
        stage.balanced()
    })
}

/// A host of its own for one daemon: files in `NAME/`, a vNIC `a` and a TAP interface `NAME` on the bridge.
fn host(s: &Scenario, wire: &Netns, name: &str) -> Result<Daemon> {
    let dir = s.path(name);
    std::fs::create_dir(&dir).map_err(qemu_tests::Error::io("create a directory"))?;
    let daemon =
        Daemon::start(&dir, &Config::new(&dir).vnic("a", Mode::Server, 1).tap("wire", name).yaml(), Some(wire))?;
    wait::until_true("the TAP interface", STEP, || Ok(wire.sh(&format!("test -e /sys/class/net/{name}")).is_ok()))?;
    wire.sh(&format!("ip link set {name} master wire up"))?;
    Ok(daemon)
}

/// Ends with the first frame that comes out of a TAP interface and is what a filter asks for.
struct Heard(Job);

impl Heard {
    /// Returns once every further frame will be seen. Only what comes *from* the daemon counts: the bridge sends a frame of
    /// the same kind the other way if it was heard on another port.
    fn start(s: &Scenario, wire: &Netns, interface: &str, filter: &str) -> Result<Self> {
        let said = s.path(&format!("tcpdump-{interface}"));
        let job =
            wire.start(&format!("exec tcpdump -Q in -i {interface} -n -e -l -c 1 {filter} 2>'{}'", said.display()))?;
        wait::until_true("tcpdump to listen", STEP, || {
            Ok(std::fs::read_to_string(&said).is_ok_and(|text| text.contains("listening on")))
        })?;
        Ok(Self(job))
    }
}

/// Two daemons, as on two hosts, whose uplinks meet in the kernel's bridge; the bridge has to learn of the move.
fn moves_between_hosts(s: &Scenario, options: &str, announcement: &str) -> Result<()> {
    let mac = Nic::default_mac("a", 1);
    let wire = s.netns("wire")?;
    wire.sh("ip link add wire type bridge")?;
    wire.configure("wire", "10.9.0.9/24")?;
    let (_here, _there) = (host(s, &wire, "here")?, host(s, &wire, "there")?);
    let nic = Nic::new(&s.path("here/a.sock")).options(options);
    let [a] = s.boot([Guest::named("a").nic(nic).address("10.9.0.1/24")])?;
    ping_both(&a, &wire)?;
    let flows = flowing(&a, &wire)?;
    for (round, name) in ["there", "here"].into_iter().enumerate() {
        let destination = a.destination(s, &format!("a-{round}"), &[&format!("{name}/a")])?;
        let heard = Heard::start(s, &wire, name, &format!("{announcement} and ether src {mac}"))?;
        move_pinged(&a, destination, &wire, &flows, &format!("to host {name} {options}"))?;
        heard.0.output(STEP)?;
    }
    finish_all(flows, BYTES)
}

#[test]
fn a_guest_announces_itself_on_another_host() -> Result<()> {
    scenario(|s| moves_between_hosts(s, "", "broadcast and arp"))
}

#[test]
fn a_guest_that_cannot_is_announced_by_the_switch() -> Result<()> {
    scenario(|s| moves_between_hosts(s, "guest_announce=off", "broadcast and rarp"))
}

//! Addresses that are seen at two ports: a guest that borrows another's, a pair of routers of which both are master, a guest
//! that connects two of its NICs. Whoever does nothing of that keeps his frames.

#![allow(clippy::unwrap_used)]

mod frontend;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use frontend::daemon::{Daemon, port, port_with, preamble};
use frontend::eventually;
use frontend::frame::{BROADCAST, frame};
use frontend::nic::{Nic, NicConfig, meet};
use serde_json::Value;

/// The virtual address of two routers (RFC 5798, 7.3).
const VIRTUAL: [u8; 6] = [0, 0, 0x5e, 0, 1, 0x0a];

fn up<const N: usize>(daemon: &Daemon, names: [&str; N]) -> [Nic; N] {
    names.map(|name| Nic::up(&daemon.socket(name), &NicConfig::default()))
}

/// Whether a frame with number `seed` from `from` reaches `to`, where `from` sends it to address `address` and has `source` for
/// its own. Other frames that come in are thrown away.
fn reaches(from: &mut Nic, source: [u8; 6], to: &mut Nic, address: [u8; 6], seed: u64) -> bool {
    let sent = frame(address, source, 100, seed);
    from.send(&sent);
    // Its buffer is given back when it has been delivered or dropped.
    from.drain();
    to.poll().iter().any(|(_, got)| got.frame == sent)
}

#[test]
fn a_guest_that_borrowed_an_address_does_not_keep_it() {
    let daemon = Daemon::with_ports(&["victim", "hostile", "c"]);
    let [mut victim, mut hostile, mut c] = up(&daemon, ["victim", "hostile", "c"]);
    meet(&mut victim, &mut c);
    meet(&mut hostile, &mut c);
    let address = victim.mac;
    // Four frames of five are the borrower's, and the last ones are.
    for n in 0..100 {
        let sender = if n % 5 == 0 { &mut victim } else { &mut hostile };
        sender.send(&frame(c.mac, address, 60, n));
        sender.drain();
        let _ = (c.poll(), hostile.poll(), victim.poll());
    }
    // The first frame of the victim's own is enough, and what the borrower still sends changes nothing.
    let source = c.mac;
    for n in 0..50 {
        assert!(reaches(&mut victim, address, &mut c, source, 1000 + n), "frame {n} of the victim");
        assert!(reaches(&mut c, source, &mut victim, address, 2000 + n), "frame {n} to the victim");
        hostile.send(&frame(c.mac, address, 60, n));
        hostile.drain();
    }
    let dropped = daemon.port_when("hostile", "what it borrowed is dropped", |port| port.drops("source-damped") >= 50);
    assert!(dropped.is_conserved());
    // Told with both ports, wherever an operator looks.
    let of =
        |record: &serde_json::Value| [&record["port"], &record["other-port"], &record["mac"]].map(|v| v.to_string());
    let text = address.map(|byte| format!("{byte:02x}")).join(":");
    let want = ["hostile", "victim", &text].map(|word| format!("{word:?}"));
    let damped = eventually("the conflict is told", || daemon.events("address-damped").pop());
    assert_eq!(of(&damped), want);
    assert!(daemon.log().contains(&format!("{text} is at ports victim and hostile in turn: it stays at victim")));
    for name in ["victim", "hostile"] {
        let conflict = &daemon.port(name).0["conflicts"][0];
        assert_eq!((&conflict["port"], &conflict["stays-at"]), (&"hostile".into(), &"victim".into()), "{name}");
    }
    let entry = &daemon.linecard(&["fdb", "list", "--mac", &text]).unwrap()[0];
    assert_eq!(
        (&entry["port"], &entry["damped"], &entry["also-at"][0]),
        (&"victim".into(), &true.into(), &"hostile".into())
    );
    let status = daemon.linecard(&["status"]).unwrap();
    assert_eq!((status["fdb"]["damped"].as_u64().unwrap() >= 50, status["loops"].as_array().unwrap().len()), (true, 0));
}

/// Both routers are master until the one that was there first is gone.
#[test]
fn an_address_is_free_when_its_port_goes_down() {
    let daemon = Daemon::with_ports(&["a", "b", "c"]);
    let [mut a, mut b, mut c] = up(&daemon, ["a", "b", "c"]);
    meet(&mut a, &mut c);
    meet(&mut b, &mut c);
    let advertise = |nic: &mut Nic, n| {
        nic.send(&frame(BROADCAST, VIRTUAL, 60, n));
        nic.drain();
    };
    for n in 0..20 {
        advertise(&mut a, n);
        advertise(&mut b, n);
        let _ = (a.poll(), b.poll(), c.poll());
    }
    let source = c.mac;
    assert!(reaches(&mut c, source, &mut a, VIRTUAL, 1), "a was there first");
    a.disconnect();
    drop(a);
    daemon.port_when("a", "a is gone", |port| port.state() == "down");
    let mut n = 100;
    eventually("the address is at b", || {
        n += 1;
        advertise(&mut b, n);
        reaches(&mut c, source, &mut b, VIRTUAL, n).then_some(())
    });
    // An address that is followed because its port is silent is damped on; one whose port is down begins anew.
    let entry = &daemon.linecard(&["fdb", "list", "--mac", "00:00:5e:00:01:0a"]).unwrap()[0];
    assert_eq!((&entry["port"], &entry["damped"]), (&"b".into(), &false.into()), "{entry}");
}

/// A guest that connects two of its NICs, as long as this is.
struct Bridge {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Bridge {
    fn between(mut x: Nic, mut y: Nic) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut carried = 0;
            while !stopped.load(Ordering::Relaxed) {
                let (from_x, from_y) = (x.poll(), y.poll());
                // What does not fit is dropped, as a guest's queue discipline does.
                carried += from_x.iter().filter(|(_, got)| y.pairs[0].tx.queue_frame(&got.frame)).count();
                carried += from_y.iter().filter(|(_, got)| x.pairs[0].tx.queue_frame(&got.frame)).count();
                y.pairs[0].tx.queue.publish();
                x.pairs[0].tx.queue.publish();
                if from_x.is_empty() && from_y.is_empty() {
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
            carried as u64
        });
        Self { stop, thread: Some(thread) }
    }

    /// Ends it; how many frames it carried.
    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

/// How many of `count` frames each way get lost.
fn lost(p: &mut Nic, q: &mut Nic, count: u64, seed: u64) -> u64 {
    let (at_p, at_q) = (p.mac, q.mac);
    let ways = |n| [reaches(p, at_p, q, at_q, seed + n), reaches(q, at_q, p, at_p, seed + 1000 + n)];
    (0..count).flat_map(ways).filter(|arrived| !arrived).take(50).count() as u64
}

fn loop_beside(p_and_q_are_pinned: bool) {
    let macs = ["02:13:00:00:00:01", "02:13:00:00:00:02"];
    let daemon = Daemon::start(|dir| {
        let mac = |number: usize| format!(", mac: \"{}\"", macs[number]);
        let port = |name: &str, more: &str| port_with(dir, name, "lan", "server", more);
        let [of_p, of_q] = [0, 1].map(|number| if p_and_q_are_pinned { mac(number) } else { String::new() });
        let bystanders = port("p", &of_p) + &port("q", &of_q) + &port("r", "");
        preamble(dir) + "networks: { lan: {} }\nports:\n" + &port("x", "") + &port("y", "") + &bystanders
    });
    let [mut x, mut y, mut p, mut q, mut r] = up(&daemon, ["x", "y", "p", "q", "r"]);
    (p.mac, q.mac) = ([2, 0x13, 0, 0, 0, 1], [2, 0x13, 0, 0, 0, 2]);
    meet(&mut p, &mut q);
    meet(&mut p, &mut r);
    meet(&mut x, &mut p);
    meet(&mut y, &mut p);
    let _ = (x.poll(), y.poll(), q.poll());
    assert_eq!(lost(&mut p, &mut q, 20, 1), 0);
    let bridge = Bridge::between(x, y);
    // Broadcasts of a third one, and of both themselves.
    let mut gone = 0;
    for round in 0..3u64 {
        let (from, mac) = match round {
            0 => (&mut r, None),
            1 => (&mut p, Some([2, 0x13, 0, 0, 0, 1])),
            _ => (&mut q, Some([2, 0x13, 0, 0, 0, 2])),
        };
        let source = mac.unwrap_or(from.mac);
        from.send(&frame(BROADCAST, source, 60, round));
        from.drain();
        gone += lost(&mut p, &mut q, 100, 10_000 * (round + 1));
        let _ = r.poll();
    }
    // Only while its address moves, five times within microseconds, does a bystander miss frames.
    let bound = if p_and_q_are_pinned { 0 } else { 10 };
    assert!(gone <= bound, "{gone} of 600 frames of bystanders were lost");
    let reason = if p_and_q_are_pinned { "source-pinned" } else { "source-damped" };
    for name in ["x", "y"] {
        daemon.port_when(name, "what the loop brings back is dropped", |port| port.drops(reason) > 0);
    }
    let suspected = eventually("the loop is told", || daemon.events("loop-suspected").pop());
    assert_eq!((&suspected["port"], &suspected["other-port"]), (&"x".into(), &"y".into()), "{suspected}");
    let pinned = daemon.events("address-pinned");
    assert_eq!(pinned.is_empty(), !p_and_q_are_pinned, "{pinned:?}");
    let status = daemon.linecard(&["status"]).unwrap();
    assert_eq!(status["loops"][0]["ports"], serde_json::json!(["x", "y"]));
    let carried = bridge.end();
    println!("the loop carried {carried} frames");
    assert!(carried < 1000, "the loop carried {carried} frames, of which most went round and round");
    assert_eq!(lost(&mut p, &mut q, 50, 90_000), 0, "after the loop");
}

#[test]
fn guests_beside_a_loop_keep_their_frames() {
    loop_beside(false);
}

#[test]
fn guests_with_configured_addresses_beside_a_loop_lose_nothing() {
    loop_beside(true);
}

/// Two guests that teach the switch all the addresses that their network may have, and go on: of a pair that comes afterwards
/// nobody else hears a frame, and none is held against what may be flooded. An operator sees who fills what.
#[test]
fn a_network_that_others_have_filled_learns_who_comes_afterwards() {
    let daemon = Daemon::start(|dir| {
        let more = ", limits: { macs: 600 }";
        let crowd: String = ["x", "y"].iter().map(|name| port_with(dir, name, "lan", "server", more)).collect();
        let rest: String = ["c", "p", "q"].iter().map(|name| port(dir, name, "lan")).collect();
        preamble(dir) + "networks: { lan: { mac-limit: 1000 } }\nports:\n" + &crowd + &rest
    });
    let [mut x, mut y, mut c] = up(&daemon, ["x", "y", "c"]);
    meet(&mut x, &mut c);
    meet(&mut y, &mut c);
    for n in 0..600u32 {
        for (nic, kind) in [(&mut x, 1), (&mut y, 2)] {
            let [.., high, low] = n.to_be_bytes();
            nic.send(&frame(c.mac, [2, 0x66, 0, kind, high, low], 60, n.into()));
            nic.drain();
        }
        let _ = c.poll();
    }
    let network = || daemon.linecard(&["network", "list"]).unwrap()[0].take();
    let full =
        eventually("the network is full", || Some(network()).filter(|lan| !lan["macs-refused"]["network"].is_null()));
    assert_eq!((&full["fdb-entries"], &full["mac-limit"]), (&1000.into(), &1000.into()), "{full}");

    let [mut p, mut q] = up(&daemon, ["p", "q"]);
    meet(&mut p, &mut q);
    let _ = (x.poll(), y.poll(), c.poll());
    let (at_p, at_q) = (p.mac, q.mac);
    for n in 0..500 {
        assert!(reaches(&mut p, at_p, &mut q, at_q, n), "frame {n} to q");
        assert!(reaches(&mut q, at_q, &mut p, at_p, 1000 + n), "frame {n} to p");
    }
    for (nic, name) in [(&mut x, "x"), (&mut y, "y"), (&mut c, "c")] {
        let of_pair = |bytes: &[u8]| [at_p, at_q].contains(&bytes[..6].try_into().unwrap());
        assert!(!nic.poll().iter().any(|(_, got)| of_pair(&got.frame)), "{name} hears what the pair says");
    }
    for name in ["p", "q"] {
        let port = daemon.port(name);
        assert_eq!((port.drops("storm-limited"), &port.0["macs"]), (0, &1.into()), "{name}: {}", port.0);
    }

    let told = eventually("it is told", || daemon.events("addresses-refused").pop());
    assert_eq!((&told["network"], &told["limit"], &told["most"]), (&"lan".into(), &"network".into(), &1000.into()));
    assert!(["x", "y"].map(Value::from).contains(&told["port"]) && told["count"].as_u64().unwrap() > 0, "{told}");
    assert!(daemon.log().contains("for the network has 1000, which is the limit"), "{}", daemon.log());
    let [of_x, of_y] = ["x", "y"].map(|name| daemon.port(name).0);
    assert_eq!(of_x["macs"].as_u64().unwrap() + of_y["macs"].as_u64().unwrap(), 999, "and c has one");
    assert_eq!((&of_x["mac-limit"], of_x["macs-refused"]["network"].as_u64() > Some(0)), (&600.into(), true), "{of_x}");
}

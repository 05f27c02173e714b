//! TCP between two Linux guests under QEMU, one switch after the other between them.
//!
//! The drivers are the guests' own, so this is what a user of such guests gets: long frames with checksums left to the
//! other side, kicks, interrupts, acknowledgements. Guests are QEMU's on the generator's CPU, all of both; the switch has
//! the other to itself. Where there is no KVM they are emulated, and then their CPU is the limit: what differs between
//! switches is how much work they make for guests (segments, kicks, interrupts), hardly what they could carry. Open
//! vSwitch and testpmd pass long frames only when told to, and are; Linecard is as an operator has it (`adaptive`).

use std::time::{Duration, Instant};

use qemu_tests::nic::Mode;
use qemu_tests::traffic::{Machine, ping_both};
use qemu_tests::{Flow, Guest, Nic, Scenario as Stage, Transfer};

use super::control::processor_time;
use super::{Group, Plan, Row};
use crate::interrupt;
use crate::measure::{Kind, MeasureError, Scenario};
use crate::nic::Door;
use crate::switch::Switch;

/// One way that guests talk.
struct Work {
    name: &'static str,
    streams: u16,
    /// What `ethtool -K` changes in both guests first.
    settings: &'static str,
    target: Option<&'static str>,
}

const TARGET: Option<&str> = Some("never under OVS with its TSO on");
const WORKS: [Work; 3] = [
    Work { name: "1 stream", streams: 1, settings: "tso on gso on gro on", target: TARGET },
    Work { name: "4 streams", streams: 4, settings: "tso on gso on gro on", target: TARGET },
    Work {
        name: "1 stream, no TSO, GSO, GRO in guests",
        streams: 1,
        settings: "tso off gso off gro off",
        target: None,
    },
];

/// Payload that is checked byte by byte in each turn, before anything is timed.
const CHECKED: u64 = 8 << 20;

/// Feature bits of virtio-net (virtio 1.3, section 5.1.3): long frames from the switch, and to it.
const LONG_FRAMES: [(usize, &str); 2] = [(7, "GUEST_TSO4"), (11, "HOST_TSO4")];

/// What one turn saw of one [`Work`].
struct Seen {
    mbps: f64,
    retransmits: u64,
    /// CPU time in percent of a core: the switch's, and that of both QEMUs, which have one core.
    switch: f64,
    guests: f64,
}

/// All works through every switch, round by round.
pub(super) fn tcp(plan: &Plan, tell: &mut dyn FnMut(&str)) -> Result<Vec<Row>, MeasureError> {
    let mut rows: Vec<_> = WORKS.iter().enumerate().map(|(at, work)| rows(work, at as f64)).collect();
    let mut kinds = vec![Kind::Linecard, Kind::Ovs, Kind::Cable];
    for round in 1..=plan.rounds {
        for kind in kinds.clone() {
            let seen = match turn(plan, kind) {
                Err(error) if kind != Kind::Linecard && !matches!(error, MeasureError::Interrupted) => {
                    tell(&format!("guests, {kind}: {}", error.chain()));
                    let note = format!("{kind} was left out from round {round} on: {}", error.chain());
                    let notes = rows[0][0].note.take().map_or(note.clone(), |before| format!("{before}; {note}"));
                    rows[0][0].note = Some(notes);
                    kinds.retain(|&other| other != kind);
                    continue;
                }
                seen => seen?,
            };
            for (rows, seen) in rows.iter_mut().zip(seen) {
                let Seen { mbps, retransmits, switch, guests } = seen;
                tell(&format!(
                    "guests {}, round {round}, {kind}: {mbps:.0} Mbit/s, {retransmits} segments sent again; \
                     of a core, the switch took {switch:.0} % and the guests {guests:.0} %",
                    rows[0].name
                ));
                for (row, figure) in rows.iter_mut().zip([mbps, switch, guests]) {
                    row.turns.entry(kind).or_default().push(figure);
                }
            }
        }
    }
    // By quantity, then by work.
    Ok((0..3).flat_map(|nth| rows.iter().map(move |rows| rows[nth].clone())).collect())
}

/// The rows of a [`Work`]: speed, CPU time of the switch, CPU time of the guests.
fn rows(work: &Work, at: f64) -> [Row; 3] {
    let share = |whose: &str| Row::new(Group::Guests, format!("{}: {whose}", work.name), at, "% of a core");
    let target = work.target.map(String::from);
    let speed = Row { target, ..Row::new(Group::Guests, work.name, at, "Mbit/s") };
    [speed, share("the switch's CPU"), share("the guests' CPU")]
}

/// One switch, two guests booted on it, and every work.
fn turn(plan: &Plan, kind: Kind) -> Result<Vec<Seen>, MeasureError> {
    let mut scenario = plan.scenario();
    scenario.nic.huge = false;
    scenario.wiring.offloads = true;
    scenario.linecard.idle = "adaptive".into();
    let _pages = scenario.pages(kind)?;
    let mut stage = Stage::new()?;
    let seen = on(&stage, &scenario, kind, plan);
    if seen.is_ok() || interrupt::came() {
        stage.pass();
    }
    // Ctrl-C ends QEMU too, and then whatever waits for it fails first.
    if interrupt::came() { Err(MeasureError::Interrupted) } else { seen }
}

fn on(stage: &Stage, scenario: &Scenario, kind: Kind, plan: &Plan) -> Result<Vec<Seen>, MeasureError> {
    let switch = scenario.start(kind)?;
    let guest = |at: usize, door: &Door| {
        let nic = match door {
            Door::Connect(socket) => Nic::new(socket),
            Door::Listen(socket) => Nic::new(socket).mode(Mode::Client),
        };
        Guest::named(["a", "b"][at]).nic(nic).address(["10.9.0.1/24", "10.9.0.2/24"][at]).host_cpu(plan.generator_cpu)
    };
    let doors = switch.doors();
    let [a, b] = stage.boot([guest(0, &doors[0]), guest(1, &doors[1])])?;
    for (bit, name) in LONG_FRAMES {
        if !(a.negotiated(bit)? && b.negotiated(bit)?) {
            return Err(qemu_tests::Error::Unexpected(format!("{kind} does not offer {name}")).into());
        }
    }
    ping_both(&a, &b)?;
    let flow = Flow::tcp(&a, &b)?;
    flow.advance(CHECKED)?;
    flow.finish()?;
    WORKS.iter().map(|work| talk(&a, &b, work, &*switch, plan)).collect()
}

fn talk(a: &Guest, b: &Guest, work: &Work, switch: &dyn Switch, plan: &Plan) -> Result<Seen, MeasureError> {
    for guest in [a, b] {
        guest.sh(&format!("ethtool -K eth0 {}", work.settings))?;
    }
    let transfer = Transfer::tcp(a, b, work.streams, plan.span)?;
    let (warm_up, span) = transfer.spans();
    interrupt::sleep(warm_up);
    let times = || {
        let guests = processor_time(a.pid()) + processor_time(b.pid());
        [switch.pid().map_or(Duration::ZERO, processor_time), guests]
    };
    let (before, start) = (times(), Instant::now());
    interrupt::sleep(span.mul_f64(0.9));
    let (after, elapsed) = (times(), start.elapsed());
    let share = |nth: usize| 100.0 * (after[nth] - before[nth]).as_secs_f64() / elapsed.as_secs_f64();
    let throughput = transfer.finish()?;
    Ok(Seen { mbps: throughput.mbps, retransmits: throughput.retransmits, switch: share(0), guests: share(1) })
}

//! The generator's devices against a real `linecardd`, every frame checked: what a fast load counts is frames that came over.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use generator::frames::Sizes;
use generator::latency::{Pings, Wait};
use generator::load::Load;
use generator::measure::{Kind, Scenario};
use generator::nic::Settings;
use generator::ring::Habit;
use generator::switch::{LinecardSetup, Wiring};

/// How long anything may take before a test gives up on it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where `linecardd` is: LINECARD_BIN_DIR, or where cargo put this test.
fn bin_dir() -> PathBuf {
    let built = || {
        let test = std::env::current_exe().expect("this test's path");
        test.ancestors().nth(2).expect("target/PROFILE/deps/TEST").to_owned()
    };
    let dir = std::env::var_os("LINECARD_BIN_DIR").map_or_else(built, PathBuf::from);
    assert!(
        dir.join("linecardd").exists(),
        "no linecardd in {}: cargo build --bins, or set LINECARD_BIN_DIR",
        dir.display()
    );
    dir
}

/// Two ports on ordinary memory, generator and switch wherever there is a CPU.
fn scenario(sizes: Sizes, habit: Habit) -> Scenario {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    Scenario {
        nic: Settings {
            queues: 1,
            ring: 256,
            packed: false,
            in_order: false,
            mergeable: true,
            habit,
            sizes,
            huge: false,
        },
        wiring: Wiring {
            ports: 2,
            queues: 1,
            stations: None,
            cpus: vec![0],
            longest: sizes.longest(),
            offloads: false,
        },
        linecard: LinecardSetup { idle: "adaptive".into(), ..LinecardSetup::default() },
        bin_dir: bin_dir(),
        cpu: cpus - 1,
        warm_up: Duration::from_millis(100),
        span: Duration::from_millis(300),
    }
}

#[track_caller]
fn assert_clean(scenario: &Scenario) {
    let (findings, dropped) = scenario.verify(Kind::Linecard).expect("a verified load");
    assert!(findings.received > 0, "{findings:?}");
    assert!(findings.is_clean(dropped), "{findings:?}, and the switch dropped {dropped:?}");
}

#[test]
fn frames_of_all_sizes_come_over_whole() {
    assert_clean(&scenario(Sizes::Imix, Habit::Recycle));
}

#[test]
fn jumbo_frames_come_over_whole() {
    assert_clean(&scenario(Sizes::Fixed(9000), Habit::Rewrite));
}

#[test]
fn two_queues_of_four_ports_keep_their_order() {
    let mut scenario = scenario(Sizes::Fixed(64), Habit::Recycle);
    (scenario.nic.queues, scenario.wiring.queues, scenario.wiring.ports) = (2, 2, 4);
    assert_clean(&scenario);
}

#[test]
fn packed_rings_carry_the_same() {
    for in_order in [false, true] {
        let mut scenario = scenario(Sizes::Imix, Habit::Recycle);
        (scenario.nic.packed, scenario.nic.in_order) = (true, in_order);
        assert_clean(&scenario);
    }
}

#[test]
fn the_fast_load_counts_what_the_switch_counts() {
    let scenario = scenario(Sizes::Fixed(64), Habit::Recycle);
    let mut switch = scenario.start(Kind::Linecard).expect("linecardd");
    let mut load = Load::new(scenario.connect(&*switch).expect("devices"), None);
    let end = Instant::now() + PATIENCE;
    let figures = load.run(scenario.span, 10_000, || Instant::now() > end);
    assert!(figures.sent >= 10_000, "the load stands still: {figures:?}");
    // Each ring was filled, and whatever came back was offered again: the switch has to take all of that and nothing else.
    let in_rings = u64::from(scenario.nic.ring) * scenario.wiring.ports as u64;
    let offered = figures.sent + in_rings;
    let sample = loop {
        let sample = switch.sample().expect("counters").expect("Linecard counts its cycles");
        if sample.frames >= offered || Instant::now() > end {
            break sample;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(sample.frames, offered, "{figures:?}, {sample:?}");
    assert!(figures.received <= offered, "{figures:?}, {sample:?}");
    // What the load did not see come back is in its receive rings, or the switch dropped it.
    assert!(figures.sent <= figures.received + in_rings + sample.not_taken, "{figures:?}, {sample:?}");
    assert!(sample.busy > 0 && sample.busy <= sample.cycles, "{sample:?}");
}

#[test]
fn pings_come_back_for_drivers_that_wait_for_interrupts() {
    let scenario = scenario(Sizes::Fixed(64), Habit::Recycle);
    let pings = Pings { gap: Duration::from_millis(1), span: scenario.span };
    let trips = scenario.ping(Kind::Linecard, &pings, Wait::Interrupt).expect("answers");
    assert!(!trips.nanoseconds.is_empty());
}

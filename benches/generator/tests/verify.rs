//! The generator's devices against a real `linecardd`, every frame checked: what a fast load counts is frames that came over.

use std::path::PathBuf;
use std::time::Duration;

use generator::frames::Sizes;
use generator::latency::{Pings, Wait};
use generator::measure::{Kind, Scenario};
use generator::nic::Settings;
use generator::ring::Habit;
use generator::switch::{LinecardSetup, Wiring};

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
        wiring: Wiring { ports: 2, queues: 1, stations: None, cpus: vec![0], longest: sizes.longest() },
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
    let mut scenario = scenario(Sizes::Fixed(64), Habit::Recycle);
    // Long enough for both to get their CPUs on a machine that does other things.
    scenario.span = Duration::from_secs(2);
    let outcome = scenario.run(Kind::Linecard).expect("a load");
    let sample = outcome.switch.expect("Linecard counts its cycles");
    assert!(outcome.load.received > 0 && sample.frames > 0 && sample.busy > 0, "{:?}, {sample:?}", outcome.load);
}

#[test]
fn pings_come_back_for_drivers_that_wait_for_interrupts() {
    let scenario = scenario(Sizes::Fixed(64), Habit::Recycle);
    let pings = Pings { gap: Duration::from_millis(1), span: scenario.span };
    let trips = scenario.ping(Kind::Linecard, &pings, Wait::Interrupt).expect("answers");
    assert!(!trips.nanoseconds.is_empty());
}

//! Rows about the daemon rather than its data path: what it costs when nothing happens, how fast it starts and reloads, how
//! soon frames flow again after it was killed.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{Group, Plan, Row};
use crate::interrupt;
use crate::load::{Figures, Load};
use crate::measure::{Kind, MeasureError, Scenario, failed, pin};
use crate::switch::{Linecard, Switch};

type Rows = Result<Vec<Row>, MeasureError>;
type Tell<'a> = &'a mut dyn FnMut(&str);

/// What is under way when vNICs have just connected is over after this.
const SETTLE: Duration = Duration::from_secs(2);
/// Shortest watch of an idle process.
const WATCH: Duration = Duration::from_secs(5);
/// Frames that were forwarded before a switch is killed, and after which it is back.
const FLOWING: u64 = 1;
/// How long a restart may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Many vNICs whose guests do nothing.
pub(super) fn idle(plan: &Plan, tell: Tell<'_>) -> Rows {
    let many = if plan.short { 200 } else { 1000 };
    let mut rows = Vec::new();
    let few_target = "under 1 % of a core";
    let mut few = Row::new(Group::Idle, "32 vNICs, CPU", 32.0, "% of a core").target(few_target);
    let mut lots = Row::new(Group::Idle, format!("{many} vNICs, CPU"), many as f64, "% of a core").target("under 3 %");
    let mut memory =
        Row::new(Group::Idle, format!("{many} vNICs, memory"), many as f64, "KiB each").target("under 200 KiB each");
    for _ in 0..plan.rounds.min(3) {
        for kind in [Kind::Linecard, Kind::Ovs] {
            let (share, base) = rest(plan, kind, 32)?;
            few.turns.entry(kind).or_default().push(share);
            tell(&format!("idle, {kind}, 32 vNICs: {share:.2} % of a core"));
            if kind == Kind::Linecard {
                let (share, all) = rest(plan, kind, many)?;
                let each = (all - base) / (many - 32) as f64;
                lots.turns.entry(kind).or_default().push(share);
                memory.turns.entry(kind).or_default().push(each);
                tell(&format!("idle, {kind}, {many} vNICs: {share:.2} % of a core, {each:.0} KiB each"));
            }
        }
    }
    lots.note = Some("Open vSwitch polls whatever the number; not run".into());
    rows.extend([few, lots, memory]);
    Ok(rows)
}

/// The share of a core, in percent, and the memory of its own, in KiB, of a switch with `count` idle vNICs.
fn rest(plan: &Plan, kind: Kind, count: usize) -> Result<(f64, f64), MeasureError> {
    let mut scenario = plan.scenario();
    scenario.wiring.ports = count;
    scenario.nic.ring = 64;
    scenario.nic.huge = false;
    scenario.linecard.idle = "adaptive".into();
    let _pages = scenario.pages(kind)?;
    let switch = scenario.start(kind)?;
    let _nics = scenario.connect(&*switch)?;
    interrupt::sleep(SETTLE);
    let pid = switch.pid().unwrap_or_default();
    let (before, start) = (processor_time(pid), Instant::now());
    interrupt::sleep(plan.span.max(WATCH));
    let share = 100.0 * (processor_time(pid) - before).as_secs_f64() / start.elapsed().as_secs_f64();
    Ok((share, own_memory(pid)))
}

/// Time on a CPU, over all threads: schedstat has nanoseconds where stat has hundredths.
pub(super) fn processor_time(pid: u32) -> Duration {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Duration::ZERO };
    let time = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    };
    Duration::from_nanos(tasks.flatten().filter_map(time).sum())
}

/// Memory that is the process's alone, in KiB: what it shares with guests is theirs.
fn own_memory(pid: u32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(f64::NAN)
}

/// Start with many ports, and a reload that concerns all of them.
pub(super) fn start(plan: &Plan, tell: Tell<'_>) -> Rows {
    let count = if plan.short { 200 } else { 1000 };
    let at = count as f64;
    let mut start = Row::new(Group::Start, format!("{count} ports listening"), at, "ms").target("under 2 s");
    let mut reload =
        Row::new(Group::Start, format!("profile of {count} ports reloaded"), at, "ms").target("under 100 ms");
    let mut lost = Row::new(Group::Start, "frames lost by the reload", at, "frames").target("none");
    let mut scenario = plan.scenario();
    scenario.wiring.ports = count;
    for _ in 0..plan.rounds {
        let mut switch = Linecard::start(&scenario.bin_dir, &scenario.wiring, &scenario.linecard)?;
        all_listen(&scenario, &switch)?;
        let begin = switch.restart()?;
        all_listen(&scenario, &switch)?;
        let took = begin.elapsed().as_secs_f64() * 1e3;
        let (reloading, dropped) = reload_under_load(&scenario, &mut switch)?;
        tell(&format!("start, {count} ports: {took:.0} ms; reload {reloading:.1} ms, {dropped} frames lost"));
        start.turns.entry(Kind::Linecard).or_default().push(took);
        reload.turns.entry(Kind::Linecard).or_default().push(reloading);
        lost.turns.entry(Kind::Linecard).or_default().push(dropped as f64);
    }
    Ok(vec![start, reload, lost])
}

fn all_listen(scenario: &Scenario, switch: &dyn Switch) -> Result<(), MeasureError> {
    for (port, meeting) in scenario.meetings(switch)?.iter().enumerate() {
        meeting.wait().map_err(failed(switch, port))?;
    }
    Ok(())
}

/// Reloads while the first two ports are busy: how long `linecard apply` took in ms, and what was dropped meanwhile.
fn reload_under_load(scenario: &Scenario, switch: &mut Linecard) -> Result<(f64, u64), MeasureError> {
    let mut busy = scenario.clone();
    busy.wiring.ports = 2;
    let _pages = busy.pages(Kind::Linecard)?;
    let meetings = scenario.meetings(switch)?;
    let connect = |port: usize| {
        crate::nic::Nic::connect(port, port ^ 1, &meetings[port], &scenario.nic).map_err(failed(switch, port))
    };
    let nics = vec![connect(0)?, connect(1)?];
    let stop = AtomicBool::new(false);
    let cpu = scenario.cpu;
    std::thread::scope(|scope| {
        let stop = &stop;
        scope.spawn(move || {
            // A generator on the wrong CPU is slower, and that is all.
            let _ = pin(cpu);
            let told = || stop.load(Ordering::Relaxed) || interrupt::came();
            Load::new(nics, None).run(PATIENCE, 0, told);
        });
        interrupt::sleep(Duration::from_millis(300));
        let done = measured_reload(switch);
        stop.store(true, Ordering::Relaxed);
        done
    })
}

fn measured_reload(switch: &Linecard) -> Result<(f64, u64), MeasureError> {
    let before = switch.dropped()?;
    let took = switch.reload()?;
    interrupt::sleep(Duration::from_millis(200));
    Ok((took.as_secs_f64() * 1e3, switch.dropped()? - before))
}

/// Killed under load and started again: from exec to the first frame that is forwarded.
pub(super) fn restart(plan: &Plan, tell: Tell<'_>) -> Rows {
    let mut row = Row::new(Group::Restart, "killed under load, first frame", 0.0, "ms").target("under 100 ms");
    for _ in 0..plan.rounds {
        for kind in [Kind::Linecard, Kind::Ovs] {
            let took = gap(&plan.scenario(), kind)?;
            tell(&format!("restart, {kind}: {took:.1} ms"));
            row.turns.entry(kind).or_default().push(took);
        }
    }
    Ok(vec![row])
}

fn gap(scenario: &Scenario, kind: Kind) -> Result<f64, MeasureError> {
    let _pages = scenario.pages(kind)?;
    let mut switch = scenario.start(kind)?;
    let mut load = Load::new(scenario.connect(&*switch)?, None);
    load.run(scenario.warm_up, FLOWING, interrupt::came);
    // Who connects to us must find us there.
    let meetings = scenario.meetings(&*switch)?;
    let begin = switch.restart()?;
    for (port, (nic, meeting)) in load.nics().iter_mut().zip(&meetings).enumerate() {
        nic.reconnect(meeting).map_err(failed(&*switch, port))?;
    }
    let mut figures = Figures::default();
    while figures.received < FLOWING && begin.elapsed() < PATIENCE && !interrupt::came() {
        load.round(&mut figures);
    }
    Ok(begin.elapsed().as_secs_f64() * 1e3)
}

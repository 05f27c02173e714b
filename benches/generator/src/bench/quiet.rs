//! Rows of latency: one frame in flight, 1 kHz pings with nothing and with a load beside them, and 1 kHz pings whose
//! drivers wait for interrupts; for each of Linecard's levels, Open vSwitch and the patch cable.

use std::time::Duration;

use super::{Plan, TripRow};
use crate::frames::Sizes;
use crate::latency::{Pings, Trips, Wait};
use crate::measure::{Kind, MeasureError, Scenario};

/// Spans of time in the plot of jitter.
const SPANS: usize = 60;

const WORKS: [(&str, u64, bool, Wait); 4] = [
    ("in flight", 0, false, Wait::Poll),
    ("1 kHz", 1000, false, Wait::Poll),
    ("1 kHz under load", 1000, true, Wait::Poll),
    ("1 kHz, interrupts", 1000, false, Wait::Interrupt),
];

pub(super) fn trips(plan: &Plan, tell: &mut dyn FnMut(&str)) -> Result<Vec<TripRow>, MeasureError> {
    let mut rows = Vec::new();
    for (work, gap, loaded, wait) in WORKS {
        let pings = Pings { gap: Duration::from_micros(gap), span: plan.span * plan.rounds as u32 };
        for level in ["low", "normal", "medium", "high"] {
            let mut scenario = scenario(plan, loaded);
            scenario.linecard.idle = "adaptive".into();
            scenario.linecard.latency = level.into();
            let trips = scenario.ping(Kind::Linecard, &pings, wait)?;
            rows.push(row(work, format!("Linecard {level}"), Kind::Linecard, &trips, tell));
        }
        for (kind, who) in [(Kind::Ovs, "Open vSwitch"), (Kind::Cable, "patch cable")] {
            let trips = scenario(plan, loaded).ping(kind, &pings, wait)?;
            rows.push(row(work, who.into(), kind, &trips, tell));
        }
    }
    Ok(rows)
}

fn scenario(plan: &Plan, loaded: bool) -> Scenario {
    let mut scenario = plan.scenario();
    scenario.nic.ring = 256;
    if loaded {
        scenario.wiring.ports = 4;
        scenario.nic.sizes = Sizes::Imix;
    }
    scenario
}

fn row(work: &'static str, who: String, kind: Kind, trips: &Trips, tell: &mut dyn FnMut(&str)) -> TripRow {
    let sorted = trips.sorted();
    let [median, p99, p999, max] =
        [0.5, 0.99, 0.999, 1.0].map(|quantile| Trips::quantile(&sorted, quantile).unwrap_or_default());
    tell(&format!("{work}, {who}: median {median:.2} us, p99 {p99:.2}, p99.9 {p999:.2}, max {max:.1}"));
    let each = trips.nanoseconds.len().div_ceil(SPANS).max(1);
    let jitter = trips.nanoseconds.chunks(each).map(|chunk| {
        let mut chunk = chunk.to_vec();
        chunk.sort_unstable();
        [0.0, 0.5, 1.0].map(|quantile| (Trips::quantile(&chunk, quantile).unwrap_or_default() * 100.0).round() / 100.0)
    });
    let jitter = jitter.collect();
    TripRow { work: work.into(), who, kind, count: sorted.len(), lost: trips.lost, median, p99, p999, max, jitter }
}

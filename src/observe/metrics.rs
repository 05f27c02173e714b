//! Prometheus metrics, read from the shards' own counters when somebody scrapes: between two scrapes they cost nothing.
//!
//! Names begin with `linecard_`. "rx" is what the switch received from a port, "tx" what it gave to it. The labels of a
//! port in the configuration are on `linecard_port_info`, to be joined by `port`, so that renaming a VM does not begin
//! every other series anew.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::response::Response;
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use utoipa::OpenApi;

use crate::control::Controller;
use crate::control::http::{Asker, Refused, Routes};
use crate::control::report::{
    CounterReport, Direction, NetworkReport, PortReport, PortState, ShardReport, StatusReport,
};
use crate::port::{Conduct, Notifications};
use crate::sys::cpu;

#[derive(OpenApi)]
#[openapi(paths(metrics))]
struct Document;

/// `/metrics`.
pub fn routes(controller: Arc<Controller>) -> Routes {
    let router = Router::new().route("/metrics", get(metrics)).with_state(controller);
    Routes { router, document: Document::openapi() }
}

/// Metrics in OpenMetrics text.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, content_type = "application/openmetrics-text", body = String),
))]
async fn metrics(asker: Asker, State(controller): State<Arc<Controller>>) -> Result<Response, Refused> {
    const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let requests = controller.requests().clone();
    asker.text(&requests, OPENMETRICS, move || text(controller)).await
}

/// What a scrape gets.
fn text(controller: Arc<Controller>) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("linecard");
    registry.register_collector(Box::new(Scrape(controller)));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry)?;
    Ok(text)
}

#[derive(Debug)]
struct Scrape(Arc<Controller>);

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder) -> std::fmt::Result {
        let Self(controller) = self;
        daemon(&mut encoder, &controller.status())?;
        let reports = controller.ports();
        ports(&mut encoder, &reports)?;
        storms(&mut encoder, &reports)?;
        stations(&mut encoder, &reports, &controller.networks())?;
        conduct(&mut encoder, controller)?;
        drops(&mut encoder, controller)?;
        notifications(&mut encoder, controller)?;
        shards(&mut encoder, &controller.shards())
    }
}

/// Labels of one value. Their names are ours but for the labels of [`info`].
type Labels = Vec<(String, String)>;

/// One label.
fn label(name: &str, value: impl ToString) -> (String, String) {
    (name.into(), value.to_string())
}

/// The one value of a family without labels.
fn one<N>(value: N) -> impl Iterator<Item = (Labels, N)> {
    std::iter::once((Labels::new(), value))
}

/// One counter with a value for each set of labels.
fn counters(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (Labels, u64)>,
) -> std::fmt::Result {
    let kind = ConstCounter::new(0u64).metric_type();
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    for (labels, value) in values {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

/// One gauge with a value for each set of labels.
fn gauges(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    values: impl Iterator<Item = (Labels, i64)>,
) -> std::fmt::Result {
    let kind = ConstGauge::new(0i64).metric_type();
    let mut family = encoder.encode_descriptor(name, help, None, kind)?;
    for (labels, value) in values {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn daemon(encoder: &mut DescriptorEncoder, status: &StatusReport) -> std::fmt::Result {
    let version = vec![label("version", &status.version)];
    gauges(encoder, "build_info", "The running version", std::iter::once((version, 1)))?;
    gauges(encoder, "uptime_seconds", "Time since the daemon started", one(status.uptime_seconds as i64))?;
    counters(encoder, "config_generation", "Configurations applied", one(status.generation))?;
    let refused = i64::from(status.refused.is_some());
    gauges(encoder, "config_refused", "1 if the last configuration was refused", one(refused))?;
    let fdb = &status.fdb;
    gauges(encoder, "fdb_entries", "Stations in the FDB", one(fdb.entries as i64))?;
    counters(encoder, "fdb_learned", "Stations learned", one(fdb.learned))?;
    counters(encoder, "fdb_aged", "Stations forgotten because they were silent", one(fdb.aged))?;
    counters(encoder, "fdb_moves", "Stations that moved to another port", one(fdb.moved))?;
    counters(encoder, "fdb_damped", "Moves not followed because there were too many", one(fdb.damped))?;
    gauges(encoder, "loops_suspected", "Pairs of ports that seem to be connected", one(status.loops.len() as i64))?;
    counters(encoder, "fdb_refused", "Stations not learned because of a limit", one(fdb.refused))?;
    counters(encoder, "fdb_full", "Stations not learned for want of room", one(fdb.full))?;
    counters(encoder, "log_lines_lost", "Lines lost because nobody read the log", one(status.log.lines_lost))?;
    gauges(encoder, "log_stuck", "1 if nobody reads the log", one(i64::from(status.log.stuck)))
}

fn ports(encoder: &mut DescriptorEncoder, ports: &[PortReport]) -> std::fmt::Result {
    let by_port = |port: &PortReport| vec![label("port", &port.name)];
    gauges(encoder, "port_info", "A port, what it is and its labels", ports.iter().map(|port| (info(port), 1)))?;
    let up = ports.iter().map(|port| (by_port(port), i64::from(port.state == PortState::Up)));
    gauges(encoder, "port_up", "1 if the port carries frames", up)?;
    let conflicts = ports.iter().map(|port| (by_port(port), port.conflicts.len() as i64));
    gauges(encoder, "port_address_conflicts", "Addresses seen at this port and another one", conflicts)?;
    let each = |of: fn(&CounterReport) -> u64| ports.iter().map(move |port| (by_port(port), of(&port.counters)));
    counters(encoder, "port_rx_packets", "Frames received from the port", each(|c| c.rx_frames))?;
    counters(encoder, "port_rx_bytes", "Their bytes, without FCS", each(|c| c.rx_bytes))?;
    counters(encoder, "port_rx_delivered", "Received frames that reached a port", each(|c| c.rx_delivered))?;
    counters(encoder, "port_tx_packets", "Frames given to the port", each(|c| c.tx_frames))?;
    counters(encoder, "port_tx_bytes", "Their bytes, without FCS", each(|c| c.tx_bytes))?;
    counters(encoder, "port_rx_gso", "Frames received from the port to be segmented", each(|c| c.rx_gso))?;
    counters(encoder, "port_tx_gso", "Frames given to the port to be segmented", each(|c| c.tx_gso))?;
    counters(encoder, "port_tx_segmented", "Frames segmented for the port", each(|c| c.tx_segmented))?;
    let cut = each(|c| c.tx_segments_dropped);
    counters(encoder, "port_tx_segments_dropped", "Segments for which the port had no buffer", cut)?;
    counters(encoder, "port_tx_merged", "Frames merged into larger ones for the port", each(|c| c.tx_merged))?;
    counters(encoder, "port_tx_checksums_completed", "Checksums completed for the port", each(|c| c.tx_completed))
}

/// What a port is. Labels of the configuration get a prefix, so that they cannot take the name of one of ours.
fn info(port: &PortReport) -> Labels {
    let plain = |text: &Option<String>| text.clone().unwrap_or_default();
    let mut labels = vec![
        label("port", &port.name),
        label("kind", plain(&port.kind)),
        label("network", plain(&port.network)),
        label("profile", plain(&port.profile)),
    ];
    for (key, value) in &port.labels {
        let word = |c: char| if c.is_ascii_alphanumeric() { c } else { '_' };
        let key = format!("label_{}", key.chars().map(word).collect::<String>());
        // Two keys may differ only in what a metric label cannot say; the first one stands.
        if labels.iter().all(|(taken, _): &(String, _)| *taken != key) {
            labels.push((key, value.clone()));
        }
    }
    labels
}

fn drops(encoder: &mut DescriptorEncoder, controller: &Controller) -> std::fmt::Result {
    // Without a filter there is nothing to be refused.
    let drops = controller.drops(None).unwrap_or_default();
    let labeled = drops.into_iter().map(|drop| {
        let direction = match drop.direction {
            Direction::Rx => "rx",
            Direction::Tx => "tx",
        };
        (vec![label("port", drop.port), label("direction", direction), label("reason", drop.reason)], drop.count)
    });
    counters(encoder, "port_drops", "Frames dropped, by reason", labeled)
}

/// What is counted of a port that holds shards up.
const HELD_UP: &str =
    "How often the memory of the port's VM held a shard up, many short times that came to 200 ms being one";

/// What the ports' far ends have done to others.
fn conduct(encoder: &mut DescriptorEncoder, controller: &Controller) -> std::fmt::Result {
    let ports = controller.conduct();
    let each = |of: fn(&Conduct) -> u64| ports.iter().map(move |(port, c)| (vec![label("port", port)], of(c)));
    counters(encoder, "port_held_up", HELD_UP, each(|c| c.held_up))?;
    counters(encoder, "port_barred", "How often the port served nobody for what its VM did", each(|c| c.barred))
}

fn storms(encoder: &mut DescriptorEncoder, ports: &[PortReport]) -> std::fmt::Result {
    let labeled = ports.iter().flat_map(|port| {
        let drops = port.counters.storm_drops.iter();
        drops.map(|(class, count)| (vec![label("port", &port.name), label("class", class)], *count))
    });
    counters(encoder, "port_storm_drops", "Frames of the port that were too many to be flooded", labeled)
}

/// How many stations ports and networks have, of how many they may, and how often one more was refused.
fn stations(encoder: &mut DescriptorEncoder, ports: &[PortReport], networks: &[NetworkReport]) -> std::fmt::Result {
    let by_port = |port: &PortReport| vec![label("port", &port.name)];
    let by_network = |network: &NetworkReport| vec![label("network", &network.name)];
    let learned = ports.iter().map(|port| (by_port(port), i64::from(port.macs)));
    gauges(encoder, "port_stations", "Stations learned at the port", learned)?;
    let most = ports.iter().filter_map(|port| Some((by_port(port), i64::from(port.mac_limit?))));
    gauges(encoder, "port_stations_limit", "Stations that may be learned at the port", most)?;
    let refused = ports.iter().flat_map(|port| {
        let by_limit = port.macs_refused.iter();
        by_limit.map(|(limit, count)| (vec![label("port", &port.name), label("limit", limit)], *count))
    });
    counters(encoder, "port_stations_refused", "Stations of the port not learned, by limit", refused)?;
    let entries = networks.iter().map(|network| (by_network(network), network.fdb_entries as i64));
    gauges(encoder, "network_stations", "Stations of the network in the FDB", entries)?;
    let most = networks.iter().map(|network| (by_network(network), i64::from(network.mac_limit)));
    gauges(encoder, "network_stations_limit", "Stations that may be learned in the network", most)
}

/// Kicks and interrupts of rings. Their sum over a guest's rings is what it spends on exits and interrupts. `ring` is the
/// number that the front end has for it: the guest receives by even ones and sends by odd ones (virtio 1.2, 5.1.2).
fn notifications(encoder: &mut DescriptorEncoder, controller: &Controller) -> std::fmt::Result {
    let rings = controller.notifications();
    let each = |of: fn(&Notifications) -> u64| {
        rings.iter().map(move |(port, ring, counts)| {
            let direction = if ring % 2 == 0 { "tx" } else { "rx" };
            (vec![label("port", port), label("ring", ring), label("direction", direction)], of(counts))
        })
    };
    counters(encoder, "queue_kicks", "Kicks of the guest", each(|c| c.kicks))?;
    counters(encoder, "queue_kicks_suppressed", "Batches found without a kick", each(|c| c.kicks_suppressed))?;
    counters(encoder, "queue_calls", "Interrupts sent to the guest", each(|c| c.calls))?;
    counters(
        encoder,
        "queue_calls_suppressed",
        "Batches the guest wanted no interrupt for",
        each(|c| c.calls_suppressed),
    )?;
    counters(encoder, "queue_calls_coalesced", "Batches that shared an interrupt", each(|c| c.calls_coalesced))
}

/// One counter of seconds, from cycles.
fn seconds(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    shards: &[ShardReport],
    of: fn(&ShardReport) -> u64,
) -> std::fmt::Result {
    let kind = ConstCounter::new(0f64).metric_type();
    let mut family = encoder.encode_descriptor(name, help, Some(&Unit::Seconds), kind)?;
    for shard in shards {
        let value = of(shard) as f64 / cpu::cycles_per_second() as f64;
        ConstCounter::new(value).encode(family.encode_family(&vec![label("cpu", shard.cpu)])?)?;
    }
    Ok(())
}

fn shards(encoder: &mut DescriptorEncoder, shards: &[ShardReport]) -> std::fmt::Result {
    let each = |of: fn(&ShardReport) -> u64| shards.iter().map(move |s| (vec![label("cpu", s.cpu)], of(s)));
    let queues = shards.iter().map(|shard| (vec![label("cpu", shard.cpu)], shard.queues as i64));
    gauges(encoder, "shard_queues", "Receive queues of the shard", queues)?;
    counters(encoder, "shard_frames", "Frames received by the shard", each(|s| s.frames))?;
    counters(encoder, "shard_batches", "Batches that they came in", each(|s| s.batches))?;
    counters(encoder, "shard_sleeps", "How often the shard slept", each(|s| s.sleeps))?;
    counters(encoder, "shard_held_up", "How often a VM's memory held the shard up", each(|s| s.held_up))?;
    counters(encoder, "shard_busy_cycles", "CPU cycles in turns that moved frames", each(|s| s.busy_cycles))?;
    counters(encoder, "shard_poll_cycles", "CPU cycles in turns that found nothing", each(|s| s.poll_cycles))?;
    counters(encoder, "shard_sleep_cycles", "CPU cycles asleep", each(|s| s.sleep_cycles))?;
    seconds(encoder, "shard_busy", "Time in turns that moved frames", shards, |s| s.busy_cycles)?;
    seconds(encoder, "shard_poll", "Time in turns that found nothing", shards, |s| s.poll_cycles)?;
    seconds(encoder, "shard_sleep", "Time asleep", shards, |s| s.sleep_cycles)
}

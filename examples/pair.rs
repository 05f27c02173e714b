use linecard::{
    clock::Clock,
    ident::*,
    port::{Port, vnic::*},
    shard::*,
    switch,
};
use std::sync::Arc;
fn main() {
    env_logger::init();
    let dir = std::env::args().nth(1).unwrap();
    let acceptor = Acceptor::start().unwrap();
    let shards = Shards::start(
        &[0],
        &[],
        if std::env::args().nth(2).is_some() { IdlePolicy::Adaptive } else { IdlePolicy::Never },
        Clock::start(),
    )
    .unwrap();
    let ports: Vec<Arc<Vnic>> = ["a", "b"]
        .iter()
        .map(|n| {
            Vnic::new(
                VnicConfig {
                    name: n.parse().unwrap(),
                    socket: format!("{dir}/{n}.sock").into(),
                    mode: Mode::Server,
                    queue_pairs: 1,
                    mtu: None,
                    mac: None,
                    owner: None,
                    group: None,
                    permissions: 0o660,
                },
                &acceptor,
            )
            .unwrap()
        })
        .collect();
    let row = switch::PortRow { network: NetworkIndex(0), mtu: None, macs: 100 };
    let net = switch::NetworkRow {
        members: [PortIndex(0), PortIndex(1)].into(),
        mac_age: std::time::Duration::from_secs(300),
        mac_limit: 1000,
    };
    shards.publish(Tables {
        switch: switch::Tables {
            ports: vec![Some(row); 2].into(),
            networks: [Some(net)].into(),
            fdb: Arc::new(switch::Fdb::with_capacity(1000, [1, 2])),
        },
        transmit: ports.iter().map(|p| Some(p.transmit_side())).collect(),
    });
    for (i, p) in ports.iter().enumerate() {
        shards.attach(PortIndex(i as u16), p.receive_queues(), LatencySensitivity::Normal).unwrap();
    }
    let mut last = shards.report()[0].clone();
    loop {
        std::thread::sleep(std::time::Duration::from_secs(1));
        let r = shards.report()[0].clone();
        let f = r.frames - last.frames;
        if f > 0 {
            eprintln!(
                "{:.2} Mpps, {:.1} cycles/frame busy, {:.0}% busy, {:.1}/batch",
                f as f64 / 1e6,
                (r.busy_cycles - last.busy_cycles) as f64 / f as f64,
                100. * (r.busy_cycles - last.busy_cycles) as f64
                    / ((r.busy_cycles + r.poll_cycles + r.sleep_cycles)
                        - (last.busy_cycles + last.poll_cycles + last.sleep_cycles)) as f64,
                f as f64 / (r.batches - last.batches) as f64
            );
        }
        last = r;
    }
}

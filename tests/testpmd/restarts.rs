//! Either side dies without a word in the middle of traffic, whichever of them listens, and the next one takes its place.

use super::console::Nics;
use super::frontend::daemon::PortView;
use super::{PORTS, Scene};

#[test]
fn testpmd_killed_in_the_middle_of_traffic_is_followed_by_another() {
    for server in [false, true] {
        // A packed ring first: the file that says where its port's rings stand stays open from then on.
        let modes = [(true, true, 2, 255), (false, true, 2, 256), (false, false, 1, 1024), (true, false, 8, 256)];
        let nics = |(packed, in_order, queues, queue_size)| Nics {
            packed,
            in_order,
            queues,
            queue_size,
            server,
            ..Nics::default()
        };
        let mut scene = Scene::new(nics(modes[0]));
        let mut footprint = None;
        for next in modes.into_iter().cycle().take(6) {
            scene.bounce("512");
            scene.testpmd.kill();
            for name in PORTS {
                scene.daemon.port_when(name, "down without a front end", |port| port.state() == "down");
            }
            let first = footprint.get_or_insert_with(|| scene.daemon.footprint_at_rest());
            scene.daemon.expect_given_back(first, "what testpmd left");
            let ports = scene.ports();
            assert!(ports.iter().all(PortView::is_conserved), "{:?}", ports.map(|port| port.0));
            scene.replace_testpmd(nics(next));
        }
        scene.bounce("64");
        scene.rest();
    }
}

#[test]
fn linecardd_killed_in_the_middle_of_traffic_is_found_again() {
    // DPDK makes its packed rings anew for whoever comes back, at the same place.
    for (packed, in_order, queues) in [(false, true, 1), (false, false, 2), (true, true, 2), (true, false, 1)] {
        let mut scene = Scene::new(Nics { packed, in_order, queues, server: true, ..Nics::default() });
        for _ in 0..3 {
            scene.bounce("64");
            scene.daemon.kill();
            scene.daemon.restart();
            scene.expect_up();
            scene.rest();
        }
        scene.bounce("1514");
        scene.rest();
    }
}

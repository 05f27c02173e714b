//! What is told of a port and set of it while its session is held up.

use super::*;
use crate::frame::Needs;
use crate::ident::LatencySensitivity;

/// A session may wait in the kernel for something of its front end's, and then for long.
#[test]
fn nobody_who_asks_or_sets_waits_for_a_session() {
    let (host, guest) = (Host::new(), Guest::new());
    let port = host.port("vm1");
    let mut front = host.connect("vm1");
    front.negotiate();
    assert!(front.done(Req::SET_FEATURES, &FEATURES.to_ne_bytes(), &[]));
    assert!(front.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
    assert!(front.done(Req::SET_VRING_ENABLE, &state(1, 1), &[]));
    front.start(1, 0, &guest);
    let (answer, answers) = std::sync::mpsc::channel();
    let asking = Arc::clone(&port);
    let ended = port.attachment.while_busy(|| {
        std::thread::spawn(move || {
            asking.set_mtu(Some(1500));
            asking.set_latency(LatencySensitivity::Medium);
            asking.set_offloads(Needs::NONE);
            let _ = (asking.memory_nodes(), asking.notifications());
            let shown = (asking.link(), asking.detail()["queues"][1]["started"] == true);
            answer.send(shown).unwrap();
        });
        answers.recv_timeout(Duration::from_secs(20))
    });
    assert_eq!(ended, Ok((LinkState::Up, true)));
    // Its end is not waited for either, but for a moment.
    let (attachment, (closed, end)) = (Arc::clone(&port.attachment), std::sync::mpsc::channel());
    attachment.while_busy(|| {
        std::thread::spawn(move || {
            drop(port);
            closed.send(())
        });
        assert_eq!(end.recv_timeout(Duration::from_secs(20)), Ok(()));
    });
}

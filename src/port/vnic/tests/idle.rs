//! What is told of a device of which no ring runs.

use super::*;

#[test]
fn what_is_known_of_a_device_that_does_not_run_is_said() {
    let (host, guest) = (Host::new(), Guest::new());
    let port = host.port("vm1");
    let says =
        |what: &str| assert!(matches!(port.link(), LinkState::Down(why) if why.contains(what)), "{:?}", port.link());
    let mut front = host.connect("vm1");
    front.negotiate();
    assert!(front.done(Req::SET_FEATURES, &FEATURES.to_ne_bytes(), &[]));
    says("has not started");
    front.start(0, 0, &guest);
    assert!(front.done(Req::SET_VRING_ENABLE, &state(0, 1), &[]));
    says("does not share its memory");
    assert!(front.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
    assert_eq!(port.link(), LinkState::Up);
    front.base(0);
    says("has stopped its network device");
}

//! Who is connected to which port: front ends that come, go and wait, and ports that go.

use super::*;

#[test]
fn one_front_end_at_a_time_and_the_next_follows_at_once() {
    let host = Host::new();
    let port = host.port("vm1");
    let mut first = host.connect("vm1");
    first.negotiate();
    let mut second = host.connect("vm1");
    assert!(second.is_closed());
    first.get(Req::GET_FEATURES);
    assert_eq!(port.detail()["refused_connections"], 1);
    for round in 2..8 {
        drop(first);
        first = host.connect("vm1");
        first.negotiate();
        assert_eq!(port.detail()["connections"], round);
    }
    assert_eq!(port.detail()["refused_connections"], 1);
}

#[test]
fn a_port_that_goes_takes_its_session_and_its_socket_along() {
    let (host, guest) = (Host::new(), Guest::new());
    let port = host.port("vm1");
    let mut front = host.connect("vm1");
    front.negotiate();
    assert!(front.done(Req::ADD_MEM_REG, &guest.region(), &[guest.memory.as_fd()]));
    assert_eq!(guest.descriptors()[0], 2);
    drop(port);
    assert_eq!(guest.descriptors()[0], 1);
    assert!(!host.dir.path().join("vm1").exists());
    assert!(front.is_closed());
}

#[test]
fn in_client_mode_the_port_looks_for_its_vm_and_takes_nobody_of_this_process() {
    let host = Host::new();
    let config = VnicConfig { mode: Mode::Client, ..host.config("vm1") };
    let path = config.socket.clone();
    let port = Vnic::new(config, &host.acceptor).unwrap();
    eventually("it looks", || matches!(port.link(), LinkState::Down(why) if why.contains("No such file")));
    let listener = UnixListener::bind(&path).unwrap();
    assert!(Raw(listener.accept().unwrap().0).is_closed());
    eventually("it says so", || matches!(port.link(), LinkState::Down(why) if why.contains("itself listens there")));
    assert_eq!(port.detail()["connections"], 0);
    drop(port);
    assert!(path.exists());
}

#[test]
fn many_ports_share_one_acceptor_and_too_many_connections_wait() {
    let host = Host::new();
    let ports: Vec<_> = (0..100).map(|i| host.port(&format!("vm{i}"))).collect();
    for name in ["vm0", "vm99"] {
        host.connect(name).negotiate();
    }
    assert_eq!(ports[50].detail()["connections"], 0);
    // More than the port takes in a second: they wait, none is lost.
    for _ in 0..20 {
        let mut front = host.connect("vm50");
        front.negotiate();
    }
    assert_eq!(ports[50].detail()["connections"], 20);
}

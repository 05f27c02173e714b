//! Beyond the points: what a front end can have printed where an operator looks. The kernel lets it give a descriptor any
//! name, and a refusal says which name that was.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::Command;

use rustix::fs::{CWD, FileType, MemfdFlags, Mode, memfd_create, mknodat};

use super::frontend::ram::Region;
use super::frontend::session::{mem_table, protocol, request, single_region};
use super::frontend::{child, eventually};
use super::mapping::metrics;
use super::{MIB, Scene, refused};

/// Clears the screen, sets the window's title, rings, forges a log line, turns the text round, and uses the 8-bit form of ESC [.
const NAME: &str = "x\x1b[2J\x1b]0;owned\x07\n[2026-11-29T00:00:00Z ERROR] well-1: forged\r\u{202e}\u{200b}\u{9b}2J";

/// What `linecard ARGS` prints for people.
fn printed(scene: &Scene, args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_linecard"));
    let output = child::output(command.arg("--api").arg(scene.daemon.dir().join("api.sock")).args(args));
    String::from_utf8(output.stdout).unwrap()
}

/// The first character that a name must not bring to a terminal or a log.
fn raw(text: &str) -> Option<char> {
    let harmless = |c: char| c == '\n' || c.is_ascii_graphic() || c == ' ';
    text.chars().find(|c| !harmless(*c))
}

#[test]
fn names_of_descriptors_are_printed_and_not_obeyed() {
    let scene = Scene::new();
    let session = scene.session();
    let file = File::from(memfd_create(NAME, MemfdFlags::CLOEXEC).unwrap());
    let refused = session.tell(request::SET_VRING_KICK, &0u64.to_le_bytes(), &[file.as_fd()], true);
    assert!(refused.is_err(), "no eventfd");
    let port = scene.daemon.port_when("bad", "it says what was wrong", |port| port.state() == "stopped");
    let reason = port.reason().unwrap();
    assert!(reason.contains(r"not an eventfd but /memfd:x\x1b[2J"), "{reason}");
    for args in [&["port", "list"][..], &["port", "show", "bad"], &["status"], &["-o", "yaml", "port", "show", "bad"]] {
        let text = printed(&scene, args);
        assert_eq!(raw(&text), None, "{args:?}: {text:?}");
        assert!(!text.lines().any(|line| line.starts_with("[2026")), "{args:?}: {text:?}");
    }
    let log = scene.daemon.log();
    assert!(log.contains("not an eventfd but /memfd:x"), "{log}");
    assert_eq!(raw(&log), None, "{log:?}");
    assert!(
        !log.lines().any(|line| line.ends_with("well-1: forged") || line.contains("] well-1: forged\r")),
        "{log:?}"
    );
    drop(session);
    // As long as a name can be, and longer when it is escaped.
    let session = scene.session();
    let file = File::from(memfd_create("\x1b".repeat(200).as_str(), MemfdFlags::CLOEXEC).unwrap());
    assert!(session.tell(request::SET_VRING_KICK, &0u64.to_le_bytes(), &[file.as_fd()], true).is_err());
    let long = scene.daemon.port_when("bad", "it says so again", |port| {
        port.reason().is_some_and(|reason| reason.contains(r"/memfd:\x1b\x1b"))
    });
    assert!(long.reason().unwrap().len() < 400, "{:?}", long.reason());
    drop(session);
    scene.finish();
}

#[test]
fn names_of_files_that_are_no_memory_are_escaped_wherever_they_are_printed() {
    let scene = Scene::new();
    let dir = tempfile::tempdir().unwrap();
    let region = Region::new(0, 0x1_0000_0000, MIB);
    let cases = [
        (request::SET_MEM_TABLE, mem_table(std::slice::from_ref(&region))),
        (request::SET_LOG_BASE, [MIB, 0].map(u64::to_le_bytes).concat()),
        (request::ADD_MEM_REG, single_region(&region)),
    ];
    for (number, payload) in cases {
        // A pipe has whatever name its directory has for it, on any file system.
        let path = dir.path().join(format!("{number}{NAME}"));
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let pipe = File::options().read(true).write(true).open(&path).unwrap();
        let session = scene.session();
        let all = protocol::REPLY_ACK | protocol::CONFIGURE_MEM_SLOTS | protocol::LOG_SHMFD;
        session.set_protocol_features(all).unwrap();
        refused(session.tell(number, &payload, &[pipe.as_fd()], true), "memory in a pipe");
        let named = format!(r"/{number}x\x1b[2J\x1b]0;owned\x07\n[2026-11-29");
        if number == request::SET_LOG_BASE {
            // Without the answer that it wants, a front end is sent away, and that is the reason then.
            assert!(scene.daemon.log().contains(&named), "{}", scene.daemon.log());
            continue;
        }
        let tells = |text: Option<&str>| text.is_some_and(|text| text.contains(&named));
        scene.daemon.port_when("bad", "its reason has the name", |port| tells(port.reason()));
        // One that is stopped, and a moment later stopped again, has one event.
        if number == request::SET_MEM_TABLE {
            eventually("an event has the name", || {
                let stopped = scene.daemon.events("port-stopped");
                stopped.iter().any(|event| tells(event["reason"].as_str())).then_some(())
            });
        }
    }
    for args in [&["port", "list"][..], &["port", "show", "bad"], &["status"], &["events"], &["drops"]] {
        for form in ["table", "json", "yaml"] {
            let text = printed(&scene, &[&["-o", form], args].concat());
            assert!(!text.is_empty(), "{args:?} as {form}");
            assert_eq!(raw(&text), None, "{args:?} as {form}: {text:?}");
            assert!(!text.lines().any(|line| line.starts_with("[2026")), "{args:?} as {form}: {text:?}");
        }
    }
    let (log, metrics) = (scene.daemon.log(), metrics(&scene.daemon).replace('\r', ""));
    assert_eq!((raw(&log), raw(&metrics)), (None, None), "{log:?} {metrics:?}");
    assert!(metrics.contains("linecard_port_up"), "{metrics}");
    scene.finish();
}

#[test]
fn what_the_relay_says_of_a_descriptor_is_not_for_front_ends_to_say() {
    let scene = Scene::new();
    let session = scene.session();
    // Once the name of what stands for a descriptor that is refused; what is in it was believed to be what the other was.
    let mut file = File::from(memfd_create("linecard-refused", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(b"nothing; port well-1: call 555-1234").unwrap();
    assert!(session.tell(request::SET_VRING_KICK, &0u64.to_le_bytes(), &[file.as_fd()], true).is_err());
    // And what it is now.
    let (pipe, mut other) = std::io::pipe().unwrap();
    other.write_all(b"nothing; port well-1: call 555-1234").unwrap();
    assert!(session.tell(request::SET_VRING_KICK, &0u64.to_le_bytes(), &[pipe.as_fd()], true).is_err());
    let log = scene.daemon.log();
    assert!(log.contains("not an eventfd but /memfd:linecard-refused"), "{log}");
    assert!(log.contains("not an eventfd but pipe:["), "{log}");
    assert!(!log.contains("555-1234"), "{log}");
    drop(session);
    scene.finish();
}

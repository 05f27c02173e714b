//! Firmware that boots from the host over a TAP port: iPXE, as QEMU's virtio-net card has it in its ROM, loads files by HTTP in a
//! network namespace of its own. Needs root.
//!
//! Its driver posts eight buffers and takes no large frames, while the host's stack sends up to 44 segments in one. What is asked
//! for is that TCP hardly ever has to wait for a timer: that depends on what gets lost and not on how fast the machine is.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use qemu_tests::child::Child;
use qemu_tests::kit::QEMU;
use qemu_tests::traffic::Machine;
use qemu_tests::wait::{self, STEP};
use qemu_tests::{Config, Daemon, Error, Netns, Nic, Result, Scenario, nic::Mode, scenario};

/// Bytes of the file that is loaded.
const FILE: usize = 8 << 20;

/// How often TCP may wait for a timer beyond what it does without large frames; when those were lost whole, it was 121 times.
const WAITS: u64 = 20;

/// Long enough to load the file at a segment per retransmission timer.
const LOAD: Duration = Duration::from_secs(1200);

const SCRIPT: &str =
    "#!ipxe\nimgfetch http://10.9.0.9/file || goto failed\nimgfetch http://10.9.0.9/done\n:failed\nprompt\n";

/// Starts a program in the namespace; its output goes to a log.
fn serve(s: &Scenario, host: &Netns, name: &str, command: &[&str]) -> Result<Child> {
    let inside = command.iter().map(|&word| word.to_owned());
    let command: Vec<String> = host.enter().into_iter().chain(inside).collect();
    Child::start(name, &command, &s.path(&format!("{name}.log")), Stdio::null())
}

fn write(s: &Scenario, name: &str, content: &[u8]) -> Result<String> {
    let path = s.path(name);
    fs::write(&path, content).map_err(|source| Error::Io { what: format!("write {path:?}"), source })?;
    Ok(path.display().to_string())
}

/// A DHCP server that names the script, and an HTTP server that has it and the file.
fn servers(s: &Scenario, host: &Netns) -> Result<[Child; 2]> {
    let (leases, pid) = (write(s, "leases", b"")?, s.path("udhcpd.pid"));
    let settings = format!(
        "start 10.9.0.20\nend 10.9.0.30\ninterface lc0\nlease_file {leases}\npidfile {}\noption subnet 255.255.255.0\n\
         siaddr 10.9.0.9\nboot_file http://10.9.0.9/script\n",
        pid.display()
    );
    let settings = write(s, "udhcpd.conf", settings.as_bytes())?;
    let dhcp = serve(s, host, "dhcp", &["busybox", "udhcpd", "-f", &settings])?;
    let root = s.path("www");
    fs::create_dir(&root).map_err(|source| Error::Io { what: format!("make {root:?}"), source })?;
    let file: Vec<u8> = (0..FILE as u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
    for (name, content) in [("script", SCRIPT.as_bytes()), ("file", &file[..]), ("done", b"done")] {
        write(s, &format!("www/{name}"), content)?;
    }
    let root = root.display().to_string();
    let http = serve(s, host, "http", &["busybox", "httpd", "-f", "-vv", "-p", "10.9.0.9:80", "-h", &root])?;
    Ok([dhcp, http])
}

/// How often TCP in the namespace had to wait for a timer, retransmission or loss probe, before it sent more.
fn waits(host: &Netns) -> Result<u64> {
    let text = host.sh("grep ^TcpExt: /proc/net/netstat")?;
    let mut lines = text.lines().map(str::split_whitespace);
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else { return Err(Error::Unexpected(text)) };
    let waits = names.zip(values).filter(|(name, _)| ["TCPTimeouts", "TCPLossProbes"].contains(name));
    Ok(waits.filter_map(|(_, value)| value.parse::<u64>().ok()).sum())
}

/// Boots the firmware and waits until it has loaded the file, for the `turn`th time; returns what [`waits`] has grown by.
fn load(s: &Scenario, host: &Netns, daemon: &Daemon, turn: usize) -> Result<u64> {
    daemon.wait_state("a", "down")?;
    let before = waits(host)?;
    let machine = "-machine q35,memory-backend=ram -accel tcg -m 256 -object memory-backend-memfd,id=ram,size=256M,share=on \
                   -nodefaults -display none -boot n";
    let console = format!("file:{}", s.path("firmware.console").display());
    let words = machine.split_whitespace().map(str::to_owned);
    let command: Vec<String> = [QEMU.to_owned()].into_iter().chain(words).chain(["-serial".into(), console]).collect();
    // The card's own ROM: QEMU makes only that one fit the card.
    let nic =
        Nic::new(&s.path("a.sock")).arguments("a", 1).into_iter().map(|word| word.replace("romfile=", "bootindex=1"));
    let command: Vec<String> = command.into_iter().chain(nic).collect();
    let firmware = Child::start("firmware", &command, &s.path("firmware.log"), Stdio::null())?;
    wait::until_true("the firmware to load its files", LOAD, || {
        let requests = fs::read_to_string(s.path("http.log")).unwrap_or_default();
        Ok(requests.matches("url:/done").count() == turn)
    })?;
    drop(firmware);
    Ok(waits(host)? - before)
}

#[test]
fn firmware_loads_from_the_host_without_waiting_for_retransmission_timers() -> Result<()> {
    scenario(|s| {
        let host = s.netns("host")?;
        let yaml = Config::new(s.dir()).vnic("a", Mode::Server, 1).tap("host0", "lc0").yaml();
        let daemon = Daemon::start(s.dir(), &yaml, Some(&host))?;
        wait::until_true("the TAP interface", STEP, || Ok(host.sh("test -e /sys/class/net/lc0").is_ok()))?;
        host.configure("lc0", "10.9.0.9/24")?;
        let _servers = servers(s, &host)?;
        let large = load(s, &host, &daemon, 1)?;
        let cut = daemon.counter("a", "tx_segments_dropped")?;
        assert!(
            daemon.counter("a", "tx_segmented")? > 0 && cut > 0,
            "the host sent no large frames, or it lost nothing of them"
        );
        // What docs/offloads.md advises for such networks.
        write(s, "linecard.yaml", yaml.replace("lc0 }", "lc0 }, offloads: { tso: false }").as_bytes())?;
        daemon.cli(&["apply"])?;
        let small = load(s, &host, &daemon, 2)?;
        assert_eq!(daemon.counter("a", "tx_segments_dropped")?, cut);
        assert!(large <= small + WAITS, "TCP waited {large} times for a timer, and {small} times without large frames");
        daemon.balanced(&["a", "host0"])
    })
}

//! `make demo`: the quickstart configuration with two real guests on it, in half a minute, leaving nothing behind.

use std::error::Error;
use std::io::{IsTerminal, stdout};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{fs, thread};

use qemu_tests::guest::Spec;
use qemu_tests::traffic::{Machine, ping};
use qemu_tests::{Daemon, Flow, Guest, Nic, Scenario};

const QUICKSTART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/quickstart.yaml");

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\ndemo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let mut scenario = Scenario::new()?;
    show(&scenario)?;
    scenario.pass();
    Ok(())
}

fn show(s: &Scenario) -> Result<(), Box<dyn Error>> {
    let started = Instant::now();
    heading("A switch with two ports", "linecardd --config configs/quickstart.yaml");
    let daemon = s.daemon(&quickstart(s.dir())?)?;

    heading("Two guests, one on each port", "qemu-system-x86_64 ... -netdev vhost-user ...");
    let booting = Instant::now();
    let [vm1, vm2] = s.boot([guest(s, &daemon, "vm1", "10.9.0.1/24")?, guest(s, &daemon, "vm2", "10.9.0.2/24")?])?;
    println!("  vm1 is 10.9.0.1, vm2 is 10.9.0.2, booted in {:.1} s", booting.elapsed().as_secs_f64());

    heading("vm1 pings vm2", "ping -c 3 10.9.0.2");
    ping(&vm1, &vm2)?; // the first frames also resolve addresses
    for line in vm1.sh("ping -c 3 -i 0.2 10.9.0.2")?.lines().filter(|line| line.contains("icmp_seq")) {
        println!("  {line}");
    }

    heading("vm1 sends to vm2 for three seconds, every byte checked", "TCP");
    let sending = Instant::now();
    let flow = Flow::tcp(&vm1, &vm2)?;
    thread::sleep(Duration::from_secs(3));
    let report = flow.finish()?;
    let rate = report.bytes as f64 * 8.0 / sending.elapsed().as_secs_f64() / 1e6;
    println!("  {:.0} MB arrived, {} corrupt; {rate:.0} Mbit/s", report.bytes as f64 / 1e6, report.corrupt);

    heading("What the switch saw", "linecard port list; linecard port show vm1-eth0");
    println!("{}", indent(&daemon.cli(&["port", "list"])?));
    println!("{}", indent(&daemon.cli(&["port", "show", "vm1-eth0"])?));

    heading("Your own guest", "");
    println!("  linecard qemu args vm1-eth0     prints what to add to QEMU's command line");
    println!("  linecard libvirt xml vm1-eth0   prints the interface for libvirt");
    println!("\nDone in {:.0} s; guests, switch and files are gone.", started.elapsed().as_secs_f64());
    Ok(())
}

/// The quickstart file, its directories moved into the demo's own.
fn quickstart(dir: &Path) -> Result<String, Box<dyn Error>> {
    let dir = dir.display().to_string();
    let yaml = fs::read_to_string(QUICKSTART).map_err(|e| format!("read {QUICKSTART}: {e}"))?;
    let yaml = yaml.replace("/run/linecard", &dir).replace("/var/lib/linecard", &format!("{dir}/state"));
    // Without a `daemon` section the file means the default directories.
    let says = |key: &str| yaml.lines().any(|line| line.starts_with(key));
    let own = format!("daemon: {{ api: {dir}/api.sock, state-dir: {dir}/state }}\n");
    Ok(if says("daemon:") { yaml } else { yaml + "\n" + &own })
}

/// A guest on port `NAME-eth0`, with the MAC address that the port's configuration gives it.
fn guest(s: &Scenario, daemon: &Daemon, name: &str, address: &str) -> Result<Spec, Box<dyn Error>> {
    let port = format!("{name}-eth0");
    let mut nic = Nic::new(&s.path(&format!("{port}.sock")));
    if let Some(mac) = daemon.port(&port)?["mac"].as_str() {
        nic = nic.mac(mac);
    }
    Ok(Guest::named(name).nic(nic).address(address))
}

fn heading(title: &str, command: &str) {
    let (bold, faint, plain) = if stdout().is_terminal() { ("\x1b[1m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
    println!("\n{bold}{title}{plain}  {faint}{command}{plain}");
}

fn indent(text: &str) -> String {
    text.trim_end().lines().map(|line| format!("  {line}\n")).collect::<String>().trim_end().to_owned()
}

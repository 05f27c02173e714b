//! PID 1 of a test guest, and the command agent in it (its other side is `agent.rs`).
//!
//! Protocol on the virtio-serial port [`PORT_NAME`]: after boot one line `READY UPTIME`; then requests `ID LEN\n` with
//! LEN bytes of shell script, any number in flight; each is answered by `ID STATUS LEN\n` with LEN bytes of its output
//! and errors when it ends. The agent outlives any closing of the port's host side, which reads as end of file.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use qemu_tests::agent::PORT_NAME;
use rustix::mount::{MountFlags, mount};

fn main() {
    mount_all();
    run("modprobe virtio_net; ip link set lo up");
    let port = loop {
        match agent_port() {
            Some(port) => break port,
            None => thread::sleep(Duration::from_millis(10)),
        }
    };
    // PID 1 must not end: the kernel panics, and QEMU with it. Any trouble with the port is tried again.
    loop {
        if let Err(error) = serve(&port) {
            eprintln!("guest-init: {}: {error}", port.display());
        }
        thread::sleep(Duration::from_millis(100));
    }
}

fn mount_all() {
    let mounts = [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/tmp"), ("tmpfs", "/run")];
    for (kind, path) in mounts {
        if let Err(error) = mount(kind, path, kind, MountFlags::empty(), None) {
            eprintln!("guest-init: mount {path}: {error}");
        }
    }
}

fn agent_port() -> Option<PathBuf> {
    let named = |path: PathBuf| fs::read_to_string(path.join("name")).is_ok_and(|name| name.trim() == PORT_NAME);
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?;
    let port = ports.flatten().find(|port| named(port.path()))?;
    Some(PathBuf::from("/dev").join(port.file_name()))
}

fn serve(path: &PathBuf) -> std::io::Result<()> {
    let port = File::options().read(true).write(true).open(path)?;
    let replies = Arc::new(Mutex::new(port.try_clone()?));
    let uptime = fs::read_to_string("/proc/uptime")?;
    let uptime = uptime.split(' ').next().unwrap_or_default().to_owned();
    send(&replies, format!("READY {uptime}\n").as_bytes());
    let mut requests = BufReader::new(port);
    loop {
        let mut header = String::new();
        if requests.read_line(&mut header)? == 0 {
            thread::sleep(Duration::from_millis(20));
            continue;
        }
        let Some((id, length)) = parse(&header) else { continue };
        let mut script = vec![0; length];
        requests.read_exact(&mut script)?;
        let replies = replies.clone();
        thread::spawn(move || {
            let (status, output) = run(&String::from_utf8_lossy(&script));
            let mut reply = format!("{id} {status} {}\n", output.len()).into_bytes();
            reply.extend_from_slice(&output);
            send(&replies, &reply);
        });
    }
}

fn parse(header: &str) -> Option<(u64, usize)> {
    let (id, length) = header.trim().split_once(' ')?;
    Some((id.parse().ok()?, length.parse().ok()?))
}

fn send(replies: &Mutex<File>, bytes: &[u8]) {
    let mut port = replies.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Err(error) = port.write_all(bytes) {
        eprintln!("guest-init: reply: {error}");
    }
}

/// Runs a script and gives its status (128 + signal, as shells say it) with its output and errors.
fn run(script: &str) -> (i32, Vec<u8>) {
    let shell = Command::new("/bin/sh")
        .args(["-c", &format!("exec 2>&1\n{script}")])
        .env("PATH", "/bin")
        .stdin(Stdio::null())
        .output();
    match shell {
        Ok(done) => {
            let status = done.status.code().unwrap_or_else(|| 128 + done.status.signal().unwrap_or(0));
            (status, done.stdout)
        }
        Err(error) => (127, error.to_string().into_bytes()),
    }
}

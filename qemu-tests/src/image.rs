//! The guest's whole world: an initramfs with busybox, the real network tools, and this crate's [`guest-init`] as
//! PID 1. Everything comes from the host's own files, with the shared libraries that `ldd` names, so that nothing is
//! downloaded and a guest's tools are as new as the host's.
//!
//! [`guest-init`]: ../bin/guest-init.rs

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cpio::Archive;
use crate::modules::Modules;
use crate::{Error, Result, kit};

/// Host programs that every guest has. dash is the shell because busybox's own prefers its applets (its `ping` and
/// `ip` too) to the real programs in PATH.
const PROGRAMS: [(&str, &str); 5] =
    [("dash", "bin/sh"), ("ip", "bin/ip"), ("ping", "bin/ping"), ("ethtool", "bin/ethtool"), ("iperf3", "bin/iperf3")];

/// Programs of this crate in the guest.
const OWN: [(&str, &str); 2] = [("guest-init", "init"), ("payload", "bin/payload")];

/// Modules in the guest; `guest-init` loads virtio_net, a test may `modprobe` the others. What memory and PCI hot-plug,
/// virtio-pci and the virtio console need is built into Debian's kernel.
const MODULES: [&str; 5] = ["virtio_net", "virtio_balloon", "8021q", "vxlan", "geneve"];

const FIX_SETUP: &str = "qemu-tests/setup.sh";
const FIX_BUILD: &str = "cargo build -p qemu-tests --bins (with the same profile)";

/// Writes the initramfs for the kernel unpacked at `linux`.
pub fn write(linux: &Path, initramfs: &Path) -> Result<()> {
    let mut archive = Archive::default();
    for dir in ["proc", "sys", "dev", "tmp", "run", "etc", "root", "mnt"] {
        archive.directory(dir);
    }
    // The kernel opens /dev/console for PID 1 before anybody has mounted devtmpfs.
    archive.device("dev/console", 5, 1);
    for (program, path) in PROGRAMS {
        add_program(&mut archive, &find(program)?, path)?;
    }
    for (program, path) in OWN {
        add_program(&mut archive, &kit::binary(program, FIX_BUILD)?, path)?;
    }
    add_busybox(&mut archive, &find("busybox")?)?;
    Modules::read(linux)?.add(&MODULES, &mut archive)?;
    archive.write(initramfs)
}

fn add_program(archive: &mut Archive, program: &Path, path: &str) -> Result<()> {
    archive.file(path, stripped(program)?);
    for library in libraries(program)? {
        // The dynamic loader is found by its full name, libraries in the loader's default directories.
        let name = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let place = if name.starts_with("ld-linux") { format!("lib64/{name}") } else { format!("lib/{name}") };
        if !archive.contains(&place) {
            archive.file(&place, read(&library)?);
        }
    }
    Ok(())
}

fn add_busybox(archive: &mut Archive, busybox: &Path) -> Result<()> {
    archive.file("bin/busybox", read(busybox)?);
    let list = Command::new(busybox).arg("--list").output().map_err(Error::io("list busybox applets"))?;
    for applet in String::from_utf8_lossy(&list.stdout).split_whitespace() {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    Ok(())
}

/// A program without its debug information, which a guest would only unpack into its memory.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let out = tempfile::NamedTempFile::new().map_err(Error::io("create a temporary file"))?;
    let strip = Command::new("strip").arg("-o").arg(out.path()).arg(program).output();
    match strip {
        Ok(done) if done.status.success() => read(out.path()),
        _ => read(program),
    }
}

fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let ldd = Command::new("ldd").arg(program).output().map_err(Error::io(format!("run ldd on {program:?}")))?;
    let text = String::from_utf8_lossy(&ldd.stdout).into_owned();
    // "libc.so.6 => /lib/.../libc.so.6 (0x...)" or "/lib64/ld-linux-x86-64.so.2 (0x...)"
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect())
}

fn find(program: &'static str) -> Result<PathBuf> {
    let places = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
    let path = places.iter().map(|dir| Path::new(dir).join(program)).find(|path| path.exists());
    path.ok_or(Error::Missing { what: program, path: "/usr/bin".into(), fix: FIX_SETUP })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::io(format!("read {path:?}")))
}

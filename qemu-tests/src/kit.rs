//! The kit: what `setup.sh` prepared on this machine (QEMU, a guest kernel) and what this crate adds to it (the
//! initramfs, the answer to whether KVM works). It lives in `guest-kit/` of cargo's target directory.
//!
//! Scenarios of all processes share the machine's few CPUs, so a scenario first takes the kit's [`Slot`], a file lock.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use crate::guest::Guest;
use crate::{Error, Result, image};

/// The program that runs guests.
pub const QEMU: &str = "qemu-system-x86_64";

/// How long a guest may take to boot under KVM (under a second is usual); one that takes longer is better emulated.
const PROBE: Duration = Duration::from_secs(15);

/// How QEMU executes guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// The host's virtualisation.
    Kvm,
    /// QEMU's own emulation (TCG), one host thread per vCPU.
    Tcg,
}

/// What guests boot from.
#[derive(Clone, Debug)]
pub struct Kit {
    /// The directory with everything.
    pub dir: PathBuf,
    /// The guest kernel as an ELF file: booted through its PVH entry, without firmware or decompression.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
}

/// The right to run QEMU on this machine, until dropped.
#[derive(Debug)]
pub struct Slot {
    _lock: File,
}

impl Kit {
    /// The kit of this build, its initramfs written once per process.
    pub fn open() -> Result<&'static Kit> {
        static KIT: OnceLock<Kit> = OnceLock::new();
        if let Some(kit) = KIT.get() {
            return Ok(kit);
        }
        let kit = Kit::prepare()?;
        Ok(KIT.get_or_init(|| kit))
    }

    fn prepare() -> Result<Kit> {
        let dir = directory()?;
        let linux = dir.join("kernel");
        let kernel = linux.join("vmlinux");
        if !kernel.exists() {
            return Err(Error::Missing { what: "the guest kernel", path: kernel, fix: "qemu-tests/setup.sh" });
        }
        let initramfs = dir.join("guest.cpio");
        image::write(&linux, &initramfs)?;
        Ok(Kit { dir, kernel, initramfs })
    }

    /// Waits for this machine's QEMU slot. There is no deadline: the holder's scenario has deadlines of its own.
    pub fn slot() -> Result<Slot> {
        let path = directory()?.join("lock");
        let lock = File::create(&path).map_err(Error::io(format!("create {path:?}")))?;
        if lock.try_lock().is_err() {
            eprintln!("waiting for another scenario on this machine to end");
            lock.lock().map_err(Error::io(format!("lock {path:?}")))?;
        }
        Ok(Slot { _lock: lock })
    }

    /// KVM if it boots a guest here, else emulation. A `/dev/kvm` may exist and open and still not work (nested, in
    /// some clouds), so the question is put to a guest once per boot of this machine and the answer kept in the kit.
    pub fn accel(&self) -> Accel {
        static ACCEL: OnceLock<Accel> = OnceLock::new();
        *ACCEL.get_or_init(|| {
            if File::options().read(true).write(true).open("/dev/kvm").is_err() {
                return Accel::Tcg;
            }
            let note = self.dir.join("kvm");
            let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
            let works = match fs::read_to_string(&note).ok().as_deref().and_then(|n| n.strip_prefix(boot.as_str())) {
                Some(answer) => answer.trim() == "works",
                None => {
                    let works = self.boots_with_kvm();
                    // Without the note the next process asks again, which costs seconds and nothing else.
                    let _ = fs::write(&note, format!("{boot}{}\n", if works { "works" } else { "fails" }));
                    works
                }
            };
            if works { Accel::Kvm } else { Accel::Tcg }
        })
    }

    fn boots_with_kvm(&self) -> bool {
        let Ok(dir) = tempfile::tempdir() else { return false };
        Guest::named("kvm-probe")
            .accel(Accel::Kvm)
            .start(self, dir.path())
            .and_then(|guest| guest.ready_within(PROBE))
            .is_ok()
    }
}

/// Where binaries of this workspace are: beside this executable, or above it when this is a test (`deps/`).
pub fn binary(name: &'static str, fix: &'static str) -> Result<PathBuf> {
    let own = own_directory()?;
    let dir = if own.ends_with("deps") { own.parent().unwrap_or(&own).to_owned() } else { own };
    let path = dir.join(name);
    if path.exists() { Ok(path) } else { Err(Error::Missing { what: name, path, fix }) }
}

fn own_directory() -> Result<PathBuf> {
    let own = std::env::current_exe().map_err(Error::io("find this executable"))?;
    Ok(own.parent().map(Path::to_owned).unwrap_or_default())
}

fn directory() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("LINECARD_KIT_DIR") {
        return Ok(dir.into());
    }
    let own = own_directory()?;
    let kit = own.ancestors().map(|dir| dir.join("guest-kit")).find(|kit| kit.is_dir());
    kit.ok_or(Error::Missing { what: "the guest kit", path: own.join("../guest-kit"), fix: "qemu-tests/setup.sh" })
}

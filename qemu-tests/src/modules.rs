//! Kernel modules of the guest: reads depmod's `modules.dep`, and gives the asked modules with all they depend on,
//! decompressed (busybox does not read `.xz`), beside a `modules.dep` of just these.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::cpio::Archive;
use crate::{Error, Result};

/// The modules of one kernel, from its `modules.dep`.
#[derive(Debug)]
pub struct Modules {
    dir: PathBuf,
    version: String,
    /// Path (relative to the directory) and dependencies (as paths), by module name.
    known: BTreeMap<String, (String, Vec<String>)>,
}

impl Modules {
    /// Reads the one kernel's modules below `linux/lib/modules/VERSION`.
    pub fn read(linux: &Path) -> Result<Modules> {
        let all = linux.join("lib/modules");
        let mut entries = fs::read_dir(&all).map_err(Error::io(format!("read {all:?}")))?.flatten();
        let dir = entries.next().map(|e| e.path()).unwrap_or_default();
        let dep = dir.join("modules.dep");
        let text = fs::read_to_string(&dep).map_err(Error::io(format!("read {dep:?}")))?;
        let version = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Modules { dir, version, known: parse(&text) })
    }

    /// Puts `names` and their dependencies into the archive where modprobe looks for them.
    pub fn add(&self, names: &[&str], archive: &mut Archive) -> Result<()> {
        let root = format!("lib/modules/{}", self.version);
        let mut dep = String::new();
        for name in self.closure(names)? {
            let (path, needs) = &self.known[&name];
            archive.file(&format!("{root}/{}", plain(path)), self.contents(path)?);
            let needs: String = needs.iter().map(|path| format!(" {}", plain(path))).collect();
            dep += &format!("{}:{needs}\n", plain(path));
        }
        archive.file(&format!("{root}/modules.dep"), dep.into_bytes());
        Ok(())
    }

    fn closure(&self, names: &[&str]) -> Result<Vec<String>> {
        let mut wanted: Vec<String> = Vec::new();
        for &name in names {
            let missing = || Error::Unexpected(format!("guest kernel {} has no module {name}", self.version));
            let (_, needs) = self.known.get(name).ok_or_else(missing)?;
            // depmod lists a module's dependencies transitively: one level is all of them.
            wanted.extend(needs.iter().map(|path| module_name(path)).chain([name.to_owned()]));
        }
        wanted.sort();
        wanted.dedup();
        Ok(wanted)
    }

    fn contents(&self, path: &str) -> Result<Vec<u8>> {
        let path = self.dir.join(path);
        let run = |program: &str| {
            let run = Command::new(program).arg("-dc").arg(&path).stderr(Stdio::inherit()).output();
            run.map(|output| output.stdout).map_err(Error::io(format!("run {program} on {path:?}")))
        };
        match path.extension().and_then(|e| e.to_str()) {
            Some("xz") => run("xz"),
            Some("zst") => run("zstd"),
            _ => fs::read(&path).map_err(Error::io(format!("read {path:?}"))),
        }
    }
}

fn parse(dep: &str) -> BTreeMap<String, (String, Vec<String>)> {
    let line = |line: &str| {
        let (path, needs) = line.split_once(':')?;
        Some((module_name(path), (path.to_owned(), needs.split_whitespace().map(str::to_owned).collect())))
    };
    dep.lines().filter_map(line).collect()
}

/// `kernel/drivers/net/virtio_net.ko.xz` without the compression.
fn plain(path: &str) -> &str {
    path.strip_suffix(".xz").or_else(|| path.strip_suffix(".zst")).unwrap_or(path)
}

/// The name that `modprobe` knows: dashes and underscores are one.
fn module_name(path: &str) -> String {
    let file = plain(path).rsplit('/').next().unwrap_or_default();
    file.strip_suffix(".ko").unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_dep_gives_names_paths_and_dependencies() {
        let known = parse("kernel/net/net-failover.ko.xz: kernel/net/failover.ko.xz\nkernel/net/failover.ko.xz:\n");
        let (path, needs) = &known["net_failover"];
        assert_eq!(plain(path), "kernel/net/net-failover.ko");
        assert_eq!(needs, &["kernel/net/failover.ko.xz"]);
        assert!(known["failover"].1.is_empty());
    }
}

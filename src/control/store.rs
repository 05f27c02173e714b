//! What must survive the daemon: the ports made at run time, in one JSON file in the state directory.
//!
//! A port is on disk before anybody is told that it was added. A new version of the file replaces the old one by rename,
//! after its bytes are synced and before the directory is, so a crash at any moment leaves one or the other, whole. A
//! file that cannot be understood is moved aside, never overwritten: somebody's ports are in it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::TEXT_BYTES;
use crate::ident::Name;
use crate::sys::regular_file::{self, FileError, Symlinks};

/// What went wrong with the state directory.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file is there but cannot be read.
    #[error("cannot read {}: ports made at run time would be lost, so nothing is started", .0.display())]
    Read(PathBuf, #[source] FileError),
    /// The file is not ours, or not whole.
    #[error("{} cannot be understood and was moved to {}: ports made at run time are not there until it is mended", file.display(), aside.display())]
    Corrupt {
        /// What could not be understood.
        file: PathBuf,
        /// Where it is now.
        aside: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// It cannot be understood, and cannot be moved either.
    #[error("{} cannot be understood and cannot be moved aside: move it yourself", .0.display())]
    Stuck(PathBuf, #[source] io::Error),
    /// A new version could not be written.
    #[error("cannot write {}: is the state directory (daemon.state-dir) writable, and is there room?", .0.display())]
    Write(PathBuf, #[source] io::Error),
}

/// The ports made at run time, as they were written.
#[derive(Debug)]
pub struct Store {
    file: PathBuf,
    ports: BTreeMap<Name, Value>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content<Ports> {
    version: Version,
    ports: Ports,
}

/// The one version of the format there is; another one is not understood.
#[derive(Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
#[derive(Clone)]
struct Version;

impl TryFrom<u32> for Version {
    type Error = String;
    fn try_from(version: u32) -> Result<Self, String> {
        if version == 1 { Ok(Self) } else { Err(format!("version {version} is not known here, only 1 is")) }
    }
}

impl From<Version> for u32 {
    fn from(_: Version) -> Self {
        1
    }
}

impl Store {
    /// The file's name in the state directory.
    pub const FILE: &'static str = "ports.json";

    /// Reads what is in `directory`; no file there means no ports. A file that cannot be understood is moved aside, and
    /// the second value says so: a daemon goes on without it.
    ///
    /// # Errors
    /// The file is there and cannot be read, or cannot be moved aside.
    pub fn open(directory: &Path) -> Result<(Self, Option<StoreError>), StoreError> {
        let file = directory.join(Self::FILE);
        let text = match regular_file::read(&file, TEXT_BYTES, Symlinks::Refused) {
            Ok(text) => text,
            Err(error) if error.is_missing() => {
                return Ok((Self { file, ports: BTreeMap::new() }, None));
            }
            Err(error) => return Err(StoreError::Read(file, error)),
        };
        match serde_json::from_slice::<Content<BTreeMap<Name, Value>>>(&text) {
            Ok(content) => Ok((Self { file, ports: content.ports }, None)),
            Err(source) => {
                let aside = move_aside(&file).map_err(|error| StoreError::Stuck(file.clone(), error))?;
                let moved = StoreError::Corrupt { file: file.clone(), aside, source };
                Ok((Self { file, ports: BTreeMap::new() }, Some(moved)))
            }
        }
    }

    /// The ports.
    pub fn ports(&self) -> &BTreeMap<Name, Value> {
        &self.ports
    }

    /// Keeps a port, or another version of it.
    ///
    /// # Errors
    /// It could not be written; then nothing changed.
    pub fn put(&mut self, name: &Name, port: Value) -> Result<(), StoreError> {
        self.update(|ports| drop(ports.insert(name.clone(), port)))
    }

    /// Forgets a port.
    ///
    /// # Errors
    /// The file without it could not be written; then nothing changed.
    pub fn remove(&mut self, name: &Name) -> Result<(), StoreError> {
        self.update(|ports| drop(ports.remove(name)))
    }

    fn update(&mut self, change: impl FnOnce(&mut BTreeMap<Name, Value>)) -> Result<(), StoreError> {
        let mut ports = self.ports.clone();
        change(&mut ports);
        if ports != self.ports {
            self.write(&ports).map_err(|error| StoreError::Write(self.file.clone(), error))?;
            self.ports = ports;
        }
        Ok(())
    }

    fn write(&self, ports: &BTreeMap<Name, Value>) -> io::Result<()> {
        let directory = self.file.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory)?;
        let new = self.file.with_extension("json.new");
        let mut text = serde_json::to_vec_pretty(&Content { version: Version, ports })?;
        text.push(b'\n');
        // One that a crash has left, or whatever else: what is opened below is a file that nobody else has.
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = File::create_new(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&new, &self.file)?;
        File::open(directory)?.sync_all()
    }
}

/// Moves `file` to the first of `.bad`, `.bad1`, … that is free: an earlier accident's file is somebody's as well.
fn move_aside(file: &Path) -> io::Result<PathBuf> {
    let names = std::iter::once(String::new()).chain((1..).map(|n: u32| n.to_string()));
    for number in names.take(1000) {
        let aside = file.with_extension(format!("json.bad{number}"));
        // A hard link fails where a rename would overwrite.
        match fs::hard_link(file, &aside) {
            Ok(()) => return fs::remove_file(file).map(|()| aside),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other("there are 1000 files like it already"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[test]
    fn ports_come_back_as_they_were_written() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("not/yet/there");
        let (mut store, moved) = Store::open(&state).unwrap();
        assert!(moved.is_none() && store.ports().is_empty());
        store.put(&name("a"), json!({"null": {}, "network": "lan"})).unwrap();
        store.put(&name("b"), json!({"loopback": {}})).unwrap();
        store.remove(&name("a")).unwrap();
        let (again, moved) = Store::open(&state).unwrap();
        assert!(moved.is_none());
        assert_eq!(again.ports(), &BTreeMap::from([(name("b"), json!({"loopback": {}}))]));
        assert_eq!(fs::read_dir(&state).unwrap().count(), 1, "nothing else is left behind");
    }

    #[test]
    fn what_cannot_be_understood_is_moved_aside_and_never_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        for (text, aside) in
            [("{ torn", "ports.json.bad"), (r#"{"version":2,"ports":{}}"#, "ports.json.bad1"), ("", "ports.json.bad2")]
        {
            fs::write(directory.path().join(Store::FILE), text).unwrap();
            let (store, moved) = Store::open(directory.path()).unwrap();
            let message = moved.unwrap().to_string();
            assert!(store.ports().is_empty() && message.contains(aside), "{message}");
            assert_eq!(fs::read_to_string(directory.path().join(aside)).unwrap(), text);
            assert!(!directory.path().join(Store::FILE).exists());
        }
    }

    #[test]
    fn what_is_not_a_regular_file_is_neither_waited_for_nor_written_to() {
        use rustix::fs::{CWD, FileType, Mode, mknodat};
        let directory = tempfile::tempdir().unwrap();
        let pipe = |name: &str| {
            mknodat(CWD, directory.path().join(name), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        };
        let (mut store, _) = Store::open(directory.path()).unwrap();
        // A pipe, or a link, where the new version of the file is going to be.
        pipe("ports.json.new");
        store.put(&name("a"), json!({})).unwrap();
        let precious = directory.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        std::os::unix::fs::symlink(&precious, directory.path().join("ports.json.new")).unwrap();
        store.put(&name("b"), json!({})).unwrap();
        assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
        fs::remove_file(directory.path().join(Store::FILE)).unwrap();
        pipe(Store::FILE);
        let error = super::super::chain(&Store::open(directory.path()).unwrap_err());
        assert!(error.ends_with("nothing is started: it is a pipe, not a regular file"), "{error}");
    }

    #[test]
    fn a_write_that_fails_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let (mut store, _) = Store::open(&state).unwrap();
        fs::write(&state, "in the way").unwrap();
        let error = store.put(&name("a"), json!({})).unwrap_err();
        assert!(error.to_string().contains("daemon.state-dir"), "{error}");
        assert!(store.ports().is_empty());
    }
}

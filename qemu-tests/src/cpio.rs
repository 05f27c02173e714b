//! An initramfs archive: the kernel's "newc" cpio format, uncompressed (Documentation/driver-api/early-userspace/
//! buffer-format.rst). Written by hand because it is one header, and nothing then depends on a cpio program.

use std::collections::BTreeMap;
use std::path::Path;

use crate::{Error, Result};

/// A file tree to be; the order of paths puts directories before what they contain, as the kernel needs them.
#[derive(Debug, Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    mode: u32,
    data: Vec<u8>,
    device: (u32, u32),
}

impl Archive {
    /// Adds a directory and those above it.
    pub fn directory(&mut self, path: &str) {
        let mut at = path.trim_matches('/');
        while !at.is_empty() {
            self.entries.entry(at.to_owned()).or_insert(Entry { mode: 0o40755, data: Vec::new(), device: (0, 0) });
            at = at.rsplit_once('/').map_or("", |(above, _)| above);
        }
    }

    /// Adds a file that everybody may read and execute (modes matter little to a guest that is all root).
    pub fn file(&mut self, path: &str, data: Vec<u8>) {
        self.entry(path, Entry { mode: 0o100755, data, device: (0, 0) });
    }

    /// Adds a symbolic link, unless the path is taken.
    pub fn link(&mut self, path: &str, target: &str) {
        if !self.contains(path) {
            self.entry(path, Entry { mode: 0o120777, data: target.as_bytes().to_vec(), device: (0, 0) });
        }
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, Entry { mode: 0o20600, data: Vec::new(), device: (major, minor) });
    }

    /// Whether something is at this path.
    pub fn contains(&self, path: &str) -> bool {
        self.entries.contains_key(path.trim_start_matches('/'))
    }

    fn entry(&mut self, path: &str, entry: Entry) {
        if let Some((above, _)) = path.rsplit_once('/') {
            self.directory(above);
        }
        self.entries.insert(path.trim_start_matches('/').to_owned(), entry);
    }

    /// The archive's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.entries.values().map(|e| e.data.len() + 256).sum());
        for (inode, (path, entry)) in (1..).zip(&self.entries) {
            write_entry(&mut out, inode, path, entry);
        }
        write_entry(&mut out, 0, "TRAILER!!!", &Entry { mode: 0, data: Vec::new(), device: (0, 0) });
        out
    }

    /// Writes the archive so that readers see the old file or the new one whole.
    pub fn write(&self, path: &Path) -> Result<()> {
        let new = path.with_extension(format!("new-{}", std::process::id()));
        std::fs::write(&new, self.bytes()).map_err(Error::io(format!("write {new:?}")))?;
        std::fs::rename(&new, path).map_err(Error::io(format!("rename {new:?}")))
    }
}

/// Header of 13 fields in hex, name with its NUL, padding to 4, data, padding to 4.
fn write_entry(out: &mut Vec<u8>, inode: u32, path: &str, entry: &Entry) {
    let (size, name) = (entry.data.len() as u32, path.len() as u32 + 1);
    let (major, minor) = entry.device;
    let fields = [inode, entry.mode, 0, 0, 1, 0, size, 0, 0, major, minor, name, 0];
    out.extend_from_slice(b"070701");
    for field in fields {
        out.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    out.extend_from_slice(path.as_bytes());
    out.push(0);
    pad(out);
    out.extend_from_slice(&entry.data);
    pad(out);
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_come_before_their_files_and_the_trailer_last() {
        let mut archive = Archive::default();
        archive.file("/a/b/c", b"hello".to_vec());
        let bytes = archive.bytes();
        let at = |name: &[u8]| bytes.windows(name.len()).position(|w| w == name);
        let places = [at(b"a\0"), at(b"a/b\0"), at(b"a/b/c\0"), at(b"hello"), at(b"TRAILER!!!\0")];
        assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{places:?}");
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn an_entry_has_the_sizes_that_its_header_says() {
        let mut archive = Archive::default();
        archive.file("f", vec![7; 5]);
        let bytes = archive.bytes();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[6 + 6 * 8..6 + 7 * 8], b"00000005", "file size");
        assert_eq!(&bytes[6 + 11 * 8..6 + 12 * 8], b"00000002", "name size with its NUL");
        assert_eq!(bytes[112..117], [7; 5], "data follows header and name, both padded to 4");
    }
}

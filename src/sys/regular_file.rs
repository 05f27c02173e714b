//! Files that are read whole: [`read`]. Only regular ones of a bounded size, so that neither a pipe nor a device at a path that
//! somebody else could write keeps the reader waiting or fills its memory.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The kernel refused.
    #[error(transparent)]
    System(#[from] io::Error),
    /// It is something else, which the words name with their article.
    #[error("it is {0}, not a regular file")]
    Kind(&'static str),
    /// It is too long.
    #[error("it is longer than {0} bytes, the most that is read")]
    Long(u64),
}

impl FileError {
    /// Whether nothing is there.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::System(error) if error.kind() == io::ErrorKind::NotFound)
    }
}

/// Whether a symbolic link may lead to the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Symlinks {
    /// It may: the path was written by an operator.
    Followed,
    /// It may not: the path is in a directory of ours, where we make none.
    Refused,
}

/// The bytes of the file at `path`, if there are no more than `most`. Never waits for a writer.
///
/// # Errors
/// It is not there, not regular, too long, or cannot be read.
pub fn read(path: &Path, most: usize, links: Symlinks) -> Result<Vec<u8>, FileError> {
    let no_follow = if links == Symlinks::Refused { libc::O_NOFOLLOW } else { 0 };
    // Without O_NONBLOCK, opening a pipe waits for its writer (fifo(7)), and O_NOCTTY is for terminals (open(2)).
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | no_follow;
    let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ELOOP) if links == Symlinks::Refused => FileError::Kind("a symbolic link"),
        // What open(2) says of a socket.
        Some(libc::ENXIO) => FileError::Kind("a socket"),
        _ => FileError::System(error),
    })?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() {
        return Err(FileError::Kind(match kind {
            kind if kind.is_dir() => "a directory",
            kind if kind.is_fifo() => "a pipe",
            _ => "a device",
        }));
    }
    read_from(file, most)
}

/// All that comes from `stream`, if it is no more than `most` bytes.
fn read_from(stream: impl Read, most: usize) -> Result<Vec<u8>, FileError> {
    let mut bytes = Vec::new();
    stream.take(most as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > most { Err(FileError::Long(most as u64)) } else { Ok(bytes) }
}

/// The same as text.
///
/// # Errors
/// As above, or it is not UTF-8.
pub fn read_text(path: &Path, most: usize, links: Symlinks) -> Result<String, FileError> {
    text(read(path, most, links)?)
}

/// The text that comes from `stream`, which is somebody's who wants it to be waited for: standard input.
///
/// # Errors
/// It is too long, not UTF-8, or cannot be read.
pub fn read_text_from(stream: impl Read, most: usize) -> Result<String, FileError> {
    text(read_from(stream, most)?)
}

fn text(bytes: Vec<u8>) -> Result<String, FileError> {
    let not_text = |_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8 text");
    Ok(String::from_utf8(bytes).map_err(not_text)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    #[test]
    fn only_regular_files_of_bounded_size_are_read_and_nothing_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("file"), "12345678").unwrap();
        std::os::unix::fs::symlink(at("file"), at("link")).unwrap();
        mknodat(CWD, at("pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let told = |name: &str, links| read(&at(name), 8, links).map_err(|error| error.to_string());
        assert_eq!(told("file", Symlinks::Refused).unwrap(), b"12345678");
        assert_eq!(told("link", Symlinks::Followed).unwrap(), b"12345678");
        assert_eq!(told("link", Symlinks::Refused).unwrap_err(), "it is a symbolic link, not a regular file");
        assert_eq!(told("pipe", Symlinks::Refused).unwrap_err(), "it is a pipe, not a regular file");
        assert_eq!(told("socket", Symlinks::Followed).unwrap_err(), "it is a socket, not a regular file");
        assert_eq!(told(".", Symlinks::Followed).unwrap_err(), "it is a directory, not a regular file");
        assert!(read(&at("nothing"), 8, Symlinks::Refused).unwrap_err().is_missing());
        fs::write(at("file"), "123456789").unwrap();
        assert!(matches!(read(&at("file"), 8, Symlinks::Followed), Err(FileError::Long(8))));
        fs::write(at("file"), [0xff]).unwrap();
        assert!(read_text(&at("file"), 8, Symlinks::Followed).unwrap_err().to_string().contains("UTF-8"));
        assert_eq!(
            read(Path::new("/dev/zero"), 8, Symlinks::Followed).unwrap_err().to_string(),
            "it is a device, not a regular file"
        );
    }
}

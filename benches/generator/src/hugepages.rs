//! Huge pages, taken from the machine for as long as they are needed.

use std::io;

use crate::memory::HUGE_PAGE;

const COUNT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// At least this many pages of 2 MiB are reserved; the count from before comes back when this goes.
#[derive(Debug)]
pub struct HugePages {
    before: usize,
}

impl HugePages {
    /// Reserves room for `bytes` and `pages` more.
    pub fn reserve(bytes: usize, pages: usize) -> io::Result<Self> {
        let wanted = bytes.div_ceil(HUGE_PAGE) + pages;
        let before = count()?;
        let this = Self { before };
        if before < wanted {
            std::fs::write(COUNT, wanted.to_string())?;
        }
        let have = count()?;
        if have < wanted {
            let text = format!("cannot reserve {wanted} huge pages of 2 MiB, only {have}: free some memory");
            return Err(io::Error::other(text));
        }
        Ok(this)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(COUNT, self.before.to_string());
    }
}

fn count() -> io::Result<usize> {
    let text = std::fs::read_to_string(COUNT)?;
    text.trim().parse().map_err(|_| io::Error::other(format!("{COUNT} has {text:?}")))
}

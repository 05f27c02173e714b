//! Huge pages, taken from the machine for as long as they are needed.

use std::io;

use crate::memory::HUGE_PAGE;

const DIR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Pages of 2 MiB that the machine really got for this, which go again with it: never more than those, as the rest are others',
/// who may add and remove theirs meanwhile.
#[derive(Debug)]
pub struct HugePages {
    added: usize,
}

impl HugePages {
    /// Nothing of the machine's is touched.
    pub fn none() -> Self {
        Self { added: 0 }
    }

    /// Makes room for `bytes` and `pages` more.
    pub fn reserve(bytes: usize, pages: usize) -> io::Result<Self> {
        let wanted = bytes.div_ceil(HUGE_PAGE) + pages;
        let this = Self::add(wanted.saturating_sub(number("free_hugepages")?))?;
        let free = number("free_hugepages")?;
        if free < wanted {
            let text = format!("{wanted} huge pages of 2 MiB are needed, {free} are to be had: free some memory");
            return Err(io::Error::other(text));
        }
        Ok(this)
    }

    /// Asks for `count` more. The kernel may add fewer, even none, without an error: only what it did add is ours to give back.
    fn add(count: usize) -> io::Result<Self> {
        if count == 0 {
            return Ok(Self::none());
        }
        let before = number("nr_hugepages")?;
        set(before + count)?;
        Ok(Self { added: number("nr_hugepages")?.saturating_sub(before).min(count) })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(have) = number("nr_hugepages").ok().filter(|_| self.added > 0) {
            let _ = set(have.saturating_sub(self.added));
        }
    }
}

fn number(name: &str) -> io::Result<usize> {
    let text = std::fs::read_to_string(format!("{DIR}/{name}"))?;
    text.trim().parse().map_err(|_| io::Error::other(format!("{DIR}/{name} has {text:?}")))
}

fn set(count: usize) -> io::Result<()> {
    std::fs::write(format!("{DIR}/nr_hugepages"), count.to_string())
}

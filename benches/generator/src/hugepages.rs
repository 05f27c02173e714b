//! Huge pages, taken from the machine for as long as they are needed.
//!
//! A program of its own gives them back ([`Keeper`]): it waits for the end of a pipe, which comes when [`HugePages`] is dropped
//! and just as well when this process is killed, with its whole process group if need be.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::memory::HUGE_PAGE;

const DIR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Pages of 2 MiB that the machine really got for this, which go again with it: never more than those, as the rest are others',
/// who may add and remove theirs meanwhile.
#[derive(Debug)]
pub struct HugePages {
    _keeper: Option<Keeper>,
}

impl HugePages {
    /// Nothing of the machine's is touched.
    pub fn none() -> Self {
        Self { _keeper: None }
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
        let total = format!("{DIR}/nr_hugepages");
        let mut keeper = Keeper::start(Path::new(&total))?;
        let before = number("nr_hugepages")?;
        std::fs::write(&total, (before + count).to_string())?;
        keeper.keep(number("nr_hugepages")?.saturating_sub(before).min(count))?;
        Ok(Self { _keeper: Some(keeper) })
    }
}

/// A program that takes something off the number in a file when this is dropped, or this process is gone.
#[derive(Debug)]
struct Keeper(Child);

/// `$0` is the file; how much to take off is the first line that comes in, and the end of input the time to do it.
const SCRIPT: &str = r#"
trap '' HUP INT TERM
read -r added || exit 0
cat > /dev/null
have=$(cat "$0")
[ "$added" -le "$have" ] || added=$have
echo $((have - added)) > "$0"
"#;

impl Keeper {
    /// Starts it, out of reach of what ends this process and its group. It has nothing to take off yet.
    fn start(file: &Path) -> io::Result<Self> {
        let mut shell = Command::new("sh");
        shell.args(["-c", SCRIPT]).arg(file).stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
        shell.spawn().map(Self)
    }

    /// Tells it how much to take off in the end.
    fn keep(&mut self, count: usize) -> io::Result<()> {
        self.0.stdin.as_mut().map_or(Ok(()), |input| writeln!(input, "{count}"))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn number(name: &str) -> io::Result<usize> {
    let text = std::fs::read_to_string(format!("{DIR}/{name}"))?;
    text.trim().parse().map_err(|_| io::Error::other(format!("{DIR}/{name} has {text:?}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;
    use std::io::{BufRead, BufReader};
    use std::path::PathBuf;
    use std::time::{Duration, Instant};

    use rustix::process::{Pid, Signal, kill_process_group};

    use super::*;

    const FILE: &str = "GENERATOR_TEST_KEPT_FILE";

    fn pool() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("nr_hugepages");
        fs::write(&file, "10\n").unwrap();
        (dir, file)
    }

    fn number_in(file: &Path) -> Option<u32> {
        fs::read_to_string(file).unwrap().trim().parse().ok()
    }

    #[test]
    fn what_was_added_and_no_more_is_taken_off_again() {
        let (_dir, file) = pool();
        drop(Keeper::start(&file).unwrap());
        assert_eq!(number_in(&file), Some(10), "nothing was added");
        let mut keeper = Keeper::start(&file).unwrap();
        keeper.keep(3).unwrap();
        // Somebody else's.
        fs::write(&file, "12\n").unwrap();
        drop(keeper);
        assert_eq!(number_in(&file), Some(9));
        let mut keeper = Keeper::start(&file).unwrap();
        keeper.keep(20).unwrap();
        drop(keeper);
        assert_eq!(number_in(&file), Some(0), "somebody took them before");
    }

    /// Not a test: what [`a_process_group_that_is_killed_gives_back_as_well`] kills.
    #[test]
    #[ignore = "run by another test"]
    fn keep_until_killed() {
        let file = std::env::var_os(FILE).expect("the test that runs this says which file");
        let mut keeper = Keeper::start(Path::new(&file)).unwrap();
        keeper.keep(3).unwrap();
        println!("\nkept");
        loop {
            std::thread::park();
        }
    }

    #[test]
    fn a_process_group_that_is_killed_gives_back_as_well() {
        let (_dir, file) = pool();
        let mut run = Command::new(std::env::current_exe().unwrap());
        run.args(["--exact", "hugepages::tests::keep_until_killed", "--ignored", "--nocapture"]);
        let mut child = run.env(FILE, &file).stdout(Stdio::piped()).process_group(0).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("kept")), "it never kept anything");
        kill_process_group(Pid::from_raw(child.id() as i32).unwrap(), Signal::KILL).unwrap();
        child.wait().unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while number_in(&file) != Some(7) {
            assert!(Instant::now() < end, "{:?}", number_in(&file));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

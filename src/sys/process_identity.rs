//! Other processes of this host, told apart for good: [`ProcessIdentity`].
//!
//! The kernel gives process numbers anew, so a process is its number and when it was started (proc_pid_stat(5)).

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessIdentity {
    /// Its number.
    pub pid: i32,
    /// When it was started, in clock ticks since boot.
    pub started: u64,
}

impl ProcessIdentity {
    /// The process that has the number `pid` now; `None` if there is none, if it has ended and only waits for its parent, or
    /// if we cannot see it.
    pub fn of(pid: i32) -> Option<Self> {
        if pid <= 0 {
            return None;
        }
        let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        parse(&stat).map(|started| Self { pid, started })
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }
}

/// When the process of this line was started, if it has not ended. Its second field is a name in parentheses, which may
/// have any bytes in it, parentheses too.
fn parse(stat: &[u8]) -> Option<u64> {
    let name_end = stat.iter().rposition(|&byte| byte == b')')?;
    let mut fields = std::str::from_utf8(&stat[name_end + 1..]).ok()?.split_ascii_whitespace();
    let state = fields.next()?;
    // The state is field 3, the start field 22.
    let started = fields.nth(18)?.parse().ok()?;
    (!matches!(state, "Z" | "X" | "x")).then_some(started)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_process_is_itself_until_it_ends() {
        let own = ProcessIdentity::of(std::process::id() as i32).unwrap();
        assert!(own.is_running());
        assert!(!ProcessIdentity { started: own.started + 1, ..own }.is_running(), "the number was given anew");
        let mut child = std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        let other = ProcessIdentity::of(child.id() as i32).unwrap();
        assert_ne!(own, other);
        assert!(other.is_running());
        child.kill().unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while other.is_running() {
            assert!(std::time::Instant::now() < end, "a process that was killed and nobody waits for still runs");
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert_eq!((ProcessIdentity::of(0), ProcessIdentity::of(-1)), (None, None));
    }

    #[test]
    fn names_hide_nothing() {
        let line = |state: &str| format!("7 (a) Z 1 (b) {state} 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20");
        assert_eq!(parse(line("S").as_bytes()), Some(4711));
        assert_eq!(parse(line("Z").as_bytes()), None);
        assert_eq!(parse(b"7 (x) S 1"), None);
        assert_eq!(parse(b""), None);
    }
}

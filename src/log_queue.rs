//! The log's lines on their way to the thread that writes them: [`LOG`]. Whoever logs leaves a line here and goes on; only that thread
//! waits for whoever reads the log.
//!
//! What finds the queue full is lost and counted, and so is all that comes until what waits has been written: so there is one gap, and
//! it is told where it is.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use log::Level;

use crate::limits::{LOG_BYTES, LOG_LINES};

/// The log of this process.
pub static LOG: LogQueue = LogQueue::new(LOG_LINES, LOG_BYTES);

/// A line that takes longer than this to be written is not read by anybody.
const STUCK: Duration = Duration::from_secs(1);

/// What is to be written.
#[derive(Debug)]
pub struct Line {
    /// The message, or all of the line, as the destination wants it.
    pub text: Vec<u8>,
    /// How much it matters.
    pub level: Level,
    /// The module that says it.
    pub module: Option<&'static str>,
    /// Its source file, and the line there.
    pub place: (Option<&'static str>, Option<u32>),
}

/// What the thread that writes has to do next.
#[derive(Debug)]
pub enum Next {
    /// To write this line.
    Line(Line),
    /// To say that so many lines were lost behind the one before.
    Lost(u64),
}

/// How the log is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Lines that were lost since the process started.
    pub lost: u64,
    /// Whether the log is stuck: lines wait, and none was written for more than a second.
    pub stuck: bool,
}

/// Lines in the order in which they were logged, so many of them and no more.
#[derive(Debug)]
pub struct LogQueue {
    waiting: Mutex<Waiting>,
    came: Condvar,
    written: Condvar,
    most_lines: usize,
    most_bytes: usize,
}

#[derive(Debug)]
struct Waiting {
    lines: VecDeque<Line>,
    bytes: usize,
    lost: u64,
    /// Those of the lost that nobody was told of.
    untold: u64,
    /// Since when what came last from [`LogQueue::next`] is being written.
    writing: Option<Instant>,
}

impl LogQueue {
    const fn new(most_lines: usize, most_bytes: usize) -> Self {
        let waiting = Waiting { lines: VecDeque::new(), bytes: 0, lost: 0, untold: 0, writing: None };
        Self { waiting: Mutex::new(waiting), came: Condvar::new(), written: Condvar::new(), most_lines, most_bytes }
    }

    /// Has memory for all lines, so that [`push`](Self::push) asks for none.
    pub fn reserve(&self) {
        self.lock().lines.reserve_exact(self.most_lines);
    }

    /// Leaves a line, or counts it as lost. Waits for nobody.
    pub fn push(&self, line: Line) {
        let mut waiting = self.lock();
        let bytes = waiting.bytes + line.text.len();
        let full = waiting.lines.len() == self.most_lines || (bytes > self.most_bytes && !waiting.lines.is_empty());
        if full || waiting.untold > 0 {
            waiting.lost += 1;
            waiting.untold += 1;
            return;
        }
        waiting.bytes = bytes;
        waiting.lines.push_back(line);
        drop(waiting);
        self.came.notify_one();
    }

    /// What to write next; what came before is written. Waits until there is something.
    pub fn next(&self) -> Next {
        let mut waiting = self.lock();
        waiting.writing = None;
        if waiting.is_empty() {
            self.written.notify_all();
        }
        let mut waiting =
            self.came.wait_while(waiting, |waiting| waiting.is_empty()).unwrap_or_else(PoisonError::into_inner);
        waiting.writing = Some(Instant::now());
        match waiting.lines.pop_front() {
            Some(line) => {
                waiting.bytes -= line.text.len();
                Next::Line(line)
            }
            None => Next::Lost(std::mem::take(&mut waiting.untold)),
        }
    }

    /// Returns when all lines are written, or after this time.
    pub fn wait_written(&self, patience: Duration) {
        let is_busy = |waiting: &mut Waiting| waiting.writing.is_some() || !waiting.is_empty();
        let _ = self.written.wait_timeout_while(self.lock(), patience, is_busy);
    }

    /// How the log is.
    pub fn standing(&self) -> Standing {
        let waiting = self.lock();
        let stuck = waiting.writing.is_some_and(|since| since.elapsed() > STUCK);
        Standing { lost: waiting.lost, stuck }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.untold == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(queue: &LogQueue, text: &str) {
        queue.push(Line { text: text.into(), level: Level::Info, module: None, place: (None, None) });
    }

    fn next(queue: &LogQueue) -> String {
        match queue.next() {
            Next::Line(line) => String::from_utf8_lossy(&line.text).into_owned(),
            Next::Lost(lines) => format!("lost {lines}"),
        }
    }

    #[test]
    fn lines_wait_in_order_up_to_a_bound_and_a_gap_is_told_where_it_is() {
        let queue = LogQueue::new(3, 1000);
        queue.reserve();
        (1..=5).for_each(|n| push(&queue, &n.to_string()));
        assert_eq!(next(&queue), "1");
        // There is room, but this would hide where lines are missing.
        push(&queue, "6");
        assert_eq!([next(&queue), next(&queue)], ["2", "3"]);
        push(&queue, "7");
        assert_eq!(next(&queue), "lost 4");
        push(&queue, "8");
        assert_eq!(next(&queue), "8");
        assert_eq!(queue.standing(), Standing { lost: 4, stuck: false });
    }

    #[test]
    fn bytes_are_bounded_as_well_and_a_line_of_any_length_is_written_when_none_waits() {
        let queue = LogQueue::new(100, 10);
        push(&queue, "123456");
        push(&queue, "7890");
        push(&queue, "x");
        assert_eq!([next(&queue), next(&queue), next(&queue)], ["123456", "7890", "lost 1"]);
        push(&queue, &"y".repeat(11));
        push(&queue, "");
        assert_eq!([next(&queue), next(&queue)], ["y".repeat(11), "lost 1".into()]);
    }

    #[test]
    fn what_is_not_written_is_waited_for_so_long_and_no_longer_and_then_is_stuck() {
        let queue = LogQueue::new(3, 1000);
        queue.wait_written(Duration::MAX);
        push(&queue, "1");
        assert_eq!(next(&queue), "1");
        queue.wait_written(STUCK + Duration::from_millis(100));
        assert!(queue.standing().stuck);
        std::thread::scope(|scope| {
            scope.spawn(|| queue.next());
            queue.wait_written(Duration::MAX);
            assert!(!queue.standing().stuck);
            push(&queue, "2");
        });
    }
}

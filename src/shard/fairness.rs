//! How the cycles of a shard are shared out between ports that all want them: [`Account`], deficit round robin in cycles.
//!
//! Each round gives every port the same number of cycles, its quantum; a port is served until it has used them or has
//! nothing left. A batch cannot be broken off, so a port may overdraw by what one batch takes, and pays that back out of
//! its next quanta (Shreedhar and Varghese's deficit round robin, with the debt carried instead of the credit, because
//! what a batch costs is known only afterwards). How much it can cost is bounded where frames become many
//! ([`crate::limits::VISIT_WORK`]). What counts is measured cycles, not frames: a port with 128 queues, with
//! frames that are costly to copy, or that floods a large network gets as much of the shard as one with small frames.
//!
//! What it costs: one look at the cycle counter per visit of a queue, about 25 cycles beside the 250 of the smallest batch
//! and the 5,000 of a full one; and nothing while a single port is awake. With a quantum of 2 us, a port waits for its
//! turn 2 us for each other port that is busy, or one batch if that takes longer.

/// What a port may use in one round, in nanoseconds: a full batch of small frames. Less would make a port with full
/// batches sit out rounds for no gain; more makes everybody else wait longer.
pub(super) const QUANTUM_NANOS: u64 = 2_000;

/// The largest debt, in quanta (10 ms). A visit that seemed to take longer was one in which the kernel gave the CPU to
/// somebody else, which is not the port's doing.
const DEBT_QUANTA: i64 = 5_000;

/// What one port has left of its cycles; below zero what it owes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Account(i64);

impl Account {
    /// Whether the port has to wait for a later round.
    #[inline]
    pub fn is_spent(self) -> bool {
        self.0 <= 0
    }

    /// What the port owes.
    #[inline]
    pub fn debt(self) -> i64 {
        self.0.saturating_neg().max(0)
    }

    /// A new round: `grant` cycles more. Nobody saves up more than one `quantum`: a port that did not use its cycles had
    /// nothing to do with them.
    #[inline]
    pub fn grant(&mut self, grant: i64, quantum: i64) {
        self.0 = self.0.saturating_add(grant).min(quantum);
    }

    /// Takes off what a visit took.
    #[inline]
    pub fn charge(&mut self, cycles: u64, quantum: i64) {
        let cycles = i64::try_from(cycles).unwrap_or(i64::MAX);
        self.0 = self.0.saturating_sub(cycles).max(quantum.saturating_mul(-DEBT_QUANTA));
    }

    /// Forgets everything: the port is alone.
    #[inline]
    pub fn clear(&mut self) {
        self.0 = 0;
    }
}

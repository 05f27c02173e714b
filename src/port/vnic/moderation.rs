//! When a guest is interrupted for frames that it was given: [`Moderation`], pure.
//!
//! An interrupt costs the guest some microseconds of its CPU and us a system call of half a one. One for each batch is the
//! quickest for a guest that waits, and a waste for one that is being streamed to. What the levels do:
//!
//! | level | an interrupt that the guest wants |
//! |---|---|
//! | low | goes at once if the last one was 500 us ago; else they are 500 us apart, or there are 64 frames for it |
//! | normal | goes at once, unless the guest is being streamed to; then they are at least 50 us apart |
//! | medium, high | goes at once |
//!
//! *Streamed to* means that the guest was given two frames or more for each interrupt, on average over the last eight or so,
//! and that its last interrupt is less than 50 us old. A guest that is asked and answers, one frame at a time, never is,
//! however quick it is; nor is one that was left alone for 50 us. So at `normal` no interrupt is late for more than 50 us,
//! and with one frame in flight none is late at all. What Linux does by itself in addition (it asks for no interrupt while
//! its NAPI polls) comes first: only interrupts that it wants are counted here.
//!
//! Whoever holds one back must see to it that it is sent when it is due: [`crate::port::Outcome::hold`].

use crate::ident::LatencySensitivity;
use crate::sys::cpu;

/// Frames after which nothing is held back any longer.
const FRAMES: u32 = 64;

/// Average frames for one interrupt from which on a guest is being streamed to, in eighths.
const STREAM: u32 = 16;

/// Frames of one interrupt that count for the average: how much of a stream it was does not matter, and the sooner the
/// average falls after it, within fifteen interrupts, the sooner an answer goes at once again.
const COUNTED: u32 = 8;

/// What to do about an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// The guest wants none.
    None,
    /// Send it.
    Call,
    /// Send it at this cycle count, together with whatever comes until then.
    Hold(u64),
}

/// The interrupts of one ring.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Moderation {
    level: LatencySensitivity,
    /// Frames since the last interrupt.
    frames: u32,
    /// Frames for each of the last interrupts, in eighths.
    average: u32,
    last_call: u64,
    /// When the interrupt that is held back is due.
    due: Option<u64>,
}

impl Moderation {
    /// Changes the level for what comes.
    pub fn set_level(&mut self, level: LatencySensitivity) {
        self.level = level;
    }

    /// When the interrupt that is held back is due, if there is one.
    #[inline]
    pub fn due(&self) -> Option<u64> {
        self.due
    }

    /// Whether an interrupt that is held back stays so when the shard has nothing else to do.
    pub fn is_patient(&self) -> bool {
        self.level == LatencySensitivity::Low
    }

    /// `frames` more were given to the guest, which wants an interrupt for them or does not. `now` is asked only if that
    /// makes a difference.
    #[inline]
    pub fn given(&mut self, frames: u32, wanted: bool, now: impl FnOnce() -> u64) -> Decision {
        if matches!(self.level, LatencySensitivity::Medium | LatencySensitivity::High) && self.due.is_none() {
            return if wanted { Decision::Call } else { Decision::None };
        }
        self.frames = self.frames.saturating_add(frames);
        if !wanted && self.due.is_none() {
            return Decision::None;
        }
        self.moderate(now())
    }

    /// An interrupt is owed at `now`: when does it go?
    fn moderate(&mut self, now: u64) -> Decision {
        let micros = |count: u64| cpu::cycles_per_second() / 1_000_000 * count;
        let due = self.due.unwrap_or(match self.level {
            LatencySensitivity::Low => self.last_call.wrapping_add(micros(500)),
            LatencySensitivity::Normal if self.average >= STREAM => self.last_call.wrapping_add(micros(50)),
            _ => now,
        });
        // Cycle counts are compared by their distance; one that was left behind long ago is as good as now.
        let left = due.wrapping_sub(now);
        if self.frames >= FRAMES || left == 0 || left > micros(500) {
            self.called(now);
            return Decision::Call;
        }
        self.due = Some(due);
        Decision::Hold(due)
    }

    /// An interrupt was sent at `now`.
    pub fn called(&mut self, now: u64) {
        self.average = self.average - self.average / 8 + self.frames.min(COUNTED);
        self.frames = 0;
        self.last_call = now;
        self.due = None;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn micros(count: u64) -> u64 {
        cpu::cycles_per_second() / 1_000_000 * count
    }

    fn at(level: LatencySensitivity) -> Moderation {
        Moderation { level, ..Moderation::default() }
    }

    #[test]
    fn one_frame_in_flight_is_never_held_back_however_quick_the_guest_answers() {
        let mut normal = at(LatencySensitivity::Normal);
        for round in 0..1000 {
            assert_eq!(normal.given(1, true, || micros(3 * round)), Decision::Call, "round {round}");
        }
    }

    #[test]
    fn a_stream_has_its_interrupts_fifty_microseconds_apart() {
        let mut normal = at(LatencySensitivity::Normal);
        let mut calls = Vec::new();
        for now in (1..2000).map(|step| micros(1000 + step * 5)) {
            match normal.given(4, true, || now) {
                Decision::Call => calls.push(now),
                Decision::Hold(due) => assert!(due > now && due - now <= micros(50)),
                Decision::None => panic!("it was wanted"),
            }
        }
        let apart: Vec<u64> = calls.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(apart[20..].iter().all(|&apart| apart == micros(50)), "{apart:?}");
        // Left alone for a while it is a guest that waits, and then one that is asked and answers.
        assert_eq!(normal.given(1, true, || micros(100_000)), Decision::Call);
        let mut now = micros(100_000);
        let late = (0..100).filter(|_| {
            now += micros(20);
            match normal.given(1, true, || now) {
                Decision::Hold(due) => {
                    now = due;
                    normal.called(now);
                    true
                }
                _ => false,
            }
        });
        assert!(late.count() < 20);
    }

    #[test]
    fn low_has_its_interrupts_sixty_four_frames_or_half_a_millisecond_apart() {
        let mut low = at(LatencySensitivity::Low);
        let first = micros(10_000);
        assert_eq!(low.given(1, true, || first), Decision::Call, "it was left alone");
        let next = first + micros(500);
        assert_eq!(low.given(1, true, || first + micros(1)), Decision::Hold(next));
        assert_eq!(low.given(62, false, || first + micros(2)), Decision::Hold(next));
        assert_eq!(low.given(1, false, || first + micros(3)), Decision::Call);
        assert_eq!(low.given(3, false, || unreachable!("nobody wants one")), Decision::None);
        let Decision::Hold(due) = low.given(1, true, || first + micros(4)) else { panic!("not held back") };
        assert_eq!((due, low.given(1, true, || due)), (first + micros(503), Decision::Call));
        assert_eq!(low.due(), None);
    }

    #[test]
    fn sensitive_guests_are_interrupted_at_once_and_nobody_looks_at_the_time() {
        for level in [LatencySensitivity::Medium, LatencySensitivity::High] {
            let mut moderation = at(level);
            assert_eq!(moderation.given(9, true, || unreachable!()), Decision::Call);
            assert_eq!(moderation.given(9, false, || unreachable!()), Decision::None);
        }
        let mut raised = at(LatencySensitivity::Low);
        raised.called(micros(1000));
        assert!(matches!(raised.given(1, true, || micros(1001)), Decision::Hold(_)));
        raised.set_level(LatencySensitivity::High);
        assert!(
            matches!(raised.given(1, false, || micros(1501)), Decision::Call),
            "what was held back is not forgotten"
        );
    }

    proptest! {
        /// Whatever comes: what is wanted is sent or held back, never later than its level allows, and no longer than
        /// until 64 frames are there.
        #[test]
        fn nothing_that_is_wanted_is_forgotten(
            level in prop::sample::select(vec![LatencySensitivity::Low, LatencySensitivity::Normal]),
            steps in prop::collection::vec((0u64..200, 1u32..65, any::<bool>()), 1..200),
        ) {
            let most = if level == LatencySensitivity::Low { 500 } else { 50 };
            let mut moderation = at(level);
            let (mut now, mut owed) = (micros(1_000_000), None::<(u64, u32)>);
            for (after, frames, wanted) in steps {
                now += micros(after);
                if let Some((since, _)) = owed && moderation.due().unwrap() <= now {
                    prop_assert!(moderation.due().unwrap() - since <= micros(most));
                    moderation.called(now);
                    owed = None;
                }
                match moderation.given(frames, wanted, || now) {
                    Decision::Call => owed = None,
                    Decision::None => prop_assert!(!wanted && owed.is_none()),
                    Decision::Hold(due) => {
                        let (since, had) = owed.unwrap_or((now, 0));
                        prop_assert!(due - since <= micros(most) && had + frames < 64);
                        owed = Some((since, had + frames));
                    }
                }
                prop_assert_eq!(owed.is_some(), moderation.due().is_some());
            }
        }
    }
}

//! When a port begins to send more than it may have flooded, and when that is over: [`Storms`], told from the counters of its
//! storm control once a second.
//!
//! A storm is over when nothing was dropped for [`CALM`]: a guest that floods now and then makes one storm and not an event for
//! each time.

use super::events::{Event, Events, Traffic};
use crate::ident::Name;
use crate::switch::{Storm, StormClass};

/// For how many seconds in a row nothing must have been dropped.
const CALM: u32 = 10;

/// What is going on at one port.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Storms([Watch; 3]);

/// What is going on with one class of frames.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Watch {
    /// The counter, as it was seen last.
    seen: u64,
    /// The storm there is: the counter before it, and for how long nothing was dropped.
    storm: Option<(u64, u32)>,
}

/// What a look found.
#[derive(Debug, PartialEq, Eq)]
enum Turn {
    Began,
    Ended {
        /// Frames that were dropped.
        dropped: u64,
    },
}

impl Storms {
    /// Looks at the counters of port `name`, and says what began and ended. To be called once a second.
    pub(super) fn look(&mut self, name: &Name, control: &Storm, events: &Events) {
        let (rates, refused) = (control.rates(), control.refused());
        for (at, class) in StormClass::ALL.into_iter().enumerate() {
            let Some(turn) = self.0[at].look(refused[at]) else { continue };
            let (port, traffic) = (name.to_string(), traffic(class));
            events.record(match turn {
                // The bound may have been lifted since.
                Turn::Began => Event::StormBegan { port, traffic, limit: rates[at].unwrap_or(0).into() },
                Turn::Ended { dropped } => Event::StormEnded { port, traffic, dropped },
            });
        }
    }
}

/// The class as events name it.
fn traffic(class: StormClass) -> Traffic {
    match class {
        StormClass::Broadcast => Traffic::Broadcast,
        StormClass::Multicast => Traffic::Multicast,
        StormClass::UnknownUnicast => Traffic::UnknownUnicast,
    }
}

impl Watch {
    fn look(&mut self, refused: u64) -> Option<Turn> {
        let before = std::mem::replace(&mut self.seen, refused);
        match (&mut self.storm, refused > before) {
            (None, false) => None,
            (None, true) => {
                self.storm = Some((before, 0));
                Some(Turn::Began)
            }
            (Some((_, calm)), true) => {
                *calm = 0;
                None
            }
            (Some((start, calm)), false) => {
                *calm += 1;
                let dropped = refused.saturating_sub(*start);
                (*calm >= CALM).then(|| {
                    self.storm = None;
                    Turn::Ended { dropped }
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storm_begins_once_and_ends_when_it_was_calm_for_long_enough() {
        let mut watch = Watch::default();
        let mut look = |refused| watch.look(refused);
        assert_eq!([look(0), look(0), look(5), look(5), look(9)], [None, None, Some(Turn::Began), None, None]);
        for _ in 1..CALM {
            assert_eq!(look(9), None);
        }
        assert_eq!(look(10), None, "it was one second short");
        for _ in 1..CALM {
            assert_eq!(look(10), None);
        }
        assert_eq!(look(10), Some(Turn::Ended { dropped: 10 }));
        assert_eq!([look(10), look(11)], [None, Some(Turn::Began)]);
        for _ in 1..CALM {
            assert_eq!(look(11), None);
        }
        assert_eq!(look(11), Some(Turn::Ended { dropped: 1 }), "each is counted by itself");
    }
}

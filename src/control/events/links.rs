//! Ports that come up, go down, stop and are barred, found by comparing what is published of them with what was: [`Links`].

use std::collections::BTreeMap;

use super::{Event, Events};
use crate::control::report::PortState;
use crate::port::Conduct;

/// What was last seen of the ports.
#[derive(Debug, Default)]
pub(in crate::control) struct Links(BTreeMap<String, Seen>);

#[derive(Debug, Clone, Copy)]
struct Seen {
    state: PortState,
    /// How often it was barred.
    barred: u64,
}

/// What a port is now.
pub(in crate::control) struct Sight {
    pub(in crate::control) port: String,
    pub(in crate::control) state: PortState,
    pub(in crate::control) reason: Option<String>,
    /// Nothing of a port that does not answer.
    pub(in crate::control) conduct: Option<Conduct>,
}

/// How many ports there are in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Those that carry frames.
    pub up: usize,
    /// Those that wait for their far end.
    pub down: usize,
    /// Those that somebody has to look at.
    pub stopped: usize,
}

impl Links {
    /// What there was at the last call of [`Self::note`].
    pub(in crate::control) fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for seen in self.0.values() {
            match seen.state {
                PortState::Up => tally.up += 1,
                PortState::Down => tally.down += 1,
                PortState::Stopped => tally.stopped += 1,
            }
        }
        tally
    }

    /// Records what has become of the ports since the last call. A port that is new and waits for its far end is not worth a
    /// word; one that has come up and is down again in between is not seen.
    pub(in crate::control) fn note(&mut self, ports: impl Iterator<Item = Sight>, events: &Events) {
        let mut before = std::mem::take(&mut self.0);
        for Sight { port, state, reason, conduct } in ports {
            let seen = before.remove(&port);
            let (was, bars) = (seen.map(|seen| seen.state), seen.map_or(0, |seen| seen.barred));
            let barred = conduct.map_or(bars, |conduct| conduct.barred);
            self.0.insert(port.clone(), Seen { state, barred });
            if let Some(Conduct { deed: Some(deed), seconds, .. }) = conduct.filter(|_| barred > bars) {
                let (port, reason) = (port.clone(), format!("its front end {deed}"));
                events.record(Event::PortBarred { port, reason, seconds });
            }
            let reason = reason.unwrap_or_default();
            match state {
                PortState::Up if was != Some(state) => events.record(Event::PortUp { port }),
                PortState::Down if was.is_some_and(|was| was != state) => {
                    events.record(Event::PortDown { port, reason })
                }
                PortState::Stopped if was != Some(state) => events.record(Event::PortStopped { port, reason }),
                _ => {}
            }
        }
        for (port, _) in before.into_iter().filter(|(_, seen)| seen.state == PortState::Up) {
            events.record(Event::PortDown { port, reason: "it was removed".into() });
        }
    }
}

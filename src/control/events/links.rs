//! Ports that come up, go down and stop, found by comparing what their links are with what they were: [`Links`].

use std::collections::BTreeMap;

use super::{Event, Events};
use crate::control::report::PortState;

/// What the ports' links were.
#[derive(Debug, Default)]
pub(in crate::control) struct Links(BTreeMap<String, PortState>);

impl Links {
    /// Records what has become of the ports since the last call. A port that is new and waits for its far end is not worth a
    /// word; one that has come up and is down again in between is not seen.
    pub(in crate::control) fn note(
        &mut self,
        ports: impl Iterator<Item = (String, PortState, Option<String>)>,
        events: &Events,
    ) {
        let mut before = std::mem::take(&mut self.0);
        for (port, state, reason) in ports {
            let was = before.remove(&port);
            self.0.insert(port.clone(), state);
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
        for (port, _) in before.into_iter().filter(|(_, state)| *state == PortState::Up) {
            events.record(Event::PortDown { port, reason: "it was removed".into() });
        }
    }
}

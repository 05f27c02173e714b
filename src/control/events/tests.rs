//! The list keeps its bounds and its order, whoever causes events and however slowly they are read.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::control::report::PortState;
use crate::port::Conduct;

fn up(port: &str) -> Event {
    Event::PortUp { port: port.into() }
}

fn numbers(records: &[EventRecord]) -> Vec<u64> {
    records.iter().map(|record| record.seq).collect()
}

#[test]
fn a_record_is_its_number_its_time_and_the_kind_with_its_fields() {
    let events = Events::default();
    events.record(Event::AddressMoved {
        network: "lan".into(),
        mac: "02:00:00:00:00:01".into(),
        port: "b".into(),
        other_port: "a".into(),
        count: 1,
    });
    let record = events.since(0).remove(0);
    let written = serde_json::to_value(&record).unwrap();
    assert_eq!((&written["seq"], &written["event"]), (&1.into(), &"address-moved".into()));
    assert_eq!((&written["port"], &written["other-port"]), (&"b".into(), &"a".into()));
    assert_eq!(serde_json::from_value::<EventRecord>(written).unwrap(), record);
}

#[test]
fn a_kinds_name_is_the_one_that_is_written() {
    let port = || "a".to_string();
    let text = String::new;
    let kinds = [
        Event::DaemonStarted { version: text() },
        Event::DaemonStopping,
        Event::ConfigurationApplied { generation: 1, steps: 0 },
        Event::ConfigurationRefused { reason: text() },
        up("a"),
        Event::PortDown { port: port(), reason: text() },
        Event::PortStopped { port: port(), reason: text() },
        Event::PortBarred { port: port(), reason: text(), seconds: 5 },
        Event::AddressMoved { network: text(), mac: text(), port: port(), other_port: text(), count: 1 },
        Event::AddressDamped {
            network: text(),
            mac: text(),
            port: port(),
            other_port: text(),
            more_ports: 1,
            count: 1,
        },
        Event::AddressPinned { network: text(), mac: text(), port: port(), other_port: text(), count: 1 },
        Event::AddressesUntold { count: 1 },
        Event::AddressesRefused { network: text(), port: port(), limit: AddressLimit::Host, most: 1, count: 1 },
        Event::LoopSuspected { network: text(), port: port(), other_port: text(), count: 1 },
        Event::ShardStalled { cpu: 0, port: port(), sender: None, milliseconds: 1, short_times: None },
        Event::ShardStalled { cpu: 0, port: port(), sender: Some(port()), milliseconds: 1, short_times: Some(2) },
        Event::StormBegan { port: port(), traffic: Traffic::Broadcast, limit: 1 },
        Event::StormEnded { port: port(), traffic: Traffic::UnknownUnicast, dropped: 1 },
    ];
    for event in kinds {
        let written = serde_json::to_value(&event).unwrap();
        assert_eq!(written["event"], event.kind());
        assert_eq!(written.get("port").and_then(|port| port.as_str()), event.port(), "{event}");
    }
}

#[test]
fn a_full_list_loses_the_oldest_of_whoever_has_most() {
    let events = Events::default();
    events.record(up("quiet"));
    for _ in 0..EVENTS + 500 {
        events.record(up("noisy"));
    }
    let records = events.since(0);
    assert_eq!(records.len(), EVENTS);
    assert_eq!(numbers(&records[..2]), [1, 503]);
    assert_eq!(records[0].event.port(), Some("quiet"));
    assert_eq!(records.last().unwrap().seq, 1 + EVENTS as u64 + 500);
    let held = &events.list().held;
    assert_eq!(held.values().sum::<usize>(), EVENTS);
}

#[test]
fn a_number_from_an_earlier_daemon_means_all() {
    let events = Events::default();
    ["a", "b", "c"].into_iter().for_each(|port| events.record(up(port)));
    assert_eq!(numbers(&events.since(1)), [2, 3]);
    assert!(events.since(3).is_empty());
    assert_eq!(numbers(&events.since(4)), [1, 2, 3]);
}

#[test]
fn a_long_text_ends_at_the_bound() {
    let events = Events::default();
    events.record(Event::PortDown { port: "a".into(), reason: "\u{e4}".repeat(EVENT_REASON_BYTES) });
    let record = events.since(0).remove(0);
    let Event::PortDown { reason, .. } = &record.event else { panic!("{record:?}") };
    assert_eq!((reason.len(), reason.ends_with("\u{e4}...")), (EVENT_REASON_BYTES + 3, true));
}

#[test]
fn lines_are_bounded_by_kind_and_port() {
    let mut list = List::default();
    let now = Instant::now();
    let admitted = |list: &mut List, event: &Event, seconds| list.quota(event, now + Duration::from_secs(seconds));
    for _ in 0..EVENT_LOG_LINES {
        assert_eq!(admitted(&mut list, &up("a"), 0), Some(0));
    }
    assert_eq!([1, 59].map(|seconds| admitted(&mut list, &up("a"), seconds)), [None, None]);
    assert_eq!(admitted(&mut list, &up("b"), 59), Some(0), "another port");
    assert_eq!(admitted(&mut list, &Event::PortDown { port: "a".into(), reason: String::new() }, 59), Some(0));
    assert_eq!([60, 61].map(|seconds| admitted(&mut list, &up("a"), seconds)), [Some(2), Some(0)]);
    // Ports that come and go under ever new names are not remembered for ever.
    for number in 0..5 * PORTS as u64 {
        admitted(&mut list, &up(&number.to_string()), 200);
    }
    assert!(list.quotas.len() <= 4 * PORTS, "{}", list.quotas.len());
}

#[test]
fn followers_get_every_record_once_and_end_with_the_daemon() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let events = Arc::new(Events::default());
    events.record(up("a"));
    let mut follower = events.follow(0, true).unwrap();
    let recorder = events.clone();
    runtime.block_on(async {
        assert_eq!(numbers(&follower.next().await.unwrap()), [1]);
        let later = tokio::spawn(async move {
            recorder.record(up("b"));
            tokio::task::yield_now().await;
            recorder.record(up("c"));
            recorder.close();
        });
        let mut got = Vec::new();
        while let Some(records) = follower.next().await {
            got.extend(numbers(&records));
        }
        assert_eq!(got, [2, 3]);
        later.await.unwrap();
    });
}

#[test]
fn followers_are_bounded_and_those_who_only_look_leave_room() {
    let events = Arc::new(Events::default());
    let mut lookers: Vec<_> = (0..EVENT_FOLLOWERS_READ_ONLY).map(|_| events.follow(0, false).unwrap()).collect();
    assert!(events.follow(0, false).is_none());
    let writers: Vec<_> =
        (EVENT_FOLLOWERS_READ_ONLY..EVENT_FOLLOWERS).map(|_| events.follow(0, true).unwrap()).collect();
    assert!(events.follow(0, true).is_none());
    lookers.pop();
    assert!(events.follow(0, false).is_some(), "a place is free again");
    drop(writers);
}

#[test]
fn links_are_told_when_they_change() {
    let (events, mut links) = (Events::default(), Links::default());
    let mut see = |ports: &[(&str, PortState)]| {
        let last = events.since(0).last().map_or(0, |record| record.seq);
        let sight =
            |&(port, state): &(&str, _)| Sight { port: port.into(), state, reason: Some("why".into()), conduct: None };
        links.note(ports.iter().map(sight), &events);
        events.since(0).iter().filter(|r| r.seq > last).map(|r| r.event.to_string()).collect::<Vec<_>>()
    };
    use PortState::{Down, Stopped, Up};
    assert_eq!(see(&[("a", Up), ("b", Down), ("c", Stopped)]), ["port a: up", "port c: stopped: why"]);
    assert!(see(&[("a", Up), ("b", Down), ("c", Stopped)]).is_empty());
    assert_eq!(see(&[("a", Down), ("b", Up), ("c", Down)]), ["port a: down: why", "port b: up", "port c: down: why"]);
    assert_eq!(see(&[("a", Down)]), ["port b: down: it was removed"]);
    assert!(see(&[("a", Down), ("d", Down)]).is_empty());
    assert_eq!(see(&[("a", Down), ("d", Down), ("e", Up)]).len(), 1);
    assert_eq!(links.tally(), Tally { up: 1, down: 2, stopped: 0 });
}

#[test]
fn a_port_that_is_barred_is_told_once_for_each_time() {
    let (events, mut links) = (Events::default(), Links::default());
    let mut see = |barred: Option<u64>| {
        let last = events.since(0).last().map_or(0, |record| record.seq);
        let conduct = |barred| Conduct { held_up: 9, barred, deed: Some("did something"), seconds: 5 };
        let (port, conduct) = ("a".to_string(), barred.map(conduct));
        links.note(std::iter::once(Sight { port, state: PortState::Down, reason: None, conduct }), &events);
        events.since(0).iter().filter(|r| r.seq > last).map(|r| r.event.to_string()).collect::<Vec<_>>()
    };
    let told = ["port a: serves nobody for 5 s: its front end did something"];
    assert!(see(Some(0)).is_empty() && see(None).is_empty());
    assert_eq!(see(Some(1)), told);
    // One that does not answer for a while was not barred again.
    assert!(see(Some(1)).is_empty() && see(None).is_empty() && see(Some(1)).is_empty());
    assert_eq!(see(Some(2)), told);
    // A port of that name that was made anew.
    assert!(see(Some(0)).is_empty());
    assert_eq!(see(Some(1)), told);
}

//! Any text as a configuration, with everything asserted that must hold whatever it is: [`exercise`]. The fuzz target
//! `yaml` calls it, and so does the test below, with the seeds of `fuzz/seeds/yaml`.

#![allow(clippy::unwrap_used)]

use super::{Diagnostics, Place, Plan, Report, check, check_port, document};

/// What a port on its own may name.
const SURROUNDINGS: &str = "version: 1
networks: { lan: {}, web: { mac-age: 60s } }
profiles: { server: { network: lan }, web: { inherit: server, network: web, latency-sensitivity: medium } }
ports: { vm1-eth0: { vhost-user: { socket: /run/linecard/vm1-eth0.sock }, profile: server } }
";

/// Checks `bytes` as a file, and each of its ports, and itself, as a port on its own. Returns what is wrong with the file.
pub fn exercise(bytes: &[u8]) -> Option<Diagnostics> {
    let text = String::from_utf8_lossy(bytes);
    let checked = check("fuzz.yaml", &text);
    if let Err(wrong) = &checked {
        readable(wrong);
        for diagnostic in wrong.list() {
            let place = diagnostic.place.as_ref().expect("whatever is wrong with a text stands somewhere in it");
            let related = diagnostic.related.iter().map(|related| &related.place);
            related.chain([place]).for_each(|place| within(&text, place));
        }
    }
    let surroundings = check("surroundings.yaml", SURROUNDINGS).unwrap();
    if let Ok(value) = document(&text, &mut Report::without_text()) {
        alone("vm1-eth0", &value, checked.as_ref().unwrap_or(&surroundings));
        for (name, value) in value.get("ports").and_then(|ports| ports.as_object()).into_iter().flatten() {
            alone(name, value, &surroundings);
            if let Ok(plan) = &checked {
                assert_eq!(check_port(name, value.clone(), plan).unwrap(), plan.ports[name.as_str()]);
            }
        }
    }
    checked.err()
}

/// A port on its own, as the API gets it.
fn alone(name: &str, value: &serde_json::Value, plan: &Plan) {
    if let Err(wrong) = check_port(name, value.clone(), plan) {
        readable(&wrong);
        assert!(wrong.list().iter().all(|diagnostic| diagnostic.place.is_none()), "a place in no text: {wrong}");
    }
}

/// There is something wrong, and it can be said in every form.
fn readable(wrong: &Diagnostics) {
    assert!(!wrong.list().is_empty());
    for diagnostic in wrong.list() {
        assert!(!diagnostic.message.is_empty());
        assert!(diagnostic.help.as_ref().is_none_or(|help| !help.is_empty()));
    }
    assert_eq!(serde_json::to_value(wrong).unwrap().as_array().unwrap().len(), wrong.list().len());
    for text in [wrong.to_string(), wrong.render(false), wrong.render(true)] {
        assert!(!text.is_empty());
    }
}

/// An editor can go to that place: its line exists, and its column is in the line or just behind it.
fn within(text: &str, place: &Place) {
    // A lone carriage return ends a line too (YAML 1.2, 5.4).
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let line = place.line.checked_sub(1).and_then(|above| text.split('\n').nth(above));
    let line = line.unwrap_or_else(|| panic!("{place:?} is no line of {text:?}"));
    let (columns, end) = (line.chars().count(), place.column.saturating_sub(1) + place.length);
    assert!(place.column >= 1 && place.length >= 1 && end <= columns.max(place.column), "{place:?} of {line:?}");
    assert!(place.column <= columns + 1, "{place:?} is behind {line:?}");
}

/// Every file of `fuzz/seeds/yaml`: cases that were thought of, and those that a fuzzer found.
#[cfg(test)]
#[test]
fn seeds_are_survived() {
    let mut count = 0;
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/seeds/yaml")).unwrap() {
        let path = entry.unwrap().path();
        let wrong = exercise(&std::fs::read(&path).unwrap());
        // A name that begins with "good-" promises a plan, with "corpus-" nothing, and any other none.
        let name = path.file_name().unwrap().to_str().unwrap();
        let kept = wrong.is_none() == name.starts_with("good-") || name.starts_with("corpus-");
        assert!(kept, "{name}: {wrong:?}");
        count += 1;
    }
    assert!(count >= 10, "the seeds are gone");
}

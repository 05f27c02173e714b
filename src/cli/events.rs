//! `linecard events`: what happened, one record a line, as data or for people.

use serde_json::Value;

use super::Output;
use super::client::with_query;
use super::format::table;
use super::run::{RunError, Session};
use crate::control::events::EventRecord;

/// Prints the records after number `since`, and with `follow` those to come until the daemon ends.
pub(super) fn run(session: &Session<'_>, follow: bool, since: Option<u64>) -> Result<u8, RunError> {
    let client = session.client()?;
    let since = since.map(|since| since.to_string());
    if follow {
        let path = with_query("/v1/events", &[("since", since), ("follow", Some("true".into()))]);
        client.follow(&path, |line| {
            let record: Value = serde_json::from_str(line).map_err(RunError::Answer)?;
            session.write(&printed(session.output, &[record], |list| list.iter().map(line_of).collect())?)
        })?;
    } else {
        let answer = client.get(&with_query("/v1/events", &[("since", since)]))?;
        let records: Vec<Value> = serde_json::from_value(answer).map_err(RunError::Answer)?;
        session.write(&printed(session.output, &records, rows)?)?;
    }
    Ok(0)
}

/// Each record by itself, so that a program can read one after the other, or `text` made of them for people.
fn printed(output: Output, records: &[Value], text: fn(&[EventRecord]) -> String) -> Result<String, RunError> {
    let yaml = |record| serde_yaml::to_string(record).map(|text| format!("---\n{text}")).map_err(RunError::Yaml);
    match output {
        Output::Json => Ok(records.iter().map(|record| format!("{record}\n")).collect()),
        Output::Yaml => records.iter().map(yaml).collect(),
        Output::Table => {
            let typed: Result<Vec<_>, _> = records.iter().cloned().map(serde_json::from_value).collect();
            typed.map(|records| text(&records)).map_err(RunError::Answer)
        }
    }
}

fn rows(records: &[EventRecord]) -> String {
    let row = |record: &EventRecord| {
        let EventRecord { seq, time, event } = record;
        vec![seq.to_string(), time.clone(), event.kind().into(), event.to_string()]
    };
    match records {
        [] => "nothing happened\n".into(),
        _ => table(&["SEQ", "TIME", "EVENT", "WHAT"], &[0], records.iter().map(row)),
    }
}

/// A record as soon as it is there, when nobody knows how wide those to come will be.
fn line_of(record: &EventRecord) -> String {
    format!("{}  {:<21}  {}\n", record.time, record.event.kind(), record.event)
}

//! Sends and receives checksummed streams; see `payload.rs` of the library. A receiver prints a JSON report.
//!
//! ```text
//! payload send    tcp|udp ADDRESS:PORT STOP-FILE
//! payload receive tcp|udp PORT PROGRESS-FILE [HOLD-FILE]
//! ```

use std::io;
use std::path::Path;
use std::process::ExitCode;

use qemu_tests::payload;
use rustix::process::{Signal, set_parent_process_death_signal};

fn main() -> ExitCode {
    // A scenario that is killed takes its shells with it; this ends with them.
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        eprintln!("payload: {error}");
        return ExitCode::FAILURE;
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments.iter().map(String::as_str).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("payload {}: {error}", arguments.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[&str]) -> io::Result<()> {
    let port = |text: &str| text.parse().map_err(|_| io::Error::other(format!("not a port: {text}")));
    let report = match *arguments {
        ["send", "tcp", address, stop] => return payload::send_tcp(address, Path::new(stop)),
        ["send", "udp", address, stop] => return payload::send_udp(address, Path::new(stop)),
        ["receive", "tcp", number, progress, ref hold @ ..] => {
            payload::receive_tcp(port(number)?, Path::new(progress), hold.first().map(Path::new))?
        }
        ["receive", "udp", number, progress, ref hold @ ..] => {
            payload::receive_udp(port(number)?, Path::new(progress), hold.first().map(Path::new))?
        }
        _ => return Err(io::Error::other("usage: payload send|receive tcp|udp ADDRESS:PORT|PORT FILE [HOLD]")),
    };
    println!("{}", report.to_json());
    Ok(())
}

//! Keeps the host's CPUs out of deep sleep: [`DmaLatency`], PM-QoS (Documentation/power/pm_qos_interface.rst).
//!
//! A CPU that sleeps deeply takes up to some hundred microseconds to wake. The shard of a `high` port never sleeps, but its
//! guest does, and it is woken by an interrupt. While the file is held open with a zero in it no CPU sleeps deeper than it
//! can wake from at once; the kernel takes the request back when the file is closed, however the process ends.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};

/// A request for CPUs that wake at once, for as long as this lives.
#[derive(Debug)]
pub struct DmaLatency(#[expect(dead_code, reason = "it is the open file that counts")] File);

impl DmaLatency {
    /// Makes the request.
    ///
    /// # Errors
    /// The kernel has no such interface (in a VM or a container), or does not let us use it.
    pub fn hold() -> io::Result<Self> {
        let mut file = OpenOptions::new().write(true).open("/dev/cpu_dma_latency")?;
        file.write_all(&0i32.to_ne_bytes())?;
        Ok(Self(file))
    }
}

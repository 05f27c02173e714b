//! Who looks at the switch from outside, without being able to change anything: [`metrics`].

pub mod metrics;

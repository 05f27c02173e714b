//! This machine: its CPUs ([`cpu`]) and its groups ([`group`]). Reads /sys, /etc and the scheduler; changes nothing.

pub mod cpu;
pub mod group;

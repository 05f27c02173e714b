//! This machine: its CPUs ([`cpu`]) and its users and groups ([`account`]). Reads /sys, /etc and the scheduler; changes nothing.

pub mod account;
pub mod cpu;

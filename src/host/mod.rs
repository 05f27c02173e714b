//! This machine: its CPUs ([`cpu`]) and who gets which ([`cpu_plan`]), how deeply they sleep ([`dma_latency`]), and its users and groups ([`account`]).

pub mod account;
pub mod cpu;
pub mod cpu_plan;
pub mod dma_latency;

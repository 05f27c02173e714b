//! This machine: its CPUs ([`cpu`]), how deeply they sleep ([`dma_latency`]), and its users and groups ([`account`]).

pub mod account;
pub mod cpu;
pub mod dma_latency;

//! The vNIC.
mod queue;
mod receive;
mod transmit;

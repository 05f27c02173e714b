//! What the kernel and the CPU offer, as safe calls: the only place besides `mem` and `ring` that may be unsafe.

#[cfg(test)]
mod alone;
pub mod arguments;
pub mod cpu;
pub mod descriptors;
pub mod doorbell;
pub mod eventfd;
pub mod heap;
pub mod mapped_file;
pub mod mapping_turn;
pub mod numa;
mod pieces;
pub mod process;
pub mod process_identity;
pub mod regular_file;
pub mod sigbus;
pub mod signal;
pub mod socket;
pub mod socket_file;
pub mod stop_signals;
pub mod tap;
pub mod threads;
pub mod toll;
mod zeros;

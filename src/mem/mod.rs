//! Guest memory: what a front end shared ([`SharedMemory`]), the map that rings use ([`GuestMemory`]), and bounded pieces
//! of it ([`Span`]).

mod guest;
mod mapping;
mod span;

pub use guest::{GuestMemory, Region};
pub use mapping::{MappingError, RegionRequest, SharedMemory};
pub use span::Span;

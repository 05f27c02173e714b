//! Guest memory: what a front end shared ([`GuestMemory`]), and bounded pieces of it ([`Span`]).

mod guest;
mod span;

pub use guest::{GuestMemory, Region};
pub use span::Span;

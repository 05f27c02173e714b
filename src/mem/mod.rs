//! Guest memory: what a front end shared ([`SharedMemory`]), the map that rings use ([`GuestMemory`]), bounded pieces
//! of it ([`Span`]), places in lists of those ([`Cursor`], [`Source`]),
//! which pages were written ([`DirtyLog`]), and on which NUMA nodes they lie ([`NodePages`]). `pin` keeps pages
//! from being faulted in by a shard, `budget` says how many pieces there may be.

mod budget;
mod cursor;
mod dirty;
mod guest;
mod mapping;
mod nodes;
mod pin;
mod span;

pub use cursor::{Cursor, Source};
pub use dirty::{DirtyLog, DirtyLogError};
pub use guest::{GuestMemory, Region, Window};
pub use mapping::{MappingError, RegionRequest, SharedMemory, host_bytes};
pub use nodes::NodePages;
pub use pin::Pinned;
pub use span::Span;

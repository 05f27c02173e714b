//! Every interleaving, under every memory order that the language allows, of a few steps of the lock-free parts.
//!
//! `cargo test --release --manifest-path tests/loom/Cargo.toml`. The files are the library's own, compiled with
//! `cfg(loom)`, which swaps their atomics for loom's; the models stand at their ends as `loom_tests`.

#[path = "../../../src/clock.rs"]
pub mod clock;
#[path = "../../../src/ident.rs"]
pub mod ident;
#[path = "../../../src/limits.rs"]
pub mod limits;

/// The FDB's slots, and those of what shards have to tell: see `bucket` and `incidents`. The modules nest as in the library, so that its paths hold; `path = "."` keeps
/// the files' own paths from nesting as well.
#[path = "."]
pub mod switch {
    /// As in the library.
    #[path = "."]
    pub mod fdb {
        #[path = "../../../src/switch/fdb/bucket.rs"]
        mod bucket;
        #[path = "../../../src/switch/fdb/entry.rs"]
        mod entry;
        #[path = "../../../src/switch/fdb/incidents.rs"]
        mod incidents;
    }
}

/// The shards' bell: see `flags`.
#[path = "."]
pub mod shard {
    #[path = "../../../src/shard/flags.rs"]
    mod flags;
}

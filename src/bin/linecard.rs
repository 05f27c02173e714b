//! linecard.

fn main() {}

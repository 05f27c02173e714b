//! linecardd.

fn main() {}

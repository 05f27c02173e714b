//! Other programs that Linecard is compared with, or that stand in for it.

pub mod testpmd;

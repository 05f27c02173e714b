//! Linecard.

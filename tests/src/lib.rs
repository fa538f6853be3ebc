//! The harness of Mainstay's whole-system tests, and the UDP fault proxy.

pub mod appending;
pub mod harness;
pub mod process;
pub mod proxy;
pub mod random;

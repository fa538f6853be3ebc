//! The harness of Mainstay's whole-system tests.

pub mod harness;

//! The pure core of Mainstay: everything that can be decided without a socket, a clock or a disk.
//!
//! Two layers, each usable alone:
//!
//! - [`wire`] turns bytes into frames and frames into bytes. It is stateless but for the [`wire::Deframer`], which
//!   reassembles frames from arbitrary pieces.
//! - [`session`] holds the rules of a session: records, the fold and its [`session::View`], the server's
//!   [`session::Authority`] that accepts or refuses batches, producers, subscriptions and flow control.
//!
//! What is never here: tokio, sockets, files, clocks, randomness. Time and random ids are arguments. Nothing in this
//! crate panics on input, and decoding never allocates more than a small multiple of the bytes it was given.
//!
//! The normative text is `spec/`; items cite its requirement ids. Every number on the wire is listed in
//! `spec/registry.toml`, and a test holds this crate to it.

pub mod error;
mod kept;
pub mod planted;
pub mod registry;
pub mod session;
#[cfg(feature = "testing")]
pub mod testing;
pub mod wire;

pub use error::{Advice, Code, ProtocolError, Scope};

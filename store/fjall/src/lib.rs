//! The embedded engine: one machine, one directory, [fjall](https://docs.rs/fjall) underneath.
//!
//! # The directory
//!
//! ```text
//! DIR/lock       held while the store is open
//! DIR/format     version of this layout, the store's id and fjall's keyspace ids; written last at creation
//! DIR/witness    two checksummed slots: how far the store has certainly been (see `witness`)
//! DIR/log/       the fjall database
//! DIR/torn-*     tails of journals that were cut off at a start, kept for inspection
//! ```
//!
//! Keyspaces: `log` holds chunks under `segment | first seq | number`; `sessions` a row per session; `snapshots` the newest
//! snapshot of a session; `meta` the witness row, dead segments and quarantined sessions. Segments belong to one session,
//! have ascending ids and are never reused, so that writes cluster and whole segments die together.
//!
//! A store of an older layout is brought to this one when it is opened: one commit, whose number the format file says first (`upgrade`).
//!
//! # One thread writes
//!
//! fjall has no group commit. Every change goes through one committer thread, which takes what all sessions have ready, at
//! most one chunk each, writes one batch with one `fdatasync`, and then answers. While it syncs, the next batch gathers.
//!
//! # Damage is loud
//!
//! fjall takes an undecodable journal entry for a torn tail and cuts the journal there, and it refuses to open after some
//! torn tails that are legal. So the journal check (`check`) runs before it: what follows a hole is compared with the
//! witness, and only a tail that was never acknowledged is cut off. Chunks carry checksums, numbers and links, which every
//! read checks. The witness row counts commits and sums up a digest of every row, so that [`verify`] notices a row that
//! vanished anywhere.

mod backlog;
pub mod backup;
mod behind;
mod check;
mod committer;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod keys;
mod open;
mod reader;
mod reclaim;
mod store;
mod tickets;
mod upgrade;
pub mod verify;
mod witness;

pub use open::{Config, OpenError};
pub use store::FjallStore;
pub use tickets::{MAX_TICKETS, Tickets};

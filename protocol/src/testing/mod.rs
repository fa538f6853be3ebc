//! Reference models of a session, and runners that hold the [`Authority`](crate::session::Authority) to them.
//!
//! Property tests and fuzzing run the same operations through both: [`log`] is about batches, producers and commits, [`view`]
//! about what records mean, [`runs`] about who may do what in a run, and signals. [`compaction`] puts together what came of them, and
//! [`rebirth`] brings it back as from a backup. [`rules`] drives what keeps no log: paths, credit, readers, leases, grants.

pub mod compaction;
mod counts;
mod digest;
pub mod log;
pub mod rebirth;
pub mod rules;
pub mod runs;
pub mod view;

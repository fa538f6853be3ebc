//! Proof by experiment: one [`workload`] over a simulated world or the real binary, disasters from a seed, and the checker's verdict.
//!
//! - [`simulation`]: the real client and server over links in memory and a simulated disk, in one thread and in tokio's paused time. The
//!   same seed is the same history, byte for byte.
//! - [`damage`]: data directories with flipped bits, torn, missing, stale and exchanged pages and files.
//! - [`hostile`]: the real binary, attacked beside honest clients, and with more to do than it can.
//! - [`crashes`]: the real binary, killed at random moments and system calls, and with the power cut under it.

pub mod crashes;
pub mod damage;
pub mod findings;
pub mod history;
pub mod hostile;
#[cfg(feature = "planted")]
pub mod planted;
pub mod rotten;
pub mod seeds;
pub mod simulation;
pub mod workload;

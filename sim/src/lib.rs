//! Proof by experiment: one [`workload`] over a simulated world or the real binary, disasters from a seed, and the checker's verdict.
//!
//! - [`simulation`]: the real client and server over links in memory and a simulated disk, in one thread and in tokio's paused time. The
//!   same seed is the same history, byte for byte.
//! - [`crashes`]: the real binary, killed at random moments and system calls, and with the power cut under it.

pub mod crashes;
pub mod history;
pub mod power;
pub mod seeds;
pub mod simulation;
pub mod workload;

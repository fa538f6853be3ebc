//! The load generator behind `mainstay bench`.
//!
//! `bench/README.md` says how it measures. In short: client and server are two processes on one machine and talk real QUIC; a
//! closed loop keeps a window of records in flight; an open loop sends at a fixed rate and measures from the moment at which
//! a record *should* have been sent, so that a stall is not hidden by the pause that it causes.

mod load;
mod report;
mod target;
pub mod yardstick;

pub use load::{Options, append, compact, fanout, idle, live, reconnect, replay, start};
pub use mainstay_tests::process::use_binary;
pub use report::{Figure, Report, Spread};
pub use target::Target;

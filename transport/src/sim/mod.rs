//! A bad network, from a seed: [`Link`] is one direction of a path and decides what becomes of each datagram;
//! [`SimNetwork`] puts real quinn on such links inside one process, in tokio's time, which tests pause.

mod link;
mod network;
mod random;

pub use link::{Conditions, Counts, Fate, Faults, Link};
pub use network::{SimHost, SimNetwork, SimSocket};
pub use random::Random;

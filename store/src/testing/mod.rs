//! What engines are tested with: the conformance suite, the fault wrapper, and a simulated disk.

mod conformance;
mod disk;
mod faulty;
mod random;

pub use conformance::{CASES, Case, Log, session_id};
pub use disk::{SimulatedDisk, Wear};
pub use faulty::{Faults, FaultyStore};
pub use random::SplitMix;

//! What engines are tested with: the conformance suite and the fault wrapper.

mod conformance;
mod faulty;

pub use conformance::{CASES, Case, Log, session_id};
pub use faulty::{Faults, FaultyStore};

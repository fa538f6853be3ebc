//! Entry points for fuzzing.

use bytes::Bytes;

use crate::check::{Journals, Walk};

/// Reads arbitrary bytes as the last journal of a store.
pub fn journal(bytes: &[u8]) {
    let mut walk = Walk::new([7; 16], 4);
    let mut found = Journals::default();
    // Damage is an answer like any other.
    let bytes = Bytes::copy_from_slice(bytes);
    let _ = walk.journal(0, "fuzz.jnl".as_ref(), &bytes, true, &mut found);
    crate::behind::scan(&bytes, 1, &mut Vec::new());
}

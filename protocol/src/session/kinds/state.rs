//! Shared state: keys with values (spec STATE).

use bytes::Bytes;

use super::payload;
use crate::error::ProtocolError;
use crate::kept::Kept;
use crate::session::words::Key;
use crate::wire::{Field, Reader, Writer};

payload! {
    /// A key has a value from here on (spec STATE-1).
    StatePut = STATE_PUT, {
        /// The key.
        key: Key,
        /// Its value.
        value: Bytes,
        /// Milliseconds after the record's time at which the value expires; 0 for never.
        lasts: u64,
    }
}

payload! {
    /// A key has no value from here on (spec STATE-1).
    StateDeleted = STATE_DELETED, {
        /// The key.
        key: Key,
    }
}

payload! {
    /// The value of a key expired (spec STATE-6).
    StateExpired = STATE_EXPIRED, {
        /// The key.
        key: Key,
    }
}

payload! {
    /// Changes a key if it is as expected; stored as what comes of it (spec STATE-3, KIND-4).
    StateChange = STATE_CHANGE, {
        /// The key.
        key: Key,
        /// What the key must be.
        expected: Expected,
        /// What becomes of it.
        change: Change,
    }
}

/// What a key must be for a change to take place (spec STATE-3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// Anything.
    Any,
    /// Without a value.
    Absent,
    /// As the record with this seq left it.
    Revision(u64),
}

impl Field for Expected {
    fn put(&self, w: &mut Writer) {
        w.varint(match self {
            Self::Any => 0,
            Self::Absent => 1,
            Self::Revision(seq) => seq.saturating_add(2),
        });
    }
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        Ok(match r.varint()? {
            0 => Self::Any,
            1 => Self::Absent,
            seq => Self::Revision(seq - 2),
        })
    }
}

/// What becomes of a key (spec STATE-3, STATE-4, STATE-5).
#[derive(Clone, PartialEq, Eq)]
pub enum Change {
    /// It gets a value.
    Put {
        /// The value.
        value: Bytes,
        /// Milliseconds until it expires; 0 for never.
        lasts: u64,
    },
    /// It loses its value.
    Delete,
    /// Its value, a decimal integer, grows by this much.
    Increment(i64),
    /// Its value, a JSON document, is changed by a JSON merge patch.
    Merge(Bytes),
}

impl core::fmt::Debug for Change {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Put { value, lasts } => {
                f.debug_struct("Put").field("value", &value.kept()).field("lasts", lasts).finish()
            }
            Self::Delete => f.write_str("Delete"),
            Self::Increment(by) => f.debug_tuple("Increment").field(by).finish(),
            Self::Merge(patch) => f.debug_tuple("Merge").field(&patch.kept()).finish(),
        }
    }
}

impl Field for Change {
    fn put(&self, w: &mut Writer) {
        match self {
            Self::Put { value, lasts } => {
                w.varint(0);
                w.bytes(value);
                w.varint(*lasts);
            }
            Self::Delete => w.varint(1),
            Self::Increment(by) => {
                w.varint(2);
                w.raw(&by.to_be_bytes());
            }
            Self::Merge(patch) => {
                w.varint(3);
                w.bytes(patch);
            }
        }
    }
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        Ok(match r.varint()? {
            0 => Self::Put { value: r.bytes(usize::MAX)?, lasts: r.varint()? },
            1 => Self::Delete,
            2 => Self::Increment(i64::from_be_bytes(r.array()?)),
            3 => Self::Merge(r.bytes(usize::MAX)?),
            _ => return Err(ProtocolError::malformed("change of a key is not known")),
        })
    }
}

//! Presence: who is here, and what they are doing (spec PRES).

use bytes::Bytes;

use super::{payload, words};
use crate::error::ProtocolError;
use crate::registry::MAX_PROGRESS;
use crate::session::words::Author;
use crate::wire::{Field, Label, Reader, Writer};

payload! {
    /// The author of the record is here from now on; its seq is the member's generation (spec PRES-1).
    PresenceJoined = PRESENCE_JOINED, {
        /// How people call the member.
        name: Label,
        /// Milliseconds without a sign of life after which the member is lost.
        grace: u64,
        /// What the member is doing.
        activity: Activity,
    }
}

payload! {
    /// The author of the record is doing something else (spec PRES-2).
    PresenceUpdated = PRESENCE_UPDATED, {
        /// What the member is doing.
        activity: Activity,
    }
}

payload! {
    /// A member is not here any more (spec PRES-3).
    PresenceLeft = PRESENCE_LEFT, {
        /// Who.
        member: Author,
        /// The member's generation.
        generation: u64,
        /// Why.
        reason: Departure,
    }
}

/// What a member is doing (spec PRES-2).
#[derive(Clone, PartialEq, Eq)]
pub struct Activity {
    /// In a word: `idle`, `thinking`, `streaming`, `tool:NAME`, `waiting`, or the application's own.
    pub status: Label,
    /// How far, in percent, if that is known.
    pub progress: Option<u64>,
    /// What else the application wants to say, at most `max_member_data` bytes.
    pub data: Bytes,
}

crate::kept::keeps!(Activity, status progress, keeps data);

impl Activity {
    /// The same in memory of its own: a view outlives what it is read from.
    pub(in crate::session) fn owned(self) -> Self {
        Self { data: Bytes::copy_from_slice(&self.data), ..self }
    }
}

impl Field for Activity {
    fn put(&self, w: &mut Writer) {
        self.status.put(w);
        Field::put(&self.progress, w);
        w.bytes(&self.data);
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let this = Self { status: Label::get(r)?, progress: Field::get(r)?, data: r.bytes(usize::MAX)? };
        if this.progress.is_some_and(|percent| percent > MAX_PROGRESS) {
            return Err(ProtocolError::malformed("progress is more than all"));
        }
        Ok(this)
    }
}

words! {
    /// Why a member is not here any more (spec PRES-3).
    Departure, "reason of a departure", {
        /// It said so.
        Left = 0, "left";
        /// Nothing was heard of it for its grace.
        Lost = 1, "lost";
    }
}

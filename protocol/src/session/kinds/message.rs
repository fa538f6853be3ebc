//! Messages: text or bytes that are built by appended parts (spec MSG).

use bytes::Bytes;

use super::{Kind, Payload, payload};
use crate::error::ProtocolError;
use crate::registry::INPUT_ROLE;
use crate::wire::{Detail, Field, Label, Reader, Writer};

payload! {
    /// A message begins; its id is the record's (spec MSG-1).
    MessageStart = MESSAGE_START, {
        /// Who speaks: `user`, `assistant`, `tool` and so on (spec MSG-6).
        role: Label,
        /// Media type of its bytes, for example `text/markdown`.
        content_type: Label,
    }
}

impl MessageStart {
    /// True if the message is for an agent: what is said under the role `user` (spec RUN-8).
    pub fn is_input(&self) -> bool {
        self.role.as_str() == INPUT_ROLE
    }
}

payload! {
    /// A message is finished (spec MSG-4).
    MessageEnd = MESSAGE_END, {
        /// How.
        status: Status,
        /// Why, for people.
        detail: Detail,
    }
}

/// How a message stands (spec MSG-4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Parts may follow.
    Open = 0,
    /// Its author finished it.
    Complete = 1,
    /// Somebody cancelled it.
    Cancelled = 2,
    /// Its author stopped before it was finished.
    Interrupted = 3,
    /// Its author failed.
    Error = 4,
}

impl Status {
    /// Every status, by number.
    pub const ALL: [Self; 5] = [Self::Open, Self::Complete, Self::Cancelled, Self::Interrupted, Self::Error];

    /// The word used in the registry, on the command line and in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Complete => "complete",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "interrupted",
            Self::Error => "error",
        }
    }
}

/// In a record only the end of a message has a status, and it is never `open`.
impl Field for Status {
    fn put(&self, w: &mut Writer) {
        w.varint(*self as u64);
    }
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let number = r.varint()?;
        let known = Self::ALL.into_iter().skip(1).find(|status| *status as u64 == number);
        known.ok_or(ProtocolError::malformed("status of a finished message is not known"))
    }
}

macro_rules! bytes_payload {
    ($(#[$doc:meta])* $name:ident = $kind:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq)]
        pub struct $name(pub Bytes);

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.debug_tuple(stringify!($name)).field(&crate::kept::Kept::kept(&self.0)).finish()
            }
        }

        impl Payload for $name {
            const KIND: Kind = Kind::$kind;

            fn put(&self, w: &mut Writer) {
                w.raw(&self.0);
            }

            fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
                Ok(Self(r.rest_bytes()))
            }
        }
    };
}

bytes_payload! {
    /// Bytes at the end of a message: the whole payload (spec MSG-2).
    MessageAppend = MESSAGE_APPEND
}

bytes_payload! {
    /// Bytes in place of all that a message holds: the whole payload (spec MSG-3).
    MessageReplace = MESSAGE_REPLACE
}

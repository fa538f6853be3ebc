//! What records are: the table of kinds, and a file with the payloads of each family (spec KIND).

mod message;
mod presence;
mod state;

use bytes::Bytes;

pub use message::{MessageAppend, MessageEnd, MessageReplace, MessageStart, Status};
pub use presence::{Activity, Departure, PresenceJoined, PresenceLeft, PresenceUpdated};
pub use state::{Change, Expected, StateChange, StateDeleted, StateExpired, StatePut};

use super::record::Record;
use super::words::{MessageId, RunId};
use crate::error::{Code, ProtocolError};
use crate::registry::is_ignorable;
use crate::wire::{Reader, Writer};

/// Who puts records of a kind into a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writes {
    /// Clients, in their batches.
    Client,
    /// The server alone (spec KIND-3).
    Server,
    /// Nobody: clients send it, and the server stores what comes of it (spec KIND-4).
    Request,
}

impl Writes {
    /// The word of the registry.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
            Self::Request => "request",
        }
    }
}

/// What a record is. Open: a number that this version does not know survives a round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind(pub u64);

macro_rules! kinds {
    ($( $(#[$doc:meta])* $const:ident = $number:literal, $name:literal, $writes:ident; )+) => {
        impl Kind {
            $( $(#[$doc])* pub const $const: Self = Self($number); )+

            /// Every kind of the registry (spec KIND-1).
            pub const ALL: &'static [Self] = &[$(Self::$const),+];

            /// The registry name, or `None` for a number that this version does not know.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 { $( $number => Some($name), )+ _ => None }
            }

            /// Who writes it. Clients may write kinds that this version does not know, if they are ignorable.
            pub const fn writes(self) -> Writes {
                match self.0 { $( $number => Writes::$writes, )+ _ => Writes::Client }
            }
        }
    };
}

kinds! {
    /// Bytes whose meaning is the application's.
    DATA = 0x00, "data", Client;
    /// The session was closed; no record follows.
    SESSION_CLOSED = 0x02, "session.closed", Server;
    /// A message begins.
    MESSAGE_START = 0x10, "message.start", Client;
    /// Bytes at the end of an open message.
    MESSAGE_APPEND = 0x12, "message.append", Client;
    /// Bytes in place of all that an open message holds.
    MESSAGE_REPLACE = 0x14, "message.replace", Client;
    /// A message is finished.
    MESSAGE_END = 0x16, "message.end", Client;
    /// A key has a value.
    STATE_PUT = 0x20, "state.put", Client;
    /// A key has no value any more.
    STATE_DELETED = 0x22, "state.deleted", Client;
    /// A value outlived its time.
    STATE_EXPIRED = 0x24, "state.expired", Server;
    /// A change of a key that depends on what it holds.
    STATE_CHANGE = 0x26, "state.change", Request;
    /// Somebody is here.
    PRESENCE_JOINED = 0x30, "presence.joined", Server;
    /// Somebody who is here is doing something else.
    PRESENCE_UPDATED = 0x32, "presence.updated", Client;
    /// Somebody is not here any more.
    PRESENCE_LEFT = 0x34, "presence.left", Server;
}

impl Kind {
    /// The kind that has this registry name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.name() == Some(name))
    }

    /// Checks that a client may send a record of this kind (spec KIND-2, KIND-3).
    ///
    /// Errors: `KIND_REFUSED` for one that only the server writes; `KIND_UNKNOWN` for a critical one that this version does not
    /// know.
    pub(crate) fn check_sendable(self) -> Result<(), ProtocolError> {
        if self.writes() == Writes::Server {
            return Err(ProtocolError::new(Code::KIND_REFUSED, "only the server writes records of this kind"));
        }
        if self.name().is_none() && !is_ignorable(self.0) {
            return Err(ProtocolError::new(Code::KIND_UNKNOWN, "critical record kind is not known"));
        }
        Ok(())
    }

    /// True if records of this kind change nothing but what is known of their stream.
    pub(crate) const fn is_plain(self) -> bool {
        self.0 == Self::DATA.0 || self.name().is_none()
    }
}

/// The payload of one record kind: exactly one encoding per value.
pub trait Payload: Sized {
    /// The kind of record that it stands in.
    const KIND: Kind;

    /// Appends the payload to `w`.
    fn put(&self, w: &mut Writer);

    /// Reads the whole of `r` as a payload. Errors: `FRAME_MALFORMED`, `FRAME_UNKNOWN` for a critical parameter, `NAME_INVALID`.
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError>;

    /// A record with this payload in `stream`, of no message and no run.
    fn record(&self, stream: u64) -> Record {
        let mut w = Writer::new();
        self.put(&mut w);
        Record { kind: Self::KIND, stream, message: None, run: None, headers: Vec::new(), payload: w.freeze() }
    }

    /// The payload of `record`. Errors: `RECORD_MALFORMED`, also for another kind.
    fn of(record: &Record) -> Result<Self, ProtocolError> {
        if record.kind != Self::KIND {
            return Err(ProtocolError::new(Code::RECORD_MALFORMED, "record is of another kind"));
        }
        Self::get(&mut Reader::new(&record.payload)).map_err(malformed)
    }
}

/// A payload whose fields follow each other, and then parameters, of which it defines none.
macro_rules! payload {
    ($(#[$doc:meta])* $name:ident = $kind:ident, { $( $(#[$field_doc:meta])* $field:ident: $ty:ty, )* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name {
            $( $(#[$field_doc])* pub $field: $ty, )*
        }

        impl $crate::session::Payload for $name {
            const KIND: $crate::session::Kind = $crate::session::Kind::$kind;

            fn put(&self, w: &mut $crate::wire::Writer) {
                $( $crate::wire::Field::put(&self.$field, w); )*
            }

            fn get(r: &mut $crate::wire::Reader<'_>) -> Result<Self, $crate::ProtocolError> {
                $( let $field = <$ty as $crate::wire::Field>::get(r)?; )*
                $crate::wire::Params::get_none(r)?;
                Ok(Self { $($field),* })
            }
        }
    };
}
pub(crate) use payload;

/// A record as what it does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Deed {
    /// Nothing but being there.
    Plain,
    SessionClosed,
    MessageStart(MessageId, Option<RunId>, MessageStart),
    MessageAppend(MessageId, Bytes),
    MessageReplace(MessageId, Bytes),
    MessageEnd(MessageId, MessageEnd),
    StatePut(StatePut),
    StateDeleted(StateDeleted),
    StateExpired(StateExpired),
    StateChange(StateChange),
    PresenceJoined(PresenceJoined),
    PresenceUpdated(PresenceUpdated),
    PresenceLeft(PresenceLeft),
}

impl Deed {
    /// What `record` does. Errors: `RECORD_MALFORMED` if its fields or payload are not those of its kind (spec KIND-5).
    pub(crate) fn of(record: &Record) -> Result<Self, ProtocolError> {
        let message = || {
            let missing = ProtocolError::new(Code::RECORD_MALFORMED, "record of a message names no message");
            record.message.ok_or(missing)
        };
        Ok(match record.kind {
            Kind::SESSION_CLOSED => Self::SessionClosed,
            Kind::MESSAGE_START => Self::MessageStart(message()?, record.run, Payload::of(record)?),
            Kind::MESSAGE_APPEND => Self::MessageAppend(message()?, MessageAppend::of(record)?.0),
            Kind::MESSAGE_REPLACE => Self::MessageReplace(message()?, MessageReplace::of(record)?.0),
            Kind::MESSAGE_END => Self::MessageEnd(message()?, Payload::of(record)?),
            Kind::STATE_PUT => Self::StatePut(Payload::of(record)?),
            Kind::STATE_DELETED => Self::StateDeleted(Payload::of(record)?),
            Kind::STATE_EXPIRED => Self::StateExpired(Payload::of(record)?),
            Kind::STATE_CHANGE => Self::StateChange(Payload::of(record)?),
            Kind::PRESENCE_JOINED => Self::PresenceJoined(Payload::of(record)?),
            Kind::PRESENCE_UPDATED => Self::PresenceUpdated(Payload::of(record)?),
            Kind::PRESENCE_LEFT => Self::PresenceLeft(Payload::of(record)?),
            _ => Self::Plain,
        })
    }
}

fn malformed(error: ProtocolError) -> ProtocolError {
    ProtocolError::new(Code::RECORD_MALFORMED, error.detail)
}

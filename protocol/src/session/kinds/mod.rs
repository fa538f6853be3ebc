//! What records are: the table of kinds, and a file with the payloads of each family (spec KIND).

mod message;
mod notify;
mod presence;
mod run;
mod signal;
mod state;

use bytes::Bytes;

pub use message::{MessageAppend, MessageEnd, MessageReplace, MessageStart, Status};
pub use notify::{JobOutcome, NotifyDone, NotifyEmitted, NotifyRule, Triggers};
pub use presence::{Activity, Departure, PresenceJoined, PresenceLeft, PresenceUpdated};
pub use run::{InputPolicy, RunConsumed, RunEnd, RunLost, RunMode, RunStart, SessionConfigured};
pub use signal::{
    Intent, RequestExpired, RequestOpened, RequestWithdrawn, Resolution, Signal, SignalExpired, SignalResolved, Target,
};
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
    /// How runs and inputs are treated.
    SESSION_CONFIGURED = 0x04, "session.configured", Server;
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
    /// A run is active, held by somebody.
    RUN_START = 0x40, "run.start", Server;
    /// A run is over.
    RUN_END = 0x42, "run.end", Client;
    /// Nothing was heard of who held a run.
    RUN_LOST = 0x44, "run.lost", Server;
    /// A run has read inputs.
    RUN_CONSUMED = 0x46, "run.consumed", Client;
    /// Stop, and finish as cancelled.
    SIGNAL_CANCEL = 0x50, "signal.cancel", Server;
    /// Stop, and go on from what the text says.
    SIGNAL_INTERRUPT = 0x52, "signal.interrupt", Server;
    /// Take the text into account.
    SIGNAL_STEER = 0x54, "signal.steer", Server;
    /// Wait.
    SIGNAL_PAUSE = 0x56, "signal.pause", Server;
    /// Go on.
    SIGNAL_RESUME = 0x58, "signal.resume", Server;
    /// What was asked for is allowed.
    SIGNAL_APPROVE = 0x5a, "signal.approve", Server;
    /// What was asked for is not allowed.
    SIGNAL_DENY = 0x5c, "signal.deny", Server;
    /// An answer to what was asked.
    SIGNAL_REPLY = 0x5e, "signal.reply", Server;
    /// What the application makes of it.
    SIGNAL_CUSTOM = 0x60, "signal.custom", Server;
    /// What became of a signal.
    SIGNAL_RESOLVED = 0x62, "signal.resolved", Client;
    /// Nobody took a signal in its time.
    SIGNAL_EXPIRED = 0x64, "signal.expired", Server;
    /// An agent asks people something.
    REQUEST_OPENED = 0x70, "request.opened", Client;
    /// Nobody needs to answer any more.
    REQUEST_WITHDRAWN = 0x72, "request.withdrawn", Client;
    /// Nobody answered in time.
    REQUEST_EXPIRED = 0x74, "request.expired", Server;
    /// Somebody is to be told of some things.
    NOTIFY_RULE = 0x80, "notify.rule", Server;
    /// A job is due.
    NOTIFY_EMITTED = 0x82, "notify.emitted", Server;
    /// A job is done.
    NOTIFY_DONE = 0x84, "notify.done", Server;
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

    /// True if records of this kind are also told early (spec SIG-6).
    pub(crate) fn is_early(self) -> bool {
        Intent::of_kind(self).is_some()
            || matches!(self, Self::RUN_LOST | Self::SIGNAL_RESOLVED | Self::SIGNAL_EXPIRED | Self::REQUEST_EXPIRED)
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
    ($(#[$attribute:meta])* $name:ident = $kind:ident, { $( $(#[$field_doc:meta])* $field:ident: $ty:ty, )* }) => {
        $(#[$attribute])*
        #[derive(Clone, PartialEq, Eq)]
        pub struct $name {
            $( $(#[$field_doc])* pub $field: $ty, )*
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.debug_struct(stringify!($name))
                    $( .field(stringify!($field), &$crate::wire::Shown(&self.$field)) )*
                    .finish()
            }
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

/// An enumeration whose members are numbers in records and words for people.
macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $what:literal, { $( $(#[$member_doc:meta])* $member:ident = $number:literal, $word:literal; )+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $( $(#[$member_doc])* $member = $number, )+
        }

        impl $name {
            /// Every member, by number.
            pub const ALL: &'static [Self] = &[$( Self::$member ),+];

            /// The word used in the registry, on the command line and in logs.
            pub const fn as_str(self) -> &'static str {
                match self { $( Self::$member => $word, )+ }
            }
        }

        impl core::str::FromStr for $name {
            type Err = $crate::ProtocolError;

            /// Reads the word. Errors: `NAME_INVALID` for any other.
            fn from_str(word: &str) -> Result<Self, Self::Err> {
                let known = Self::ALL.iter().copied().find(|member| member.as_str() == word);
                known.ok_or($crate::ProtocolError::new($crate::Code::NAME_INVALID, concat!($what, " is not known")))
            }
        }

        impl $crate::wire::Field for $name {
            fn put(&self, w: &mut $crate::wire::Writer) {
                w.varint(*self as u64);
            }

            fn get(r: &mut $crate::wire::Reader<'_>) -> Result<Self, $crate::ProtocolError> {
                match r.varint()? {
                    $( $number => Ok(Self::$member), )+
                    _ => Err($crate::ProtocolError::malformed(concat!($what, " is not known"))),
                }
            }
        }
    };
}
pub(crate) use words;

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
    SessionConfigured(SessionConfigured),
    RunStart(RunId, RunStart),
    RunEnd(RunId, RunEnd),
    RunLost(RunId, RunLost),
    RunConsumed(RunId, RunConsumed),
    Signal(Option<RunId>, Signal),
    SignalResolved(SignalResolved),
    SignalExpired(SignalExpired),
    RequestOpened(Option<RunId>, RequestOpened),
    RequestWithdrawn(RequestWithdrawn),
    RequestExpired(RequestExpired),
    NotifyRule(NotifyRule),
    NotifyEmitted(NotifyEmitted),
    NotifyDone(NotifyDone),
}

impl Deed {
    /// True if a record that names a run says that the run does this: only its holder may (spec RUN-3). Inputs are for the run; of a
    /// message's other records the message decides.
    pub(crate) fn is_said_by_run(&self) -> bool {
        match self {
            Self::MessageStart(_, _, start) => !start.is_input(),
            Self::Plain
            | Self::StatePut(_)
            | Self::StateDeleted(_)
            | Self::StateChange(_)
            | Self::PresenceUpdated(_) => true,
            _ => false,
        }
    }

    /// What `record` does. Errors: `RECORD_MALFORMED` if its fields or payload are not those of its kind (spec KIND-5).
    pub(crate) fn of(record: &Record) -> Result<Self, ProtocolError> {
        let message = || {
            let missing = ProtocolError::new(Code::RECORD_MALFORMED, "record of a message names no message");
            record.message.ok_or(missing)
        };
        let run = || {
            let missing = ProtocolError::new(Code::RECORD_MALFORMED, "record of a run names no run");
            record.run.ok_or(missing)
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
            Kind::SESSION_CONFIGURED => Self::SessionConfigured(Payload::of(record)?),
            Kind::RUN_START => Self::RunStart(run()?, Payload::of(record)?),
            Kind::RUN_END => Self::RunEnd(run()?, Payload::of(record)?),
            Kind::RUN_LOST => Self::RunLost(run()?, Payload::of(record)?),
            Kind::RUN_CONSUMED => Self::RunConsumed(run()?, Payload::of(record)?),
            Kind::SIGNAL_RESOLVED => Self::SignalResolved(Payload::of(record)?),
            Kind::SIGNAL_EXPIRED => Self::SignalExpired(Payload::of(record)?),
            Kind::REQUEST_OPENED => Self::RequestOpened(record.run, Payload::of(record)?),
            Kind::REQUEST_WITHDRAWN => Self::RequestWithdrawn(Payload::of(record)?),
            Kind::REQUEST_EXPIRED => Self::RequestExpired(Payload::of(record)?),
            Kind::NOTIFY_RULE => Self::NotifyRule(Payload::of(record)?),
            Kind::NOTIFY_EMITTED => Self::NotifyEmitted(Payload::of(record)?),
            Kind::NOTIFY_DONE => Self::NotifyDone(Payload::of(record)?),
            kind if Intent::of_kind(kind).is_some() => Self::Signal(record.run, Signal::of(record)?),
            _ => Self::Plain,
        })
    }
}

fn malformed(error: ProtocolError) -> ProtocolError {
    ProtocolError::new(Code::RECORD_MALFORMED, error.detail)
}

//! The nouns: names, ids, authors, cursors, verdicts.

use core::fmt;
use core::str::FromStr;

use crate::error::{Code, ProtocolError};
use crate::planted::{Bug, planted};
use crate::registry::{MAX_KEY, MAX_NAME};
use crate::session::Refusal;
use crate::wire::{Reader, Subject, Writer};

crate::wire::text_type! {
    /// Name of a session: 1 to 512 bytes of UTF-8 without control characters, for example `agent:session123`
    /// (spec SESS-1).
    SessionName, MAX_NAME, "session name"
}

crate::wire::text_type! {
    /// Key of the shared state: 1 to 512 bytes of UTF-8 without control characters, for example `tool/42` (spec STATE-1).
    Key, MAX_KEY, "key"
}

impl core::borrow::Borrow<str> for Key {
    fn borrow(&self) -> &str {
        self.as_str()
    }
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $len:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            #[allow(dead_code, reason = "not every id stands in a frame field of its own")]
            pub(crate) fn put(&self, w: &mut Writer) {
                w.raw(&self.0);
            }

            #[allow(dead_code, reason = "not every id stands in a frame field of its own")]
            pub(crate) fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
                Ok(Self(r.array()?))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ProtocolError;

            /// Reads lower- or upper-case hexadecimal. Errors: `NAME_INVALID` for anything else.
            fn from_str(text: &str) -> Result<Self, ProtocolError> {
                const WRONG: ProtocolError = ProtocolError::new(Code::NAME_INVALID, "id is not hexadecimal of its length");
                let text = text.as_bytes();
                if text.len() != 2 * $len {
                    return Err(WRONG);
                }
                let mut id = [0; $len];
                for (byte, pair) in id.iter_mut().zip(text.chunks_exact(2)) {
                    let digit = |at: usize| (pair[at] as char).to_digit(16).ok_or(WRONG);
                    *byte = (digit(0)? << 4 | digit(1)?) as u8;
                }
                Ok(Self(id))
            }
        }
    };
}

id_type! {
    /// Random id of one life of a session; changes when it is deleted and created again (spec SESS-3).
    Incarnation, 16
}
id_type! {
    /// Random id of one client installation or tab (spec CONN-6).
    Instance, 16
}
id_type! {
    /// Id of a message, chosen at random by whoever begins it (spec REC-3).
    MessageId, 16
}
id_type! {
    /// Id of a run, chosen at random by whoever asks for it (spec REC-3).
    RunId, 16
}
id_type! {
    /// Id of a signal, chosen at random by whoever sends it (spec SIG-1).
    SignalId, 16
}
id_type! {
    /// Id of a request to people, chosen at random by whoever asks (spec SIG-7).
    RequestId, 16
}
id_type! {
    /// BLAKE3 of the canonical encoding of a view (spec FOLD-4).
    ViewHash, 32
}

id_type! {
    /// An Ed25519 public key of a client (spec RES-1).
    ClientKey, 32
}

/// Who wrote a record: stamped by the server, never taken from the client (spec AUTH-4).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Author {
    /// Subject of the verified capability token.
    pub subject: Subject,
    /// The instance that the client stated in HELLO.
    pub instance: Instance,
}

impl Author {
    /// The author of records that the server writes itself: subject `server`, instance zero (spec AUTH-5).
    pub fn server() -> Self {
        let subject = Subject::new("server").unwrap_or_else(|_| unreachable!("a fixed valid subject"));
        Self { subject, instance: Instance([0; 16]) }
    }

    /// True for [`Author::server`].
    pub fn is_server(&self) -> bool {
        self.subject.as_str() == "server"
    }

    pub(crate) fn put(&self, w: &mut Writer) {
        self.subject.put(w);
        self.instance.put(w);
    }

    pub(crate) fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        Ok(Self { subject: Subject::get(r)?, instance: Instance::get(r)? })
    }
}

impl fmt::Display for Author {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.subject, self.instance)
    }
}

/// A position in a session. It grants nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    /// The incarnation that the position belongs to.
    pub incarnation: Incarnation,
    /// The next seq wanted.
    pub next: u64,
}

/// What became of a cursor (spec SESS-10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Every record from the cursor on follows.
    Exact = 0,
    /// What the cursor points into comes folded, as a view or as whole messages.
    Snapshot = 1,
    /// Records at the cursor were trimmed; from where to where is stated.
    Gap = 2,
    /// The cursor belongs to another incarnation.
    Gone = 3,
}

impl Verdict {
    /// What became of a position `next` where records below `first` were trimmed, and some below `compacted` put together.
    pub(super) fn of(next: u64, first: u64, compacted: u64) -> Self {
        if next < first {
            Self::Gap
        } else if next < compacted {
            Self::Snapshot
        } else {
            Self::Exact
        }
    }

    /// What an attach answers about the cursor that it was given, of a session with this incarnation whose readable seqs are
    /// `first..tail`, and of which records below `compacted` may have been put together (spec SESS-10). Refusals: `SESSION_DAMAGED` for a
    /// cursor beyond the tail.
    pub fn of_attach(
        (held, next): (Option<Incarnation>, Option<u64>),
        incarnation: Incarnation,
        (first, compacted, tail): (u64, u64, u64),
    ) -> Result<Self, Refusal> {
        match (held, next) {
            (Some(held), _) if held != incarnation && !planted(Bug::IncarnationIgnored) => Ok(Self::Gone),
            (_, Some(next)) if next > tail => {
                let detail = "the cursor is beyond the tail: records that were shown are missing";
                Err(Refusal::new(Code::SESSION_DAMAGED, detail))
            }
            (_, next) => Ok(next.map_or(Self::Exact, |next| Self::of(next, first, compacted))),
        }
    }

    /// The word used on the command line and in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::Snapshot => "snapshot",
            Self::Gap => "gap",
            Self::Gone => "gone",
        }
    }

    pub(crate) fn put(&self, w: &mut Writer) {
        w.varint(*self as u64);
    }

    pub(crate) fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        Ok(match r.varint()? {
            0 => Self::Exact,
            1 => Self::Snapshot,
            2 => Self::Gap,
            3 => Self::Gone,
            _ => return Err(ProtocolError::malformed("verdict is not known")),
        })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

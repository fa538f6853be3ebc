//! Error codes: the one table of what can go wrong, what it ends, and what to do about it (spec `ERR`).

use core::fmt;
use core::time::Duration;

use crate::registry::MAX_RETRY_AFTER;

/// What an error ends (spec ERR-2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The request or batch that it answers; the QUIC stream goes on.
    Request,
    /// The QUIC stream on which it happened; the connection goes on.
    Stream,
    /// The connection.
    Connection,
}

/// What the receiver of an error should do (spec ERR-3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Advice {
    /// The same request may succeed later; retry it with backoff.
    Retry,
    /// The attachment is no longer right; attach again.
    Reattach,
    /// Present a valid or wider capability token.
    Reauthenticate,
    /// The request is wrong; do not repeat it unchanged.
    Fix,
    /// Nothing that this client does will make it succeed.
    GiveUp,
}

macro_rules! codes {
    ($( $(#[$doc:meta])* $name:ident = $number:literal, $scope:ident, $advice:ident; )+) => {
        impl Code {
            $( $(#[$doc])* pub const $name: Self = Self($number); )+

            /// Every code of the registry, in ascending order.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The registry name, or `None` for a number that this version does not know.
            pub const fn name(self) -> Option<&'static str> {
                match self.0 { $( $number => Some(stringify!($name)), )+ _ => None }
            }

            /// What the error ends. An unknown code ends the request.
            pub const fn scope(self) -> Scope {
                match self.0 { $( $number => Scope::$scope, )+ _ => Scope::Request }
            }

            /// What to do about it. An unknown code means give up.
            pub const fn advice(self) -> Advice {
                match self.0 { $( $number => Advice::$advice, )+ _ => Advice::GiveUp }
            }
        }
    };
}

/// A wire error code. Open: a number that this version does not know survives a round trip, ends the request, and means
/// give up (spec ERR-5).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Code(pub u64);

codes! {
    /// Nothing is wrong: the orderly end of a QUIC stream or connection.
    NO_ERROR = 0x00, Connection, Retry;
    /// The peer failed in a way that is its own fault.
    INTERNAL = 0x01, Stream, Retry;
    /// Bytes that no frame may have: bad length, non-minimal varint, truncated field, wrong parameter order.
    FRAME_MALFORMED = 0x02, Stream, Fix;
    /// A frame longer than the limit in force.
    FRAME_TOO_LARGE = 0x03, Stream, Fix;
    /// A critical frame type or parameter that this version does not know.
    FRAME_UNKNOWN = 0x04, Stream, Fix;
    /// A known frame where the protocol does not allow it.
    FRAME_UNEXPECTED = 0x05, Stream, Fix;
    /// A limit stated in HELLO was exceeded.
    LIMIT_EXCEEDED = 0x06, Request, Fix;
    /// The peer did not say HELLO in time.
    HELLO_TIMEOUT = 0x07, Connection, Retry;
    /// Credit for bytes that were never sent.
    CREDIT_EXCEEDED = 0x08, Stream, Fix;
    /// The peer let unread control data grow beyond the bound.
    CONTROL_BACKLOG = 0x09, Stream, Reattach;
    /// The id of a producer or subscription is in use on the connection.
    ID_IN_USE = 0x0a, Request, Fix;
    /// No capability token was presented.
    UNAUTHENTICATED = 0x10, Request, Reauthenticate;
    /// The capability token has expired.
    TOKEN_EXPIRED = 0x11, Request, Reauthenticate;
    /// The capability token is forged, garbled or signed by an unknown key.
    TOKEN_INVALID = 0x12, Request, Reauthenticate;
    /// The capability token does not grant this operation on this session.
    FORBIDDEN = 0x13, Request, Reauthenticate;
    /// The capability token, what it was made from, its subject or its key was revoked.
    TOKEN_REVOKED = 0x14, Request, Reauthenticate;
    /// No session has this name.
    SESSION_NOT_FOUND = 0x20, Stream, Fix;
    /// A session of this name exists already.
    SESSION_EXISTS = 0x21, Stream, Fix;
    /// The session is closed; it can be read, not appended to.
    SESSION_CLOSED = 0x22, Request, GiveUp;
    /// The session was deleted while this attachment was open.
    SESSION_GONE = 0x23, Stream, Reattach;
    /// Stored data of this session is damaged; it is quarantined.
    SESSION_DAMAGED = 0x24, Stream, GiveUp;
    /// The name is empty, too long or holds control characters.
    NAME_INVALID = 0x25, Request, Fix;
    /// A newer writer holds this session; this server no longer does.
    WRITER_FENCED = 0x26, Stream, Reattach;
    /// A newer epoch of this producer was granted.
    FENCED = 0x30, Request, GiveUp;
    /// The batch is ahead of the producer's next sequence; `value` is the expected one.
    SEQ_GAP = 0x31, Request, Retry;
    /// The batch was stored long ago; its original seqs are no longer known.
    DUPLICATE = 0x32, Request, GiveUp;
    /// A record is longer than the limit.
    RECORD_TOO_LARGE = 0x33, Request, Fix;
    /// A batch has too many records or bytes, or none.
    BATCH_TOO_LARGE = 0x34, Request, Fix;
    /// A record kind that only the server may write.
    KIND_REFUSED = 0x35, Request, Fix;
    /// A critical record kind that this version does not know.
    KIND_UNKNOWN = 0x36, Request, Fix;
    /// Record bytes that no record may have.
    RECORD_MALFORMED = 0x37, Request, Fix;
    /// The record names a stream id that the session has not defined.
    STREAM_UNDEFINED = 0x38, Request, Fix;
    /// The QUIC stream names an attachment or producer that this connection did not open.
    PRODUCER_UNKNOWN = 0x39, Stream, Reattach;
    /// What was sent may be stored or not, and nobody can tell any more. Never sent: what a client says of what it kept (spec OUT-7).
    OUTCOME_UNKNOWN = 0x3a, Request, GiveUp;
    /// The server cannot do this now: no disk space, a failing store; `value` is after how many milliseconds to try again, or 0.
    UNAVAILABLE = 0x40, Request, Retry;
    /// The server has too much to do; `value` is after how many milliseconds to try again, or 0.
    OVERLOADED = 0x41, Request, Retry;
    /// The server is shutting down.
    GOING_AWAY = 0x42, Connection, Retry;
    /// More in a time than is allowed; `value` is after how many milliseconds it will be again.
    RATE_LIMITED = 0x43, Request, Retry;
    /// More of something than is allowed at once; `value` is how much is.
    QUOTA_EXCEEDED = 0x44, Request, Retry;
    /// A message with this id was begun before.
    MESSAGE_EXISTS = 0x50, Request, Fix;
    /// No message with this id is open.
    MESSAGE_NOT_OPEN = 0x51, Request, Fix;
    /// A key of the shared state is not as expected; `value` is its revision plus one, or 0 if it has no value.
    CONFLICT = 0x52, Request, Fix;
    /// What a change needs of a value or of its argument does not hold: no integer, no JSON document.
    STATE_INVALID = 0x53, Request, Fix;
    /// The caller is not a member of the session.
    NOT_A_MEMBER = 0x54, Request, Fix;
    /// A run is active; `value` is its epoch.
    RUN_ACTIVE = 0x55, Request, Fix;
    /// The run is over, or no run of this id is known.
    RUN_OVER = 0x56, Request, Fix;
    /// Something became of the request already, or none of this id is known; `value` is the seq of what did, plus one, or 0.
    ALREADY_RESOLVED = 0x57, Request, Fix;
    /// The run is not held under this epoch: it was lost, taken over, or is over; `value` is its epoch, or 0.
    RUN_FENCED = 0x58, Request, GiveUp;
    /// The resume token, or the signature, does not prove anything here.
    RESUME_INVALID = 0x60, Request, Fix;
    /// The resume token was used before the last one, or the client went on over another connection.
    RESUME_STALE = 0x61, Stream, GiveUp;
    /// The resume token is for another life of the session.
    RESUME_GONE = 0x62, Request, Fix;
    /// The instance is bound to a client key, and the attachment has not resumed.
    RESUME_REQUIRED = 0x63, Request, Fix;
    /// Nothing is known of the instance any more.
    RESUME_UNKNOWN = 0x64, Request, Fix;
}

impl Code {
    /// After how long the same request should be tried again, from the `value` that came with the code; zero where that is not said (spec
    /// ERR-6).
    pub const fn retry_after(self, value: u64) -> Duration {
        match self {
            Self::RATE_LIMITED | Self::OVERLOADED | Self::UNAVAILABLE => {
                Duration::from_millis(if value < MAX_RETRY_AFTER { value } else { MAX_RETRY_AFTER })
            }
            _ => Duration::ZERO,
        }
    }

    /// True if the same request may succeed later without being changed.
    pub const fn is_retryable(self) -> bool {
        matches!(self.advice(), Advice::Retry | Advice::Reattach)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "CODE_{:#x}", self.0),
        }
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A rule of the protocol that a peer or a file broke: exactly what the peer is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProtocolError {
    /// The registry code.
    pub code: Code,
    /// What happened and to what, in lower case, without secrets or payload bytes.
    pub detail: &'static str,
}

impl ProtocolError {
    /// An error with `code` that says `detail`.
    pub const fn new(code: Code, detail: &'static str) -> Self {
        Self { code, detail }
    }

    /// `FRAME_MALFORMED` that says `detail`.
    pub const fn malformed(detail: &'static str) -> Self {
        Self::new(Code::FRAME_MALFORMED, detail)
    }
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.detail)
    }
}

impl std::error::Error for ProtocolError {}

//! What can go wrong, and whether trying again can help.

use core::fmt;
use core::time::Duration;

use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::wire::Error;
use mainstay_transport::ConnectionError;

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClientError {
    /// The server refused.
    Refused {
        /// The registry code.
        code: Code,
        /// The number that the code defines, else 0; with `CONFLICT` the key's revision plus one, or 0 if it has no value.
        value: u64,
        /// What the server said, for people.
        message: String,
    },
    /// The server cannot be reached; trying went on for as long as the configuration says.
    Unreachable {
        /// The server.
        target: String,
        /// The last failure.
        last: ConnectionError,
    },
    /// The server broke the protocol.
    Protocol(ProtocolError),
    /// The session was deleted, and perhaps created again: what this handle was attached to is gone.
    Gone,
    /// The client was closed.
    Closed,
    /// It was valid until a time that has passed, and was not sent.
    Expired,
    /// A configuration or an argument is wrong.
    Invalid(String),
}

impl ClientError {
    /// True if the same request may succeed later. The client has retried already for as long as it was told to.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Refused { code, .. } => code.is_retryable(),
            Self::Unreachable { last, .. } => !matches!(last, ConnectionError::Untrusted(_)),
            Self::Protocol(_) | Self::Gone | Self::Closed | Self::Expired | Self::Invalid(_) => false,
        }
    }

    /// The name of the error: a registry name, or `UNREACHABLE`, `UDP_BLOCKED` where nothing at all came back, `GONE`, `CLOSED`, `EXPIRED`, `INVALID`.
    pub fn name(&self) -> String {
        match self {
            Self::Refused { code, .. } => code.to_string(),
            Self::Unreachable { last: ConnectionError::Silent(_), .. } => "UDP_BLOCKED".into(),
            Self::Unreachable { .. } => "UNREACHABLE".into(),
            Self::Protocol(error) => error.code.to_string(),
            Self::Gone => "GONE".into(),
            Self::Closed => "CLOSED".into(),
            Self::Expired => "EXPIRED".into(),
            Self::Invalid(_) => "INVALID".into(),
        }
    }

    /// After how long the server asks to try again, where it does (spec ERR-6).
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { code, value, .. } => Some(code.retry_after(*value)).filter(|after| !after.is_zero()),
            _ => None,
        }
    }

    /// How long to wait before it is tried again: at least `pause`, and as long as the server asks.
    pub(crate) fn pause(&self, pause: Duration) -> Duration {
        self.retry_after().unwrap_or_default().max(pause)
    }

    /// True if it may be taken later: with another token, too, where one comes from somewhere.
    pub(crate) fn passes(&self, renews: bool) -> bool {
        self.is_retryable() || renews && matches!(self, Self::Refused { code, .. } if is_renewable(*code))
    }

    /// What an ERROR frame says.
    pub(crate) fn answered(error: &Error) -> Self {
        Self::Refused { code: error.code, value: error.value, message: error.detail.as_str().to_owned() }
    }

    pub(crate) fn refused(code: Code, message: impl Into<String>) -> Self {
        Self::Refused { code, value: 0, message: message.into() }
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { code, message, .. } => write!(f, "the server refused: {message} ({code})"),
            Self::Unreachable { target, last } => write!(f, "cannot reach the server at {target}: {last}"),
            // Found here, before anything was sent.
            Self::Protocol(error) if error.code == Code::NAME_INVALID => {
                write!(f, "not a valid name: {}", error.detail)
            }
            Self::Protocol(error) => write!(f, "the server broke the protocol: {error}"),
            Self::Gone => f.write_str("the session was deleted, or created again under another incarnation"),
            Self::Closed => f.write_str("the client was closed"),
            Self::Expired => f.write_str("it was not sent before its time was over"),
            Self::Invalid(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for ClientError {}

impl From<ProtocolError> for ClientError {
    fn from(error: ProtocolError) -> Self {
        Self::Protocol(error)
    }
}

/// True where another token of the same kind helps.
pub(crate) fn is_renewable(code: Code) -> bool {
    matches!(code, Code::TOKEN_EXPIRED | Code::TOKEN_REVOKED)
}

/// Whether a failed append took effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// It is not stored and never will be.
    NotCommitted,
    /// It may be stored; only reading the session tells.
    Unknown,
}

/// Why an append failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppendError {
    /// Whether it took effect.
    pub stored: Stored,
    /// Why.
    pub error: ClientError,
}

impl AppendError {
    /// An append that failed before anything was sent.
    pub(crate) fn unsent(error: ClientError) -> Self {
        Self { stored: Stored::NotCommitted, error }
    }
}

impl fmt::Display for AppendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stored = match self.stored {
            Stored::NotCommitted => "not stored",
            Stored::Unknown => "not known whether stored",
        };
        write!(f, "{stored}: {}", self.error)
    }
}

impl std::error::Error for AppendError {}

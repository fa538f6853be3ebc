//! Why a command failed, and its exit code.

use std::fmt;
use std::process::ExitCode;

use mainstay_client::{AppendError, ClientError, Code};
use mainstay_store_fjall::OpenError;

/// The exit codes of the command line contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    Failed = 1,
    Usage = 2,
    Refused = 3,
    Unreachable = 4,
    Integrity = 5,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// What went wrong.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    /// Name of the error, for scripts.
    pub(crate) code: String,
    /// What happened, to what, and what to do, for people.
    pub(crate) message: String,
    pub(crate) retryable: bool,
}

impl Failure {
    fn new(exit: Exit, code: &str, message: impl Into<String>) -> Self {
        Self { exit, code: code.into(), message: message.into(), retryable: false }
    }

    /// The code of a failure that nobody is there to be told of.
    const UNREAD: &str = "UNREAD";

    /// True if whoever read the output has gone.
    pub(crate) fn is_unread(&self) -> bool {
        self.code == Self::UNREAD
    }

    pub(crate) fn failed(code: &str, message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, code, message)
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, "USAGE", message)
    }

    pub(crate) fn integrity(message: impl Into<String>) -> Self {
        Self::new(Exit::Integrity, "DAMAGED", message)
    }

    /// A file or stream that cannot be read or written.
    pub(crate) fn io(what: impl fmt::Display, error: &std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return Self::failed(Self::UNREAD, format!("{what}: nobody reads it any more"));
        }
        Self::failed("IO", format!("{what}: {error}"))
    }
}

/// Names what was asked for where the server's answer does not.
pub(crate) trait About<T> {
    /// The failure of something that a session of this name is needed for; without a name it stays as it is.
    fn about(self, session: &str) -> Result<T, Failure>;
}

impl<T> About<T> for Result<T, ClientError> {
    fn about(self, session: &str) -> Result<T, Failure> {
        self.map_err(|error| {
            let is_missing = matches!(error, ClientError::Refused { code: Code::SESSION_NOT_FOUND, .. });
            let concerns_it = matches!(error, ClientError::Refused { .. } | ClientError::Gone) && !session.is_empty();
            let failure = Failure::from(error);
            let message = if !concerns_it {
                return failure;
            } else if is_missing {
                format!("there is no session {session} (SESSION_NOT_FOUND); `mainstay session ls` lists those that are there")
            } else {
                format!("session {session}: {}", failure.message)
            };
            Failure { message, ..failure }
        })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        let exit = match &error {
            ClientError::Refused { code: Code::SESSION_DAMAGED, .. } => Exit::Integrity,
            ClientError::Refused { .. } | ClientError::Gone => Exit::Refused,
            ClientError::Unreachable { .. } => Exit::Unreachable,
            ClientError::Invalid(_) => Exit::Usage,
            ClientError::Protocol(error) if error.code == Code::NAME_INVALID => Exit::Usage,
            _ => Exit::Failed,
        };
        Self { exit, code: error.name(), message: error.to_string(), retryable: error.is_retryable() }
    }
}

impl From<AppendError> for Failure {
    fn from(error: AppendError) -> Self {
        let message = error.to_string();
        Self { message, ..error.error.into() }
    }
}

impl From<OpenError> for Failure {
    fn from(error: OpenError) -> Self {
        let exit = if error.is_damage() { Exit::Integrity } else { Exit::Failed };
        let code = match &error {
            OpenError::Locked(_) => "LOCKED",
            OpenError::Damaged(_) => "DAMAGED",
            OpenError::Version(_) => "VERSION",
            _ => "IO",
        };
        Self::new(exit, code, error.to_string())
    }
}

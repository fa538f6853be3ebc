//! What other processes of this machine ask the server that serves a data directory, each answered by one line: how it is doing, and to
//! believe a token no more.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use mainstay_server::auth::Revocation;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::failure::{Exit, Failure};
use crate::local::{self, Request};

/// What is asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Question {
    /// What it is doing, with so many sessions and connections.
    Status(usize),
    /// To believe something no more in a namespace.
    Revoke {
        /// Its name.
        namespace: String,
        /// What.
        revocation: Revocation,
    },
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answer {
    Is(Value),
    Failed { code: String, message: String },
}

/// Answers. Whoever asked and is gone needs none.
pub(super) fn answer(mut stream: UnixStream, answer: Result<Value, Failure>) {
    let answer = match answer {
        Ok(value) => Answer::Is(value),
        Err(Failure { code, message, .. }) => Answer::Failed { code, message },
    };
    let _ = local::say(&mut stream, &answer);
}

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks the server that serves the directory of this socket. `None` if none does.
///
/// Errors: it refuses, or does not answer in time.
pub(crate) fn ask(path: &Path, question: Question) -> Result<Option<Value>, Failure> {
    let broken = |error: io::Error| Failure::io("the server that runs", &error);
    let Some((mut stream, _)) = local::call(path).map_err(broken)? else { return Ok(None) };
    local::say(&mut stream, &Request::Ask(question)).map_err(broken)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(broken)?;
    match local::hear(&mut stream).map_err(broken)? {
        Answer::Is(value) => Ok(Some(value)),
        Answer::Failed { code, message } => Err(Failure { exit: Exit::Refused, code, message, retryable: false }),
    }
}

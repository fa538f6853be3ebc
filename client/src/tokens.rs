//! The capability tokens of a client: the one that a server took, and the one that the application wants.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::ClientError;

#[derive(Debug, Default)]
struct Held {
    /// What a server took last, or what the client began with.
    taken: Option<String>,
    /// What the application gave since; no server has said anything about it.
    wanted: Option<String>,
    /// The last one that was refused.
    refused: Option<(String, ClientError)>,
}

/// Shared by the client and its connections. A token that is refused is never used again, and what was taken before it stays.
#[derive(Debug)]
pub(crate) struct Tokens(Mutex<Held>);

/// What is known of a token.
pub(crate) enum Judged {
    /// A server took it, or another one was wanted since.
    Taken,
    /// It was refused.
    Refused(ClientError),
    /// No server has said anything about it.
    Open,
}

impl Tokens {
    pub(crate) fn new(first: Option<String>) -> Self {
        Self(Mutex::new(Held { taken: first, ..Held::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The token that a connection begins with.
    pub(crate) fn taken(&self) -> Option<String> {
        self.lock().taken.clone()
    }

    /// The token that no server has judged.
    pub(crate) fn wanted(&self) -> Option<String> {
        self.lock().wanted.clone()
    }

    /// The application wants this one from now on.
    pub(crate) fn want(&self, token: String) {
        self.lock().wanted = Some(token);
    }

    /// A server judged a token.
    pub(crate) fn judge(&self, token: &str, verdict: &Result<(), ClientError>) {
        let mut held = self.lock();
        if held.wanted.as_deref() == Some(token) {
            held.wanted = None;
        }
        match verdict {
            Ok(()) => held.taken = Some(token.to_owned()),
            Err(error) => held.refused = Some((token.to_owned(), error.clone())),
        }
    }

    /// What is known of a token that was wanted.
    pub(crate) fn judged(&self, token: &str) -> Judged {
        let held = self.lock();
        match &held.refused {
            _ if held.wanted.as_deref() == Some(token) => Judged::Open,
            Some((refused, error)) if refused == token => Judged::Refused(error.clone()),
            _ => Judged::Taken,
        }
    }
}

//! The capability tokens of a client: the one that a server took, and the one that the application wants.

use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::time::Duration;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::Notify;

use crate::error::ClientError;

type Asking = Pin<Box<dyn Future<Output = Result<String, String>> + Send>>;

/// Where a client gets its next capability token when the one that it has is about to expire, or is not taken any more.
#[derive(Clone)]
pub struct Renewal(Arc<dyn Fn() -> Asking + Send + Sync>);

impl fmt::Debug for Renewal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Renewal")
    }
}

impl Renewal {
    /// Asks `source`: for example a backend of the application. It is asked about a minute before a token expires, and again after five
    /// seconds if it fails, which it says for people, or if its token is not taken. It may take ten seconds.
    pub fn new<F>(source: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<String, String>> + Send + 'static,
    {
        Self(Arc::new(move || Box::pin(source())))
    }

    /// The next token, if there is one now.
    pub(crate) async fn ask(&self) -> Option<String> {
        match tokio::time::timeout(PATIENCE, (self.0)()).await {
            Ok(Ok(token)) => Some(token),
            Ok(Err(error)) => {
                tracing::warn!(%error, "no other token");
                None
            }
            Err(_) => {
                tracing::warn!("no other token came in time");
                None
            }
        }
    }
}

/// How long the source of tokens may take.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Held {
    /// What a server took last, or what the client began with.
    taken: Option<String>,
    /// What the application gave since; no server has said anything about it.
    wanted: Option<String>,
    /// The last one that was refused.
    refused: Option<(String, ClientError)>,
    /// When the one that was taken expires, in seconds since the Unix epoch.
    expires: Option<u64>,
    /// The one that was taken is not any more.
    stale: bool,
    /// It will not be for long.
    expiring: bool,
}

/// Shared by the client and its connections. A token that is refused is never used again, and what was taken before it stays.
pub(crate) struct Tokens {
    held: Mutex<Held>,
    /// Another token is needed soon.
    pub(crate) needed: Notify,
}

impl fmt::Debug for Tokens {
    /// Tokens are secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tokens(..)")
    }
}

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
        Self { held: Mutex::new(Held { taken: first, ..Held::default() }), needed: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The token that a connection begins with.
    pub(crate) fn taken(&self) -> Option<String> {
        self.lock().taken.clone()
    }

    /// The token that no server has judged.
    pub(crate) fn wanted(&self) -> Option<String> {
        self.lock().wanted.clone()
    }

    /// True if nothing came in the place of this one.
    pub(crate) fn is_current(&self, token: &str) -> bool {
        let held = self.lock();
        held.wanted.as_ref().or(held.taken.as_ref()).is_some_and(|current| current == token)
    }

    /// The application wants this one from now on.
    pub(crate) fn want(&self, token: String) {
        self.lock().wanted = Some(token);
    }

    /// The token that was taken will not be for long: another one is needed.
    pub(crate) fn expiring(&self) {
        self.lock().expiring = true;
        self.needed.notify_one();
    }

    /// True unless another one was taken since one was needed.
    pub(crate) fn is_needed(&self) -> bool {
        let held = self.lock();
        held.stale || held.expiring
    }

    /// The token that was taken is not any more: another one is needed.
    pub(crate) fn outlived(&self) {
        self.lock().stale = true;
        self.needed.notify_one();
    }

    /// Before a connection is made: gets another token where the one that was taken would be refused.
    pub(crate) async fn refresh(&self, renewal: Option<&Renewal>) {
        let Some(renewal) = renewal else { return };
        let stale = {
            let held = self.lock();
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            held.stale || held.taken.is_none() || held.expires.is_some_and(|expires| expires < now)
        };
        if stale && let Some(token) = renewal.ask().await {
            let mut held = self.lock();
            (held.taken, held.expires) = (Some(token), None);
            (held.stale, held.expiring) = (false, false);
        }
    }

    /// A server judged a token; one that it took expires then.
    pub(crate) fn judge(&self, token: &str, verdict: &Result<u64, ClientError>) {
        let mut held = self.lock();
        if held.wanted.as_deref() == Some(token) {
            held.wanted = None;
        }
        match verdict {
            Ok(expires) => {
                (held.taken, held.expires) = (Some(token.to_owned()), Some(*expires));
                (held.stale, held.expiring) = (false, false);
            }
            Err(error) => {
                if held.taken.as_deref() == Some(token) {
                    held.stale = true;
                    self.needed.notify_one();
                }
                held.refused = Some((token.to_owned(), error.clone()));
            }
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

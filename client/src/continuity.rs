//! What proves that this is the same client again: its key, and the newest resume token of each session (spec RES).

use core::fmt;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mainstay_protocol::error::ProtocolError;
use mainstay_protocol::session::{ClientKey, Instance, RESUME_EXPORTER, SessionName, resume_context, resume_text};
use mainstay_protocol::wire::Resume;
use mainstay_transport::Connection;
use mainstay_transport::entropy;
use ring::signature::{Ed25519KeyPair, KeyPair};
use serde::{Deserialize, Serialize};

use crate::error::ClientError;
use crate::files::{Replacement, sync_directory};

/// Who a client is to the sessions that it is in: an instance, and the key that the instance is bound to as soon as it holds something there: a
/// producer, a membership, a run. From then on nobody else can go on with what it holds, with whatever token. Clones are the same
/// client.
///
/// An application that is to be the same client after a restart keeps it in a file, with [`Continuity::in_file`]. Two processes must not use one
/// file at once: the one that resumed last goes on, the other one is stale.
#[derive(Clone)]
pub struct Continuity(Arc<Inner>);

struct Inner {
    instance: Instance,
    key: Ed25519KeyPair,
    seed: [u8; 32],
    tokens: Mutex<BTreeMap<SessionName, Bytes>>,
    /// How many RESUMEs for each session were never answered: of a connection that was given up one may arrive late (spec RES-5).
    unanswered: Mutex<BTreeMap<SessionName, u32>>,
    file: Option<PathBuf>,
}

/// What the file has.
#[derive(Serialize, Deserialize)]
struct File {
    instance: String,
    seed: String,
    /// The newest resume token of each session.
    tokens: BTreeMap<String, String>,
}

impl fmt::Debug for Continuity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Continuity({})", self.0.instance)
    }
}

impl Default for Continuity {
    /// A new client.
    fn default() -> Self {
        // The seed of a key comes from the system, whatever ids come from.
        Self::with(Instance(entropy::random()), rand::random(), BTreeMap::new(), None)
    }
}

impl Continuity {
    /// The client that is kept in `path`, or a new one that is kept there from now on; what its tokens become is written there before they
    /// are used. The file is a secret, and readable by its owner alone.
    ///
    /// Errors: `Invalid`, the file cannot be read or written, or is something else.
    pub fn in_file(path: &Path) -> Result<Self, ClientError> {
        let wrong = |what: &dyn fmt::Display| ClientError::Invalid(format!("{}: {what}", path.display()));
        let file = Some(path.to_owned());
        let this = match std::fs::read(path) {
            Ok(text) => {
                let kept: File = serde_json::from_slice(&text).map_err(|error| wrong(&error))?;
                let instance = kept.instance.parse::<Instance>().map_err(|error| wrong(&error))?;
                // As long as a client key, and as secret.
                let seed = kept.seed.parse::<ClientKey>().map_err(|error| wrong(&error))?.0;
                let tokens =
                    kept.tokens.into_iter().map(|(name, token)| Ok((SessionName::new(&name)?, Bytes::from(token))));
                let tokens: Result<_, ProtocolError> = tokens.collect();
                Self::with(instance, seed, tokens.map_err(|error| wrong(&error))?, file)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let Inner { instance, seed, .. } = &*Self::default().0;
                Self::with(*instance, *seed, BTreeMap::new(), file)
            }
            Err(error) => return Err(wrong(&error)),
        };
        this.write(&this.lock()).map_err(|error| wrong(&error))?;
        Ok(this)
    }

    fn with(instance: Instance, seed: [u8; 32], tokens: BTreeMap<SessionName, Bytes>, file: Option<PathBuf>) -> Self {
        let key = Ed25519KeyPair::from_seed_unchecked(&seed);
        let key = key.unwrap_or_else(|_| unreachable!("any 32 bytes are a seed"));
        let (tokens, unanswered) = (Mutex::new(tokens), Mutex::default());
        Self(Arc::new(Inner { instance, key, seed, tokens, unanswered, file }))
    }

    /// Writes the file, if there is one: the old one or the new one is there, whole.
    fn write(&self, tokens: &BTreeMap<SessionName, Bytes>) -> std::io::Result<()> {
        let Some(path) = &self.0.file else { return Ok(()) };
        let text = |(name, token): (&SessionName, &Bytes)| {
            (name.as_str().to_owned(), String::from_utf8_lossy(token).into_owned())
        };
        let tokens = tokens.iter().map(text).collect();
        let file = File { instance: self.0.instance.to_string(), seed: ClientKey(self.0.seed).to_string(), tokens };
        let mut replacement = Replacement::of(path)?;
        replacement.file.write_all(&serde_json::to_vec_pretty(&file)?)?;
        replacement.take_place()?;
        sync_directory(path)
    }

    /// The tokens are these from now on.
    fn change(&self, change: impl FnOnce(&mut BTreeMap<SessionName, Bytes>)) {
        let mut tokens = self.lock();
        change(&mut tokens);
        // Before it can be used: after a restart the one before it would be stale then. A few hundred bytes, once for an attachment.
        if let Err(error) = self.write(&tokens) {
            tracing::warn!(%error, "cannot keep a resume token; after a restart this is another client");
        }
    }

    /// Its instance.
    pub fn instance(&self) -> Instance {
        self.0.instance
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SessionName, Bytes>> {
        self.0.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unanswered(&self) -> MutexGuard<'_, BTreeMap<SessionName, u32>> {
        self.0.unanswered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A RESUME is sent.
    pub(crate) fn sent(&self, session: &SessionName) {
        let mut unanswered = self.unanswered();
        let count = unanswered.entry(session.clone()).or_default();
        *count = count.saturating_add(1);
    }

    /// One that was sent is answered.
    pub(crate) fn answered(&self, session: &SessionName) {
        let mut unanswered = self.unanswered();
        if let Some(count) = unanswered.get_mut(session) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                unanswered.remove(session);
            }
        }
    }

    /// How many are not answered, of whichever attachment.
    pub(crate) fn count_unanswered(&self, session: &SessionName) -> u32 {
        self.unanswered().get(session).copied().unwrap_or(0)
    }

    /// True if it is bound in this session.
    pub(crate) fn is_bound(&self, session: &SessionName) -> bool {
        self.lock().contains_key(session)
    }

    /// The server gave a token in the place of the one before.
    pub(crate) fn keep(&self, session: &SessionName, token: Bytes) {
        self.change(|tokens| drop(tokens.insert(session.clone(), token)));
    }

    /// The token is worth nothing any more.
    pub(crate) fn forget(&self, session: &SessionName) {
        self.change(|tokens| drop(tokens.remove(session)));
    }

    /// The proof for this connection. `None` if it exports no secret: it is not confirmed, or lost.
    pub(crate) fn proof(&self, session: &SessionName, connection: &impl Connection) -> Option<Resume> {
        let token = self.lock().get(session).cloned().unwrap_or_default();
        let secret = connection.export(RESUME_EXPORTER, resume_context(session)).ok()?;
        let mut signature = [0; 64];
        signature.copy_from_slice(self.0.key.sign(&resume_text(&secret, &token)).as_ref());
        let mut key = [0; 32];
        key.copy_from_slice(self.0.key.public_key().as_ref());
        Some(Resume { key: ClientKey(key), signature, token })
    }
}

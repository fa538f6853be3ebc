//! What proves that this is the same client again: its key, and the newest resume token of each session (spec RES).

use core::fmt;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mainstay_protocol::session::{ClientKey, Instance, RESUME_EXPORTER, SessionName, resume_context, resume_text};
use mainstay_protocol::wire::Resume;
use mainstay_transport::Connection;
use rand::RngCore;
use ring::signature::{Ed25519KeyPair, KeyPair};

/// Who a client is to the sessions that it is in: an instance, and the key that the instance is bound to as soon as it holds something there: a
/// producer, a membership, a run. From then on nobody else can go on with what it holds, with whatever token. Clones are the same
/// client.
#[derive(Clone)]
pub struct Continuity(Arc<Inner>);

struct Inner {
    instance: Instance,
    key: Ed25519KeyPair,
    tokens: Mutex<HashMap<SessionName, Bytes>>,
}

impl fmt::Debug for Continuity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Continuity({})", self.0.instance)
    }
}

impl Default for Continuity {
    /// A new client.
    fn default() -> Self {
        let (mut instance, mut seed) = ([0; 16], [0; 32]);
        let mut rng = rand::rng();
        rng.fill_bytes(&mut instance);
        rng.fill_bytes(&mut seed);
        Self::new(Instance(instance), &seed)
    }
}

impl Continuity {
    /// The client that is called `instance` and whose key was made from `seed`: the same over restarts if the application keeps both.
    pub fn new(instance: Instance, seed: &[u8; 32]) -> Self {
        let key = Ed25519KeyPair::from_seed_unchecked(seed);
        let key = key.unwrap_or_else(|_| unreachable!("any 32 bytes are a seed"));
        Self(Arc::new(Inner { instance, key, tokens: Mutex::default() }))
    }

    /// Its instance.
    pub fn instance(&self) -> Instance {
        self.0.instance
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SessionName, Bytes>> {
        self.0.tokens.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if it is bound in this session.
    pub(crate) fn is_bound(&self, session: &SessionName) -> bool {
        self.lock().contains_key(session)
    }

    /// The server gave a token in the place of the one before.
    pub(crate) fn keep(&self, session: &SessionName, token: Bytes) {
        self.lock().insert(session.clone(), token);
    }

    /// The token is worth nothing any more.
    pub(crate) fn forget(&self, session: &SessionName) {
        self.lock().remove(session);
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

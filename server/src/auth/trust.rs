//! Whom a server believes at the moment.

use std::sync::Arc;

use ring::digest::{SHA256, digest};
use tokio::sync::watch;

use super::jwt::JwtIssuer;
use super::revocation::{Revocation, Revocations};
use super::token::{Keyring, SigningKey};
use super::{AuthError, Claims};

/// What a token says: of one that was believed, or of whatever is in it ([`Verified::unchecked`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// What it says.
    pub claims: Claims,
    /// Its id: the one that it names, else the first half of its SHA-256, in hexadecimal.
    pub id: String,
    /// The id of the key that signed it.
    pub key: String,
}

/// Keys, issuers and revocations that are in force together.
#[derive(Debug, Clone, Default)]
pub struct Anchors {
    /// Keys of capability tokens.
    pub keyring: Keyring,
    /// Identity providers whose JWTs are taken.
    pub issuers: Vec<Arc<JwtIssuer>>,
    /// What was revoked.
    pub revoked: Revocations,
    minting: Option<Arc<SigningKey>>,
}

impl Anchors {
    /// Believes the keys of `keyring` alone.
    pub fn new(keyring: Keyring) -> Self {
        Self { keyring, ..Self::default() }
    }

    /// Signs the narrower tokens that clients ask for with this key, and believes it (spec AUTH-9). Without one a server makes none.
    #[must_use]
    pub fn minting_with(mut self, key: SigningKey) -> Self {
        self.keyring = self.keyring.with(key.verifying_key());
        self.minting = Some(Arc::new(key));
        self
    }

    /// The key that signs narrower tokens.
    pub fn minting(&self) -> Option<&SigningKey> {
        self.minting.as_deref()
    }

    /// Verifies a token at `now`, in seconds since the Unix epoch.
    ///
    /// Errors: `TOKEN_INVALID`, `TOKEN_EXPIRED`, `TOKEN_REVOKED`.
    pub fn verify(&self, token: &[u8], now: i64) -> Result<Verified, AuthError> {
        let (claims, key) = match JwtIssuer::is_jwt(token) {
            true => JwtIssuer::verify_with(&self.issuers, token, now)?,
            false => self.keyring.verify(token, now)?,
        };
        let id = claims.id.clone().unwrap_or_else(|| token_digest(token));
        let verified = Verified { claims, id, key };
        self.still(&verified)?;
        Ok(verified)
    }

    /// Succeeds if a token that was believed still is, its times aside. Errors: `TOKEN_INVALID` once its key is not trusted any more,
    /// `TOKEN_REVOKED`.
    pub fn still(&self, verified: &Verified) -> Result<(), AuthError> {
        self.revoked.check(verified)?;
        let trusts = |key: &str| self.keyring.trusts(key) || self.issuers.iter().any(|issuer| issuer.trusts(key));
        // What was made from a token is no better than that.
        match trusts(&verified.key) && verified.claims.root_key.as_deref().is_none_or(trusts) {
            true => Ok(()),
            false => Err(AuthError::invalid("the key that signed the token is not trusted any more")),
        }
    }
}

/// What a token without an id is called.
fn token_digest(token: &[u8]) -> String {
    // Of a JWT what is signed: some signatures can be written in more than one way.
    let signed = match JwtIssuer::is_jwt(token) {
        true => token.iter().rposition(|byte| *byte == b'.').map_or(token, |at| &token[..at]),
        false => token,
    };
    digest(&SHA256, signed).as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

impl Verified {
    /// What a token says of itself, without verifying anything: to show it, and to find the id under which it can be revoked.
    ///
    /// Errors: `TOKEN_INVALID`.
    pub fn unchecked(token: &[u8]) -> Result<Self, AuthError> {
        let (claims, key) = match JwtIssuer::is_jwt(token) {
            true => JwtIssuer::read(token)?,
            false => super::token::read(token)?,
        };
        let id = claims.id.clone().unwrap_or_else(|| token_digest(token));
        Ok(Self { claims, id, key })
    }
}

/// The [`Anchors`] in force, which can be changed while a server serves: connections learn of it at once (spec AUTH-8). Clones are the same.
#[derive(Debug, Clone)]
pub struct Trust {
    anchors: Arc<watch::Sender<Arc<Anchors>>>,
}

impl From<Keyring> for Trust {
    fn from(keyring: Keyring) -> Self {
        Self::new(Anchors::new(keyring))
    }
}

impl Trust {
    /// Believes these.
    pub fn new(anchors: Anchors) -> Self {
        Self { anchors: Arc::new(watch::channel(Arc::new(anchors)).0) }
    }

    /// What is in force.
    pub fn anchors(&self) -> Arc<Anchors> {
        self.anchors.borrow().clone()
    }

    /// Puts other keys and issuers in force; what was revoked stays revoked.
    pub fn replace(&self, anchors: Anchors) {
        self.anchors.send_modify(|now| {
            let revoked = now.revoked.clone();
            *now = Arc::new(Anchors { revoked, ..anchors });
        });
    }

    /// Revokes something. True if that was not revoked before. Errors: those of [`Revocations::add`].
    pub fn revoke(&self, revocation: Revocation, now: i64) -> Result<bool, String> {
        let mut added = Ok(false);
        self.anchors.send_if_modified(|anchors| {
            let mut revoked = anchors.revoked.clone();
            added = revoked.add(revocation, now);
            let changed = added == Ok(true);
            if changed {
                *anchors = Arc::new(Anchors { revoked, ..(**anchors).clone() });
            }
            changed
        });
        added
    }

    /// Follows changes.
    pub(crate) fn changes(&self) -> watch::Receiver<Arc<Anchors>> {
        self.anchors.subscribe()
    }
}

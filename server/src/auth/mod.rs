//! Who is at the other end, and what they may do where (spec AUTH).
//!
//! - [`token`](Claims): capability tokens, PASETO v4.public.
//! - [`jwt`](JwtIssuer): tokens of identity providers that exist already.
//! - [`Trust`]: which keys and issuers a server believes at the moment, and what was revoked.

mod jwt;
mod revocation;
mod token;
mod trust;

use core::fmt;

use mainstay_protocol::error::Code;
use mainstay_protocol::session::{Grants, Instance};
use mainstay_protocol::wire::Subject;

pub use jwt::{Algorithm, JwtIssuer};
pub use revocation::{MAX_REVOCATIONS, RESERVED_REVOCATIONS, Revocation, Revocations};
pub use token::{Keyring, SigningKey, VerifyingKey, read};
pub use trust::{Anchors, Trust, Verified};

/// SHA-256 of the SubjectPublicKeyInfo of a certificate.
pub type CertificatePin = [u8; 32];

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// Who.
    pub subject: Subject,
    /// The instance that alone may use it, if it is bound to one.
    pub device: Option<Instance>,
    /// The client certificate that it is bound to, if it is: it is good only on connections that prove to have its key.
    pub certificate: Option<CertificatePin>,
    /// Its id, if its issuer gave it one: at most [`MAX_TOKEN_ID`](mainstay_protocol::registry::MAX_TOKEN_ID) bytes.
    pub id: Option<String>,
    /// Ids of the tokens that it was made from, the first one first (spec AUTH-9).
    pub ancestors: Vec<String>,
    /// The id of the key that signed the first of those (spec AUTH-9).
    pub root_key: Option<String>,
    /// What may be done where.
    pub grants: Grants,
    /// When it was issued, in seconds since the Unix epoch.
    pub issued: i64,
    /// When it expires, in seconds since the Unix epoch.
    pub expires: i64,
}

impl Claims {
    /// The subject of the first token that this one was made from: what is counted against its quotas.
    pub(crate) fn root_subject(&self) -> Subject {
        let mut text = self.subject.as_str();
        for _ in &self.ancestors {
            text = text.rsplit_once('/').map_or(text, |(above, _)| above);
        }
        Subject::new(text).unwrap_or_else(|_| self.subject.clone())
    }

    /// Claims of a token that is bound to nothing and made from no other.
    pub fn new(subject: Subject, grants: Grants, issued: i64, expires: i64) -> Self {
        let (device, certificate, id, root_key, ancestors) = (None, None, None, None, Vec::new());
        Self { subject, device, certificate, id, ancestors, root_key, grants, issued, expires }
    }
}

/// Why a token is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthError {
    /// `UNAUTHENTICATED`, `TOKEN_INVALID`, `TOKEN_EXPIRED`, `TOKEN_REVOKED` or `QUOTA_EXCEEDED`.
    pub code: Code,
    /// The number that the code defines, else 0.
    pub value: u64,
    /// Why, without anything from the token that was not verified.
    pub detail: &'static str,
}

impl AuthError {
    pub(crate) const fn new(code: Code, detail: &'static str) -> Self {
        Self { code, value: 0, detail }
    }

    pub(crate) const fn invalid(detail: &'static str) -> Self {
        Self::new(Code::TOKEN_INVALID, detail)
    }
}

impl fmt::Display for AuthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.detail)
    }
}

impl std::error::Error for AuthError {}

/// How far ahead of the server's clock an issuer's may be, in seconds. Expiry is by the server's clock alone.
const LEEWAY: i64 = 60;

/// Checks the times of verified claims at `now`.
fn in_time(claims: &Claims, now: i64) -> Result<(), AuthError> {
    if claims.expires < now {
        return Err(AuthError::new(Code::TOKEN_EXPIRED, "the token has expired"));
    }
    if claims.issued > now.saturating_add(LEEWAY) {
        return Err(AuthError::invalid("the token is from the future"));
    }
    Ok(())
}

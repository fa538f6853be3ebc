//! Capability tokens: PASETO v4.public, signed with Ed25519 (spec AUTH).
//!
//! The claims are `sub`, `exp`, `iat`, `grants` and optionally `dev`, the instance that the token is bound to. The footer
//! names the key (`kid`), so that keys can be rotated: a server verifies with every key it knows.

use core::fmt;

use mainstay_protocol::error::Code;
use mainstay_protocol::registry::MAX_TOKEN;
use mainstay_protocol::session::{Grant, Grants, Instance, Operation, Operations};
use mainstay_protocol::wire::Subject;
use pasetors::Public;
use pasetors::keys::{AsymmetricKeyPair, AsymmetricPublicKey, AsymmetricSecretKey, Generate};
use pasetors::paserk::{FormatAsPaserk, Id};
use pasetors::token::UntrustedToken;
use pasetors::version4::{PublicToken, V4};
use serde::{Deserialize, Serialize};

/// Binds tokens to this protocol: a token made for something else does not verify.
const IMPLICIT: &[u8] = b"mainstay/1 capability";

/// How far ahead of the server's clock an issuer's may be, in seconds. Expiry is by the server's clock alone.
const LEEWAY: i64 = 60;

/// What a capability token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claims {
    /// Who.
    pub subject: Subject,
    /// The instance that alone may use it, if it is bound to one.
    pub device: Option<Instance>,
    /// What may be done where.
    pub grants: Grants,
    /// When it was issued, in seconds since the Unix epoch.
    pub issued: i64,
    /// When it expires, in seconds since the Unix epoch.
    pub expires: i64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClaimsText {
    sub: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    dev: Option<String>,
    iat: String,
    exp: String,
    grants: Vec<GrantText>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GrantText {
    prefix: String,
    ops: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct Footer {
    kid: String,
}

/// Why a token is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthError {
    /// `UNAUTHENTICATED`, `TOKEN_INVALID`, `TOKEN_EXPIRED` or `FORBIDDEN`.
    pub code: Code,
    /// Why, without anything from the token that was not verified.
    pub detail: &'static str,
}

impl AuthError {
    const fn invalid(detail: &'static str) -> Self {
        Self { code: Code::TOKEN_INVALID, detail }
    }
}

impl fmt::Display for AuthError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.detail)
    }
}

impl std::error::Error for AuthError {}

/// Signs tokens.
pub struct SigningKey {
    pair: AsymmetricKeyPair<V4>,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.verifying_key().id())
    }
}

impl SigningKey {
    /// A new random key. Errors: the random generator failed.
    pub fn generate() -> Result<Self, String> {
        AsymmetricKeyPair::generate().map(|pair| Self { pair }).map_err(|error| error.to_string())
    }

    /// Reads a PASERK `k4.secret.…` text. Errors: it is something else.
    pub fn from_paserk(text: &str) -> Result<Self, String> {
        let secret = AsymmetricSecretKey::<V4>::try_from(text.trim())
            .map_err(|_| "the signing key is not a PASERK k4.secret text".to_owned())?;
        let public = AsymmetricPublicKey::<V4>::try_from(&secret).map_err(|error| error.to_string())?;
        Ok(Self { pair: AsymmetricKeyPair { public, secret } })
    }

    /// The key as PASERK text. It is a secret.
    pub fn to_paserk(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.pair.secret.fmt(&mut text);
        text
    }

    /// The key that verifies what this one signs.
    pub fn verifying_key(&self) -> VerifyingKey {
        VerifyingKey { key: self.pair.public.clone() }
    }

    /// Signs a token. Errors: the claims do not fit into a token.
    pub fn mint(&self, claims: &Claims) -> Result<String, String> {
        let time = |seconds| jiff::Timestamp::from_second(seconds).map(|time| time.to_string());
        let grant = |grant: &Grant| GrantText {
            prefix: grant.prefix.clone(),
            ops: Operation::ALL
                .into_iter()
                .filter(|operation| grant.operations.contains(*operation))
                .map(|operation| operation.as_str().to_owned())
                .collect(),
        };
        let text = ClaimsText {
            sub: claims.subject.as_str().to_owned(),
            dev: claims.device.map(|device| device.to_string()),
            iat: time(claims.issued).map_err(|error| error.to_string())?,
            exp: time(claims.expires).map_err(|error| error.to_string())?,
            grants: claims.grants.0.iter().map(grant).collect(),
        };
        let message = serde_json::to_vec(&text).map_err(|error| error.to_string())?;
        let footer = Footer { kid: self.verifying_key().id() };
        let footer = serde_json::to_vec(&footer).map_err(|error| error.to_string())?;
        let token = PublicToken::sign(&self.pair.secret, &message, Some(&footer), Some(IMPLICIT))
            .map_err(|error| error.to_string())?;
        if token.len() > MAX_TOKEN {
            return Err(format!("the token has {} bytes; at most {MAX_TOKEN} are allowed", token.len()));
        }
        Ok(token)
    }
}

/// Verifies tokens.
#[derive(Debug, Clone)]
pub struct VerifyingKey {
    key: AsymmetricPublicKey<V4>,
}

impl VerifyingKey {
    /// Reads a PASERK `k4.public.…` text. Errors: it is something else.
    pub fn from_paserk(text: &str) -> Result<Self, String> {
        let key = AsymmetricPublicKey::<V4>::try_from(text.trim())
            .map_err(|_| "the verification key is not a PASERK k4.public text".to_owned())?;
        Ok(Self { key })
    }

    /// The key as PASERK text.
    pub fn to_paserk(&self) -> String {
        let mut text = String::new();
        let _ = self.key.fmt(&mut text);
        text
    }

    /// The key's id, its PASERK `k4.pid.…`.
    pub fn id(&self) -> String {
        let mut text = String::new();
        let _ = Id::from(&self.key).fmt(&mut text);
        text
    }
}

/// The keys that a server trusts. Several, so that a new one can be introduced before the old one is retired.
#[derive(Debug, Clone, Default)]
pub struct Keyring {
    keys: Vec<(String, VerifyingKey)>,
}

impl Keyring {
    /// Trusts `keys`.
    pub fn new(keys: impl IntoIterator<Item = VerifyingKey>) -> Self {
        Self { keys: keys.into_iter().map(|key| (key.id(), key)).collect() }
    }

    /// Verifies a token at `now`, in seconds since the Unix epoch.
    ///
    /// Errors: `TOKEN_INVALID` for anything that is not a token of this protocol signed by a trusted key, `TOKEN_EXPIRED`.
    pub fn verify(&self, token: &[u8], now: i64) -> Result<Claims, AuthError> {
        let (claims, kid) = read(token)?;
        let known = self.keys.iter().find(|(id, _)| *id == kid);
        let (_, key) = known.ok_or(AuthError::invalid("the token is signed by a key that is not trusted here"))?;
        let token = untrusted(token)?;
        PublicToken::verify(&key.key, &token, Some(token.untrusted_footer()), Some(IMPLICIT))
            .map_err(|_| AuthError::invalid("the token's signature does not verify"))?;
        if claims.expires < now {
            return Err(AuthError { code: Code::TOKEN_EXPIRED, detail: "the token has expired" });
        }
        if claims.issued > now + LEEWAY {
            return Err(AuthError::invalid("the token is from the future"));
        }
        Ok(claims)
    }
}

fn untrusted(token: &[u8]) -> Result<UntrustedToken<Public, V4>, AuthError> {
    let text = core::str::from_utf8(token).map_err(|_| AuthError::invalid("the token is not text"))?;
    if text.len() > MAX_TOKEN {
        return Err(AuthError::invalid("the token is too long"));
    }
    UntrustedToken::<Public, V4>::try_from(text.trim()).map_err(|_| AuthError::invalid("not a PASETO v4.public token"))
}

/// Reads claims and key id without verifying anything: for `token inspect`, and to find the key.
///
/// Errors: `TOKEN_INVALID` for anything that is not a token of this protocol.
pub fn read(token: &[u8]) -> Result<(Claims, String), AuthError> {
    let token = untrusted(token)?;
    let footer: Footer = serde_json::from_slice(token.untrusted_footer())
        .map_err(|_| AuthError::invalid("the token's footer names no key"))?;
    let text: ClaimsText = serde_json::from_slice(token.untrusted_payload())
        .map_err(|_| AuthError::invalid("the token's claims are not those of a capability"))?;
    let time = |text: &str| {
        let time: Result<jiff::Timestamp, _> = text.parse();
        time.map(jiff::Timestamp::as_second).map_err(|_| AuthError::invalid("a time in the token is not RFC 3339"))
    };
    let mut grants = Vec::with_capacity(text.grants.len());
    for grant in text.grants {
        let operations: Option<Operations> = grant.ops.iter().map(|name| Operation::from_name(name)).collect();
        let operations = operations.ok_or(AuthError::invalid("the token grants an operation that is not known"))?;
        grants.push(Grant { prefix: grant.prefix, operations });
    }
    let device = match text.dev {
        Some(device) => {
            Some(device.parse().map_err(|_| AuthError::invalid("the token's device is not an instance id"))?)
        }
        None => None,
    };
    let subject = Subject::new(&text.sub).map_err(|_| AuthError::invalid("the token's subject is not valid"))?;
    if subject.as_str() == "server" {
        return Err(AuthError::invalid("the subject `server` is reserved"));
    }
    let claims =
        Claims { subject, device, grants: Grants(grants), issued: time(&text.iat)?, expires: time(&text.exp)? };
    Ok((claims, footer.kid))
}

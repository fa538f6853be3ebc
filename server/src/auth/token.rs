//! Capability tokens: PASETO v4.public, signed with Ed25519 (spec AUTH).
//!
//! The footer names the key (`kid`), so that keys can be rotated: a server verifies with every key it knows.

use core::fmt;

use mainstay_protocol::registry::{MAX_DELEGATIONS, MAX_GRANTS, MAX_TOKEN, MAX_TOKEN_ID};
use mainstay_protocol::session::{Grant, Grants, Operation, Operations};
use mainstay_protocol::wire::Subject;
use pasetors::Public;
use pasetors::keys::{AsymmetricKeyPair, AsymmetricPublicKey, AsymmetricSecretKey, Generate};
use pasetors::paserk::{FormatAsPaserk, Id};
use pasetors::token::UntrustedToken;
use pasetors::version4::{PublicToken, V4};
use serde::{Deserialize, Serialize};

use super::{AuthError, Claims, in_time};

/// Binds tokens to this protocol: a token made for something else does not verify.
const IMPLICIT: &[u8] = b"mainstay/1 capability";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ClaimsText {
    sub: String,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    dev: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    cnf: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    jti: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    anc: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    via: Option<String>,
    iat: String,
    exp: String,
    grants: Vec<GrantText>,
}

/// A grant as tokens write it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct GrantText {
    prefix: String,
    ops: Vec<String>,
}

impl GrantText {
    fn of(grant: &Grant) -> Self {
        let ops = grant.operations.iter().map(|operation| operation.as_str().to_owned());
        Self { prefix: grant.prefix.clone(), ops: ops.collect() }
    }

    /// Reads the grants of a token. Errors: `TOKEN_INVALID`.
    pub(super) fn read(grants: &[Self]) -> Result<Grants, AuthError> {
        if grants.len() > MAX_GRANTS {
            return Err(AuthError::invalid("the token has too many grants"));
        }
        let grant = |text: &Self| {
            let operations: Option<Operations> = text.ops.iter().map(|name| Operation::from_name(name)).collect();
            let operations = operations.ok_or(AuthError::invalid("the token grants an operation that is not known"))?;
            Ok(Grant { prefix: text.prefix.clone(), operations })
        };
        Ok(Grants(grants.iter().map(grant).collect::<Result<_, _>>()?))
    }
}

#[derive(Serialize, Deserialize)]
struct Footer {
    kid: String,
}

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

    /// Signs a token. Errors: the claims do not fit into a token; the subject is one that no server believes.
    pub fn mint(&self, claims: &Claims) -> Result<String, String> {
        subject(claims.subject.as_str()).map_err(|error| error.detail.to_string())?;
        let time = |seconds| jiff::Timestamp::from_second(seconds).map(|time| time.to_string());
        let text = ClaimsText {
            sub: claims.subject.as_str().to_owned(),
            dev: claims.device.map(|device| device.to_string()),
            cnf: claims.certificate.map(|pin| hex(&pin)),
            jti: claims.id.clone(),
            anc: claims.ancestors.clone(),
            via: claims.root_key.clone(),
            iat: time(claims.issued).map_err(|error| error.to_string())?,
            exp: time(claims.expires).map_err(|error| error.to_string())?,
            grants: claims.grants.0.iter().map(GrantText::of).collect(),
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
    /// Trusts one key more. Nothing happens if it is trusted already.
    #[must_use]
    pub fn with(mut self, key: VerifyingKey) -> Self {
        if !self.trusts(&key.id()) {
            self.keys.push((key.id(), key));
        }
        self
    }

    /// True if the key with this id is trusted.
    pub fn trusts(&self, id: &str) -> bool {
        self.keys.iter().any(|(known, _)| known == id)
    }

    /// True if no key is trusted.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Trusts `keys`.
    pub fn new(keys: impl IntoIterator<Item = VerifyingKey>) -> Self {
        Self { keys: keys.into_iter().map(|key| (key.id(), key)).collect() }
    }

    /// Verifies a token at `now`, in seconds since the Unix epoch: what it says, and the id of the key that signed it.
    ///
    /// Errors: `TOKEN_INVALID` for anything that is not a token of this protocol signed by a trusted key, `TOKEN_EXPIRED`.
    pub fn verify(&self, token: &[u8], now: i64) -> Result<(Claims, String), AuthError> {
        let (claims, kid) = read(token)?;
        let known = self.keys.iter().find(|(id, _)| *id == kid);
        let (_, key) = known.ok_or(AuthError::invalid("the token is signed by a key that is not trusted here"))?;
        let token = untrusted(token)?;
        PublicToken::verify(&key.key, &token, Some(token.untrusted_footer()), Some(IMPLICIT))
            .map_err(|_| AuthError::invalid("the token's signature does not verify"))?;
        in_time(&claims, now)?;
        Ok((claims, kid))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; N];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

/// Checks the id of a token.
pub(super) fn token_id(id: String) -> Result<String, AuthError> {
    match id.is_empty() || id.len() > MAX_TOKEN_ID || id.chars().any(char::is_control) {
        true => Err(AuthError::invalid("an id in the token is empty, too long or holds control characters")),
        false => Ok(id),
    }
}

/// Checks the subject of a token.
pub(super) fn subject(text: &str) -> Result<Subject, AuthError> {
    let subject = Subject::new(text).map_err(|_| AuthError::invalid("the token's subject is not valid"))?;
    match subject.as_str() {
        "server" => Err(AuthError::invalid("the subject `server` is reserved")),
        _ => Ok(subject),
    }
}

fn untrusted(token: &[u8]) -> Result<UntrustedToken<Public, V4>, AuthError> {
    let text = core::str::from_utf8(token).map_err(|_| AuthError::invalid("the token is not text"))?;
    if text.len() > MAX_TOKEN {
        return Err(AuthError::invalid("the token is too long"));
    }
    // As it is: what is left away here would still count where it is revoked by its text.
    UntrustedToken::<Public, V4>::try_from(text).map_err(|_| AuthError::invalid("not a PASETO v4.public token"))
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
    let device = match text.dev {
        Some(device) => {
            Some(device.parse().map_err(|_| AuthError::invalid("the token's device is not an instance id"))?)
        }
        None => None,
    };
    let certificate = match text.cnf {
        Some(pin) => {
            Some(unhex(&pin).ok_or(AuthError::invalid("the token's certificate is not a SHA-256 in hexadecimal"))?)
        }
        None => None,
    };
    if text.anc.len() > MAX_DELEGATIONS {
        return Err(AuthError::invalid("the token was made from too many others"));
    }
    let claims = Claims {
        subject: subject(&text.sub)?,
        device,
        certificate,
        id: text.jti.map(token_id).transpose()?,
        ancestors: text.anc.into_iter().map(token_id).collect::<Result<_, _>>()?,
        root_key: text.via,
        grants: GrantText::read(&text.grants)?,
        issued: time(&text.iat)?,
        expires: time(&text.exp)?,
    };
    Ok((claims, footer.kid))
}

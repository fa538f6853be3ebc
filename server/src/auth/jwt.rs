//! Tokens of identity providers that exist already: JWTs, as narrow as RFC 8725 asks for (spec AUTH-11).

use std::sync::{Arc, Once};

use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::{AlgorithmParameters, JwkSet, KeyAlgorithm};
use jsonwebtoken::signature::{Error as SignatureError, Verifier};
use jsonwebtoken::{DecodingKey, DecodingKeyKind, EncodingKey, Validation};
use mainstay_protocol::registry::MAX_TOKEN;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RsaPublicKeyComponents, UnparsedPublicKey,
};
use serde::Deserialize;

use super::token::{GrantText, subject, token_id};
use super::{AuthError, Claims, in_time};

/// An algorithm that may sign JWTs. Symmetric ones are none: whoever verifies could sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
pub enum Algorithm {
    /// Ed25519.
    #[serde(rename = "EdDSA")]
    EdDsa,
    /// ECDSA over P-256 with SHA-256.
    #[serde(rename = "ES256")]
    Es256,
    /// RSA PKCS #1 with SHA-256, 2048 to 8192 bits.
    #[serde(rename = "RS256")]
    Rs256,
}

impl Algorithm {
    const fn inner(self) -> jsonwebtoken::Algorithm {
        match self {
            Self::EdDsa => jsonwebtoken::Algorithm::EdDSA,
            Self::Es256 => jsonwebtoken::Algorithm::ES256,
            Self::Rs256 => jsonwebtoken::Algorithm::RS256,
        }
    }
}

/// An identity provider whose JWTs are taken.
#[derive(Debug)]
pub struct JwtIssuer {
    /// What its tokens have as `iss`.
    issuer: String,
    /// What they must have as `aud`: this server, or what it is part of.
    audience: String,
    keys: Vec<Key>,
}

struct Key {
    kid: String,
    algorithm: Algorithm,
    key: DecodingKey,
}

impl core::fmt::Debug for Key {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{} {:?}", self.kid, self.algorithm)
    }
}

/// What a JWT must say. Members that are not known are other parties' business; a known one of another type is an error, never absent.
#[derive(Deserialize)]
struct JwtClaims {
    sub: String,
    iat: i64,
    exp: i64,
    #[serde(default)]
    nbf: Option<i64>,
    #[serde(default)]
    jti: Option<String>,
    mainstay: Vec<GrantText>,
}

impl JwtClaims {
    /// The capability that they are. Errors: `TOKEN_INVALID`.
    fn capability(self) -> Result<Claims, AuthError> {
        let mut claims = Claims::new(subject(&self.sub)?, GrantText::read(&self.mainstay)?, self.iat, self.exp);
        claims.id = self.jti.map(token_id).transpose()?;
        Ok(claims)
    }
}

#[derive(Deserialize)]
struct Issuer {
    iss: String,
}

/// What a token says, of whatever is in it, before anything is verified.
fn unverified<T: serde::de::DeserializeOwned>(text: &str, what: &'static str) -> Result<T, AuthError> {
    jsonwebtoken::dangerous::insecure_decode(text).map(|read| read.claims).map_err(|_| AuthError::invalid(what))
}

/// A token before anything is verified, and whose key it says has signed it.
struct Signed<'a> {
    text: &'a str,
    algorithm: jsonwebtoken::Algorithm,
    iss: String,
    kid: String,
}

impl<'a> Signed<'a> {
    /// Errors: `TOKEN_INVALID`.
    fn read(token: &'a [u8]) -> Result<Self, AuthError> {
        let text = core::str::from_utf8(token).map_err(|_| AuthError::invalid("the token is not text"))?;
        if text.len() > MAX_TOKEN {
            return Err(AuthError::invalid("the token is too long"));
        }
        let header = jsonwebtoken::decode_header(text).map_err(|_| AuthError::invalid("not a JWT"))?;
        let Issuer { iss } = unverified(text, "the JWT names no issuer")?;
        let kid = header.kid.ok_or(AuthError::invalid("the JWT names no key"))?;
        Ok(Self { text, algorithm: header.alg, iss, kid })
    }
}

const NO_CAPABILITY: &str = "the claims of the JWT are not those of a capability";

impl JwtIssuer {
    /// Takes tokens of `issuer` for `audience` that one of the keys in `jwks`, a JWK set (RFC 7517), has signed by one of `algorithms`.
    ///
    /// Errors: not a JWK set, no key of one of the algorithms, or a key without a `kid` or an `alg`.
    pub fn new(issuer: String, audience: String, algorithms: &[Algorithm], jwks: &[u8]) -> Result<Self, String> {
        install();
        let set: JwkSet = serde_json::from_slice(jwks).map_err(|error| format!("not a JWK set: {error}"))?;
        let mut keys: Vec<Key> = Vec::new();
        for jwk in &set.keys {
            let kid = jwk.common.key_id.clone().ok_or("a key of the JWK set has no `kid`")?;
            let algorithm = match jwk.common.key_algorithm {
                Some(KeyAlgorithm::EdDSA) => Algorithm::EdDsa,
                Some(KeyAlgorithm::ES256) => Algorithm::Es256,
                Some(KeyAlgorithm::RS256) => Algorithm::Rs256,
                Some(_) => continue,
                None => return Err(format!("key {kid:?} of the JWK set does not say by `alg` what it is for")),
            };
            let fits = matches!(
                (algorithm, &jwk.algorithm),
                (Algorithm::EdDsa, AlgorithmParameters::OctetKeyPair(_))
                    | (Algorithm::Es256, AlgorithmParameters::EllipticCurve(_))
                    | (Algorithm::Rs256, AlgorithmParameters::RSA(_))
            );
            if !fits {
                return Err(format!("key {kid:?} of the JWK set is not one for its `alg`"));
            }
            if !algorithms.contains(&algorithm) {
                continue;
            }
            if keys.iter().any(|known| known.kid == kid) {
                return Err(format!("two keys of the JWK set are called {kid:?}"));
            }
            let key = DecodingKey::from_jwk(jwk).map_err(|error| format!("key {kid:?} of the JWK set: {error}"))?;
            keys.push(Key { kid, algorithm, key });
        }
        if keys.is_empty() {
            return Err(format!("no key of the JWK set is for one of {algorithms:?}"));
        }
        Ok(Self { issuer, audience, keys })
    }

    /// True if this is meant to be a JWT: it begins as JSON objects do in base64.
    pub(super) fn is_jwt(token: &[u8]) -> bool {
        token.starts_with(b"eyJ")
    }

    /// What a token says of itself, and which key it names. Errors: `TOKEN_INVALID`.
    pub(super) fn read(token: &[u8]) -> Result<(Claims, String), AuthError> {
        let Signed { text, iss, kid, .. } = Signed::read(token)?;
        Ok((unverified::<JwtClaims>(text, NO_CAPABILITY)?.capability()?, key_name(&iss, &kid)))
    }

    /// True if a key of this name is one of its.
    pub(super) fn trusts(&self, name: &str) -> bool {
        self.keys.iter().any(|key| key_name(&self.issuer, &key.kid) == name)
    }

    /// Verifies a token of one of these at `now`. Errors: `TOKEN_INVALID`, `TOKEN_EXPIRED`.
    pub(super) fn verify_with(issuers: &[Arc<Self>], token: &[u8], now: i64) -> Result<(Claims, String), AuthError> {
        let Signed { text, algorithm, iss, kid } = Signed::read(token)?;
        let named = issuers.iter().filter(|issuer| issuer.issuer == iss);
        let mut found = named.filter_map(|issuer| Some((issuer, issuer.keys.iter().find(|key| key.kid == kid)?)));
        let (issuer, key) =
            found.next().ok_or(AuthError::invalid("the JWT is signed by a key that is not trusted here"))?;
        let judged = issuer.judge(text, key, algorithm, now);
        // An issuer may be configured for more than one audience.
        match found.map(|(issuer, key)| issuer.judge(text, key, algorithm, now)).find(Result::is_ok) {
            Some(taken) if judged.is_err() => taken,
            _ => judged,
        }
    }

    /// Verifies a token by one of its keys.
    fn judge(
        &self,
        text: &str,
        key: &Key,
        algorithm: jsonwebtoken::Algorithm,
        now: i64,
    ) -> Result<(Claims, String), AuthError> {
        // What the key is for, not what the token says.
        if algorithm != key.algorithm.inner() {
            return Err(AuthError::invalid("the JWT is not signed by the algorithm of its key"));
        }
        let mut rules = Validation::new(key.algorithm.inner());
        rules.set_issuer(&[&self.issuer]);
        rules.set_audience(&[&self.audience]);
        rules.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        // By the server's clock, below.
        rules.validate_exp = false;
        rules.validate_nbf = false;
        let decoded =
            jsonwebtoken::decode::<JwtClaims>(text, &key.key, &rules).map_err(|error| match error.kind() {
                ErrorKind::InvalidSignature => AuthError::invalid("the JWT's signature does not verify"),
                ErrorKind::InvalidAudience => AuthError::invalid("the JWT is for another audience"),
                ErrorKind::MissingRequiredClaim(_) => {
                    AuthError::invalid("the JWT lacks one of `exp`, `iss`, `aud` and `sub`")
                }
                _ => AuthError::invalid(NO_CAPABILITY),
            })?;
        if decoded.claims.nbf.is_some_and(|nbf| nbf > now.saturating_add(super::LEEWAY)) {
            return Err(AuthError::invalid("the JWT is not valid yet"));
        }
        let claims = decoded.claims.capability()?;
        in_time(&claims, now)?;
        Ok((claims, key_name(&self.issuer, &key.kid)))
    }
}

/// The name of a key among those of all issuers.
fn key_name(issuer: &str, kid: &str) -> String {
    format!("{issuer} {kid}")
}

/// Signatures are verified by ring, as those of TLS are.
struct Ring {
    algorithm: jsonwebtoken::Algorithm,
    key: DecodingKeyKind,
}

impl Verifier<Vec<u8>> for Ring {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), SignatureError> {
        let verified = match (&self.key, self.algorithm) {
            (DecodingKeyKind::SecretOrDer(key), jsonwebtoken::Algorithm::EdDSA) => {
                UnparsedPublicKey::new(&ED25519, key).verify(message, signature)
            }
            (DecodingKeyKind::SecretOrDer(key), jsonwebtoken::Algorithm::ES256) => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, key).verify(message, signature)
            }
            (DecodingKeyKind::RsaModulusExponent { n, e }, jsonwebtoken::Algorithm::RS256) => {
                RsaPublicKeyComponents { n, e }.verify(&RSA_PKCS1_2048_8192_SHA256, message, signature)
            }
            _ => return Err(SignatureError::new()),
        };
        verified.map_err(|_| SignatureError::new())
    }
}

impl JwtVerifier for Ring {
    fn algorithm(&self) -> jsonwebtoken::Algorithm {
        self.algorithm
    }
}

fn verifier(
    algorithm: &jsonwebtoken::Algorithm,
    key: &DecodingKey,
) -> Result<Box<dyn JwtVerifier>, jsonwebtoken::errors::Error> {
    Ok(Box::new(Ring { algorithm: *algorithm, key: key.kind().clone() }))
}

/// Nothing is signed here.
fn signer(_: &jsonwebtoken::Algorithm, _: &EncodingKey) -> Result<Box<dyn JwtSigner>, jsonwebtoken::errors::Error> {
    Err(ErrorKind::InvalidAlgorithm.into())
}

static PROVIDER: CryptoProvider =
    CryptoProvider { signer_factory: signer, verifier_factory: verifier, key_utils: KeyUtils::new_unimplemented() };

/// Where the process has a provider already, it verifies with that.
fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = PROVIDER.install_default();
    });
}

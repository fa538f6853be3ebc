//! Resume tokens: PASETO v4.local, sealed by this server and opaque to clients (spec RES-2).

use core::fmt;

use mainstay_protocol::error::Code;
use mainstay_protocol::registry::MAX_RESUME_TOKEN;
use mainstay_protocol::session::{Author, ClientKey, Incarnation, Instance, Refusal, ResumeToken};
use mainstay_protocol::wire::Subject;
use pasetors::Local;
use pasetors::keys::{Generate, SymmetricKey};
use pasetors::paserk::FormatAsPaserk;
use pasetors::token::UntrustedToken;
use pasetors::version4::{LocalToken, V4};
use serde::{Deserialize, Serialize};

/// Binds tokens to this purpose: one made for something else does not open.
const IMPLICIT: &[u8] = b"mainstay/1 resume";

/// The keys that seal and open resume tokens. Several, so that a new one can be introduced while tokens of the old one are about: the first
/// one seals, all open.
#[derive(Clone)]
pub struct ResumeKeys {
    first: SymmetricKey<V4>,
    others: Vec<SymmetricKey<V4>>,
}

impl fmt::Debug for ResumeKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ResumeKeys({})", 1 + self.others.len())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    inc: String,
    sub: String,
    ins: String,
    key: String,
    generation: u64,
}

/// Why a token does not open. It says no more: whoever made it up learns nothing.
const INVALID: Refusal = Refusal::new(Code::RESUME_INVALID, "the resume token was not made by this server");

impl ResumeKeys {
    /// One new random key. Errors: the random generator failed.
    pub fn generate() -> Result<Self, String> {
        let first = SymmetricKey::generate().map_err(|error| error.to_string())?;
        Ok(Self { first, others: Vec::new() })
    }

    /// Reads PASERK `k4.local.…` texts, one per line, the one that seals first. Errors: one is something else, or there is none.
    pub fn from_paserk(text: &str) -> Result<Self, String> {
        let read = |line: &str| {
            SymmetricKey::<V4>::try_from(line.trim())
                .map_err(|_| "a resume key is not a PASERK k4.local text".to_owned())
        };
        let mut keys = text.lines().filter(|line| !line.trim().is_empty()).map(read);
        let first = keys.next().ok_or("there is no resume key")??;
        Ok(Self { first, others: keys.collect::<Result<_, _>>()? })
    }

    /// The key that seals, as PASERK text. It is a secret.
    pub fn to_paserk(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.first.fmt(&mut text);
        text
    }

    /// Seals a token. `None` if the random generator failed.
    pub fn seal(&self, token: &ResumeToken) -> Option<String> {
        let text = Text {
            inc: token.incarnation.to_string(),
            sub: token.author.subject.as_str().to_owned(),
            ins: token.author.instance.to_string(),
            key: token.key.to_string(),
            generation: token.generation,
        };
        let text = serde_json::to_vec(&text).ok()?;
        LocalToken::encrypt(&self.first, &text, None, Some(IMPLICIT)).ok()
    }

    /// Opens a token. Refusals: `RESUME_INVALID` for anything that this server did not seal.
    pub fn open(&self, token: &[u8]) -> Result<ResumeToken, Refusal> {
        if token.len() > MAX_RESUME_TOKEN {
            return Err(INVALID);
        }
        let token = core::str::from_utf8(token).map_err(|_| INVALID)?;
        let token = UntrustedToken::<Local, V4>::try_from(token).map_err(|_| INVALID)?;
        let mut keys = core::iter::once(&self.first).chain(&self.others);
        let opened = keys.find_map(|key| LocalToken::decrypt(key, &token, None, Some(IMPLICIT)).ok()).ok_or(INVALID)?;
        let text: Text = serde_json::from_str(opened.payload()).map_err(|_| INVALID)?;
        let author = Author {
            subject: Subject::new(&text.sub).map_err(|_| INVALID)?,
            instance: text.ins.parse::<Instance>().map_err(|_| INVALID)?,
        };
        let incarnation = text.inc.parse::<Incarnation>().map_err(|_| INVALID)?;
        let key = text.key.parse::<ClientKey>().map_err(|_| INVALID)?;
        Ok(ResumeToken { incarnation, author, key, generation: text.generation })
    }
}

/// True if `signature` is one of `text` by the holder of `key`.
pub(crate) fn verify(key: ClientKey, text: &[u8], signature: &[u8; 64]) -> bool {
    let key = ring::signature::UnparsedPublicKey::new(&ring::signature::ED25519, key.0);
    key.verify(text, signature).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> ResumeToken {
        ResumeToken {
            incarnation: Incarnation([7; 16]),
            author: Author {
                subject: Subject::new("é".repeat(128).as_str()).expect("a subject"),
                instance: Instance([9; 16]),
            },
            key: ClientKey([0xab; 32]),
            generation: u64::MAX,
        }
    }

    #[test]
    fn a_token_comes_out_as_it_went_in_and_fits() {
        let keys = ResumeKeys::generate().expect("a key");
        let sealed = keys.seal(&token()).expect("sealed");
        assert!(sealed.len() <= MAX_RESUME_TOKEN, "{}", sealed.len());
        assert_eq!(keys.open(sealed.as_bytes()), Ok(token()));
    }

    #[test]
    fn what_this_server_did_not_seal_is_refused_by_name() {
        let keys = ResumeKeys::generate().expect("a key");
        let sealed = keys.seal(&token()).expect("sealed").into_bytes();
        for cut in 0..sealed.len() {
            assert_eq!(keys.open(&sealed[..cut]), Err(INVALID), "cut to {cut}");
        }
        for at in 0..sealed.len() {
            let mut flipped = sealed.clone();
            flipped[at] ^= 1 << (at % 8);
            assert_eq!(keys.open(&flipped), Err(INVALID), "a bit of byte {at}");
        }
        let other = ResumeKeys::generate().expect("a key");
        assert_eq!(other.open(&sealed), Err(INVALID));
    }

    #[test]
    fn keys_are_rotated_without_losing_tokens() {
        let old = ResumeKeys::generate().expect("a key");
        let new = ResumeKeys::generate().expect("a key");
        let sealed = old.seal(&token()).expect("sealed");
        let both = ResumeKeys::from_paserk(&format!("{}\n{}\n", new.to_paserk(), old.to_paserk())).expect("keys");
        assert_eq!(both.open(sealed.as_bytes()), Ok(token()));
        assert_eq!(new.open(both.seal(&token()).expect("sealed").as_bytes()), Ok(token()));
        assert!(ResumeKeys::from_paserk("").is_err() && ResumeKeys::from_paserk("k4.public.x").is_err());
    }
}

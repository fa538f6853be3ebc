//! What was revoked: tokens, subjects and keys (spec AUTH-8).

use std::collections::{BTreeMap, BTreeSet};

use mainstay_protocol::error::Code;
use mainstay_protocol::registry::MAX_TOKEN_ID;
use mainstay_protocol::wire::Subject;
use serde::{Deserialize, Serialize};

use super::trust::Verified;
use super::{AuthError, LEEWAY};

/// Something that is not to be believed any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Revocation {
    /// The token with this id, and what was made from it.
    Token {
        /// Its id.
        id: String,
    },
    /// Every token of this subject, and of what is below it, that was issued at this time or before.
    Subject {
        /// The subject.
        subject: String,
        /// In seconds since the Unix epoch.
        until: i64,
    },
    /// Every token that this key signed.
    Key {
        /// Its id: PASERK `k4.pid.…`, or the `kid` of a JWT's key behind its issuer and a space.
        id: String,
    },
}

/// Revocations that are kept: more would make whoever can revoke the one who decides over memory. A key or a subject stands for any number of
/// tokens.
pub const MAX_REVOCATIONS: usize = 65_536;

/// Of those, places that are not for tokens: what stands for many can be revoked when there are too many.
pub const RESERVED_REVOCATIONS: usize = 1024;

/// Everything that was revoked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Revocations {
    /// Ids of tokens.
    tokens: BTreeSet<String>,
    /// Subjects, and until when what was issued for them is revoked.
    subjects: BTreeMap<String, i64>,
    /// Ids of keys.
    keys: BTreeSet<String>,
}

impl Revocation {
    /// Whether there can be what it names. Errors: what is wrong, without what was named: it may be a secret that was mistaken for a name.
    fn check(&self) -> Result<(), String> {
        match self {
            Self::Token { id } if id.is_empty() || id.len() > MAX_TOKEN_ID => Err(format!(
                "the id of a token has 1 to {MAX_TOKEN_ID} bytes; a token that has none is revoked by its whole text"
            )),
            // PASERK, or an issuer and a `kid`.
            Self::Key { id } if !id.starts_with("k4.pid.") && !id.contains(' ') => {
                Err("the id of a key begins with `k4.pid.`; that of a JWT's is its issuer, a space and its `kid`"
                    .into())
            }
            Self::Subject { subject, .. } => Subject::new(subject).map(drop).map_err(|error| error.detail.into()),
            Self::Token { .. } | Self::Key { .. } => Ok(()),
        }
    }
}

impl Revocations {
    /// Revokes something. True if that was not revoked before.
    ///
    /// Errors: it names nothing that there can be; there are too many; the time of a subject is not in the past, so that what is issued next would be revoked too.
    pub fn add(&mut self, revocation: Revocation, now: i64) -> Result<bool, String> {
        revocation.check()?;
        let (known, room) = match &revocation {
            Revocation::Token { id } => (self.tokens.contains(id), MAX_REVOCATIONS - RESERVED_REVOCATIONS),
            Revocation::Key { id } => (self.keys.contains(id), MAX_REVOCATIONS),
            Revocation::Subject { subject, .. } => (self.subjects.contains_key(subject), MAX_REVOCATIONS),
        };
        if !known && self.len() >= room {
            return Err(format!("{room} revocations of this kind are kept at most; revoke a key or a subject instead"));
        }
        match revocation {
            Revocation::Token { id } => Ok(self.tokens.insert(id)),
            Revocation::Key { id } => Ok(self.keys.insert(id)),
            Revocation::Subject { until, .. } if until > now.saturating_add(LEEWAY) => {
                Err("tokens that are issued in the future cannot be revoked".into())
            }
            Revocation::Subject { subject, until } => {
                let before = self.subjects.get(&subject).copied();
                let later = before.is_none_or(|before| before < until);
                if later {
                    self.subjects.insert(subject, until);
                }
                Ok(later)
            }
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.tokens.len() + self.subjects.len() + self.keys.len()
    }

    /// True if nothing was revoked.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Succeeds if a verified token was not revoked. Errors: `TOKEN_REVOKED`.
    pub fn check(&self, verified: &Verified) -> Result<(), AuthError> {
        let revoked = |detail| Err(AuthError::new(Code::TOKEN_REVOKED, detail));
        if self.tokens.contains(&verified.id) {
            return revoked("the token was revoked");
        }
        if verified.claims.ancestors.iter().any(|id| self.tokens.contains(id)) {
            return revoked("the token that it was made from was revoked");
        }
        if self.keys.contains(&verified.key)
            || verified.claims.root_key.as_ref().is_some_and(|key| self.keys.contains(key))
        {
            return revoked("the key that signed the token was revoked");
        }
        let subject = verified.claims.subject.as_str();
        // Its own, and each that it is below: `alice/agent` was made by `alice`.
        let above = subject.match_indices('/').map(|(at, _)| &subject[..at]).chain([subject]);
        let until = above.filter_map(|subject| self.subjects.get(subject)).max();
        match until.is_some_and(|until| verified.claims.issued <= *until) {
            true => revoked("the subject's tokens of that time were revoked"),
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Claims;
    use mainstay_protocol::session::Grants;

    fn verified(subject: &str, id: &str, ancestors: &[&str], issued: i64) -> Verified {
        let subject = Subject::new(subject).expect("a subject");
        let mut claims = Claims::new(subject, Grants::default(), issued, i64::MAX);
        claims.ancestors = ancestors.iter().map(|id| (*id).to_owned()).collect();
        Verified { claims, id: id.into(), key: "k4.pid.key".into() }
    }

    #[test]
    fn what_is_revoked_is_what_was_named_and_what_came_of_it_and_nothing_else() {
        let mut revoked = Revocations::default();
        let check = |revoked: &Revocations, one: Verified| revoked.check(&one).map_err(|error| error.code);
        assert_eq!(revoked.add(Revocation::Token { id: "one".into() }, 100), Ok(true));
        assert_eq!(revoked.add(Revocation::Token { id: "one".into() }, 100), Ok(false));
        assert_eq!(check(&revoked, verified("alice", "one", &[], 50)), Err(Code::TOKEN_REVOKED));
        assert_eq!(check(&revoked, verified("alice/x", "two", &["zero", "one"], 50)), Err(Code::TOKEN_REVOKED));
        assert_eq!(check(&revoked, verified("alice/x", "two", &["zero"], 50)), Ok(()));
        let subject = |until| Revocation::Subject { subject: "alice".into(), until };
        assert_eq!(revoked.add(subject(60), 100), Ok(true));
        assert_eq!(revoked.add(subject(59), 100), Ok(false), "never less");
        assert!(revoked.add(subject(1000), 100).is_err());
        for (name, issued, expected) in [
            ("alice", 60, Err(Code::TOKEN_REVOKED)),
            ("alice", 61, Ok(())),
            ("alice/agent/x", 60, Err(Code::TOKEN_REVOKED)),
            ("alicex", 60, Ok(())),
            ("bob", 60, Ok(())),
        ] {
            assert_eq!(check(&revoked, verified(name, "three", &[], issued)), expected, "{name} {issued}");
        }
        assert_eq!(revoked.add(Revocation::Key { id: "k4.pid.key".into() }, 100), Ok(true));
        assert_eq!(check(&revoked, verified("bob", "four", &[], 99)), Err(Code::TOKEN_REVOKED));
        assert_eq!(revoked.len(), 3);
    }

    #[test]
    fn what_names_nothing_is_not_revoked_and_not_said_again() {
        let mut revoked = Revocations::default();
        let secret = "v4.public.".to_owned() + &"x".repeat(300);
        for (named, one) in [
            (&secret, Revocation::Token { id: secret.clone() }),
            (&secret, Revocation::Token { id: String::new() }),
            (&secret, Revocation::Key { id: secret.clone() }),
            (&secret, Revocation::Key { id: "nonsense".into() }),
            (&secret, Revocation::Subject { subject: "a\nb".into(), until: 0 }),
            (&secret, Revocation::Subject { subject: String::new(), until: 0 }),
        ] {
            let error = revoked.add(one, 100).expect_err("refused");
            assert!(!error.contains(named.as_str()), "{error}");
        }
        assert!(revoked.is_empty());
        assert_eq!(revoked.add(Revocation::Key { id: "https://login.example.com 2026-01".into() }, 100), Ok(true));
    }

    #[test]
    fn there_are_no_more_than_are_kept() {
        let mut revoked = Revocations::default();
        for at in 0..MAX_REVOCATIONS - RESERVED_REVOCATIONS {
            assert_eq!(revoked.add(Revocation::Token { id: at.to_string() }, 0), Ok(true));
        }
        assert!(revoked.add(Revocation::Token { id: "one more".into() }, 0).is_err());
        assert_eq!(revoked.add(Revocation::Token { id: "1".into() }, 0), Ok(false), "it is revoked");
        // What stands for many has places of its own.
        for at in 0..RESERVED_REVOCATIONS {
            assert_eq!(revoked.add(Revocation::Key { id: format!("k4.pid.{at}") }, 0), Ok(true));
        }
        assert!(revoked.add(Revocation::Key { id: "k4.pid.more".into() }, 0).is_err());
        assert!(revoked.add(Revocation::Subject { subject: "one more".into(), until: 0 }, 0).is_err());
    }
}

//! Who may go on in a session as the client that it was (spec RES).
//!
//! An instance that was bound to a client key is used by the holder of that key alone. A token counts how often it went on: the server knows
//! which one is the last that was used and which its successor, so that a copy of an older one is worth nothing.

use std::collections::HashMap;

use super::authority::Refusal;
use super::words::{Author, ClientKey, Incarnation, SessionName};
use crate::error::{Code, ProtocolError};
use crate::registry::MAX_RESUMPTIONS;
use crate::wire::{
    Body, Join, Leave, OpenProducer, Reader, Release, Renew, StartRun, Subject, TakeRun, Update, Writer,
};

/// What a resume token says, once it is unsealed. It is opaque to clients (spec RES-2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResumeToken {
    /// The life of the session that it is for.
    pub incarnation: Incarnation,
    /// Who it was given to.
    pub author: Author,
    /// The key that has to sign.
    pub key: ClientKey,
    /// How many tokens of the instance were used before it.
    pub generation: u64,
}

/// What a client proved: that it holds the key, and which token it has, if it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResumeClaim {
    /// The key that signed.
    pub key: ClientKey,
    /// The generation of its token.
    pub generation: Option<u64>,
}

impl ResumeClaim {
    /// A client without a token.
    pub fn first(key: ClientKey) -> Self {
        Self { key, generation: None }
    }

    /// A client that presents an unsealed token and signed with `key`. Refusals: `RESUME_GONE` for a token of another life of the session,
    /// `RESUME_INVALID` for one of another client.
    pub fn of(token: &ResumeToken, incarnation: Incarnation, author: &Author, key: ClientKey) -> Result<Self, Refusal> {
        if token.author != *author || token.key != key {
            return Err(Refusal::new(Code::RESUME_INVALID, "the resume token is another client's"));
        }
        if token.incarnation != incarnation {
            return Err(Refusal::new(Code::RESUME_GONE, "the resume token is for another life of the session"));
        }
        Ok(Self { key, generation: Some(token.generation) })
    }
}

/// True for the types of frames that are about what an instance holds in a session: where it is bound to a key, they are its holder's alone (spec
/// RES-1).
pub fn is_held(frame_type: u64) -> bool {
    matches!(
        frame_type,
        OpenProducer::KIND
            | Join::KIND
            | Update::KIND
            | Leave::KIND
            | StartRun::KIND
            | TakeRun::KIND
            | Renew::KIND
            | Release::KIND
    )
}

/// The label under which both ends export the secret that RESUME is bound to; its context is the name of the session (spec RES-3).
pub const RESUME_EXPORTER: &[u8] = b"EXPORTER-mainstay-resume";
/// What begins the text that a client signs.
const RESUME_CONTEXT: &[u8] = b"mainstay/1 resume";

/// The text that a client signs to resume: bound to this connection by `secret`, and to the token (spec RES-3).
pub fn resume_text(secret: &[u8; 32], token: &[u8]) -> Vec<u8> {
    [RESUME_CONTEXT, secret, blake3::hash(token).as_bytes()].concat()
}

/// The context of the exporter for a session.
pub fn resume_context(session: &SessionName) -> &[u8] {
    session.as_str().as_bytes()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Resumption {
    key: ClientKey,
    /// Tokens that were used: the one of this generation is the next.
    generation: u64,
    /// When it was last used, in the order of the log.
    used: u64,
}

/// What becomes of a claim that is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claimed {
    /// Nothing changes: the token of this generation is given again.
    Again(u64),
    /// The next token will be the one of this generation, once that is durable.
    Next(u64),
}

/// The instances of a session that are bound to keys.
#[derive(Debug, Default)]
pub struct Resumptions {
    known: HashMap<Author, Resumption>,
    /// What is accepted and not durable.
    staged: HashMap<Author, (ClientKey, u64)>,
    uses: u64,
}

impl Resumptions {
    /// True if only the holder of a key may be this instance.
    pub fn is_bound(&self, author: &Author) -> bool {
        !self.known.is_empty() && self.known.contains_key(author)
    }

    /// Instances known.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// True if none is known.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// What becomes of a claim (spec RES-4). Refusals: `RESUME_REQUIRED` for a first claim of an instance that is bound, `RESUME_UNKNOWN` for a
    /// token of one that is not, `RESUME_STALE` for one that was used before the last, `RESUME_INVALID` for one that was never given.
    pub(super) fn judge(&self, author: &Author, claim: &ResumeClaim) -> Result<Claimed, Refusal> {
        let known = self.known.get(author).map(|known| (known.key, known.generation));
        let staged = self.staged.get(author).copied();
        let Some((key, generation)) = staged.or(known) else {
            return match claim.generation {
                None => Ok(Claimed::Next(0)),
                Some(_) => Err(Refusal::new(
                    Code::RESUME_UNKNOWN,
                    "nothing is known of this instance any more; begin without a token",
                )),
            };
        };
        let stale = || Refusal::new(Code::RESUME_STALE, "the resume token was used before the last one");
        let invalid = || Refusal::new(Code::RESUME_INVALID, "the resume token was never given");
        match claim.generation {
            // The answer to the first claim was lost, or comes with the next commit.
            None if key == claim.key && generation == 0 && staged.is_none() => Ok(Claimed::Again(0)),
            None if key == claim.key && generation == 0 => Ok(Claimed::Next(0)),
            None => {
                Err(Refusal::new(Code::RESUME_REQUIRED, "the instance is bound to a key; present its resume token"))
            }
            Some(_) if key != claim.key => Err(invalid()),
            Some(presented) if presented == generation => Ok(Claimed::Next(generation + 1)),
            // The answer was lost: the successor was not used yet.
            Some(presented) if presented + 1 == generation && staged.is_none() => Ok(Claimed::Again(generation)),
            Some(presented) if presented + 1 == generation => Ok(Claimed::Next(generation)),
            Some(presented) if presented < generation => Err(stale()),
            Some(_) => Err(invalid()),
        }
    }

    /// Stages what was claimed.
    pub(super) fn stage(&mut self, author: Author, key: ClientKey, generation: u64) {
        self.staged.insert(author, (key, generation));
    }

    /// Takes back everything that is not durable.
    pub(super) fn roll_back(&mut self) {
        self.staged.clear();
    }

    /// A claim became durable. Where there are too many, the subject that has most of them loses the one that was unused for longest, by the order
    /// of the log alone: nobody's bindings are given up for those of somebody who makes more.
    pub(super) fn resumed(&mut self, author: &Author, key: ClientKey, generation: u64) {
        if self.staged.get(author).is_some_and(|staged| *staged == (key, generation)) {
            self.staged.remove(author);
        }
        self.uses += 1;
        self.known.insert(author.clone(), Resumption { key, generation, used: self.uses });
        if self.known.len() > MAX_RESUMPTIONS
            && let Some(oldest) = self.least_missed().cloned()
        {
            self.known.remove(&oldest);
        }
    }

    /// The binding that was unused for longest, of the subject that has most; of subjects that have as many, the one with the oldest.
    fn least_missed(&self) -> Option<&Author> {
        let mut of_subjects: HashMap<&Subject, (usize, u64, &Author)> = HashMap::new();
        for (author, known) in &self.known {
            let of_subject = of_subjects.entry(&author.subject).or_insert((0, known.used, author));
            of_subject.0 += 1;
            if known.used < of_subject.1 {
                (of_subject.1, of_subject.2) = (known.used, author);
            }
        }
        let least = of_subjects.into_values().max_by_key(|(count, used, _)| (*count, core::cmp::Reverse(*used)));
        least.map(|(.., author)| author)
    }

    /// Writes what is durable, least recently used first.
    pub(super) fn put(&self, w: &mut Writer) {
        let mut known: Vec<_> = self.known.iter().collect();
        known.sort_by_key(|(_, known)| known.used);
        w.varint(known.len() as u64);
        for (author, Resumption { key, generation, .. }) in known {
            author.put(w);
            key.put(w);
            w.varint(*generation);
        }
    }

    /// Reads what [`Resumptions::put`] wrote.
    pub(super) fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let mut this = Self::default();
        for _ in 0..r.count(MAX_RESUMPTIONS)? {
            let (author, key, generation) = (Author::get(r)?, ClientKey::get(r)?, r.varint()?);
            this.resumed(&author, key, generation);
        }
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::Instance;

    fn author(n: u64) -> Author {
        author_of("somebody", n)
    }

    fn author_of(subject: &str, n: u64) -> Author {
        let mut instance = [0; 16];
        instance[..8].copy_from_slice(&n.to_be_bytes());
        Author { subject: Subject::new(subject).expect("a subject"), instance: Instance(instance) }
    }

    const KEY: ClientKey = ClientKey([1; 32]);
    const OTHER: ClientKey = ClientKey([2; 32]);

    fn claim(key: ClientKey, generation: Option<u64>) -> ResumeClaim {
        ResumeClaim { key, generation }
    }

    /// A table in which `author(0)` has used so many tokens.
    fn used(generation: u64) -> Resumptions {
        let mut this = Resumptions::default();
        this.resumed(&author(0), KEY, generation);
        this
    }

    #[test]
    fn a_token_retires_when_its_successor_is_used_and_until_then_gives_it_again() {
        let me = author(0);
        let mut table = Resumptions::default();
        assert_eq!(table.judge(&me, &claim(KEY, None)), Ok(Claimed::Next(0)));
        table.resumed(&me, KEY, 0);
        // The answer was lost.
        assert_eq!(table.judge(&me, &claim(KEY, None)), Ok(Claimed::Again(0)));
        assert_eq!(table.judge(&me, &claim(KEY, Some(0))), Ok(Claimed::Next(1)));
        table.resumed(&me, KEY, 1);
        assert_eq!(table.judge(&me, &claim(KEY, Some(0))), Ok(Claimed::Again(1)));
        assert_eq!(table.judge(&me, &claim(KEY, Some(1))), Ok(Claimed::Next(2)));
        table.resumed(&me, KEY, 2);
        let code = |claim| table.judge(&me, &claim).map_err(|refusal| refusal.code);
        assert_eq!(code(claim(KEY, Some(0))), Err(Code::RESUME_STALE));
        assert_eq!(code(claim(KEY, Some(1))), Ok(Claimed::Again(2)));
        assert_eq!(code(claim(KEY, Some(3))), Err(Code::RESUME_INVALID));
        assert_eq!(code(claim(KEY, None)), Err(Code::RESUME_REQUIRED));
    }

    /// Spec RES-3: what is signed for one session is no proof in another.
    #[test]
    fn the_context_of_a_session_is_its_name() {
        let name = SessionName::new("team/agent:1").expect("a name");
        assert_eq!(resume_context(&name), b"team/agent:1");
    }

    #[test]
    fn a_bound_instance_is_nobody_elses() {
        let table = used(0);
        let code = |author: &Author, claim| table.judge(author, &claim).map_err(|refusal| refusal.code);
        assert_eq!(code(&author(0), claim(OTHER, None)), Err(Code::RESUME_REQUIRED));
        assert_eq!(code(&author(0), claim(OTHER, Some(0))), Err(Code::RESUME_INVALID));
        assert_eq!(code(&author(1), claim(KEY, Some(0))), Err(Code::RESUME_UNKNOWN));
        assert_eq!(code(&author(1), claim(KEY, None)), Ok(Claimed::Next(0)));
    }

    #[test]
    fn what_is_accepted_counts_and_what_is_taken_back_does_not() {
        let me = author(0);
        let mut table = used(3);
        table.stage(me.clone(), KEY, 4);
        // It waits for the same commit, not for another generation.
        assert_eq!(table.judge(&me, &claim(KEY, Some(3))), Ok(Claimed::Next(4)));
        assert_eq!(table.judge(&me, &claim(KEY, Some(4))), Ok(Claimed::Next(5)));
        table.roll_back();
        assert_eq!(table.judge(&me, &claim(KEY, Some(3))), Ok(Claimed::Next(4)));
    }

    #[test]
    fn the_table_is_bounded_and_survives_a_snapshot() {
        let mut table = Resumptions::default();
        for n in 0..MAX_RESUMPTIONS as u64 + 5 {
            table.resumed(&author(n), KEY, n);
        }
        table.resumed(&author(5), KEY, 99);
        table.resumed(&author(5000), KEY, 1);
        assert_eq!(table.len(), MAX_RESUMPTIONS);
        assert!(!table.is_bound(&author(4)) && !table.is_bound(&author(6)) && table.is_bound(&author(5)));
        let mut w = Writer::new();
        table.put(&mut w);
        let bytes = w.freeze();
        let mut r = Reader::new(&bytes);
        let again = Resumptions::get(&mut r).expect("a table");
        r.finish().expect("nothing behind it");
        assert_eq!(again.len(), table.len());
        assert_eq!(again.judge(&author(5), &claim(KEY, Some(99))), Ok(Claimed::Next(100)));
    }

    /// Spec RES-6.
    #[test]
    fn nobody_loses_a_binding_because_somebody_else_makes_many() {
        let mut table = Resumptions::default();
        table.resumed(&author_of("victim", 0), KEY, 7);
        for n in 0..2 * MAX_RESUMPTIONS as u64 {
            table.resumed(&author_of("flood", n), OTHER, 0);
        }
        assert_eq!(table.len(), MAX_RESUMPTIONS);
        assert!(table.is_bound(&author_of("victim", 0)));
        assert_eq!(table.judge(&author_of("victim", 0), &claim(KEY, Some(7))), Ok(Claimed::Next(8)));
    }

    #[test]
    fn a_token_is_for_one_life_one_client_and_one_key() {
        let token = ResumeToken { incarnation: Incarnation([7; 16]), author: author(0), key: KEY, generation: 3 };
        let code = |incarnation, author: &Author, key| {
            ResumeClaim::of(&token, Incarnation([incarnation; 16]), author, key).map_err(|refusal| refusal.code)
        };
        assert_eq!(code(7, &author(0), KEY), Ok(claim(KEY, Some(3))));
        assert_eq!(code(8, &author(0), KEY), Err(Code::RESUME_GONE));
        assert_eq!(code(7, &author(1), KEY), Err(Code::RESUME_INVALID));
        assert_eq!(code(7, &author(0), OTHER), Err(Code::RESUME_INVALID));
        assert_ne!(resume_text(&[0; 32], b"a"), resume_text(&[0; 32], b"b"));
        assert_ne!(resume_text(&[0; 32], b"a"), resume_text(&[1; 32], b"a"));
    }
}

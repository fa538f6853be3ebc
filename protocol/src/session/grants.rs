//! Grants: what the holder of a capability token may do where (spec AUTH).

use crate::error::{Code, ProtocolError};
use crate::planted::{Bug, planted};
use crate::registry::{MAX_DELEGATIONS, MAX_GRANTS, MAX_NAME, MAX_SUBJECT};
use crate::session::Refusal;
use crate::wire::{Field, Frame, Label, Reader, Subject, Writer};

/// Something that needs a grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Attach, subscribe, list.
    Read,
    /// Open producers, define streams, append.
    Append,
    /// Create sessions.
    Create,
    /// Close, trim and delete sessions.
    Manage,
    /// Be a member.
    Join,
    /// Hold runs.
    Run,
    /// Send signals, answer requests.
    Signal,
    /// Take jobs of notification.
    Notify,
    /// Make narrower tokens.
    Mint,
    /// Send signals about one's own, and answer its requests (spec SIG-9). Whoever may send all signals may send these.
    SignalOwn,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 10] = [
        Self::Read,
        Self::Append,
        Self::Create,
        Self::Manage,
        Self::Join,
        Self::Run,
        Self::Signal,
        Self::Notify,
        Self::Mint,
        Self::SignalOwn,
    ];

    /// The word in tokens.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Append => "append",
            Self::Create => "create",
            Self::Manage => "manage",
            Self::Join => "join",
            Self::Run => "run",
            Self::Signal => "signal",
            Self::Notify => "notify",
            Self::Mint => "mint",
            Self::SignalOwn => "signal-own",
        }
    }

    /// The operations of which a request on an attachment needs one, beside what the attach needed (spec AUTH-7). None for one that needs
    /// nothing more.
    pub const fn needed_by(request: &Frame) -> &'static [Self] {
        match request {
            Frame::OpenProducer(_) | Frame::DefineStream(_) => &[Self::Append],
            Frame::CloseSession(_)
            | Frame::Trim(_)
            | Frame::DeleteSession(_)
            | Frame::Configure(_)
            | Frame::SetRule(_) => &[Self::Manage],
            Frame::StartRun(_) | Frame::TakeRun(_) | Frame::Renew(_) | Frame::Release(_) => &[Self::Run],
            // What it may be about is looked at where it is known whose that is.
            Frame::Signal(_) => &[Self::Signal, Self::SignalOwn],
            Frame::Join(_) | Frame::Update(_) => &[Self::Join],
            Frame::Subscribe(_) | Frame::Listen(_) => &[Self::Read],
            // Who may hold nothing has nothing to go on with.
            Frame::Resume(_) => &[Self::Append, Self::Join, Self::Run],
            _ => &[],
        }
    }

    /// The operation with this word.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| operation.as_str() == name)
    }
}

/// A set of operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Operations(u16);

impl Operations {
    /// The set with `operation` added.
    pub const fn with(self, operation: Operation) -> Self {
        Self(self.0 | 1 << operation as u8)
    }

    /// Every operation.
    pub fn all() -> Self {
        Operation::ALL.into_iter().fold(Self::default(), Self::with)
    }

    /// True if nothing is in the set.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The operations in the set, in the order of [`Operation::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Operation> {
        Operation::ALL.into_iter().filter(move |operation| self.contains(*operation))
    }

    /// True if `operation` is in the set.
    pub const fn contains(self, operation: Operation) -> bool {
        self.0 & 1 << operation as u8 != 0
    }

    /// True if `operation` is in the set, or one that includes it.
    pub const fn allow(self, operation: Operation) -> bool {
        self.contains(operation) || matches!(operation, Operation::SignalOwn) && self.contains(Operation::Signal)
    }
}

impl FromIterator<Operation> for Operations {
    fn from_iter<I: IntoIterator<Item = Operation>>(operations: I) -> Self {
        operations.into_iter().fold(Self::default(), Self::with)
    }
}

/// One grant: operations on every session under a prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Session names that it covers; empty for all.
    pub prefix: String,
    /// What may be done with them.
    pub operations: Operations,
}

/// Characters that end a segment of a session name.
const SEPARATORS: [char; 2] = ['/', ':'];

impl Grant {
    /// True if the grant covers `session`: the prefix is empty, is the name itself, or is followed in the name by a
    /// segment border (spec AUTH-7). `a` covers `a`, `a/x` and `a:x`, never `ab`; `a/` covers `a/x`, never `a`.
    pub fn covers(&self, session: &str) -> bool {
        match session.strip_prefix(self.prefix.as_str()) {
            Some(rest) => {
                self.prefix.is_empty()
                    || planted(Bug::PrefixWithoutBorder)
                    || rest.is_empty() && !planted(Bug::PrefixWithoutName)
                    || self.prefix.ends_with(SEPARATORS)
                    || rest.starts_with(SEPARATORS)
            }
            None => false,
        }
    }
}

/// All grants of a token.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Grants(pub Vec<Grant>);

impl Grants {
    /// True if some grant allows `operation` on `session`.
    pub fn allow(&self, operation: Operation, session: &str) -> bool {
        self.0.iter().any(|grant| grant.operations.allow(operation) && grant.covers(session))
    }

    /// True if some grant allows `operation` on some session.
    pub fn allow_somewhere(&self, operation: Operation) -> bool {
        self.0.iter().any(|grant| grant.operations.allow(operation))
    }

    /// True if nothing is allowed by `narrower` that is not allowed by these, whatever sessions there are. A prefix covers what starts with it
    /// as a whole, so it is covered itself exactly where its own text is.
    pub fn include(&self, narrower: &Self) -> bool {
        let includes = |grant: &Grant| {
            let allowed = |operation| {
                let mut own = self.0.iter().filter(|own| own.operations.allow(operation));
                own.any(|own| own.covers(&grant.prefix))
            };
            grant.operations.iter().all(allowed)
        };
        narrower.0.iter().all(includes)
    }
}

impl Field for Grants {
    fn put(&self, w: &mut Writer) {
        w.varint(self.0.len() as u64);
        for grant in &self.0 {
            w.bytes(grant.prefix.as_bytes());
            w.varint(grant.operations.iter().count() as u64);
            grant.operations.iter().for_each(|operation| w.bytes(operation.as_str().as_bytes()));
        }
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let grants = (0..r.count(MAX_GRANTS)?).map(|_| {
            let prefix = r.text(MAX_NAME)?.to_owned();
            let mut operations = Operations::default();
            let mut last = None;
            for _ in 0..r.count(Operation::ALL.len())? {
                let word = r.text(MAX_NAME)?;
                let operation = Operation::from_name(word).ok_or(ProtocolError::malformed("operation is not known"))?;
                if last.is_some_and(|last| last >= operation as u16) {
                    return Err(ProtocolError::malformed("operations are not in their order"));
                }
                last = Some(operation as u16);
                operations = operations.with(operation);
            }
            Ok(Grant { prefix, operations })
        });
        Ok(Self(grants.collect::<Result<_, ProtocolError>>()?))
    }
}

/// Names of sessions that belong together in their order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stretch {
    /// The one of this name.
    Name(String),
    /// All that begin with this.
    Under(String),
}

impl Stretch {
    fn text(&self) -> &str {
        match self {
            Self::Name(text) | Self::Under(text) => text,
        }
    }
}

impl Grants {
    /// The names that begin with `prefix` and on which `operation` is granted, in their order: each of them once, and no other. Whoever looks
    /// through them need look at nothing that is not the caller's (spec SESS-20).
    pub fn stretches(&self, operation: Operation, prefix: &str) -> Vec<Stretch> {
        let mut all = Vec::new();
        let mut under = |text: &str| {
            if text.starts_with(prefix) {
                all.push(Stretch::Under(text.to_owned()));
            } else if prefix.starts_with(text) {
                all.push(Stretch::Under(prefix.to_owned()));
            }
        };
        let granted = || self.0.iter().filter(|grant| grant.operations.allow(operation)).map(|grant| &grant.prefix);
        for text in granted() {
            if text.is_empty() || text.ends_with(SEPARATORS) {
                under(text);
            } else {
                SEPARATORS.iter().for_each(|separator| under(&format!("{text}{separator}")));
            }
        }
        all.extend(granted().filter(|text| text.starts_with(prefix)).cloned().map(Stretch::Name));
        // What is under another one comes behind it, and a name of it as well.
        all.sort_by(|a, b| a.text().cmp(b.text()).then(b.cmp(a)));
        let mut within: Option<String> = None;
        all.retain(|stretch| {
            let new = within.as_ref().is_none_or(|within| !stretch.text().starts_with(within.as_str()));
            if let (true, Stretch::Under(text)) = (new, stretch) {
                within = Some(text.clone());
            }
            new
        });
        all.dedup();
        // No session has an empty name.
        all.retain(|stretch| *stretch != Stretch::Name(String::new()));
        all
    }
}

/// What a token says that another one may be made from.
#[derive(Debug, Clone, Copy)]
pub struct Delegator<'a> {
    /// Its subject.
    pub subject: &'a Subject,
    /// What it allows.
    pub grants: &'a Grants,
    /// When it expires, in seconds since the Unix epoch.
    pub expires: i64,
    /// How many tokens it was made from, one after the other.
    pub depth: usize,
}

/// What a token that was made from another one says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delegated {
    /// Its subject.
    pub subject: Subject,
    /// When it expires, in seconds since the Unix epoch.
    pub expires: i64,
}

impl Delegator<'_> {
    /// Makes a token with `grants` for `name` out of this one at `now`, to last for `lasts` seconds (spec AUTH-9).
    ///
    /// Refusals: `NAME_INVALID` for a name with a `/`; `FORBIDDEN` for a grant that is not within those of this one, for a token that would allow all that this one does for as
    /// long as it does, and where this one may make none; `LIMIT_EXCEEDED` with the limit for one beyond `max_delegations`, and for a subject
    /// or for grants that are too long.
    pub fn delegate(self, name: &Label, grants: &Grants, lasts: u64, now: i64) -> Result<Delegated, Refusal> {
        let forbidden = |detail| Err(Refusal::new(Code::FORBIDDEN, detail));
        if !self.grants.allow_somewhere(Operation::Mint) {
            return forbidden("the token does not grant `mint`");
        }
        if self.depth >= MAX_DELEGATIONS {
            let refusal = Refusal::new(Code::LIMIT_EXCEEDED, "the token was made from too many others");
            return Err(Refusal { value: MAX_DELEGATIONS as u64, ..refusal });
        }
        if grants.0.is_empty() || grants.0.iter().any(|grant| grant.operations.is_empty()) {
            return forbidden("a token that grants nothing is of no use");
        }
        if !self.grants.include(grants) {
            return forbidden("the token does not grant all of that itself");
        }
        // To make tokens is a grant on what they are for.
        let own = |grant: &&Grant| grant.operations.contains(Operation::Mint);
        let mintable = Self::mintable(self.grants.0.iter().filter(own));
        if !mintable.include(grants) {
            return forbidden("the token does not grant `mint` on all of that");
        }
        let lasts = i64::try_from(lasts).unwrap_or(i64::MAX);
        let expires = now.saturating_add(lasts).min(self.expires);
        if expires <= now {
            return forbidden("the token would have expired");
        }
        if expires == self.expires && grants.include(self.grants) {
            return forbidden("the token would be no narrower");
        }
        // One step below: what is counted as the first subject's is found by taking as many steps back (spec LIM-2).
        if name.as_str().contains('/') {
            return Err(Refusal::new(Code::NAME_INVALID, "the name of a token that is made has a `/`"));
        }
        let subject = format!("{}/{name}", self.subject);
        let too_long = Refusal::new(Code::LIMIT_EXCEEDED, "the subject has too many bytes");
        let subject = Subject::new(&subject).map_err(|_| Refusal { value: MAX_SUBJECT as u64, ..too_long })?;
        Ok(Delegated { subject, expires })
    }

    /// Everything, on the prefixes of these.
    fn mintable<'a>(grants: impl Iterator<Item = &'a Grant>) -> Grants {
        Grants(grants.map(|grant| Grant { prefix: grant.prefix.clone(), operations: Operations::all() }).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grants(all: &[(&str, &[Operation])]) -> Grants {
        let grant = |(prefix, operations): &(&str, &[Operation])| Grant {
            prefix: (*prefix).into(),
            operations: operations.iter().copied().collect(),
        };
        Grants(all.iter().map(grant).collect())
    }

    /// Against the meaning: every name that is granted and begins so is in one of them, and no other is; they are in order.
    /// Spec AUTH-2: said twice, it is allowed as if it were said once.
    #[test]
    fn an_operation_that_is_named_twice_is_allowed() {
        use Operation::{Append, Read, Signal};
        let twice: Operations = [Read, Append, Read].into_iter().collect();
        assert!(twice.contains(Read) && twice.contains(Append) && !twice.contains(Signal));
    }

    #[test]
    fn stretches_hold_the_names_that_are_granted_each_once_and_in_order() {
        let prefixes = ["", "a", "ab", "a/", "a/b", "a:", "b", "a/b/c"];
        let holds = |stretch: &Stretch, name: &str| match stretch {
            Stretch::Name(text) => name == text,
            Stretch::Under(text) => name.starts_with(text.as_str()),
        };
        let mut names: Vec<&str> = NAMES.into_iter().chain(["a/x", "a/b:c", "ab/c", "abc", "a:b/c", "c"]).collect();
        names.sort_unstable();
        for one in prefixes {
            for other in prefixes {
                let grants =
                    grants(&[(one, &[Operation::Read]), (other, &[Operation::Read]), ("b", &[Operation::Append])]);
                for prefix in prefixes {
                    let stretches = grants.stretches(Operation::Read, prefix);
                    let found: Vec<&str> = stretches
                        .iter()
                        .flat_map(|stretch| names.iter().copied().filter(move |name| holds(stretch, name)))
                        .collect();
                    let granted = |name: &&str| name.starts_with(prefix) && grants.allow(Operation::Read, name);
                    let expected: Vec<&str> = names.iter().copied().filter(granted).collect();
                    assert_eq!(found, expected, "{one:?} and {other:?}, names that begin with {prefix:?}");
                }
            }
        }
    }

    const NAMES: [&str; 9] = ["a", "ab", "a/", "a/b", "a:b", "a/b/c", "b", "/", "a:"];

    /// Against the meaning: whatever the narrower ones allow on a name the others do.
    #[test]
    fn grants_include_others_exactly_where_they_allow_whatever_those_do() {
        let prefixes = ["", "a", "ab", "a/", "a/b", "a:", "b"];
        let sets: Vec<Grants> = prefixes
            .iter()
            .flat_map(|one| prefixes.iter().map(move |two| (one, two)))
            .map(|(one, two)| grants(&[(one, &[Operation::Read, Operation::Mint]), (two, &[Operation::Append])]))
            .collect();
        for wide in &sets {
            for narrow in &sets {
                let allows = |operation, name: &&str| !narrow.allow(operation, name) || wide.allow(operation, name);
                // Every prefix is a name too, so the names tell all differences between these.
                let meant = Operation::ALL.into_iter().all(|operation| {
                    NAMES.iter().all(|name| allows(operation, name))
                        // Names that only the empty prefix covers.
                        && allows(operation, &"zzz")
                });
                assert_eq!(wide.include(narrow), meant, "{wide:?} {narrow:?}");
            }
        }
    }

    #[test]
    fn a_token_is_made_only_if_it_is_narrower_and_within_what_may_be_passed_on() {
        use Operation::{Append, Mint, Read, Signal, SignalOwn};
        let subject = Subject::new("alice").expect("a subject");
        let own = grants(&[("team", &[Read, Append]), ("team/a", &[Mint])]);
        let delegator = Delegator { subject: &subject, grants: &own, expires: 1000, depth: 0 };
        let name = Label::new("agent").expect("a name");
        let make = |delegator: Delegator<'_>, wanted: &[(&str, &[Operation])], lasts| {
            delegator.delegate(&name, &grants(wanted), lasts, 500).map_err(|refusal| refusal.code)
        };
        let made = make(delegator, &[("team/a/x", &[Read])], 100).expect("narrower");
        assert_eq!((made.subject.as_str(), made.expires), ("alice/agent", 600));
        let made = make(delegator, &[("team/a", &[Read, Append])], u64::MAX).expect("narrower");
        assert_eq!(made.expires, 1000, "never longer than the one it is made from");
        for (wanted, lasts) in [
            (&[("team/b", &[Read][..])][..], 100),
            (&[("team", &[Read])], 100),
            (&[("team/a", &[Operation::Manage])], 100),
            (&[("team/a", &[])], 100),
            (&[], 100),
            (&[("team/a", &[Read])], 0),
        ] {
            assert_eq!(make(delegator, wanted, lasts), Err(Code::FORBIDDEN), "{wanted:?} {lasts}");
        }
        let everything = grants(&[("team", &[Read, Mint])]);
        let delegator = Delegator { grants: &everything, ..delegator };
        assert_eq!(make(delegator, &[("team", &[Read, Mint])], 500), Err(Code::FORBIDDEN), "no narrower");
        assert!(make(delegator, &[("team", &[Read, Mint])], 499).is_ok(), "it ends earlier");
        assert!(make(delegator, &[("team", &[Read])], 500).is_ok(), "it allows less");
        // All signals are more than those about one's own.
        let all = grants(&[("team", &[Signal, Mint])]);
        let all = Delegator { grants: &all, ..delegator };
        assert!(make(all, &[("team", &[SignalOwn, Mint])], 500).is_ok(), "it allows less");
        assert_eq!(make(all, &[("team", &[Signal, SignalOwn, Mint])], 500), Err(Code::FORBIDDEN), "no narrower");
        let own = grants(&[("team", &[SignalOwn, Mint])]);
        let own = Delegator { grants: &own, ..delegator };
        assert_eq!(make(own, &[("team", &[Signal])], 10), Err(Code::FORBIDDEN));
        assert!(all.grants.allow(SignalOwn, "team") && all.grants.allow_somewhere(SignalOwn));
        assert!(!own.grants.allow(Signal, "team") && !own.grants.allow_somewhere(Signal));
        let deep = Delegator { depth: MAX_DELEGATIONS, ..delegator };
        assert_eq!(make(deep, &[("team", &[Read])], 10), Err(Code::LIMIT_EXCEEDED));
        let name = Label::new("tool").expect("a name");
        let refused = deep.delegate(&name, &grants(&[("team", &[Read])]), 10, 500).expect_err("too deep");
        assert_eq!(refused.value, MAX_DELEGATIONS as u64);
        let long = Subject::new(&"x".repeat(MAX_SUBJECT - 3)).expect("a subject");
        let long = Delegator { subject: &long, ..delegator };
        assert_eq!(make(long, &[("team", &[Read])], 10), Err(Code::LIMIT_EXCEEDED));
        let refused = long.delegate(&name, &grants(&[("team", &[Read])]), 10, 500).expect_err("too long");
        assert_eq!(refused.value, MAX_SUBJECT as u64);
        let none = grants(&[("team", &[Read])]);
        let none = Delegator { grants: &none, ..delegator };
        assert_eq!(make(none, &[("team", &[Read])], 10), Err(Code::FORBIDDEN));
    }

    #[test]
    fn a_prefix_matches_whole_segments_only() {
        let covers =
            |prefix: &str, session| Grant { prefix: prefix.into(), operations: Operations::all() }.covers(session);
        for (prefix, session, expected) in [
            ("", "anything", true),
            ("a", "a", true),
            ("a", "a/x", true),
            ("a", "a:x", true),
            ("a", "ab", false),
            ("a/", "a/x", true),
            ("a/", "a", false),
            ("a/", "ab", false),
            ("agent:", "agent:session123", true),
            ("agent:s", "agent:session123", false),
            ("é", "é/x", true),
            ("é", "éa", false),
        ] {
            assert_eq!(covers(prefix, session), expected, "{prefix:?} on {session:?}");
        }
    }
}

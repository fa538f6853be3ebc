//! Grants: what the holder of a capability token may do where (spec AUTH).

use crate::planted::{Bug, planted};
use crate::wire::Frame;

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
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 8] =
        [Self::Read, Self::Append, Self::Create, Self::Manage, Self::Join, Self::Run, Self::Signal, Self::Notify];

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
            Frame::Signal(_) => &[Self::Signal],
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
pub struct Operations(u8);

impl Operations {
    /// The set with `operation` added.
    pub const fn with(self, operation: Operation) -> Self {
        Self(self.0 | 1 << operation as u8)
    }

    /// Every operation.
    pub fn all() -> Self {
        Operation::ALL.into_iter().fold(Self::default(), Self::with)
    }

    /// True if `operation` is in the set.
    pub const fn contains(self, operation: Operation) -> bool {
        self.0 & 1 << operation as u8 != 0
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
                    || rest.is_empty()
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
        self.0.iter().any(|grant| grant.operations.contains(operation) && grant.covers(session))
    }

    /// True if some grant allows `operation` on some session.
    pub fn allow_somewhere(&self, operation: Operation) -> bool {
        self.0.iter().any(|grant| grant.operations.contains(operation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

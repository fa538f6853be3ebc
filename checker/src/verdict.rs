//! What is wrong, and how much of what was looked at.

use std::collections::BTreeMap;

use serde::Serialize;

/// What kind of promise was broken. Each has a name, which reports use, and the property of which it is the breach.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
#[expect(missing_docs, reason = "what each means stands beside its property in `Class::property`")]
pub enum Class {
    LostWrite,
    Duplicate,
    Reorder,
    Hole,
    InconsistentSeq,
    RealtimeLag,
    TimeRanBackwards,
    Phantom,
    AbortedRead,
    PrecommittedRead,
    Vanished,
    TornBatch,
    MixedTimelines,
    NonmonotonicDelivery,
    Redelivered,
    SkippedDelivery,
    WrongResume,
    FilterMissed,
    FilterLeaked,
    FalseCaughtUp,
    StaleRead,
    NonmonotonicRead,
    Lagging,
    UnfencedWrite,
    EpochReused,
    Unanswered,
    WrongPosition,
    WrongChange,
    FalseConflict,
    StateDivergence,
    HashDivergence,
    MessageDivergence,
    PresenceDivergence,
    Ghost,
    MissingMember,
    LateLeave,
    ZombieWrite,
    TwoHolders,
    EndedTwice,
    Unauthorized,
    RevokedDelivery,
    WronglyRefused,
    CrossedNamespaces,
    Malformed,
    NothingProvoked,
}

impl Class {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::LostWrite,
        Self::Duplicate,
        Self::Reorder,
        Self::Hole,
        Self::InconsistentSeq,
        Self::RealtimeLag,
        Self::TimeRanBackwards,
        Self::Phantom,
        Self::AbortedRead,
        Self::PrecommittedRead,
        Self::Vanished,
        Self::TornBatch,
        Self::MixedTimelines,
        Self::NonmonotonicDelivery,
        Self::Redelivered,
        Self::SkippedDelivery,
        Self::WrongResume,
        Self::FilterMissed,
        Self::FilterLeaked,
        Self::FalseCaughtUp,
        Self::StaleRead,
        Self::NonmonotonicRead,
        Self::Lagging,
        Self::UnfencedWrite,
        Self::EpochReused,
        Self::Unanswered,
        Self::WrongPosition,
        Self::WrongChange,
        Self::FalseConflict,
        Self::StateDivergence,
        Self::HashDivergence,
        Self::MessageDivergence,
        Self::PresenceDivergence,
        Self::Ghost,
        Self::MissingMember,
        Self::LateLeave,
        Self::ZombieWrite,
        Self::TwoHolders,
        Self::EndedTwice,
        Self::Unauthorized,
        Self::RevokedDelivery,
        Self::WronglyRefused,
        Self::CrossedNamespaces,
        Self::Malformed,
        Self::NothingProvoked,
    ];

    /// The property that it breaks, and what that is.
    pub fn property(self) -> (&'static str, &'static str) {
        match self {
            Self::LostWrite => ("L1", "an acknowledged record is not stored where it was said to be"),
            Self::Duplicate => ("L2", "a record is stored twice"),
            Self::Reorder => ("L3", "what one producer appended is stored in another order"),
            Self::Hole => ("L4", "a seq holds nothing, and nothing was given up there"),
            Self::InconsistentSeq => ("L4", "a seq held different records at different times or for different readers"),
            Self::RealtimeLag => ("L5", "an append that began after another one was acknowledged is stored before it"),
            Self::TimeRanBackwards => ("L5", "a record has an earlier time than one that stands before it"),
            Self::Phantom => ("L6", "a record is stored that nobody appended"),
            Self::AbortedRead => ("L6", "a record is stored of an append that failed"),
            Self::PrecommittedRead => ("L6", "a record was read before it was appended"),
            Self::Vanished => ("L7", "a record was delivered and is not stored any more"),
            Self::TornBatch => ("L8", "of a batch only some records are stored, or others stand between them"),
            Self::MixedTimelines => {
                ("L9", "a reader of one life of a session was given records of another as its continuation")
            }
            Self::NonmonotonicDelivery => ("S1", "a subscription went backwards"),
            Self::Redelivered => ("S2", "a subscription delivered a record twice"),
            Self::SkippedDelivery => ("S3", "a subscription left records out and did not say so"),
            Self::WrongResume => ("S4", "a subscription went on elsewhere than where it was, and called that exact"),
            Self::FilterMissed => ("S8", "a record that passes the filter was not delivered"),
            Self::FilterLeaked => ("S8", "a record was delivered that does not pass the filter"),
            Self::FalseCaughtUp => ("S9", "a subscription was said to have caught up before everything was delivered"),
            Self::StaleRead => ("S7", "a tail was told below what was acknowledged before it was asked for"),
            Self::NonmonotonicRead => {
                ("S6", "a process was told a tail below what it had been told or given of the session before")
            }
            Self::Lagging => ("S10", "a subscription has not reached the end after the faults were over"),
            Self::UnfencedWrite => ("W1", "a producer wrote after a newer one had taken its place"),
            Self::EpochReused => ("W1", "an epoch was granted that is not above those before it"),
            Self::Unanswered => {
                ("W1", "nobody was told what became of an append, though nothing was in the way of that")
            }
            Self::WrongPosition => {
                ("W2", "a producer was told to go on elsewhere than behind its last batch that is stored")
            }
            Self::WrongChange => {
                ("K2", "a key changed otherwise than was asked for and answered, or against the condition for it")
            }
            Self::FalseConflict => ("K2", "a change was refused for a condition that held all the time"),
            Self::StateDivergence => ("K3", "a view has other keys than the fold of its log"),
            Self::HashDivergence => ("K4", "two views at the same seq have different hashes"),
            Self::MessageDivergence => ("K3", "a view has other messages than the fold of its log"),
            Self::PresenceDivergence => ("P1", "a view has other members than the fold of its log"),
            Self::Ghost => ("P2", "a member is there whose process is gone, or was for longer than its lease"),
            Self::MissingMember => ("P1", "a member is not there whose process joined and lives"),
            Self::LateLeave => ("P3", "a member left under a generation that is not the one that was there"),
            Self::ZombieWrite => ("R1", "a record is part of a run that its author does not hold"),
            Self::TwoHolders => ("R2", "a run was taken from somebody who held it"),
            Self::EndedTwice => ("R3", "a run went on, or ended again, after its end"),
            Self::Unauthorized => ("A1", "something was done without a right to it"),
            Self::RevokedDelivery => ("A2", "records were delivered long after the right to them was revoked"),
            Self::WronglyRefused => ("A1", "something was refused as forbidden that the process had a right to"),
            Self::CrossedNamespaces => ("A3", "a process was given what somebody of another namespace wrote"),
            Self::Malformed => ("N1", "the history contradicts itself"),
            Self::NothingProvoked => ("N1", "the history proves nothing: what had to be provoked did not happen"),
        }
    }

    /// The name in reports.
    pub fn name(self) -> String {
        serde_json::to_value(self).ok().and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default()
    }
}

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// What kind.
    pub class: Class,
    /// The property, by its id.
    pub property: &'static str,
    /// The session, where there is one.
    pub session: String,
    /// What exactly: the operations, seqs and subscriptions that contradict each other.
    pub what: String,
}

/// Violations of one class that are told one by one; the others are counted.
const TOLD: u64 = 20;

/// What came of a check.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The first violations of each class.
    pub violations: Vec<Violation>,
    /// How many there are, by class.
    pub broken: BTreeMap<Class, u64>,
    /// What was looked at, and what was provoked.
    pub counts: BTreeMap<String, u64>,
}

impl Verdict {
    /// True if every promise was kept, and the history is not empty.
    pub fn is_sound(&self) -> bool {
        self.broken.is_empty()
    }

    pub(crate) fn report(&mut self, class: Class, session: &str, what: impl FnOnce() -> String) {
        let count = self.broken.entry(class).or_default();
        *count += 1;
        if *count <= TOLD {
            let (property, _) = class.property();
            self.violations.push(Violation { class, property, session: session.to_owned(), what: what() });
        }
    }

    pub(crate) fn count(&mut self, what: &str, count: u64) {
        match self.counts.get_mut(what) {
            Some(counted) => *counted += count,
            None => drop(self.counts.insert(what.to_owned(), count)),
        }
    }

    /// What every history must have had, beside what was required of this one.
    const ALWAYS: [&str; 3] = ["acknowledged", "delivered", "complete-reads"];

    pub(crate) fn settle(&mut self, required: &[String]) {
        let required = Self::ALWAYS.iter().copied().chain(required.iter().map(String::as_str));
        for what in required.collect::<Vec<_>>() {
            if self.counts.get(what).copied().unwrap_or(0) == 0 {
                self.report(Class::NothingProvoked, "", || format!("{what}: 0"));
            }
        }
    }
}

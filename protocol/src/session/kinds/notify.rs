//! Notifications: who is to be told what while nobody of them is here (spec NOTE).

use super::{Kind, payload, words};
use crate::error::ProtocolError;
use crate::registry::MAX_TRIGGERS;
use crate::wire::{Detail, Field, Label, Reader, Subject, Writer};

payload! {
    /// A rule is in force from here on, in the place of one of the same name; one without triggers is no more (spec NOTE-1).
    NotifyRule = NOTIFY_RULE, {
        /// Its name.
        name: Label,
        /// Whom to tell: the subject of people's tokens.
        principal: Subject,
        /// What to tell of.
        triggers: Triggers,
        /// Milliseconds for which it may turn out that nobody needs to be told.
        delay: u64,
        /// Of jobs with the same key for the same principal only the newest is kept.
        collapse: Option<Label>,
    }
}

payload! {
    /// A job is due, and nobody of those whom it is for has come (spec NOTE-4).
    NotifyEmitted = NOTIFY_EMITTED, {
        /// The job: the seq of the record that caused it.
        job: u64,
        /// The rule that it is by.
        rule: Label,
    }
}

payload! {
    /// A worker has done what it could about a job (spec NOTE-5).
    NotifyDone = NOTIFY_DONE, {
        /// The job.
        job: u64,
        /// The rule that it is by.
        rule: Label,
        /// What became of it.
        outcome: JobOutcome,
        /// Why, for people.
        detail: Detail,
    }
}

words! {
    /// What a worker made of a job (spec NOTE-5).
    JobOutcome, "outcome of a job", {
        /// It was delivered.
        Delivered = 0, "delivered";
        /// It cannot be.
        Failed = 1, "failed";
    }
}

/// The kinds of records of which a rule tells (spec NOTE-2).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Triggers(Vec<Kind>);

impl Triggers {
    /// The kinds that there can be.
    pub const ALL: [Kind; 4] = [Kind::REQUEST_OPENED, Kind::RUN_END, Kind::RUN_LOST, Kind::MESSAGE_END];

    /// The triggers that are in `kinds`, each once, in their order. Errors: `NAME_INVALID` for a kind that is none.
    pub fn new(kinds: impl IntoIterator<Item = Kind>) -> Result<Self, ProtocolError> {
        let mut triggers: Vec<Kind> = kinds.into_iter().collect();
        triggers.sort_unstable();
        triggers.dedup();
        if triggers.iter().any(|kind| !Self::ALL.contains(kind)) {
            return Err(ProtocolError::new(crate::Code::NAME_INVALID, "nobody is told of records of this kind"));
        }
        Ok(Self(triggers))
    }

    /// The kinds, ascending.
    pub fn kinds(&self) -> &[Kind] {
        &self.0
    }
}

impl Field for Triggers {
    fn put(&self, w: &mut Writer) {
        w.varint(self.0.len() as u64);
        self.0.iter().for_each(|kind| w.varint(kind.0));
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let mut kinds: Vec<Kind> = Vec::new();
        for _ in 0..r.count(MAX_TRIGGERS)? {
            let kind = Kind(r.varint()?);
            if !Self::ALL.contains(&kind) || kinds.last().is_some_and(|last| *last >= kind) {
                return Err(ProtocolError::malformed("trigger is not known, or not in its place"));
            }
            kinds.push(kind);
        }
        Ok(Self(kinds))
    }
}

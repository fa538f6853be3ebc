//! The members of a view: who is here (spec PRES, FOLD-7).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::changes::Changes;
use crate::error::ProtocolError;
use crate::planted::{Bug, planted};
use crate::registry::MAX_MEMBERS;
use crate::session::kinds::{Activity, PresenceJoined};
use crate::session::words::{Author, Instance};
use crate::wire::{Field, Label, Reader, Subject, Writer};

/// Somebody who is here at the view's seq.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Seq of the record with which it joined.
    pub generation: u64,
    /// When it joined, in milliseconds since the Unix epoch.
    pub time: u64,
    /// How people call it.
    pub name: Label,
    /// Milliseconds without a sign of life after which it is lost.
    pub grace: u64,
    /// What it is doing.
    pub activity: Activity,
    /// Seq of the record that said so.
    pub updated: u64,
}

/// The members of a session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Members {
    here: BTreeMap<Arc<Author>, Member>,
    /// How often somebody came or went since the view is in memory.
    changes: Changes,
}

impl Members {
    /// The member with this subject and instance.
    pub fn get(&self, author: &Author) -> Option<&Member> {
        self.here.get(author)
    }

    /// Everybody of one subject.
    pub fn of(&self, subject: &Subject) -> impl Iterator<Item = &Arc<Author>> {
        let first = Arc::new(Author { subject: subject.clone(), instance: Instance([0; 16]) });
        self.here.range(first..).map(|(author, _)| author).take_while(move |author| author.subject == *subject)
    }

    /// Everybody, by subject and instance.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = (&Arc<Author>, &Member)> {
        self.here.iter()
    }

    /// How many are here.
    pub fn len(&self) -> usize {
        self.here.len()
    }

    /// True if nobody is.
    pub fn is_empty(&self) -> bool {
        self.here.is_empty()
    }

    /// What would exceed the limit does nothing: no server accepted it.
    pub(super) fn join(&mut self, seq: u64, time: u64, author: &Arc<Author>, of: PresenceJoined) {
        if self.here.len() == MAX_MEMBERS && !self.here.contains_key(author) {
            return;
        }
        let PresenceJoined { name, grace, activity } = of;
        self.changes.add();
        self.here.insert(author.clone(), Member { generation: seq, time, name, grace, activity, updated: seq });
    }

    /// Differs from before if somebody came or went since.
    pub fn changes(&self) -> u64 {
        self.changes.count()
    }

    pub(super) fn update(&mut self, seq: u64, author: &Author, activity: Activity) {
        if let Some(member) = self.here.get_mut(author) {
            (member.activity, member.updated) = (activity, seq);
        }
    }

    /// False if it was not here.
    pub(super) fn leave(&mut self, author: &Author, generation: u64) -> bool {
        let here = self
            .here
            .get(author)
            .is_some_and(|member| member.generation == generation || planted(Bug::LeaveWithoutGeneration));
        if here && !planted(Bug::DepartureNotFolded) {
            self.here.remove(author);
            self.changes.add();
        }
        here
    }

    /// Nothing is said of them any more.
    pub(super) fn clear(&mut self) {
        self.here.clear();
        self.changes.add();
    }

    pub(super) fn put(&self, w: &mut Writer) {
        w.varint(self.here.len() as u64);
        for (author, member) in &self.here {
            author.put(w);
            w.varint(member.generation);
            w.varint(member.time);
            member.name.put(w);
            w.varint(member.grace);
            member.activity.put(w);
            w.varint(member.updated);
        }
    }

    /// Reads what [`Members::put`] wrote, of a view that ends at `next`.
    pub(super) fn get_from(r: &mut Reader<'_>, next: u64) -> Result<Self, ProtocolError> {
        let mut this = Self::default();
        for _ in 0..r.count(MAX_MEMBERS)? {
            let author = Author::get(r)?;
            let member = Member {
                generation: r.varint()?,
                time: r.varint()?,
                name: Label::get(r)?,
                grace: r.varint()?,
                activity: Activity::get(r)?.owned(),
                updated: r.varint()?,
            };
            let ascends = this.here.last_key_value().is_none_or(|(last, _)| **last < author);
            if !ascends || member.generation > member.updated || member.updated >= next {
                return Err(ProtocolError::malformed("members of a view are not consistent"));
            }
            this.here.insert(Arc::new(author), member);
        }
        Ok(this)
    }
}

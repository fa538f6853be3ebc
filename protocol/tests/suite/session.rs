//! A session that is served by nobody: tests ask its authority, and commit what it makes.

use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::session::{
    Author, Authority, CheckedBatch, Incarnation, Instance, Outcome, ProducerHandle, ProducerKey, Record, Refusal,
    RunId, State, Step, View,
};
use mainstay_protocol::wire::{Deframer, Frame, Label, Subject, Writer};

pub(crate) const LIFE: Incarnation = Incarnation([1; 16]);

pub(crate) fn label(text: &str) -> Label {
    Label::new(text).expect("a label")
}

pub(crate) fn author(subject: &str, instance: u8) -> Arc<Author> {
    Arc::new(Author { subject: Subject::new(subject).expect("a subject"), instance: Instance([instance; 16]) })
}

pub(crate) fn alice() -> Arc<Author> {
    author("alice", 1)
}

pub(crate) fn bob() -> Arc<Author> {
    author("bob", 2)
}

/// The frames of a QUIC stream.
pub(crate) fn frames(pieces: &[Bytes]) -> Vec<Frame> {
    let mut frames = Deframer::new(1 << 20);
    frames.push(pieces.concat().into());
    core::iter::from_fn(|| frames.next_frame().expect("frames"))
        .filter_map(|raw| Frame::decode(&raw).expect("a frame"))
        .collect()
}

/// A session with one producer, of [`alice`].
pub(crate) struct Session {
    pub(crate) authority: Authority<()>,
    pub(crate) handle: ProducerHandle,
    pub(crate) sequence: u64,
}

pub(crate) fn commit(authority: &mut Authority<()>) {
    while let Step::Commit(_) = authority.next_chunk() {
        authority.committed().expect("follows");
    }
}

impl Session {
    pub(crate) fn new() -> Self {
        let key = ProducerKey { subject: alice().subject.clone(), name: label("p") };
        let mut authority = Authority::new(State::new(LIFE), 1, None);
        authority.open_producer(1, key.clone(), None, ());
        commit(&mut authority);
        let handle = authority.state().producers().find(&key).expect("granted");
        Self { authority, handle, sequence: 0 }
    }

    pub(crate) fn commit(&mut self) {
        commit(&mut self.authority);
    }

    /// Appends a record, durably.
    pub(crate) fn append(&mut self, now: u64, record: Record) -> Result<(), Refusal> {
        self.accept(now, None, &[record])?;
        self.commit();
        Ok(())
    }

    /// Appends a batch, which waits for a commit. It may be part of a run that is held under an epoch.
    pub(crate) fn accept(&mut self, now: u64, run: Option<u64>, records: &[Record]) -> Result<(), Refusal> {
        match self.authority.append(now, &alice(), (&self.handle, 1, self.sequence), run, batch(records), ()).0 {
            Outcome::Refused(refusal) => Err(refusal),
            _ => {
                self.sequence += 1;
                Ok(())
            }
        }
    }

    /// Begins a run of [`alice`], durably. Returns its epoch.
    pub(crate) fn begin(&mut self, run: RunId) -> u64 {
        self.authority.start_run(1, &alice(), run, (5000, None), ());
        self.commit();
        self.view().runs().get(run).expect("begun").epoch
    }

    pub(crate) fn view(&self) -> &View {
        self.authority.state().view()
    }

    pub(crate) fn deadline(&self) -> Option<u64> {
        self.authority.state().deadline()
    }
}

pub(crate) fn batch(records: &[Record]) -> CheckedBatch {
    let mut w = Writer::new();
    records.iter().for_each(|record| record.put(&mut w));
    CheckedBatch::new(records.len() as u64, w.freeze()).expect("a valid batch")
}

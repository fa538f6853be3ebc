//! ATTACHED: the answer to ATTACH (spec SESS-9).

use crate::error::ProtocolError;
use crate::registry::{MAX_POSITIONS, MAX_STREAMS};
use crate::session::{Incarnation, Verdict, ViewHash};
use crate::wire::Field;
use crate::wire::{Body, Label, Params, Reader, Writer};

/// Where a producer of the caller stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// The producer's name.
    pub producer: Label,
    /// The epoch granted last.
    pub epoch: u64,
    /// The sequence that the next batch must carry.
    pub next: u64,
}

/// What an attach answers: everything that is needed to draw the session without another round trip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// What became of the cursor in ATTACH; `exact` if there was none. After `gone` the QUIC stream ends.
    pub verdict: Verdict,
    /// The current incarnation.
    pub incarnation: Incarnation,
    /// The seq that the next record will get; everything below is durable.
    pub tail: u64,
    /// The first seq that can still be read.
    pub first: u64,
    /// When the session was created, in milliseconds since the Unix epoch.
    pub created: u64,
    /// True if the session is closed.
    pub closed: bool,
    /// Version of the fold that made `view_hash`.
    pub fold_version: u64,
    /// Hash of the view at `tail`.
    pub view_hash: ViewHash,
    /// Names of the session's streams; the stream id is the position.
    pub streams: Vec<Label>,
    /// Positions of the caller's producers, most recently granted first, at most 32.
    pub positions: Vec<Position>,
}

impl Body for Attached {
    const KIND: u64 = 0x12;

    fn put(&self, w: &mut Writer) {
        self.verdict.put(w);
        self.incarnation.put(w);
        w.varint(self.tail);
        w.varint(self.first);
        w.varint(self.created);
        Field::put(&self.closed, w);
        w.varint(self.fold_version);
        w.raw(&self.view_hash.0);
        w.varint(self.streams.len() as u64);
        for stream in &self.streams {
            stream.put(w);
        }
        w.varint(self.positions.len() as u64);
        for position in &self.positions {
            position.producer.put(w);
            w.varint(position.epoch);
            w.varint(position.next);
        }
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let verdict = Verdict::get(r)?;
        let incarnation = Incarnation::get(r)?;
        let tail = r.varint()?;
        let first = r.varint()?;
        let created = r.varint()?;
        let closed = <bool as Field>::get(r)?;
        let fold_version = r.varint()?;
        let view_hash = ViewHash(r.array()?);
        let streams = (0..r.count(MAX_STREAMS)?).map(|_| Label::get(r)).collect::<Result<_, _>>()?;
        let positions = (0..r.count(MAX_POSITIONS)?)
            .map(|_| Ok(Position { producer: Label::get(r)?, epoch: r.varint()?, next: r.varint()? }))
            .collect::<Result<_, ProtocolError>>()?;
        Params::get_none(r)?;
        Ok(Self { verdict, incarnation, tail, first, created, closed, fold_version, view_hash, streams, positions })
    }
}

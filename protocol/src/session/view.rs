//! The fold: the view of a session as a pure function of its records (spec FOLD).

use bytes::Bytes;

use super::record::{Head, Kind};
use super::words::ViewHash;
use crate::error::ProtocolError;
use crate::registry::{FOLD_VERSION, MAX_STREAMS};
use crate::wire::{Reader, Writer};

/// What the view knows of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamView {
    /// The stream id.
    pub id: u64,
    /// Records folded.
    pub records: u64,
    /// Payload bytes folded.
    pub bytes: u64,
    /// Seq of the last record.
    pub last: u64,
}

/// The current picture of a session: `fold(records below next)`. Bounded: it grows with the number of streams, never
/// with the number of records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    next: u64,
    time: u64,
    closed: Option<u64>,
    streams: Vec<StreamView>,
}

impl View {
    /// The first seq that is not folded.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Time of the last record, in milliseconds since the Unix epoch; 0 before the first.
    pub fn time(&self) -> u64 {
        self.time
    }

    /// Seq of the `session.closed` record.
    pub fn closed(&self) -> Option<u64> {
        self.closed
    }

    /// What is known of each stream that has records, ascending by id.
    pub fn streams(&self) -> &[StreamView] {
        &self.streams
    }

    /// Folds the record bytes of the next seq (spec FOLD-2). A record that some version accepted cannot fail; an error
    /// means that the bytes are not a record.
    pub fn apply(&mut self, time: u64, record: &Bytes) -> Result<(), ProtocolError> {
        let mut r = Reader::new(record);
        self.fold(time, &mut r, record.len())
    }

    /// Folds the record that `r` stands at; its bytes end at position `end` of the reader's input.
    pub(super) fn fold(&mut self, time: u64, r: &mut Reader<'_>, end: usize) -> Result<(), ProtocolError> {
        let head = Head::get(r)?;
        head.skip_to_payload(r)?;
        let payload =
            end.checked_sub(r.position()).ok_or(ProtocolError::malformed("record fields exceed the record"))?;
        let seq = self.next;
        self.next += 1;
        self.time = self.time.max(time);
        if head.kind == Kind::SESSION_CLOSED {
            self.closed.get_or_insert(seq);
        }
        let stream = self.stream_mut(head.stream);
        stream.records += 1;
        stream.bytes += payload as u64;
        stream.last = seq;
        Ok(())
    }

    fn stream_mut(&mut self, id: u64) -> &mut StreamView {
        let at = match self.streams.binary_search_by_key(&id, |stream| stream.id) {
            Ok(at) => at,
            Err(at) => {
                self.streams.insert(at, StreamView { id, records: 0, bytes: 0, last: 0 });
                at
            }
        };
        &mut self.streams[at]
    }

    /// The canonical encoding: equal views have equal bytes (spec FOLD-3).
    pub fn encode(&self) -> Bytes {
        let mut w = Writer::new();
        w.varint(FOLD_VERSION);
        w.varint(self.next);
        w.varint(self.time);
        w.varint(self.closed.map_or(0, |seq| seq + 1));
        w.varint(self.streams.len() as u64);
        for stream in &self.streams {
            w.varint(stream.id);
            w.varint(stream.records);
            w.varint(stream.bytes);
            w.varint(stream.last);
        }
        w.freeze()
    }

    /// Reads a view. Errors: `FRAME_MALFORMED` for anything but a canonical encoding of this fold version.
    pub fn decode(bytes: &Bytes) -> Result<Self, ProtocolError> {
        let mut r = Reader::new(bytes);
        if r.varint()? != FOLD_VERSION {
            return Err(ProtocolError::malformed("view is of another fold version"));
        }
        let (next, time) = (r.varint()?, r.varint()?);
        let closed = r.varint()?.checked_sub(1);
        let count = r.count(MAX_STREAMS)?;
        let mut streams: Vec<StreamView> = Vec::with_capacity(count);
        for _ in 0..count {
            let stream = StreamView { id: r.varint()?, records: r.varint()?, bytes: r.varint()?, last: r.varint()? };
            if streams.last().is_some_and(|last| last.id >= stream.id) {
                return Err(ProtocolError::malformed("streams of a view are not in ascending order"));
            }
            if stream.records == 0 || stream.last >= next {
                return Err(ProtocolError::malformed("stream of a view is not consistent"));
            }
            streams.push(stream);
        }
        r.finish()?;
        if closed.is_some_and(|seq| seq >= next) {
            return Err(ProtocolError::malformed("view is closed beyond its end"));
        }
        Ok(Self { next, time, closed, streams })
    }

    /// BLAKE3 of the canonical encoding (spec FOLD-4).
    pub fn hash(&self) -> ViewHash {
        ViewHash(*blake3::hash(&self.encode()).as_bytes())
    }
}

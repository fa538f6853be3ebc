//! Record bytes: self-contained, the same on the wire and on disk (spec REC-1, REC-3).
//!
//! ```text
//! record  = kind varint | stream varint | flags u8 | [message 16] | [run 16] | [headers] | payload
//! headers = count varint | (name length | name | value length | value)*
//! flags   = 1 message id, 2 run id, 4 headers; all other bits zero
//! region  = (length varint | record)*
//! ```
//!
//! A record holds no seq, time, author or incarnation: those belong to what carries it.

use bytes::Bytes;

use super::kinds::{Deed, Kind};
use super::words::{MessageId, RunId};
use crate::error::{Code, ProtocolError};
use crate::registry::{MAX_BATCH_BYTES, MAX_BATCH_RECORDS, MAX_HEADERS, MAX_RECORD};
use crate::wire::{Reader, Writer, varint_len};

const HAS_MESSAGE: u8 = 1;
const HAS_RUN: u8 = 2;
const HAS_HEADERS: u8 = 4;

/// One record.
#[derive(Clone, PartialEq, Eq)]
pub struct Record {
    /// What it is.
    pub kind: Kind,
    /// The stream that it is in, by the session's stream id (spec REC-4).
    pub stream: u64,
    /// Message that it belongs to, chosen by the client.
    pub message: Option<MessageId>,
    /// Run that it belongs to, chosen by the client.
    pub run: Option<RunId>,
    /// Application headers, in the order given.
    pub headers: Vec<(Bytes, Bytes)>,
    /// The payload.
    pub payload: Bytes,
}

crate::kept::keeps!(Record, kind stream message run, keeps headers payload);

impl Record {
    /// A `data` record in `stream`.
    pub fn data(stream: u64, payload: impl Into<Bytes>) -> Self {
        Self { kind: Kind::DATA, stream, message: None, run: None, headers: Vec::new(), payload: payload.into() }
    }

    /// Appends `length | record bytes` to a region.
    pub fn put(&self, w: &mut Writer) {
        w.varint(self.encoded_len() as u64);
        w.varint(self.kind.0);
        w.varint(self.stream);
        let mut flags = 0;
        flags |= if self.message.is_some() { HAS_MESSAGE } else { 0 };
        flags |= if self.run.is_some() { HAS_RUN } else { 0 };
        flags |= if self.headers.is_empty() { 0 } else { HAS_HEADERS };
        w.u8(flags);
        if let Some(id) = &self.message {
            id.put(w);
        }
        if let Some(id) = &self.run {
            id.put(w);
        }
        if !self.headers.is_empty() {
            w.varint(self.headers.len() as u64);
            for (name, value) in &self.headers {
                w.bytes(name);
                w.bytes(value);
            }
        }
        w.raw(&self.payload);
    }

    /// The record bytes.
    pub fn encode(&self) -> Bytes {
        let mut w = Writer::with_capacity(self.encoded_len() + 4);
        self.put(&mut w);
        let mut bytes = w.freeze();
        let _ = bytes.split_to(varint_len(self.encoded_len() as u64));
        bytes
    }

    /// Length of the record bytes, without the length that precedes them in a region.
    pub fn encoded_len(&self) -> usize {
        let field = |bytes: &Bytes| varint_len(bytes.len() as u64) + bytes.len();
        let headers = match self.headers.len() {
            0 => 0,
            count => {
                varint_len(count as u64)
                    + self.headers.iter().map(|(name, value)| field(name) + field(value)).sum::<usize>()
            }
        };
        let ids = 16 * (usize::from(self.message.is_some()) + usize::from(self.run.is_some()));
        varint_len(self.kind.0) + varint_len(self.stream) + 1 + ids + headers + self.payload.len()
    }

    /// Reads the record at the front of a region. Errors: `RECORD_MALFORMED`, `RECORD_TOO_LARGE`.
    pub fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let bytes = take(r)?;
        Self::parse(&bytes).map_err(|error| ProtocolError::new(Code::RECORD_MALFORMED, error.detail))
    }

    /// Reads record bytes. Errors: `FRAME_MALFORMED`.
    pub fn parse(bytes: &Bytes) -> Result<Self, ProtocolError> {
        let mut r = Reader::new(bytes);
        let Head { kind, stream, flags } = Head::get(&mut r)?;
        let message = if flags & HAS_MESSAGE != 0 { Some(MessageId::get(&mut r)?) } else { None };
        let run = if flags & HAS_RUN != 0 { Some(RunId::get(&mut r)?) } else { None };
        let mut headers = Vec::new();
        if flags & HAS_HEADERS != 0 {
            let count = header_count(&mut r)?;
            headers.reserve(count);
            for _ in 0..count {
                headers.push((r.bytes(usize::MAX)?, r.bytes(usize::MAX)?));
            }
        }
        Ok(Self { kind, stream, message, run, headers, payload: r.rest_bytes() })
    }
}

/// The part of a record that the fold of most kinds needs.
pub(crate) struct Head {
    pub(crate) kind: Kind,
    pub(crate) stream: u64,
    flags: u8,
}

impl Head {
    pub(crate) fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let (kind, stream, flags) = (Kind(r.varint()?), r.varint()?, r.u8()?);
        if flags & !(HAS_MESSAGE | HAS_RUN | HAS_HEADERS) != 0 {
            return Err(ProtocolError::malformed("reserved record flag is set"));
        }
        Ok(Self { kind, stream, flags })
    }

    /// Skips ids and headers, up to the payload.
    pub(crate) fn skip_to_payload(&self, r: &mut Reader<'_>) -> Result<(), ProtocolError> {
        for flag in [HAS_MESSAGE, HAS_RUN] {
            if self.flags & flag != 0 {
                r.skip(16)?;
            }
        }
        if self.flags & HAS_HEADERS != 0 {
            for _ in 0..2 * header_count(r)? {
                let len = r.varint()?;
                r.skip(usize::try_from(len).unwrap_or(usize::MAX))?;
            }
        }
        Ok(())
    }
}

fn header_count(r: &mut Reader<'_>) -> Result<usize, ProtocolError> {
    match r.count(MAX_HEADERS)? {
        0 => Err(ProtocolError::malformed("header list is empty")),
        count => Ok(count),
    }
}

/// Takes the bytes of the next record of a region.
fn take(r: &mut Reader<'_>) -> Result<Bytes, ProtocolError> {
    let len = r.varint().map_err(|error| ProtocolError::new(Code::RECORD_MALFORMED, error.detail))?;
    if len > MAX_RECORD as u64 {
        return Err(ProtocolError::new(Code::RECORD_TOO_LARGE, "record exceeds its limit"));
    }
    r.take(len as usize).map_err(|error| ProtocolError::new(Code::RECORD_MALFORMED, error.detail))
}

/// The records of a region, one after the other, each as its bytes and head.
#[derive(Debug, Clone)]
pub struct Records<'a> {
    r: Reader<'a>,
}

impl<'a> Records<'a> {
    /// Iterates over `region`.
    pub fn new(region: &'a Bytes) -> Self {
        Self { r: Reader::new(region) }
    }

    /// Position in the region, in bytes.
    pub(crate) fn position(&self) -> usize {
        self.r.position()
    }

    /// The bytes of the next record. Errors: as [`Record::get`], once; then the iteration is over.
    pub(crate) fn next_bytes(&mut self) -> Option<Result<Bytes, ProtocolError>> {
        if self.r.is_empty() {
            return None;
        }
        let bytes = take(&mut self.r);
        if bytes.is_err() {
            self.r.rest_bytes();
        }
        Some(bytes)
    }
}

impl Iterator for Records<'_> {
    type Item = Result<Record, ProtocolError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.r.is_empty() {
            return None;
        }
        let record = Record::get(&mut self.r);
        if record.is_err() {
            self.r.rest_bytes();
        }
        Some(record)
    }
}

/// A batch from a client whose records were checked: whole, within the limits, of kinds that a client may write.
#[derive(Clone)]
pub struct CheckedBatch {
    pub(super) count: u64,
    pub(super) records: Bytes,
    pub(super) max_stream: u64,
    /// No record does anything but being there, or names a run.
    pub(super) plain: bool,
    /// Some record is told early.
    pub(super) early: bool,
}

crate::kept::keeps!(CheckedBatch, count max_stream plain early, keeps records);

impl CheckedBatch {
    /// For [`Bug::HalfBatch`](crate::planted::Bug::HalfBatch).
    pub(super) fn without_the_last(&self) -> Self {
        let mut walk = Records::new(&self.records);
        let kept = (1..self.count).filter_map(|_| walk.next()).count() as u64;
        Self { count: kept, records: self.records.slice(..walk.position()), ..self.clone() }
    }

    /// Checks the region of an APPEND (spec PROD-3, KIND-2, KIND-3, KIND-5).
    ///
    /// Errors: `BATCH_TOO_LARGE` for no records, too many records or bytes; `RECORD_TOO_LARGE`; `RECORD_MALFORMED`,
    /// also if `count` is not the number of records or a payload is not one of its kind; `KIND_REFUSED` for a server-only kind; `KIND_UNKNOWN` for a
    /// critical kind that this version does not know.
    pub fn new(count: u64, records: Bytes) -> Result<Self, ProtocolError> {
        if count == 0 || count > MAX_BATCH_RECORDS as u64 || records.len() > MAX_BATCH_BYTES {
            return Err(ProtocolError::new(Code::BATCH_TOO_LARGE, "batch is empty or exceeds its limits"));
        }
        let malformed = |error: ProtocolError| ProtocolError::new(Code::RECORD_MALFORMED, error.detail);
        let mut r = Reader::new(&records);
        let (mut seen, mut max_stream, mut plain, mut early) = (0, 0, true, false);
        while !r.is_empty() {
            let start = r.clone();
            let len = r.varint().map_err(malformed)?;
            if len > MAX_RECORD as u64 {
                return Err(ProtocolError::new(Code::RECORD_TOO_LARGE, "record exceeds its limit"));
            }
            let end = r.position() + len as usize;
            let mut inner = r.clone();
            r.skip(len as usize).map_err(malformed)?;
            let head = Head::get(&mut inner).map_err(malformed)?;
            head.skip_to_payload(&mut inner).map_err(malformed)?;
            if inner.position() > end {
                return Err(ProtocolError::new(Code::RECORD_MALFORMED, "record fields exceed the record"));
            }
            head.kind.check_sendable()?;
            if !head.kind.is_plain() {
                plain = false;
                early |= head.kind.is_early();
                let mut whole = start;
                Deed::of(&Record::get(&mut whole)?)?;
            }
            // Whether it may do so depends on who holds the run.
            plain &= head.flags & HAS_RUN == 0;
            max_stream = max_stream.max(head.stream);
            seen += 1;
        }
        if seen != count {
            return Err(ProtocolError::new(Code::RECORD_MALFORMED, "count is not the number of records"));
        }
        Ok(Self { count, records, max_stream, plain, early })
    }

    /// Records of the batch.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Bytes of the record region.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Never true: an empty batch is refused.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }
}

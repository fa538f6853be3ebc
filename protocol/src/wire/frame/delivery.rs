//! DELIVERY: records of a covered interval (spec SUB-7).

use bytes::Bytes;

use crate::error::ProtocolError;
use crate::session::Author;
use crate::wire::{Body, Params, Reader, Writer};

/// Consecutive records of one author and one time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Seqs between the end of the span before (or the start of the interval) and this span that the filter left out.
    pub skip: u64,
    /// Records of the span, at least 1.
    pub count: u64,
    /// Index into the authors.
    pub author: u64,
    /// Milliseconds after the base time at which the records were accepted.
    pub time: u64,
}

impl Span {
    /// The seqs of the records that `spans` list, each with its span; the first span is counted from `from` on.
    pub fn seqs(from: u64, spans: impl Iterator<Item = Self>) -> impl Iterator<Item = (u64, Self)> {
        let mut next = from;
        spans.flat_map(move |span| {
            let first = next.saturating_add(span.skip);
            next = first.saturating_add(span.count);
            (first..next).map(move |seq| (seq, span))
        })
    }
}

/// Every record with `from <= seq < to` that passes the filter. What the interval does not list, the filter left out.
///
/// The bytes are the same for every subscriber of the same interval and filter, so that a server encodes them once.
#[derive(Clone, PartialEq, Eq)]
pub struct Delivery {
    /// First seq covered.
    pub from: u64,
    /// First seq not covered.
    pub to: u64,
    /// Base of the spans' times, in milliseconds since the Unix epoch.
    pub base_time: u64,
    /// Authors that the spans name.
    pub authors: Vec<Author>,
    /// Who wrote which records when.
    pub spans: Vec<Span>,
    /// The records, each as `length | record bytes`.
    pub records: Bytes,
}

crate::kept::keeps!(Delivery, from to base_time authors spans, keeps records);

/// Fewest bytes that an author takes: two lengths, one character, the instance.
const MIN_AUTHOR: usize = 18;
/// Fewest bytes that a span takes.
const MIN_RUN: usize = 4;

impl Body for Delivery {
    const KIND: u64 = 0x36;

    fn put(&self, w: &mut Writer) {
        self.put_head(w);
        w.bytes(&self.records);
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let (from, to) = (r.varint()?, r.varint()?);
        if from > to {
            return Err(ProtocolError::malformed("covered interval is not ordered"));
        }
        let base_time = r.varint()?;
        let count = r.count(r.remaining() / MIN_AUTHOR)?;
        let authors = (0..count).map(|_| Author::get(r)).collect::<Result<Vec<_>, _>>()?;
        let count = r.count(r.remaining() / MIN_RUN)?;
        let mut spans = Vec::with_capacity(count);
        let mut at = from;
        for _ in 0..count {
            let span = Span { skip: r.varint()?, count: r.varint()?, author: r.varint()?, time: r.varint()? };
            if span.count == 0 {
                return Err(ProtocolError::malformed("span of no record"));
            }
            if span.author >= authors.len() as u64 {
                return Err(ProtocolError::malformed("span names an author that is not listed"));
            }
            at = at.saturating_add(span.skip).saturating_add(span.count);
            if at > to {
                return Err(ProtocolError::malformed("spans exceed the covered interval"));
            }
            spans.push(span);
        }
        let records = r.bytes(usize::MAX)?;
        Params::get_none(r)?;
        Ok(Self { from, to, base_time, authors, spans, records })
    }
}

impl Delivery {
    /// Appends everything before the records' length to `w`.
    pub(crate) fn put_head(&self, w: &mut Writer) {
        w.varint(self.from);
        w.varint(self.to);
        w.varint(self.base_time);
        w.varint(self.authors.len() as u64);
        self.authors.iter().for_each(|author| author.put(w));
        w.varint(self.spans.len() as u64);
        for span in &self.spans {
            w.varint(span.skip);
            w.varint(span.count);
            w.varint(span.author);
            w.varint(span.time);
        }
    }
}

//! SUBSCRIBE: asks for records from a position on (spec SUB-1).

use bytes::Bytes;

use crate::error::{Code, ProtocolError};
use crate::registry::{MAX_FILTER, MAX_WINDOW, subscribe};
use crate::wire::{Body, Label, Params, Reader, Writer};

/// Where a subscription starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// The first record that can be read.
    Earliest,
    /// The tail: only records that are not durable yet.
    Latest,
    /// The record with this seq.
    Seq(u64),
    /// The view at the tail, then the records after it.
    Snapshot,
    /// The last so many records.
    Last(u64),
}

/// Sent on an attachment. Answered on a QUIC stream that the server opens, whose first frame is SUBSCRIBED, or by
/// ERROR about SUBSCRIBE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscribe {
    /// Chosen by the client, never used before on this connection.
    pub id: u64,
    /// Where to start.
    pub start: Start,
    /// Streams to deliver; empty means all.
    pub streams: Vec<Label>,
    /// Record kinds to deliver; empty means all.
    pub kinds: Vec<u64>,
    /// Roll parts of messages up, in deliveries at least so many milliseconds apart, at most 500.
    pub window: Option<u64>,
    /// Where much waits for it, the view comes in its place (spec SUB-14); not with a filter.
    pub folded: bool,
}

impl Body for Subscribe {
    const KIND: u64 = 0x22;

    fn put(&self, w: &mut Writer) {
        w.varint(self.id);
        let (tag, value) = match self.start {
            Start::Earliest => (0, 0),
            Start::Latest => (1, 0),
            Start::Seq(seq) => (2, seq),
            Start::Snapshot => (3, 0),
            Start::Last(count) => (4, count),
        };
        w.varint(tag);
        w.varint(value);
        let mut params = Params::default();
        if !self.streams.is_empty() {
            let mut value = Writer::new();
            self.streams.iter().for_each(|stream| stream.put(&mut value));
            params.insert(subscribe::STREAMS, value.freeze());
        }
        if !self.kinds.is_empty() {
            let mut value = Writer::new();
            self.kinds.iter().for_each(|kind| value.varint(*kind));
            params.insert(subscribe::KINDS, value.freeze());
        }
        if let Some(window) = self.window {
            params.insert_varint(subscribe::WINDOW, window);
        }
        if self.folded {
            params.insert(subscribe::FOLDED, Bytes::new());
        }
        params.put(w);
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let id = r.varint()?;
        let start = match (r.varint()?, r.varint()?) {
            (0, 0) => Start::Earliest,
            (1, 0) => Start::Latest,
            (2, seq) => Start::Seq(seq),
            (3, 0) => Start::Snapshot,
            (4, count) => Start::Last(count),
            _ => return Err(ProtocolError::malformed("start is not known")),
        };
        let mut params = Params::get(r)?;
        let streams = list(params.remove(subscribe::STREAMS), Label::get)?;
        let kinds = list(params.remove(subscribe::KINDS), |r| r.varint())?;
        if streams.len() + kinds.len() > MAX_FILTER {
            return Err(ProtocolError::new(Code::LIMIT_EXCEEDED, "filter has too many entries"));
        }
        let window = params.remove_varint(subscribe::WINDOW)?;
        if window.is_some_and(|window| window > MAX_WINDOW) {
            return Err(ProtocolError::new(Code::LIMIT_EXCEEDED, "window of a roll-up is too long"));
        }
        let folded = match params.remove(subscribe::FOLDED) {
            Some(value) if !value.is_empty() => return Err(ProtocolError::malformed("folded has a value")),
            Some(_) if !streams.is_empty() || !kinds.is_empty() => {
                return Err(ProtocolError::malformed("a subscription with a filter cannot be folded"));
            }
            folded => folded.is_some(),
        };
        params.finish()?;
        Ok(Self { id, start, streams, kinds, window, folded })
    }
}

/// A parameter that is a list without a count. An empty one has no encoding.
fn list<T>(
    value: Option<Bytes>,
    get: impl Fn(&mut Reader<'_>) -> Result<T, ProtocolError>,
) -> Result<Vec<T>, ProtocolError> {
    let Some(value) = value else { return Ok(Vec::new()) };
    let mut r = Reader::new(&value);
    let mut list = Vec::new();
    while !r.is_empty() {
        if list.len() == MAX_FILTER {
            return Err(ProtocolError::new(Code::LIMIT_EXCEEDED, "filter has too many entries"));
        }
        list.push(get(&mut r)?);
    }
    if list.is_empty() {
        return Err(ProtocolError::malformed("filter parameter is empty"));
    }
    Ok(list)
}

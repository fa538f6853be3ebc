//! Roll-up: the parts of messages in one delivery put together, and of what members do only the newest (spec SUB-13).

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::chunk::Chunk;
use super::feed::Filter;
use super::kinds::Kind;
use super::record::{Head, Record, Records};
use super::state::Streams;
use super::words::{Author, MessageId};
use crate::error::ProtocolError;
use crate::registry::MAX_RECORD;
use crate::wire::{Delivery, Reader, Span, Writer};

/// A record that is delivered, at its seq.
struct Item {
    seq: u64,
    time: u64,
    author: usize,
    what: What,
}

enum What {
    /// As it is.
    Whole(Bytes),
    /// Parts of a message that came one after the other.
    Parts { record: Record, payload: Vec<u8> },
    /// It is in a later one.
    Gone,
}

/// The delivery of the seqs `from..` up to the end of the last of `chunks`, which follow each other and hold `from`, with
/// the parts of each message put together where no other record of it is between them, and the newest update of each member.
///
/// Errors: those of record decoding; stored chunks that were checked have none.
pub(super) fn roll_up(
    from: u64,
    chunks: &[Arc<Chunk>],
    filter: &Filter,
    streams: &Streams,
) -> Result<Delivery, ProtocolError> {
    let mut items: Vec<Item> = Vec::new();
    let mut authors: Vec<Arc<Author>> = Vec::new();
    // Where the parts of a message gather that may grow.
    let mut gathering: HashMap<MessageId, usize> = HashMap::new();
    // What members did last.
    let mut doing: HashMap<usize, usize> = HashMap::new();
    let mut base_time = u64::MAX;
    for chunk in chunks {
        let header = chunk.header();
        base_time = base_time.min(header.base_time);
        let mut walk = Records::new(chunk.region());
        for (seq, span) in Span::seqs(chunk.first(), header.spans()) {
            let bytes = walk.next_bytes().ok_or(ProtocolError::malformed("records do not add up"))??;
            if seq < from || !filter.passes(&Head::get(&mut Reader::new(&bytes))?, streams) {
                continue;
            }
            let author = chunk.author(span.author);
            let known = authors.iter().rposition(|known| Arc::ptr_eq(known, author) || known == author);
            let author = known.unwrap_or_else(|| {
                authors.push(author.clone());
                authors.len() - 1
            });
            let mut item = Item { seq, time: header.base_time + span.time, author, what: What::Gone };
            let kind = Head::get(&mut Reader::new(&bytes))?.kind;
            if kind == Kind::PRESENCE_UPDATED {
                if Record::parse(&bytes)?.headers.is_empty()
                    && let Some(before) = doing.insert(author, items.len()).and_then(|at| items.get_mut(at))
                {
                    before.what = What::Gone;
                }
                item.what = What::Whole(bytes);
                items.push(item);
                continue;
            }
            if !matches!(kind, Kind::MESSAGE_APPEND | Kind::MESSAGE_REPLACE | Kind::MESSAGE_END) {
                item.what = What::Whole(bytes);
                items.push(item);
                continue;
            }
            let record = Record::parse(&bytes)?;
            let before = record.message.and_then(|id| gathering.remove(&id)).and_then(|at| items.get_mut(at));
            if kind != Kind::MESSAGE_APPEND || !record.headers.is_empty() {
                item.what = What::Whole(bytes);
                items.push(item);
                continue;
            }
            let mut payload = Vec::new();
            if let Some(Item { author: by, what: what @ What::Parts { .. }, .. }) = before
                && *by == author
                && let What::Parts { record: first, payload: gathered } = &*what
                && (first.stream, first.run) == (record.stream, record.run)
                && gathered.len() + bytes.len() <= MAX_RECORD
                && let What::Parts { payload: gathered, .. } = core::mem::replace(what, What::Gone)
            {
                payload = gathered;
            }
            payload.extend_from_slice(&record.payload);
            if let Some(id) = record.message {
                gathering.insert(id, items.len());
            }
            item.what = What::Parts { record: Record { payload: Bytes::new(), ..record }, payload };
            items.push(item);
        }
    }
    let to = chunks.last().map_or(from, |chunk| chunk.end());
    let base_time = if base_time == u64::MAX { 0 } else { base_time };
    let (mut spans, mut records): (Vec<Span>, _) = (Vec::new(), Writer::new());
    let (mut next, mut last_time) = (from, None);
    for Item { seq, time, author, what } in items {
        match what {
            What::Gone => continue,
            What::Whole(bytes) => records.bytes(&bytes),
            What::Parts { record, payload } => Record { payload: payload.into(), ..record }.put(&mut records),
        }
        match spans.last_mut() {
            Some(span) if next == seq && span.author == author as u64 && last_time == Some(time) => span.count += 1,
            _ => spans.push(Span { skip: seq - next, count: 1, author: author as u64, time: time - base_time }),
        }
        (next, last_time) = (seq + 1, Some(time));
    }
    let authors = authors.iter().map(|author| (**author).clone()).collect();
    Ok(Delivery { from, to, base_time, authors, spans, records: records.freeze() })
}

//! One subscription on the server: which bytes a subscriber gets next (spec SUB).
//!
//! A feed is a cursor and a filter. It splices history and live without gap or duplicate by construction: it only ever
//! takes the chunk that holds its next seq, wherever that comes from, and advances by what it took.

use std::sync::Arc;

use bytes::Bytes;

use super::chunk::{Chunk, frame};
use super::record::{Head, Records};
use super::rollup::roll_up;
use super::state::{StreamSet, Streams};
use super::words::Verdict;
use crate::error::ProtocolError;
use crate::planted::{Bug, planted};
use crate::registry::GAP_TRIMMED;
use crate::wire::{
    Compacted, Delivery, Frame, Gap, Label, Reader, Span, Start, Stream, Subscribe, Subscribed, Tail, Writer,
};

/// Which records a subscription wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Names of streams; empty for all. A name may be defined later.
    pub streams: Vec<Label>,
    /// Record kinds; empty for all.
    pub kinds: Vec<u64>,
}

impl Filter {
    /// True if every record passes.
    pub fn is_open(&self) -> bool {
        self.streams.is_empty() && self.kinds.is_empty()
    }

    pub(super) fn passes(&self, head: &Head, streams: &Streams) -> bool {
        let name = || streams.name(head.stream);
        let kinds = if planted(Bug::FirstKindAlone) { self.kinds.get(..1).unwrap_or_default() } else { &self.kinds };
        (kinds.is_empty() || kinds.contains(&head.kind.0) || planted(Bug::KindsIgnored))
            && (self.streams.is_empty() || name().is_some_and(|name| self.streams.contains(name)))
    }
}

/// Bytes of chunks that are rolled up into one delivery, unless one alone has more: what comes of them fits into a frame.
const ROLLED_UP: usize = 256 * 1024;

/// Where the next records of a feed are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: the feed has everything that is durable.
    AtTail,
    /// In the chunks kept in memory.
    Memory,
    /// In the store.
    Store,
    /// Released: the first seq that can be read is given.
    Trimmed(u64),
}

/// A cursor and a filter: decides which bytes a subscriber gets next, and never leaves out or repeats one.
#[derive(Debug)]
pub struct Feed {
    id: u64,
    next: u64,
    filter: Filter,
    /// Parts of messages are put together.
    rolled_up: bool,
    /// Stream ids whose names the subscriber was told.
    announced: StreamSet,
    /// The highest tail that the subscriber was told or can infer.
    known_tail: u64,
    /// The subscriber knows that records were put together.
    knows_compacted: bool,
}

/// Where a feed stood, to go back to.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    next: u64,
    announced: StreamSet,
    known_tail: u64,
    knows_compacted: bool,
}

impl Feed {
    /// Where the feed stands.
    pub fn mark(&self) -> Mark {
        let Self { next, announced, known_tail, knows_compacted, .. } = *self;
        Mark { next, announced, known_tail, knows_compacted }
    }

    /// Goes back to where it stood: the frames since then were thrown away, and will be made again.
    pub fn rewind(&mut self, mark: Mark) {
        Mark {
            next: self.next,
            announced: self.announced,
            known_tail: self.known_tail,
            knows_compacted: self.knows_compacted,
        } = mark;
    }

    /// Starts a subscription on a session whose readable records are `first..tail`, of which those below `compacted` may have been put
    /// together. Returns the feed and its verdict: `snapshot` if it starts with the view, else what became of the position.
    ///
    /// A position beyond the tail is `exact`: it waits for its seq (spec SUB-2).
    pub fn new(request: Subscribe, (first, compacted): (u64, u64), tail: u64) -> (Self, Verdict) {
        let next = match request.start {
            Start::Earliest => first,
            Start::Latest | Start::Snapshot => tail,
            Start::Seq(seq) => seq + u64::from(planted(Bug::ResumeOffByOne)),
            Start::Last(count) => tail.saturating_sub(count).max(first),
        };
        let verdict = match request.start {
            Start::Snapshot => Verdict::Snapshot,
            Start::Seq(seq) => Verdict::of(seq, first, compacted),
            _ => Verdict::Exact,
        };
        let filter = Filter { streams: request.streams, kinds: request.kinds };
        let rolled_up = request.window.is_some();
        let (announced, known_tail) = (StreamSet::default(), tail);
        let feed = Self { id: request.id, next, filter, rolled_up, announced, known_tail, knows_compacted: false };
        (feed, verdict)
    }

    /// The subscription's id.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// The next seq that the feed will cover.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// The SUBSCRIBED frame that opens the feed's QUIC stream.
    pub fn subscribed(&self, verdict: Verdict, tail: u64) -> Frame {
        let tail = if planted(Bug::CaughtUpTooEarly) { self.next } else { tail };
        Subscribed { id: self.id, verdict, next: self.next, tail }.into()
    }

    /// Goes on at `next`, where the view that is sent ends (spec SUB-14).
    pub fn jump(&mut self, next: u64) {
        self.next = self.next.max(next);
    }

    /// Where to look for the next records: those with seq `memory..tail` are in memory, those with `first..tail` in the
    /// store.
    pub fn place(&self, first: u64, memory: u64, tail: u64) -> Place {
        if self.next < first {
            Place::Trimmed(first)
        } else if self.next >= tail {
            Place::AtTail
        } else if self.next >= memory {
            Place::Memory
        } else {
            Place::Store
        }
    }

    /// Skips what was trimmed. Appends a GAP frame to `out`.
    pub fn skip_trimmed(&mut self, first: u64, out: &mut Vec<Bytes>) {
        if self.next < first && planted(Bug::SwallowedGap) {
            self.next = first;
        }
        if self.next < first {
            out.push(Frame::from(Gap { from: self.next, to: first, reason: GAP_TRIMMED }).to_bytes());
            self.next = first;
        }
    }

    /// Tells the subscriber the tail, if it is not the end of what it was told and it does not follow from the deliveries.
    pub fn announce_tail(&mut self, tail: u64, out: &mut Vec<Bytes>) {
        if tail > self.known_tail.max(self.next) {
            self.known_tail = tail;
            out.push(Frame::from(Tail { tail }).to_bytes());
        }
    }

    /// Appends the frames for what `chunk` holds from the feed's next seq on, and advances. Does nothing if the chunk does
    /// not hold it.
    ///
    /// Errors: those of record decoding; a stored chunk that was checked has none.
    pub fn deliver(&mut self, chunk: &Chunk, streams: &Streams, out: &mut Vec<Bytes>) -> Result<(), ProtocolError> {
        if self.next < chunk.first() || self.next >= chunk.end() {
            return Ok(());
        }
        self.announce(chunk, streams, out);
        if self.filter.is_open() && self.next == chunk.first() {
            out.extend_from_slice(chunk.frame());
        } else {
            out.extend(frame(&self.select(chunk, streams)?, 0));
        }
        self.next = chunk.end();
        Ok(())
    }

    /// The same for chunks that follow each other: one by one, or rolled up in deliveries that each fit into a frame.
    ///
    /// Errors: as [`Feed::deliver`].
    pub fn deliver_all(
        &mut self,
        chunks: &[Arc<Chunk>],
        streams: &Streams,
        out: &mut Vec<Bytes>,
    ) -> Result<(), ProtocolError> {
        if !self.rolled_up {
            return chunks.iter().try_for_each(|chunk| self.deliver(chunk, streams, out));
        }
        let mut rest = &chunks[chunks.partition_point(|chunk| chunk.end() <= self.next)..];
        while let Some(first) = rest.first() {
            if first.first() > self.next {
                return Ok(());
            }
            let mut bytes = first.bytes().len();
            let more = rest[1..].iter().take_while(|chunk| {
                bytes += chunk.bytes().len();
                bytes <= ROLLED_UP
            });
            let (together, later) = rest.split_at(1 + more.count());
            together.iter().for_each(|chunk| self.announce(chunk, streams, out));
            let delivery = roll_up(self.next, together, &self.filter, streams)?;
            self.next = delivery.to;
            out.extend(frame(&delivery, 0));
            rest = later;
        }
        Ok(())
    }

    /// The delivery of the records from the feed's next seq on that pass its filter.
    fn select(&self, chunk: &Chunk, streams: &Streams) -> Result<Delivery, ProtocolError> {
        let whole = chunk.delivery();
        let mut spans: Vec<Span> = Vec::new();
        let mut records = Writer::new();
        let mut walk = Records::new(chunk.region());
        let (mut seq, mut skip) = (chunk.first(), 0);
        for span in &whole.spans {
            let mut joins = false;
            // What was put together, as far as it is ahead.
            skip += (seq + span.skip).saturating_sub(seq.max(self.next));
            seq += span.skip;
            for _ in 0..span.count {
                let record = walk.next_bytes().ok_or(ProtocolError::malformed("records do not add up"))??;
                let missed = planted(Bug::CatchUpOffByOne) && seq == self.next && seq > chunk.first();
                let wanted = seq >= self.next && !missed && {
                    let head = Head::get(&mut Reader::new(&record))?;
                    self.filter.passes(&head, streams)
                };
                if wanted {
                    records.bytes(&record);
                    match spans.last_mut() {
                        Some(last) if joins && skip == 0 => last.count += 1,
                        _ => spans.push(Span { skip, count: 1, ..*span }),
                    }
                    (skip, joins) = (0, true);
                } else if seq >= self.next {
                    skip += 1;
                }
                seq += 1;
            }
        }
        Ok(Delivery { from: self.next, spans, records: records.freeze(), ..whole })
    }

    /// Names come before the first record that needs them (spec SUB-11), and that records were put together before the first (spec
    /// SUB-15).
    fn announce(&mut self, chunk: &Chunk, streams: &Streams, out: &mut Vec<Bytes>) {
        let touched = || chunk.header().whole_from().is_some_and(|whole| whole >= self.next.max(chunk.first()));
        if !self.knows_compacted && touched() {
            self.knows_compacted = true;
            out.push(Frame::from(Compacted {}).to_bytes());
        }
        if self.announced.covers(chunk.streams()) {
            return;
        }
        for id in self.announced.extend(chunk.streams()) {
            if let Some(name) = streams.name(id) {
                out.push(Frame::from(Stream { id, name: name.clone() }).to_bytes());
            }
        }
    }
}

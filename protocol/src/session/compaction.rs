//! Compaction: the parts of finished messages put together in storage (spec COMPACT).
//!
//! [`Compaction`] says what a pass is about. A [`Survey`] reads the chunks of a range, in order, and ends in a [`Plan`]: which parts go, which one holds the whole text in
//! their place, and which chunks become one. Every such part says all that the message is up to there, so that it means the same
//! to a reader who had some of the parts before. So that nobody ever reads less, the steps of a plan are done from the last to the
//! first: the whole text is there before a part goes.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;

use super::chunk::{Chunk, ChunkCount, ChunkHeader, ChunkPosition, ChunkProducer, Compacted, Control};
use super::kinds::Kind;
use super::record::{Head, Record, Records};
use super::state::State;
use super::view::View;
use super::words::{Author, MessageId, RunId};
use crate::error::ProtocolError;
use crate::planted::{Bug, planted};
use crate::registry::{INDEXED_MESSAGES, MAX_BATCH_BYTES, MAX_RECORD, PRODUCER_WINDOW, TURN_BYTES};
use crate::wire::{Reader, Span, Subject, Writer};

/// The longest text that takes the place of parts: its record is within `max_record` with ids and length.
const LONGEST_TEXT: usize = MAX_RECORD - 64;
/// Chunks that become one in a step: what a store has to read and remove at once.
const STEP_CHUNKS: usize = 256;
/// A chunk in which nothing goes is put together with others if it is no longer than that: a header more or less.
const SMALL: usize = 1024;
/// A message that is finished so many records behind its start or sooner has one part: there is nothing to be put together.
const ONE_PART: u64 = 2;
/// What a part costs beside its payload, at least: its head, its length and its batch.
const PART_OVERHEAD: usize = 16;

/// How far the compaction of a session has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Compaction {
    /// Records below this seq may have been put together. Never goes back (spec COMPACT-5).
    pub before: u64,
    /// The seq where the next pass begins, unless it knows better.
    pub next: u64,
    /// Messages that were finished below this seq were looked at.
    pub looked: u64,
}

impl Compaction {
    /// Where messages of several parts begin and end that were finished at `seq` or later and that no pass looked at, as far as the
    /// view knows them, the newest first. One that began before what passes begin with stays as it is.
    pub fn wanted(&self, view: &View, seq: u64) -> impl Iterator<Item = (u64, u64)> {
        let Self { next, looked, .. } = *self;
        let kept = view.messages().finished().rev().map(|message| (message.start, message.through));
        let known = kept.chain(view.messages().index().rev().map(|message| (message.start, message.through)));
        let late = known.take_while(move |(_, through)| *through >= looked.max(seq));
        late.filter(move |(start, through)| *start >= next && through - start > ONE_PART)
    }

    /// The seq where a pass has to begin: with the first message that it may be about, finished or not. What was written before is
    /// not read in vain, where the view knows all that was finished since the last pass.
    pub fn begin(&self, view: &View) -> u64 {
        let messages = view.messages();
        let oldest = messages.index().next().filter(|_| messages.index().count() == INDEXED_MESSAGES);
        let open = messages.open().iter().map(|message| message.start).filter(|start| *start >= self.next);
        let first = self.wanted(view, 0).map(|(start, _)| start).chain(open).min();
        first.filter(|_| oldest.is_none_or(|message| message.through < self.looked)).unwrap_or(self.next)
    }

    /// After a pass from `begin` to `end` did all of `plan`, which is of a range that was `cut`, or not. A message that is open over more
    /// than a pass is left as it is.
    pub fn passed(&mut self, (begin, end): (u64, u64), plan: &Plan, cut: bool) {
        self.next = if cut && plan.next <= begin { end } else { plan.next };
        self.looked = end;
    }
}

/// Where a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChunkStart {
    /// Seq of its first record.
    pub first: u64,
    /// Its number.
    pub number: u64,
}

/// What is known of the chunks of a range, read in order. Holds the texts of the messages in it.
#[derive(Debug, Clone)]
pub struct Survey {
    /// Messages that are not finished behind the range.
    open: HashSet<MessageId>,
    /// Where the finished ones that are known ended: no part of them is behind that.
    ended: HashMap<MessageId, u64>,
    /// Producers were evicted at some time: which one is depends on every use.
    evicted: bool,
    sources: Vec<Source>,
    growing: HashMap<MessageId, Growing>,
    planned: Vec<(MessageId, Planned)>,
}

/// A chunk of the range.
#[derive(Debug, Clone)]
struct Source {
    start: ChunkStart,
    next_number: u64,
    writer_epoch: u64,
    len: usize,
    /// It has control entries, whose order among the batches of other chunks must not change.
    has_controls: bool,
    is_compacted: bool,
    /// It was read with the one before.
    joins: bool,
}

/// A message that began in the range.
#[derive(Debug, Clone)]
struct Growing {
    /// Index of the chunk with its start.
    source: usize,
    text: Vec<u8>,
    group: Option<Group>,
    /// Its text is longer than a record.
    is_full: bool,
}

/// Parts that one author wrote one after the other.
#[derive(Debug, Clone)]
struct Group {
    by: Writing,
    first: u64,
    last: u64,
    parts: usize,
    /// Bytes of their payloads.
    bytes: usize,
    /// Bytes of their records, by index of their chunk.
    records: Vec<(usize, usize)>,
}

/// What parts must agree in to be put together.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Writing {
    author: Arc<Author>,
    stream: u64,
    run: Option<RunId>,
}

/// Parts with seqs `first..last`, which go, and the one at `last`, which holds the text.
#[derive(Clone)]
struct Planned {
    first: u64,
    last: u64,
    text: Bytes,
    records: Vec<(usize, usize)>,
}

crate::kept::keeps!(Planned, first last records, keeps text);

/// What is put together, and how.
#[derive(Debug)]
pub struct Plan {
    groups: HashMap<MessageId, Vec<Planned>>,
    evicted: bool,
    steps: Vec<PlanStep>,
    is_cut: bool,
    before: u64,
    next: u64,
}

/// Chunks that become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanStep {
    /// The first of them.
    pub start: ChunkStart,
    /// Number of the chunk behind the last of them.
    pub next_number: u64,
}

impl Survey {
    /// Of a range that ends where `state` is, or before.
    pub fn new(state: &State) -> Self {
        let messages = state.view().messages();
        let indexed = messages.index().map(|of| (of.id, of.through));
        Self {
            open: messages.open().iter().map(|message| message.id).collect(),
            ended: messages.finished().map(|of| (of.id, of.through)).chain(indexed).collect(),
            evicted: state.producers.have_evicted(),
            sources: Vec::new(),
            growing: HashMap::new(),
            planned: Vec::new(),
        }
    }

    /// Reads the next chunk, which the store returned in one page with the one before if it `joins` it: what is put together must be
    /// of one page.
    ///
    /// Errors: those of record decoding; stored chunks that were checked have none.
    pub fn read(&mut self, chunk: &Chunk, joins: bool) -> Result<(), ProtocolError> {
        let header = chunk.header();
        self.sources.push(Source {
            start: ChunkStart { first: header.first, number: header.number },
            next_number: header.next_number(),
            writer_epoch: header.writer_epoch,
            len: chunk.bytes().len(),
            has_controls: !header.controls.is_empty(),
            is_compacted: header.compacted.is_some(),
            joins,
        });
        let mut walk = Records::new(chunk.region());
        for (seq, span) in Span::seqs(header.first, header.spans()) {
            let bytes = walk.next_bytes().ok_or(NOT_WHOLE)??;
            let kind = Head::get(&mut Reader::new(&bytes))?.kind;
            match kind {
                Kind::MESSAGE_START | Kind::MESSAGE_APPEND | Kind::MESSAGE_REPLACE | Kind::MESSAGE_END => {
                    self.message(seq, chunk.author(span.author), &bytes)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn message(&mut self, seq: u64, author: &Arc<Author>, bytes: &Bytes) -> Result<(), ProtocolError> {
        let record = Record::parse(bytes)?;
        let Some(id) = record.message else { return Ok(()) };
        let source = self.sources.len() - 1;
        if matches!(record.kind, Kind::MESSAGE_START | Kind::MESSAGE_END) {
            // An id may be used again once nobody knows it any more.
            let before = self.growing.remove(&id).and_then(Growing::finish);
            self.planned.extend(before.map(|planned| (id, planned)));
            if record.kind == Kind::MESSAGE_START {
                self.growing.insert(id, Growing { source, text: Vec::new(), group: None, is_full: false });
            }
            return Ok(());
        }
        let Some(message) = self.growing.get_mut(&id).filter(|message| !message.is_full) else { return Ok(()) };
        let keep = if record.kind == Kind::MESSAGE_REPLACE { 0 } else { message.text.len() };
        let by = Writing { author: author.clone(), stream: record.stream, run: record.run };
        let joins = record.headers.is_empty() && message.group.as_ref().is_none_or(|group| group.by == by);
        let fits = keep + record.payload.len() <= LONGEST_TEXT;
        if !joins || !fits {
            let text = &message.text;
            let done = message.group.take().filter(|group| group.pays(text.len()));
            let done = done.map(|group| group.plan(Bytes::copy_from_slice(text)));
            self.planned.extend(done.map(|planned| (id, planned)));
        }
        message.is_full = !fits;
        message.text.truncate(keep);
        message.text.extend_from_slice(&record.payload);
        if !fits || !record.headers.is_empty() {
            return Ok(());
        }
        let group =
            message.group.get_or_insert(Group { by, first: seq, last: seq, parts: 0, bytes: 0, records: Vec::new() });
        group.last = seq;
        group.parts += 1;
        group.bytes += record.payload.len();
        match group.records.last_mut().filter(|(at, _)| *at == source) {
            Some((_, len)) => *len += bytes.len(),
            None => group.records.push((source, bytes.len())),
        }
        Ok(())
    }

    /// What to do. `end` is the seq where the range ends.
    pub fn plan(mut self, end: u64) -> Plan {
        let mut next = end;
        for (id, message) in self.growing {
            let start = self.sources[message.source].start.first;
            if self.open.contains(&id) || self.ended.get(&id).is_some_and(|through| *through >= end) {
                next = next.min(start);
            }
            if !self.open.contains(&id)
                && let Some(planned) = message.finish()
            {
                self.planned.push((id, planned));
            }
        }
        // In the order of the log, so that the same chunks make the same plan.
        self.planned.sort_unstable_by_key(|(_, planned)| planned.last);
        let mut sizes: Vec<usize> = self.sources.iter().map(|source| source.len).collect();
        let mut touched = vec![false; sizes.len()];
        let mut groups: HashMap<MessageId, Vec<Planned>> = HashMap::new();
        let mut before = 0;
        for (id, planned) in self.planned {
            let Some((last, _)) = planned.records.last() else { continue };
            // A chunk with many texts must not become longer than a frame.
            let is_over =
                self.ended.get(&id).is_some_and(|through| *through < planned.last && planned.first <= *through);
            if self.open.contains(&id) || is_over || sizes[*last] + planned.text.len() > MAX_BATCH_BYTES {
                continue;
            }
            for (at, len) in &planned.records {
                sizes[*at] = sizes[*at].saturating_sub(*len);
                touched[*at] = true;
            }
            sizes[*last] += planned.text.len() + 64;
            before = before.max(planned.last + 1);
            groups.entry(id).or_default().push(planned);
        }
        let (steps, is_cut) = steps(&self.sources, &sizes, &touched);
        Plan { groups, evicted: self.evicted, steps, is_cut, before, next }
    }
}

/// Which chunks become one, in the order of the log, and whether one of the steps had to end because it is long.
fn steps(sources: &[Source], sizes: &[usize], touched: &[bool]) -> (Vec<PlanStep>, bool) {
    let (mut steps, mut is_cut) = (Vec::new(), false);
    let mut at = 0;
    while at < sources.len() {
        let first = &sources[at];
        let may_go_on = |at: usize| touched[at] || sources[at].is_compacted || sizes[at] <= SMALL;
        let (mut end, mut size) = (at + 1, sizes[at]);
        while end < sources.len() && end - at < STEP_CHUNKS && may_go_on(at) && !first.has_controls {
            let next = &sources[end];
            let fits = size + sizes[end] <= TURN_BYTES;
            if !fits || !next.joins || next.has_controls || next.writer_epoch != first.writer_epoch || !may_go_on(end) {
                break;
            }
            size += sizes[end];
            end += 1;
        }
        let compacted = sources[at..end].iter().filter(|source| source.is_compacted).count();
        if touched[at..end].contains(&true) || compacted > 1 {
            steps.push(PlanStep { start: first.start, next_number: sources[end - 1].next_number });
            is_cut |= end - at == STEP_CHUNKS;
        }
        at = end;
    }
    (steps, is_cut)
}

impl Growing {
    fn finish(self) -> Option<Planned> {
        let text = self.text;
        self.group.filter(|group| group.pays(text.len())).map(|group| group.plan(text.into()))
    }
}

impl Group {
    /// False where a text of so many bytes in its place would not be less: it is left as it is then.
    fn pays(&self, text: usize) -> bool {
        self.parts > 1 && text <= self.bytes + PART_OVERHEAD * (self.parts - 1)
    }

    fn plan(self, text: Bytes) -> Planned {
        Planned { first: self.first, last: self.last, text, records: self.records }
    }
}

impl Plan {
    /// True if there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// True if nothing more can be put together once this is done: no step was as long as steps may be.
    pub fn is_final(&self) -> bool {
        !self.is_cut
    }

    /// The first seq from which on every record stays; 0 if all do.
    pub fn before(&self) -> u64 {
        self.before
    }

    /// The seq where the next range begins: with the oldest message that is not finished, or behind this one.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// What is to be done, in this order: from the last to the first.
    pub fn steps(&self) -> impl Iterator<Item = PlanStep> {
        self.steps.iter().rev().copied()
    }

    /// The chunk that takes the place of these.
    ///
    /// Errors: the chunks are not all of the step, or do not decode.
    pub fn put_together(&self, step: PlanStep, chunks: &[Arc<Chunk>]) -> Result<Chunk, ProtocolError> {
        let (Some(first), Some(last)) = (chunks.first(), chunks.last()) else { return Err(NOT_WHOLE) };
        if first.header().number != step.start.number || last.header().next_number() != step.next_number {
            return Err(NOT_WHOLE);
        }
        let base_time = chunks.iter().map(|chunk| chunk.header().base_time).min().unwrap_or(0);
        let mut whole = Together { next: first.first(), ..Together::default() };
        let mut expected = (first.first(), first.header().number);
        for chunk in chunks {
            let header = chunk.header();
            if (header.first, header.number) != expected || header.base_time < base_time {
                return Err(NOT_WHOLE);
            }
            expected = (chunk.end(), header.next_number());
            whole.add(chunk, base_time, &self.groups)?;
        }
        let time = chunks.iter().map(|chunk| chunk.time()).max().unwrap_or(base_time) - base_time;
        let (of, controls) = (first.header(), whole.controls);
        let mut positions = whole.positions;
        if controls.is_empty() {
            forget(&mut positions, &whole.names, self.evicted);
        }
        let counts = whole.counts.into_iter().map(|(stream, (records, bytes))| ChunkCount { stream, records, bytes });
        let mut counts: Vec<ChunkCount> = counts.collect();
        counts.sort_unstable_by_key(|count| count.stream);
        let header = ChunkHeader {
            incarnation: of.incarnation,
            first: of.first,
            count: last.end() - of.first,
            number: of.number,
            writer_epoch: of.writer_epoch,
            base_time,
            link: of.link,
            chain: last.header().chain,
            controls,
            authors: whole.authors,
            producers: whole.producers,
            batches: Vec::new(),
            compacted: Some(Box::new(Compacted {
                chunks: last.header().next_number() - of.number,
                time,
                positions,
                counts,
                spans: whole.spans,
            })),
        };
        Chunk::new(header, whole.records.as_slice())
    }

    /// The text that stands at `seq` in the place of parts of message `id`, `Some(None)` if a part at `seq` goes.
    fn of(groups: &HashMap<MessageId, Vec<Planned>>, id: MessageId, seq: u64) -> Option<Option<&Bytes>> {
        // In the order of the log, as they were planned.
        let of = groups.get(&id)?;
        let group = of.get(of.partition_point(|group| group.last < seq)).filter(|group| group.first <= seq)?;
        Some((seq == group.last).then_some(&group.text))
    }
}

const NOT_WHOLE: ProtocolError = ProtocolError::malformed("chunks that are put together are not those of the step");

/// A chunk in the making.
#[derive(Debug, Default)]
struct Together {
    controls: Vec<Control>,
    authors: Vec<Arc<Author>>,
    producers: Vec<ChunkProducer>,
    /// The producers of `producers`, whatever their epoch: equal numbers are one producer.
    names: Vec<usize>,
    positions: Vec<ChunkPosition>,
    counts: HashMap<u64, (u64, u64)>,
    spans: Vec<Span>,
    /// Behind the last record that stays.
    next: u64,
    records: Writer,
}

impl Together {
    fn add(
        &mut self,
        chunk: &Chunk,
        base_time: u64,
        groups: &HashMap<MessageId, Vec<Planned>>,
    ) -> Result<(), ProtocolError> {
        let header = chunk.header();
        self.controls.extend(header.controls.iter().cloned());
        let producers: Vec<u64> = header.producers.iter().map(|of| self.producer(chunk, of)).collect();
        for (producer, sequence, acked) in header.positions() {
            let producer = producers[producer as usize];
            self.positions.push(ChunkPosition { producer, sequence, first: acked.first, count: acked.count });
        }
        for of in header.compacted.iter().flat_map(|compacted| &compacted.counts) {
            self.count(of.stream, of.records, of.bytes);
        }
        let mut walk = Records::new(chunk.region());
        for (seq, span) in Span::seqs(header.first, header.spans()) {
            let bytes = walk.next_bytes().ok_or(NOT_WHOLE)??;
            let record = Record::parse(&bytes)?;
            if header.compacted.is_none() {
                self.count(record.stream, 1, record.payload.len() as u64);
            }
            let is_part = matches!(record.kind, Kind::MESSAGE_APPEND | Kind::MESSAGE_REPLACE);
            match record.message.filter(|_| is_part).and_then(|id| Plan::of(groups, id, seq)) {
                None => self.records.bytes(&bytes),
                Some(None) => continue,
                Some(Some(text)) => {
                    let lost = if planted(Bug::CompactionLosesPart) { text.len().min(2) } else { 0 };
                    Record { kind: Kind::MESSAGE_REPLACE, payload: text.slice(lost..), ..record }
                        .put(&mut self.records);
                }
            }
            let (author, time) = (self.author(chunk.author(span.author)), header.base_time - base_time + span.time);
            match self.spans.last_mut() {
                Some(last) if self.next == seq && (last.author, last.time) == (author, time) => last.count += 1,
                _ => self.spans.push(Span { skip: seq - self.next, count: 1, author, time }),
            }
            self.next = seq + 1;
        }
        Ok(())
    }

    fn count(&mut self, stream: u64, records: u64, bytes: u64) {
        let counts = self.counts.entry(stream).or_default();
        (counts.0, counts.1) = (counts.0.saturating_add(records), counts.1.saturating_add(bytes));
    }

    fn author(&mut self, author: &Arc<Author>) -> u64 {
        let known = self.authors.iter().rposition(|known| Arc::ptr_eq(known, author) || known == author);
        known.unwrap_or_else(|| {
            self.authors.push(author.clone());
            self.authors.len() - 1
        }) as u64
    }

    fn producer(&mut self, chunk: &Chunk, of: &ChunkProducer) -> u64 {
        let author = self.author(chunk.author(of.author));
        let of = ChunkProducer { author, ..of.clone() };
        let subject = |at: u64| -> &Subject { &self.authors[at as usize].subject };
        let known = self.producers.iter().rposition(|known| *known == of);
        let same = |known: &ChunkProducer| known.name == of.name && subject(known.author) == subject(of.author);
        let name = self.producers.iter().position(same).unwrap_or(self.producers.len());
        known.unwrap_or_else(|| {
            self.producers.push(of);
            self.names.push(name);
            self.producers.len() - 1
        }) as u64
    }
}

/// Leaves out the batches that no producer may ask for any more: all but the last `producer_window` of each. Where producers were
/// evicted at some time, which one is depends on the order of all uses, and only what one did without another between is left out.
fn forget(positions: &mut Vec<ChunkPosition>, names: &[usize], evicted: bool) {
    let mut behind: HashMap<usize, usize> = HashMap::new();
    let mut last = None;
    let mut kept: Vec<bool> = Vec::with_capacity(positions.len());
    for position in positions.iter().rev() {
        let name = names[position.producer as usize];
        if evicted && last.replace(name) != Some(name) {
            behind.remove(&name);
        }
        let behind = behind.entry(name).or_default();
        *behind += 1;
        kept.push(*behind <= PRODUCER_WINDOW);
    }
    let mut kept = kept.into_iter().rev();
    positions.retain(|_| kept.next().unwrap_or(true));
}

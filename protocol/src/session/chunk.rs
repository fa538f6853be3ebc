//! The chunk: batches of one session that are committed together, with their control entries and producer positions, so
//! that they cannot part (spec CHUNK, CHUNK-6).
//!
//! ```text
//! chunk    = checksum u64 | version u8 | incarnation 16 | first | count | number | writer epoch | base time
//!          | link 8 | chain 32 | controls | authors | producers | batches | records
//! controls = n | (length | type varint | fields)*
//! authors  = n | (subject | instance 16)*
//! producers= n | (author index | name | epoch)*
//! batches  = n | (source | [sequence] | count | time delta)*       source = 2 * producer index, or 2 * author index + 1
//! records  = length | region
//! ```
//!
//! Chunks that compaction put together (spec CHUNK-8) have another version, and in the place of `batches`:
//!
//! ```text
//! chunks | time delta | positions | counts | spans
//! positions= n | (producer index | sequence | first seq - first | count)*
//! counts   = n | (stream | records | bytes)*
//! spans    = n | (skip | count | author index | time delta)*
//! ```
//!
//! Integers are varints where no width is given. The checksum is XXH3-64 of everything behind it, big-endian.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::chain::Chain;
use super::record::{CheckedBatch, Head, Record, Records};
use super::state::{Damage, StreamSet};
use super::words::{Author, ClientKey, Incarnation, SessionName};
use crate::error::{Code, ProtocolError};
use crate::registry::{CHUNK_VERSION, COMPACTED_VERSION, MAX_STREAMS, control, is_ignorable};
use crate::wire::{Acked, Body, Delivery, Label, Reader, Span, Subject, Writer};

/// A durable fact about a session that is not a record: it has no seq and is neither delivered nor folded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// The session was created.
    Created {
        /// Its name.
        name: SessionName,
        /// When, in milliseconds since the Unix epoch.
        time: u64,
    },
    /// A writer took over.
    Fence {
        /// Its writer epoch.
        epoch: u64,
    },
    /// A producer was granted an epoch.
    Producer {
        /// Subject that it belongs to.
        subject: Subject,
        /// Its name.
        name: Label,
        /// The epoch.
        epoch: u64,
    },
    /// A stream id was bound to a name.
    Stream {
        /// The id.
        id: u64,
        /// The name.
        name: Label,
    },
    /// Records below a seq were released.
    Trim {
        /// The first seq that can be read.
        first: u64,
    },
    /// An instance was bound to a client key, or used its resume token.
    Resume {
        /// The client.
        author: Author,
        /// Its key.
        key: ClientKey,
        /// Tokens that it has used.
        generation: u64,
    },
    /// An entry that this version does not know and may skip.
    Unknown {
        /// The whole entry.
        entry: Bytes,
    },
}

impl Control {
    /// The entry's encoding, as chained.
    pub fn encode(&self) -> Bytes {
        let mut w = Writer::new();
        match self {
            Self::Created { name, time } => {
                w.varint(control::CREATED);
                name.put(&mut w);
                w.varint(*time);
            }
            Self::Fence { epoch } => {
                w.varint(control::FENCE);
                w.varint(*epoch);
            }
            Self::Producer { subject, name, epoch } => {
                w.varint(control::PRODUCER);
                subject.put(&mut w);
                name.put(&mut w);
                w.varint(*epoch);
            }
            Self::Stream { id, name } => {
                w.varint(control::STREAM);
                w.varint(*id);
                name.put(&mut w);
            }
            Self::Trim { first } => {
                w.varint(control::TRIM);
                w.varint(*first);
            }
            Self::Resume { author, key, generation } => {
                w.varint(control::RESUME);
                author.put(&mut w);
                key.put(&mut w);
                w.varint(*generation);
            }
            Self::Unknown { entry } => return entry.clone(),
        }
        w.freeze()
    }

    /// Reads an entry. Errors: `FRAME_MALFORMED`, `FRAME_UNKNOWN` for an unknown critical entry.
    pub fn decode(entry: &Bytes) -> Result<Self, ProtocolError> {
        let mut r = Reader::new(entry);
        let this = match r.varint()? {
            control::CREATED => Self::Created { name: SessionName::get(&mut r)?, time: r.varint()? },
            control::FENCE => Self::Fence { epoch: r.varint()? },
            control::PRODUCER => {
                Self::Producer { subject: Subject::get(&mut r)?, name: Label::get(&mut r)?, epoch: r.varint()? }
            }
            control::STREAM => Self::Stream { id: r.varint()?, name: Label::get(&mut r)? },
            control::TRIM => Self::Trim { first: r.varint()? },
            control::RESUME => {
                Self::Resume { author: Author::get(&mut r)?, key: ClientKey::get(&mut r)?, generation: r.varint()? }
            }
            kind if is_ignorable(kind) => {
                return Ok(Self::Unknown { entry: entry.clone() });
            }
            _ => {
                return Err(ProtocolError::new(Code::FRAME_UNKNOWN, "critical control entry is not known"));
            }
        };
        r.finish()?;
        Ok(this)
    }
}

/// A producer that a chunk has batches of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkProducer {
    /// Index into the chunk's authors; the producer belongs to that author's subject.
    pub author: u64,
    /// The producer's name.
    pub name: Label,
    /// The epoch under which the batches came.
    pub epoch: u64,
}

/// One batch of a chunk (spec CHUNK-3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkBatch {
    /// Index into the chunk's authors.
    pub author: u64,
    /// Index into the chunk's producers and the batch's sequence; `None` for records that the server wrote.
    pub producer: Option<(u64, u64)>,
    /// Records of the batch.
    pub count: u64,
    /// Milliseconds after the base time at which it was accepted.
    pub time: u64,
}

/// The seqs of one batch of a producer, in a chunk that was put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkPosition {
    /// Index into the chunk's producers.
    pub producer: u64,
    /// The batch's sequence.
    pub sequence: u64,
    /// Seq of the batch's first record.
    pub first: u64,
    /// Records that it had.
    pub count: u64,
}

/// What was written to one stream, in a chunk that was put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkCount {
    /// The stream id.
    pub stream: u64,
    /// Records that there were.
    pub records: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
}

/// What a chunk holds in the place of batches that was put together by compaction (spec CHUNK-8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compacted {
    /// Chunks that were put together: the chunk has as many numbers.
    pub chunks: u64,
    /// Milliseconds after the base time of what they held last.
    pub time: u64,
    /// The batches of producers that may still be asked for, in order.
    pub positions: Vec<ChunkPosition>,
    /// What was written, ascending by stream.
    pub counts: Vec<ChunkCount>,
    /// The records that are left, in order.
    pub spans: Vec<Span>,
}

/// Everything of a chunk but its records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkHeader {
    /// The life of the session that it belongs to.
    pub incarnation: Incarnation,
    /// Seq of the first record.
    pub first: u64,
    /// Seqs that it covers; 0 if the chunk holds control entries alone.
    pub count: u64,
    /// Position in the session's chunks, dense from 0. One that was put together takes several.
    pub number: u64,
    /// Epoch of the writer that made it.
    pub writer_epoch: u64,
    /// Base of the batches' times, in milliseconds since the Unix epoch.
    pub base_time: u64,
    /// First bytes of the chain before this chunk.
    pub link: [u8; 8],
    /// The chain after this chunk.
    pub chain: Chain,
    /// Control entries; they precede the records.
    pub controls: Vec<Control>,
    /// Authors that batches and producers name.
    pub authors: Vec<Arc<Author>>,
    /// Producers that batches name.
    pub producers: Vec<ChunkProducer>,
    /// The batches, in order. None in a chunk that was put together.
    pub batches: Vec<ChunkBatch>,
    /// What a chunk that was put together has instead.
    pub compacted: Option<Box<Compacted>>,
}

/// A chunk, decoded and still in its encoding.
pub struct Chunk {
    header: ChunkHeader,
    bytes: Bytes,
    records: Bytes,
    streams: StreamSet,
    frame: OnceLock<Vec<Bytes>>,
}

crate::kept::keeps!(Chunk, header streams, keeps bytes records);

/// Fewest bytes of an author, a producer and a batch, to bound what a count may reserve.
const MIN_AUTHOR: usize = 18;
const MIN_PRODUCER: usize = 4;
const MIN_BATCH: usize = 3;
/// The same of what a chunk that was put together has.
const MIN_POSITION: usize = 4;
const MIN_COUNT: usize = 3;
const MIN_SPAN: usize = 4;

/// Records up to this many bytes are copied into the delivery frame, so that it is one piece; larger regions are
/// shared with the chunk. A piece costs quinn about as much as copying this much.
const COPY_BELOW: usize = 16 * 1024;

impl ChunkHeader {
    /// Number of the next chunk.
    pub fn next_number(&self) -> u64 {
        self.number + self.compacted.as_ref().map_or(1, |compacted| compacted.chunks)
    }

    /// The first seq from which on every seq has a record, if the chunk was put together.
    pub fn whole_from(&self) -> Option<u64> {
        let compacted = self.compacted.as_ref()?;
        let (mut next, mut whole) = (self.first, self.first);
        for span in &compacted.spans {
            next += span.skip;
            whole = if span.skip > 0 { next } else { whole };
            next += span.count;
        }
        let end = self.first + self.count;
        Some(if next < end { end } else { whole })
    }

    /// Records that the chunk has: as many as seqs, unless it was put together.
    pub fn kept(&self) -> u64 {
        self.compacted.as_ref().map_or(self.count, |compacted| compacted.spans.iter().map(|span| span.count).sum())
    }

    /// Who wrote the records, and which seqs have none, in order.
    pub fn spans(&self) -> impl Iterator<Item = Span> {
        let of = |batch: &ChunkBatch| Span { skip: 0, count: batch.count, author: batch.author, time: batch.time };
        let left = self.compacted.iter().flat_map(|compacted| compacted.spans.iter().copied());
        self.batches.iter().map(of).chain(left)
    }

    /// Producer index, sequence and seqs of the batches that are known, in order.
    pub(super) fn positions(&self) -> impl Iterator<Item = (u64, u64, Acked)> {
        let mut next = self.first;
        let written = self.batches.iter().filter_map(move |batch| {
            let first = next;
            next += batch.count;
            batch.producer.map(|(producer, sequence)| (producer, sequence, Acked { first, count: batch.count }))
        });
        let left = self.compacted.iter().flat_map(|compacted| &compacted.positions);
        written.chain(left.map(|of| (of.producer, of.sequence, Acked { first: of.first, count: of.count })))
    }

    fn get_batches(&self, r: &mut Reader<'_>) -> Result<Vec<ChunkBatch>, ProtocolError> {
        let n = r.count(r.remaining() / MIN_BATCH)?;
        let mut batches = Vec::with_capacity(n);
        let mut sum = 0u64;
        for _ in 0..n {
            let source = r.varint()?;
            let batch = if source & 1 == 1 {
                ChunkBatch { author: source >> 1, producer: None, count: r.varint()?, time: r.varint()? }
            } else {
                let index = source >> 1;
                let author = self.producer(index)?.author;
                let sequence = r.varint()?;
                ChunkBatch { author, producer: Some((index, sequence)), count: r.varint()?, time: r.varint()? }
            };
            if batch.author >= self.authors.len() as u64 || batch.count == 0 {
                return Err(ProtocolError::malformed("batch names an author that is not listed, or is empty"));
            }
            sum = sum.saturating_add(batch.count);
            batches.push(batch);
        }
        if sum != self.count {
            return Err(ProtocolError::malformed("batches do not add up to the chunk"));
        }
        Ok(batches)
    }

    fn producer(&self, index: u64) -> Result<&ChunkProducer, ProtocolError> {
        let producer = usize::try_from(index).ok().and_then(|at| self.producers.get(at));
        producer.ok_or(ProtocolError::malformed("batch names a producer that is not listed"))
    }

    fn get_compacted(&self, r: &mut Reader<'_>) -> Result<Compacted, ProtocolError> {
        let not_whole = || ProtocolError::malformed("what was put together does not add up to the chunk");
        let (chunks, time) = (r.varint()?, r.varint()?);
        if chunks == 0 || self.number.checked_add(chunks).is_none_or(|next| next > crate::wire::MAX_VARINT) {
            return Err(not_whole());
        }
        let n = r.count(r.remaining() / MIN_POSITION)?;
        let mut positions = Vec::with_capacity(n);
        let mut next = self.first;
        for _ in 0..n {
            let (producer, sequence) = (r.varint()?, r.varint()?);
            let (first, count) = (self.first.saturating_add(r.varint()?), r.varint()?);
            self.producer(producer)?;
            if first < next || count == 0 || first.saturating_add(count) > self.first + self.count {
                return Err(not_whole());
            }
            next = first + count;
            positions.push(ChunkPosition { producer, sequence, first, count });
        }
        let n = r.count(MAX_STREAMS.min(r.remaining() / MIN_COUNT))?;
        let mut counts: Vec<ChunkCount> = Vec::with_capacity(n);
        for _ in 0..n {
            let count = ChunkCount { stream: r.varint()?, records: r.varint()?, bytes: r.varint()? };
            let follows = counts.last().is_none_or(|last| last.stream < count.stream);
            if count.records == 0 || !follows || count.stream >= MAX_STREAMS as u64 {
                return Err(not_whole());
            }
            counts.push(count);
        }
        let n = r.count(r.remaining() / MIN_SPAN)?;
        let mut spans = Vec::with_capacity(n);
        let mut covered = 0u64;
        for _ in 0..n {
            let span = Span { skip: r.varint()?, count: r.varint()?, author: r.varint()?, time: r.varint()? };
            if span.author >= self.authors.len() as u64 || span.count == 0 {
                return Err(ProtocolError::malformed("span names an author that is not listed, or is empty"));
            }
            if span.time > time {
                return Err(not_whole());
            }
            covered = covered.saturating_add(span.skip).saturating_add(span.count);
            spans.push(span);
        }
        let written = counts.iter().fold(0u64, |sum, count| sum.saturating_add(count.records));
        if covered > self.count || written != self.count {
            return Err(not_whole());
        }
        Ok(Compacted { chunks, time, positions, counts, spans })
    }

    /// The encoding of the chunk with these records, and where in it they begin.
    fn encode(&self, records: &[u8]) -> (Bytes, usize) {
        let mut w = Writer::with_capacity(256 + 8 * self.batches.len() + records.len());
        w.raw(&[0; 8]);
        w.u8(if self.compacted.is_some() { COMPACTED_VERSION } else { CHUNK_VERSION });
        self.incarnation.put(&mut w);
        for field in [self.first, self.count, self.number, self.writer_epoch, self.base_time] {
            w.varint(field);
        }
        w.raw(&self.link);
        w.raw(&self.chain.0);
        w.varint(self.controls.len() as u64);
        self.controls.iter().for_each(|entry| w.bytes(&entry.encode()));
        w.varint(self.authors.len() as u64);
        self.authors.iter().for_each(|author| author.put(&mut w));
        w.varint(self.producers.len() as u64);
        for producer in &self.producers {
            w.varint(producer.author);
            producer.name.put(&mut w);
            w.varint(producer.epoch);
        }
        match &self.compacted {
            None => {
                w.varint(self.batches.len() as u64);
                for batch in &self.batches {
                    match batch.producer {
                        Some((index, sequence)) => {
                            w.varint(index << 1);
                            w.varint(sequence);
                        }
                        None => w.varint(batch.author << 1 | 1),
                    }
                    w.varint(batch.count);
                    w.varint(batch.time);
                }
            }
            Some(compacted) => compacted.put(self.first, &mut w),
        }
        w.varint(records.len() as u64);
        let region = w.len();
        w.raw(records);
        let checksum = Chunk::checksum(&w.as_slice()[8..]);
        w.patch(0, &checksum.to_be_bytes());
        (w.freeze(), region)
    }
}

impl Compacted {
    fn put(&self, chunk: u64, w: &mut Writer) {
        w.varint(self.chunks);
        w.varint(self.time);
        w.varint(self.positions.len() as u64);
        for ChunkPosition { producer, sequence, first, count } in &self.positions {
            [*producer, *sequence, first - chunk, *count].into_iter().for_each(|field| w.varint(field));
        }
        w.varint(self.counts.len() as u64);
        for ChunkCount { stream, records, bytes } in &self.counts {
            [*stream, *records, *bytes].into_iter().for_each(|field| w.varint(field));
        }
        w.varint(self.spans.len() as u64);
        for Span { skip, count, author, time } in &self.spans {
            [*skip, *count, *author, *time].into_iter().for_each(|field| w.varint(field));
        }
    }
}

impl Chunk {
    /// The chunk with this header and the records that it says. Errors: the records are others.
    pub(super) fn new(header: ChunkHeader, records: &[u8]) -> Result<Self, ProtocolError> {
        let (bytes, region) = header.encode(records);
        let records = bytes.slice(region..);
        let streams = streams_of(&records, header.kept())?;
        Ok(Self { header, bytes, records, streams, frame: OnceLock::new() })
    }

    /// Reads a chunk and checks its checksum and that its parts agree.
    ///
    /// Errors: `FRAME_MALFORMED`, `FRAME_UNKNOWN` for another version or an unknown critical control entry. For a
    /// chunk from a store, each of them means damage.
    pub fn decode(bytes: Bytes) -> Result<Self, ProtocolError> {
        let mut r = Reader::new(&bytes);
        let checksum = u64::from_be_bytes(r.array()?);
        if checksum != Self::checksum(&bytes[r.position()..]) {
            return Err(ProtocolError::malformed("chunk checksum does not match"));
        }
        let compacted = match r.u8()? {
            CHUNK_VERSION => false,
            COMPACTED_VERSION => true,
            _ => return Err(ProtocolError::new(Code::FRAME_UNKNOWN, "chunk version is not known")),
        };
        let incarnation = Incarnation::get(&mut r)?;
        let (first, count, number) = (r.varint()?, r.varint()?, r.varint()?);
        let (writer_epoch, base_time) = (r.varint()?, r.varint()?);
        let link = r.array()?;
        let chain = Chain(r.array()?);
        let controls =
            (0..r.count(usize::MAX)?).map(|_| Control::decode(&r.bytes(usize::MAX)?)).collect::<Result<Vec<_>, _>>()?;
        let n = r.count(r.remaining() / MIN_AUTHOR)?;
        let authors = (0..n).map(|_| Author::get(&mut r).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
        let n = r.count(r.remaining() / MIN_PRODUCER)?;
        let mut producers = Vec::with_capacity(n);
        for _ in 0..n {
            let producer = ChunkProducer { author: r.varint()?, name: Label::get(&mut r)?, epoch: r.varint()? };
            if producer.author >= authors.len() as u64 {
                return Err(ProtocolError::malformed("producer names an author that is not listed"));
            }
            producers.push(producer);
        }
        if first.checked_add(count).is_none_or(|end| end > crate::wire::MAX_VARINT) {
            return Err(ProtocolError::malformed("seqs of the chunk exceed the largest"));
        }
        let mut header = ChunkHeader {
            incarnation,
            first,
            count,
            number,
            writer_epoch,
            base_time,
            link,
            chain,
            controls,
            authors,
            producers,
            batches: Vec::new(),
            compacted: None,
        };
        if compacted {
            header.compacted = Some(Box::new(header.get_compacted(&mut r)?));
        } else {
            header.batches = header.get_batches(&mut r)?;
        }
        let records = r.bytes(usize::MAX)?;
        r.finish()?;
        let streams = streams_of(&records, header.kept())?;
        if let Some(compacted) = &header.compacted {
            let mut written = StreamSet::default();
            compacted.counts.iter().for_each(|count| written.insert(count.stream));
            if !written.covers(&streams) {
                return Err(ProtocolError::malformed("records of a stream are not counted"));
            }
        }
        Ok(Self { header, bytes, records, streams, frame: OnceLock::new() })
    }

    /// The checksum of what follows it in a chunk.
    pub fn checksum(body: &[u8]) -> u64 {
        xxh3_64(body)
    }

    /// Everything but the records.
    pub fn header(&self) -> &ChunkHeader {
        &self.header
    }

    /// The encoding, as stored.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The record region.
    pub fn region(&self) -> &Bytes {
        &self.records
    }

    /// True if it was put together and begins and ends where these do, which follow each other.
    pub fn covers(&self, chunks: &[Arc<Self>]) -> bool {
        let (Some(first), Some(last)) = (chunks.first(), chunks.last()) else { return false };
        let (this, first, last) = (&self.header, &first.header, &last.header);
        let begins = (this.incarnation, this.first, this.number, this.link, this.writer_epoch)
            == (first.incarnation, first.first, first.number, first.link, first.writer_epoch);
        let ends = (this.incarnation, self.end(), this.next_number(), this.chain, this.writer_epoch)
            == (last.incarnation, last.first + last.count, last.next_number(), last.chain, last.writer_epoch);
        this.compacted.is_some() && begins && ends
    }

    /// Seq of the first record.
    pub fn first(&self) -> u64 {
        self.header.first
    }

    /// First seq behind the chunk.
    pub fn end(&self) -> u64 {
        self.header.first + self.header.count
    }

    /// The time of what it holds last, in milliseconds since the Unix epoch.
    pub fn time(&self) -> u64 {
        let batches = self.header.batches.iter().map(|batch| batch.time);
        let compacted = self.header.compacted.iter().map(|compacted| compacted.time);
        self.header.base_time.saturating_add(batches.chain(compacted).max().unwrap_or(0))
    }

    /// The streams that its records are in.
    pub(super) fn streams(&self) -> &StreamSet {
        &self.streams
    }

    /// The author at `index` of this chunk. The index was checked when the chunk was made or read.
    pub(super) fn author(&self, index: u64) -> &Arc<Author> {
        &self.header.authors[index as usize]
    }

    /// Computes the chain over every entry, from the chain before the chunk, and compares (spec CHAIN). Of one that was put together
    /// the entries are not there any more, and only that it links is compared.
    ///
    /// Errors: damage at the chunk's first seq if the chunk does not link to `chain`, or its own value is not the computed one.
    pub fn verify_chain(&self, chain: Chain) -> Result<Chain, Damage> {
        let damage = |what| Damage { seq: self.first(), what };
        if self.header.link != chain.link() {
            return Err(damage("chunk does not link to the one before"));
        }
        if self.header.compacted.is_some() {
            return Ok(self.header.chain);
        }
        let after = self.chain_after(chain).map_err(|error| damage(error.detail))?;
        if after != self.header.chain {
            return Err(damage("chain value does not match the entries"));
        }
        Ok(after)
    }

    /// The chain after this chunk, computed from the chain before it and every entry (spec CHAIN).
    pub(super) fn chain_after(&self, mut chain: Chain) -> Result<Chain, ProtocolError> {
        for entry in &self.header.controls {
            chain.control(&entry.encode());
        }
        let mut walk = Records::new(&self.records);
        for batch in &self.header.batches {
            let start = walk.position();
            for _ in 0..batch.count {
                walk.next_bytes().ok_or(ProtocolError::malformed("records do not add up to the chunk"))??;
            }
            let region = self.records.slice(start..walk.position());
            chain.records(self.author(batch.author), self.header.base_time + batch.time, &region)?;
        }
        Ok(chain)
    }

    /// The same records as a chunk of another life, behind the chain `before` (spec BACKUP-4). Errors: those of [`Chunk::decode`].
    pub(super) fn reborn(&self, incarnation: Incarnation, before: Chain) -> Result<Self, ProtocolError> {
        let mut header = self.header.clone();
        // A token of the life before says nothing in this one (spec RES-4): no binding may ask for one.
        header.controls.retain(|entry| !matches!(entry, Control::Resume { .. }));
        (header.incarnation, header.link, header.chain) = (incarnation, before.link(), before);
        let (records, streams) = (self.records.clone(), self.streams);
        let mut chunk = Self { header, bytes: Bytes::new(), records, streams, frame: OnceLock::new() };
        match chunk.header.compacted {
            Some(_) => chunk.header.chain.inherit(self.header.chain),
            None => chunk.header.chain = chunk.chain_after(before)?,
        }
        let (bytes, region) = chunk.header.encode(&chunk.records);
        (chunk.records, chunk.bytes) = (bytes.slice(region..), bytes);
        Ok(chunk)
    }

    /// The DELIVERY frame that covers exactly this chunk without a filter, as one piece or as head and records. It is
    /// made once and shared by everyone who reads the chunk from memory. Empty for a chunk without records.
    pub fn frame(&self) -> &[Bytes] {
        self.frame.get_or_init(|| match self.header.count {
            0 => Vec::new(),
            _ => frame(&self.delivery(), COPY_BELOW),
        })
    }

    /// The delivery that covers exactly this chunk without a filter.
    pub fn delivery(&self) -> Delivery {
        let mut spans: Vec<Span> = Vec::new();
        for span in self.header.spans() {
            match spans.last_mut() {
                Some(last) if span.skip == 0 && (last.author, last.time) == (span.author, span.time) => {
                    last.count += span.count;
                }
                _ => spans.push(span),
            }
        }
        Delivery {
            from: self.first(),
            to: self.end(),
            base_time: self.header.base_time,
            authors: self.header.authors.iter().map(|author| (**author).clone()).collect(),
            spans,
            records: self.records.clone(),
        }
    }

    /// Every record with its seq, time and author. Errors: those of [`Record::get`], for a chunk whose records no
    /// version would have accepted.
    pub fn records(&self) -> impl Iterator<Item = Result<(u64, u64, &Arc<Author>, Record), ProtocolError>> {
        Span::seqs(self.first(), self.header.spans()).zip(Records::new(&self.records)).map(|((seq, span), record)| {
            record.map(|record| (seq, self.header.base_time + span.time, self.author(span.author), record))
        })
    }
}

/// The streams of a region of `count` records.
fn streams_of(region: &Bytes, count: u64) -> Result<StreamSet, ProtocolError> {
    let mut streams = StreamSet::default();
    let mut r = Reader::new(region);
    let mut seen = 0;
    while !r.is_empty() {
        let len = r.varint()?;
        let mut record = r.clone();
        r.skip(usize::try_from(len).unwrap_or(usize::MAX))?;
        streams.insert(Head::get(&mut record)?.stream);
        seen += 1;
    }
    if seen != count {
        return Err(ProtocolError::malformed("records do not add up to the chunk"));
    }
    Ok(streams)
}

/// The pieces of a DELIVERY frame; records longer than `copy_below` bytes stay where they are.
pub(super) fn frame(delivery: &Delivery, copy_below: usize) -> Vec<Bytes> {
    let mut head = Writer::new();
    delivery.put_head(&mut head);
    head.varint(delivery.records.len() as u64);
    let body = head.len() + delivery.records.len();
    let copy = delivery.records.len() <= copy_below;
    let mut w = Writer::with_capacity(16 + if copy { body } else { head.len() });
    w.varint(Delivery::KIND);
    w.varint(body as u64);
    w.raw(head.as_slice());
    if copy {
        w.raw(&delivery.records);
        vec![w.freeze()]
    } else {
        vec![w.freeze(), delivery.records.clone()]
    }
}

/// Puts batches and control entries into a chunk.
#[derive(Debug)]
pub struct ChunkBuilder {
    header: ChunkHeader,
    records: Writer,
}

impl ChunkBuilder {
    /// Begins the chunk `number` at seq `first` with the chain so far. `base_time` is in milliseconds since the Unix
    /// epoch; no batch may be older.
    pub fn new(
        incarnation: Incarnation,
        first: u64,
        number: u64,
        writer_epoch: u64,
        base_time: u64,
        chain: Chain,
    ) -> Self {
        let header = ChunkHeader {
            incarnation,
            first,
            count: 0,
            number,
            writer_epoch,
            base_time,
            link: chain.link(),
            chain,
            controls: Vec::new(),
            authors: Vec::new(),
            producers: Vec::new(),
            batches: Vec::new(),
            compacted: None,
        };
        Self { header, records: Writer::new() }
    }

    /// First seq behind what was added.
    pub fn end(&self) -> u64 {
        self.header.first + self.header.count
    }

    /// Bytes of records added.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// True if nothing was added.
    pub fn is_empty(&self) -> bool {
        self.header.batches.is_empty() && self.header.controls.is_empty()
    }

    /// Adds a control entry.
    pub fn control(&mut self, entry: Control) {
        self.header.controls.push(entry);
    }

    /// Adds a batch that a producer sent, accepted at `time`, in milliseconds since the Unix epoch.
    pub fn batch(
        &mut self,
        author: &Arc<Author>,
        name: &Label,
        epoch: u64,
        sequence: u64,
        time: u64,
        batch: &CheckedBatch,
    ) {
        let author = self.author(author);
        let producers = &mut self.header.producers;
        let known = producers.iter().rposition(|p| p.author == author && p.epoch == epoch && p.name == *name);
        let index = known.unwrap_or_else(|| {
            producers.push(ChunkProducer { author, name: name.clone(), epoch });
            producers.len() - 1
        });
        self.push(ChunkBatch { author, producer: Some((index as u64, sequence)), count: batch.count, time });
        self.records.raw(&batch.records);
    }

    /// Adds a record that the server writes itself, on behalf of `author`.
    pub fn record(&mut self, author: &Arc<Author>, time: u64, record: &Record) {
        let author = self.author(author);
        self.push(ChunkBatch { author, producer: None, count: 1, time });
        record.put(&mut self.records);
    }

    fn push(&mut self, mut batch: ChunkBatch) {
        batch.time = batch.time.saturating_sub(self.header.base_time);
        self.header.count += batch.count;
        self.header.batches.push(batch);
    }

    fn author(&mut self, author: &Arc<Author>) -> u64 {
        let authors = &mut self.header.authors;
        let known = authors.iter().rposition(|known| Arc::ptr_eq(known, author) || known == author);
        known.unwrap_or_else(|| {
            authors.push(author.clone());
            authors.len() - 1
        }) as u64
    }

    /// Encodes the chunk.
    pub fn finish(self) -> Result<Chunk, ProtocolError> {
        let mut chunk = Chunk {
            header: self.header,
            bytes: Bytes::new(),
            records: self.records.freeze(),
            streams: StreamSet::default(),
            frame: OnceLock::new(),
        };
        chunk.streams = streams_of(&chunk.records, chunk.header.count)?;
        // The builder kept the chain before the chunk.
        chunk.header.chain = chunk.chain_after(chunk.header.chain)?;
        let (bytes, region) = chunk.header.encode(&chunk.records);
        // The records live on in the encoding; the copy they came in is let go.
        (chunk.records, chunk.bytes) = (bytes.slice(region..), bytes);
        Ok(chunk)
    }
}

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
//! Integers are varints where no width is given. The checksum is XXH3-64 of everything behind it, big-endian.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use super::chain::Chain;
use super::record::{CheckedBatch, Head, Record, Records};
use super::state::{Damage, StreamSet};
use super::words::{Author, Incarnation, SessionName};
use crate::error::{Code, ProtocolError};
use crate::registry::{CHUNK_VERSION, control, is_ignorable};
use crate::wire::{Body, Delivery, Label, Reader, Span, Subject, Writer};

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

/// Everything of a chunk but its records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkHeader {
    /// The life of the session that it belongs to.
    pub incarnation: Incarnation,
    /// Seq of the first record.
    pub first: u64,
    /// Records; 0 if the chunk holds control entries alone.
    pub count: u64,
    /// Position in the session's chunks, dense from 0.
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
    /// The batches, in order.
    pub batches: Vec<ChunkBatch>,
}

/// A chunk, decoded and still in its encoding.
#[derive(Debug)]
pub struct Chunk {
    header: ChunkHeader,
    bytes: Bytes,
    records: Bytes,
    streams: StreamSet,
    frame: OnceLock<Vec<Bytes>>,
}

/// Fewest bytes of an author, a producer and a batch, to bound what a count may reserve.
const MIN_AUTHOR: usize = 18;
const MIN_PRODUCER: usize = 4;
const MIN_BATCH: usize = 3;

/// Records up to this many bytes are copied into the delivery frame, so that it is one piece; larger regions are
/// shared with the chunk. A piece costs quinn about as much as copying this much.
const COPY_BELOW: usize = 16 * 1024;

impl Chunk {
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
        if r.u8()? != CHUNK_VERSION {
            return Err(ProtocolError::new(Code::FRAME_UNKNOWN, "chunk version is not known"));
        }
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
        let n = r.count(r.remaining() / MIN_BATCH)?;
        let mut batches = Vec::with_capacity(n);
        let mut sum = 0u64;
        for _ in 0..n {
            let source = r.varint()?;
            let batch = if source & 1 == 1 {
                ChunkBatch { author: source >> 1, producer: None, count: r.varint()?, time: r.varint()? }
            } else {
                let index = source >> 1;
                let producer = usize::try_from(index).ok().and_then(|at| producers.get(at));
                let author =
                    producer.ok_or(ProtocolError::malformed("batch names a producer that is not listed"))?.author;
                let sequence = r.varint()?;
                ChunkBatch { author, producer: Some((index, sequence)), count: r.varint()?, time: r.varint()? }
            };
            if batch.author >= authors.len() as u64 || batch.count == 0 {
                return Err(ProtocolError::malformed("batch names an author that is not listed, or is empty"));
            }
            sum = sum.saturating_add(batch.count);
            batches.push(batch);
        }
        if sum != count || first.checked_add(count).is_none_or(|end| end > crate::wire::MAX_VARINT) {
            return Err(ProtocolError::malformed("batches do not add up to the chunk"));
        }
        let records = r.bytes(usize::MAX)?;
        r.finish()?;
        let streams = streams_of(&records, count)?;
        let header = ChunkHeader {
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
            batches,
        };
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
        self.header.base_time.saturating_add(batches.max().unwrap_or(0))
    }

    /// The streams that its records are in.
    pub(super) fn streams(&self) -> &StreamSet {
        &self.streams
    }

    /// The author at `index` of this chunk. The index was checked when the chunk was made or read.
    pub(super) fn author(&self, index: u64) -> &Arc<Author> {
        &self.header.authors[index as usize]
    }

    /// Computes the chain over every entry, from the chain before the chunk, and compares (spec CHAIN).
    ///
    /// Errors: damage at the chunk's first seq if the chunk does not link to `chain`, or its own value is not the computed one.
    pub fn verify_chain(&self, chain: Chain) -> Result<Chain, Damage> {
        let damage = |what| Damage { seq: self.first(), what };
        if self.header.link != chain.link() {
            return Err(damage("chunk does not link to the one before"));
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
        for batch in &self.header.batches {
            match spans.last_mut() {
                Some(span) if span.author == batch.author && span.time == batch.time => span.count += batch.count,
                _ => spans.push(Span { skip: 0, count: batch.count, author: batch.author, time: batch.time }),
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
        let batches = self.header.batches.iter().flat_map(move |batch| {
            let time = self.header.base_time + batch.time;
            let author = self.author(batch.author);
            (0..batch.count).map(move |_| (time, author))
        });
        (self.first()..)
            .zip(batches)
            .zip(Records::new(&self.records))
            .map(|((seq, (time, author)), record)| record.map(|record| (seq, time, author, record)))
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
        let header = &chunk.header;
        let mut w = Writer::with_capacity(256 + 8 * header.batches.len() + chunk.records.len());
        w.raw(&[0; 8]);
        w.u8(CHUNK_VERSION);
        header.incarnation.put(&mut w);
        for field in [header.first, header.count, header.number, header.writer_epoch, header.base_time] {
            w.varint(field);
        }
        w.raw(&header.link);
        w.raw(&header.chain.0);
        w.varint(header.controls.len() as u64);
        header.controls.iter().for_each(|entry| w.bytes(&entry.encode()));
        w.varint(header.authors.len() as u64);
        header.authors.iter().for_each(|author| author.put(&mut w));
        w.varint(header.producers.len() as u64);
        for producer in &header.producers {
            w.varint(producer.author);
            producer.name.put(&mut w);
            w.varint(producer.epoch);
        }
        w.varint(header.batches.len() as u64);
        for batch in &header.batches {
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
        w.varint(chunk.records.len() as u64);
        let region = w.len();
        w.raw(&chunk.records);
        let checksum = Chunk::checksum(&w.as_slice()[8..]);
        w.patch(0, &checksum.to_be_bytes());
        chunk.bytes = w.freeze();
        // The records live on in the encoding; the copy they came in is let go.
        chunk.records = chunk.bytes.slice(region..);
        Ok(chunk)
    }
}

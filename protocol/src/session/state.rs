//! The durable state of a session: everything that its chunks say, rebuilt from them alone.
//!
//! The server, `verify` and the tests use the same [`State::apply`]. A snapshot of a state bounds how many chunks must be
//! read to get it back (spec DUR-9).

use bytes::Bytes;

use super::authority::runs::owes_interrupt;
use super::chain::Chain;
use super::chunk::{Chunk, Control};
use super::producer::{ProducerKey, Producers};
use super::resume::Resumptions;
use super::view::{ROW, View};
use super::words::Incarnation;
use crate::error::ProtocolError;
use crate::registry::{MAX_STREAMS, OLDEST_SNAPSHOT_VERSION, SNAPSHOT_VERSION, STREAM_MAIN_NAME};
use crate::wire::{Label, Reader, Writer};

/// Names of a session's streams; the stream id is the position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Streams(Vec<Label>);

impl Default for Streams {
    fn default() -> Self {
        let main = Label::new(STREAM_MAIN_NAME).unwrap_or_else(|_| unreachable!("a fixed valid name"));
        Self(vec![main])
    }
}

impl Streams {
    /// The id of the stream called `name`.
    pub fn id(&self, name: &Label) -> Option<u64> {
        self.0.iter().position(|known| known == name).map(|at| at as u64)
    }

    /// The name of stream `id`.
    pub fn name(&self, id: u64) -> Option<&Label> {
        self.0.get(usize::try_from(id).ok()?)
    }

    /// All names, by id.
    pub fn names(&self) -> &[Label] {
        &self.0
    }

    /// Number of streams.
    pub fn len(&self) -> u64 {
        self.0.len() as u64
    }

    /// Never true: `main` always exists.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Binds the next id to `name`; ignores a binding that exists.
    pub(super) fn define(&mut self, id: u64, name: Label) {
        if id == self.len() && self.0.len() < MAX_STREAMS {
            self.0.push(name);
        }
    }
}

/// A set of stream ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct StreamSet([u64; MAX_STREAMS / 64]);

impl StreamSet {
    /// Adds `id`; an id that no session can have is left out.
    pub(super) fn insert(&mut self, id: u64) {
        if let Some(word) = self.0.get_mut((id / 64) as usize) {
            *word |= 1 << (id % 64);
        }
    }

    /// Adds all of `other` and returns those that are new.
    pub(super) fn extend(&mut self, other: &Self) -> impl Iterator<Item = u64> + use<> {
        let mut new = *other;
        for (new, known) in new.0.iter_mut().zip(&mut self.0) {
            let fresh = *new & !*known;
            *known |= *new;
            *new = fresh;
        }
        let words = new.0;
        (0..MAX_STREAMS as u64).filter(move |id| words[(id / 64) as usize] & 1 << (id % 64) != 0)
    }

    /// True if `other` holds nothing that is not in this set.
    pub(super) fn covers(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).all(|(known, other)| other & !known == 0)
    }
}

/// Stored data that contradicts what came before it (spec DUR-7).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The first seq that cannot be trusted.
    pub seq: u64,
    /// What is wrong.
    pub what: &'static str,
}

impl core::fmt::Display for Damage {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "damaged at seq {}: {}", self.seq, self.what)
    }
}

impl std::error::Error for Damage {}

/// Since when snapshots hold the instances that are bound to keys, and under which epoch a producer's sequence began.
const RESUMPTIONS_SINCE: u8 = 2;
const BEGUN_SINCE: u8 = 3;
/// Since when their views are of the fold version in force.
const ASKERS_SINCE: u8 = 4;

/// The version of a snapshot. Errors: one that is not known.
fn version(r: &mut Reader<'_>) -> Result<u8, ProtocolError> {
    let version = r.u8()?;
    let known = (OLDEST_SNAPSHOT_VERSION..=SNAPSHOT_VERSION).contains(&version);
    known.then_some(version).ok_or(ProtocolError::malformed("snapshot is of another version"))
}

/// Everything that the chunks of a session say.
#[derive(Debug)]
pub struct State {
    incarnation: Incarnation,
    chain: Chain,
    number: u64,
    first: u64,
    created: u64,
    time: u64,
    writer_epoch: u64,
    view: View,
    streams: Streams,
    pub(super) producers: Producers,
    pub(super) resumptions: Resumptions,
}

impl State {
    /// The state of a session that has no chunk.
    pub fn new(incarnation: Incarnation) -> Self {
        Self {
            incarnation,
            chain: Chain::start(incarnation),
            number: 0,
            first: 0,
            created: 0,
            time: 0,
            writer_epoch: 0,
            view: View::default(),
            streams: Streams::default(),
            producers: Producers::default(),
            resumptions: Resumptions::default(),
        }
    }

    /// The incarnation that the state belongs to.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// The chain after the last chunk.
    pub fn chain(&self) -> Chain {
        self.chain
    }

    /// Number of the next chunk.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The first seq that may be read.
    pub fn first(&self) -> u64 {
        self.first
    }

    /// The seq that the next record will get.
    pub fn tail(&self) -> u64 {
        self.view.next()
    }

    /// When the session was created, in milliseconds since the Unix epoch.
    pub fn created(&self) -> u64 {
        self.created
    }

    /// Time of the newest chunk, in milliseconds since the Unix epoch: the session's time never runs backwards.
    pub fn time(&self) -> u64 {
        self.time
    }

    /// Epoch of the writer of the last chunk.
    pub fn writer_epoch(&self) -> u64 {
        self.writer_epoch
    }

    /// The fold of every record.
    pub fn view(&self) -> &View {
        &self.view
    }

    /// When the server has something to write, in milliseconds since the Unix epoch: a value, a signal or a request expires (spec
    /// STATE-6, SIG-5, SIG-8).
    pub fn deadline(&self) -> Option<u64> {
        self.view.deadline()
    }

    /// When a server that is not serving the session must, in milliseconds since the Unix epoch. [`AT_ONCE`](super::AT_ONCE) for one
    /// that must always be served: its members and runs have until their leases are over to be heard of, from when it is loaded.
    /// [`FOR_WORKERS`](super::FOR_WORKERS) for one with nothing to do but to give jobs to workers.
    pub fn wake(&self) -> Option<u64> {
        self.view.wake()
    }

    /// True if something follows from the durable view that nobody has written: its writer has to
    /// [follow up](super::Authority::follow_up).
    pub fn owes_follow_up(&self) -> bool {
        owes_interrupt(&self.view)
    }

    /// The session's streams.
    pub fn streams(&self) -> &Streams {
        &self.streams
    }

    /// The session's producers.
    pub fn producers(&self) -> &Producers {
        &self.producers
    }

    /// The instances that are bound to client keys.
    pub fn resumptions(&self) -> &Resumptions {
        &self.resumptions
    }

    /// The same state in another life, behind the chain `chain`: nobody is bound to a key in it.
    pub(crate) fn reborn(self, incarnation: Incarnation, chain: Chain) -> Self {
        Self { incarnation, chain, resumptions: Resumptions::default(), ..self }
    }

    /// Adds the next chunk, whose chain value is believed: for a chunk that was just made, or read back from a store
    /// that checked it. Errors: as [`State::verify`], but for the chain.
    pub fn apply(&mut self, chunk: &Chunk) -> Result<(), Damage> {
        self.check(chunk)?;
        self.fold(chunk)
    }

    /// Adds the next chunk after computing the chain over each of its entries.
    ///
    /// Errors: damage at the chunk's first seq if it is of another incarnation, not the next one, does not link to the
    /// chunk before, or if its chain value is not the one computed.
    pub fn verify(&mut self, chunk: &Chunk) -> Result<(), Damage> {
        self.check(chunk)?;
        chunk.verify_chain(self.chain)?;
        self.fold(chunk)
    }

    fn check(&self, chunk: &Chunk) -> Result<(), Damage> {
        let header = chunk.header();
        let what = if header.incarnation != self.incarnation {
            "chunk belongs to another incarnation"
        } else if header.number != self.number {
            "a chunk is missing"
        } else if header.first != self.tail() {
            "records are missing"
        } else if header.link != self.chain.link() {
            "chunk does not link to the one before"
        } else if header.writer_epoch < self.writer_epoch {
            "chunk of a fenced writer"
        } else {
            return Ok(());
        };
        Err(Damage { seq: self.tail(), what })
    }

    fn fold(&mut self, chunk: &Chunk) -> Result<(), Damage> {
        let header = chunk.header();
        for entry in &header.controls {
            self.control(entry);
        }
        let mut key: Option<(u64, ProducerKey)> = None;
        for (index, sequence, acked) in header.positions() {
            let producer = &header.producers[index as usize];
            let key = match &mut key {
                Some((known, key)) if *known == index => key,
                slot => {
                    let subject = chunk.author(producer.author).subject.clone();
                    &mut slot.insert((index, ProducerKey { subject, name: producer.name.clone() })).1
                }
            };
            self.producers.stored(key, producer.epoch, sequence, acked);
        }
        let mut r = Reader::new(chunk.region());
        let damage = |seq, error: ProtocolError| Damage { seq, what: error.detail };
        let mut seq = header.first;
        for span in header.spans() {
            let time = header.base_time + span.time;
            let author = chunk.author(span.author);
            seq += span.skip;
            self.view.pass_over(seq);
            for _ in 0..span.count {
                let len = r.varint().map_err(|error| damage(seq, error))?;
                let end = r.position() + len as usize;
                let mut record = r.clone();
                r.skip(len as usize).map_err(|error| damage(seq, error))?;
                let counted = header.compacted.is_none();
                self.view.fold(author, time, &mut record, end, counted).map_err(|error| damage(seq, error))?;
                seq += 1;
            }
        }
        if let Some(compacted) = &header.compacted {
            compacted.counts.iter().for_each(|of| self.view.count(of.stream, of.records, of.bytes));
            self.view.pass_over(chunk.end());
        }
        self.time = self.time.max(chunk.time());
        self.number = header.next_number();
        self.chain = header.chain;
        self.writer_epoch = header.writer_epoch;
        Ok(())
    }

    fn control(&mut self, entry: &Control) {
        match entry {
            Control::Created { time, .. } => self.created = *time,
            Control::Fence { .. } | Control::Unknown { .. } => {}
            Control::Producer { subject, name, epoch } => {
                self.producers.granted(ProducerKey { subject: subject.clone(), name: name.clone() }, *epoch);
            }
            Control::Stream { id, name } => self.streams.define(*id, name.clone()),
            Control::Trim { first } => self.first = self.first.max(*first),
            Control::Resume { author, key, generation } => self.resumptions.resumed(author, *key, *generation),
        }
    }

    /// About how many bytes a snapshot has, at least half of them.
    pub fn weight(&self) -> usize {
        self.view.weight() + self.producers.weight() + self.resumptions.len() * ROW
    }

    /// A snapshot: everything but the records, in a canonical encoding.
    pub fn snapshot(&self) -> Bytes {
        let mut w = Writer::with_capacity(self.weight());
        w.u8(SNAPSHOT_VERSION);
        self.incarnation.put(&mut w);
        w.raw(&self.chain.0);
        for field in [self.number, self.first, self.created, self.time, self.writer_epoch] {
            w.varint(field);
        }
        w.nested(|w| self.view.put(w));
        w.varint(self.streams.len());
        self.streams.names().iter().for_each(|name| name.put(&mut w));
        self.producers.put(&mut w);
        self.resumptions.put(&mut w);
        w.freeze()
    }

    /// The number of the next chunk that a snapshot says, without reading more of it. Errors: `FRAME_MALFORMED`.
    pub fn number_of(snapshot: &Bytes) -> Result<u64, ProtocolError> {
        let mut r = Reader::new(snapshot);
        version(&mut r)?;
        Incarnation::get(&mut r)?;
        r.skip(32)?;
        r.varint()
    }

    /// True if a snapshot is of the version in force: then the same state has the same bytes.
    pub fn is_current(snapshot: &Bytes) -> bool {
        snapshot.first() == Some(&SNAPSHOT_VERSION)
    }

    /// Reads a snapshot, also one of an older version that says all that this one does (spec DUR-9). Errors: `FRAME_MALFORMED`; the chunks
    /// must then be read from the first one.
    pub fn restore(bytes: &Bytes) -> Result<Self, ProtocolError> {
        Self::restore_kept(bytes, 0)
    }

    /// The same of a log of which the chunks from number `kept` on are there. Where the first ones were removed there is nothing else to have
    /// it from, and an older version may say less.
    pub fn restore_kept(bytes: &Bytes, kept: u64) -> Result<Self, ProtocolError> {
        let mut r = Reader::new(bytes);
        let version = version(&mut r)?;
        let incarnation = Incarnation::get(&mut r)?;
        let chain = Chain(r.array()?);
        let (number, first, created) = (r.varint()?, r.varint()?, r.varint()?);
        let (time, writer_epoch) = (r.varint()?, r.varint()?);
        let view = r.bytes(usize::MAX)?;
        let view = if version >= ASKERS_SINCE { View::decode(&view)? } else { View::decode_older(&view, kept == 0)? };
        let names = (0..r.count(MAX_STREAMS)?).map(|_| Label::get(&mut r)).collect::<Result<Vec<_>, _>>()?;
        if names.first().map(Label::as_str) != Some(STREAM_MAIN_NAME) {
            return Err(ProtocolError::malformed("stream main is missing"));
        }
        let producers = Producers::get(&mut r, version >= BEGUN_SINCE)?;
        let resumptions = if version >= RESUMPTIONS_SINCE { Resumptions::get(&mut r)? } else { Resumptions::default() };
        r.finish()?;
        let streams = Streams(names);
        Ok(Self {
            incarnation,
            chain,
            number,
            first,
            created,
            time,
            writer_epoch,
            view,
            streams,
            producers,
            resumptions,
        })
    }
}

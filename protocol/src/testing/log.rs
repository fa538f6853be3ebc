//! The log: which batches are accepted, and which seqs they get.
//!
//! The model knows nothing of overlays: it keeps what is durable and the list of what was accepted since, and decides each
//! request by applying the list to a copy.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::compaction;
use super::digest::Digest;
use crate::error::Code;
use crate::registry::{MAX_STREAMS, PRODUCER_WINDOW};
use crate::session::{
    Author, Authority, CheckedBatch, Chunk, Committed, Feed, Incarnation, Instance, Outcome, Place, ProducerHandle,
    ProducerKey, ProducerPosition, Record, Reply, SessionName, State, Step,
};
use crate::wire::{Acked, Frame, Label, RawFrame, Start, Subject, Subscribe, Writer};

/// One step of a history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// A batch of `count` records of producer `producer`, under an epoch `age` behind the newest, at `ahead` minus four of
    /// its next sequence, into stream `stream`.
    Append {
        /// Which producer.
        producer: u8,
        /// How far its epoch is behind.
        age: u8,
        /// Where its sequence is: 4 is the next one.
        ahead: u8,
        /// Records.
        count: u8,
        /// Stream id of the records.
        stream: u8,
    },
    /// Open a producer: the next epoch, or keep the one `age` behind.
    Open {
        /// Which producer.
        producer: u8,
        /// 0 for the next epoch, else keep the epoch that is `keep` minus one behind.
        keep: u8,
    },
    /// Define a stream.
    Define {
        /// Its name is made of this.
        name: u8,
    },
    /// Close the session.
    Close,
    /// Trim below this percentage of the tail.
    Trim {
        /// Percent.
        percent: u8,
    },
    /// Make the next chunk, if none is in flight.
    Commit,
    /// The chunk in flight is durable.
    Committed,
    /// The chunk in flight is not stored.
    NotCommitted,
    /// The outcome of the chunk in flight is unknown.
    Unknown,
    /// The server is restarted from a snapshot and the chunks behind it.
    Restart,
    /// Time passes, also backwards.
    Time {
        /// The clock's new value.
        now: u8,
    },
}

impl Op {
    /// Reads operations off arbitrary bytes, for fuzzing.
    pub fn from_bytes(bytes: &[u8]) -> Vec<Self> {
        let mut ops = Vec::new();
        let mut rest = bytes.iter().copied();
        while let Some(tag) = rest.next() {
            let mut next = |bound: u8| rest.next().unwrap_or(0) % bound;
            ops.push(match tag % 16 {
                0..=4 => Self::Append {
                    producer: next(3),
                    age: next(3),
                    ahead: next(8),
                    count: 1 + next(3),
                    stream: next(3),
                },
                5 | 6 => Self::Open { producer: next(3), keep: next(4) },
                7 => Self::Define { name: next(5) },
                8 => Self::Close,
                9 => Self::Trim { percent: next(120) },
                10 | 11 => Self::Commit,
                12 => Self::Committed,
                13 => Self::NotCommitted,
                14 => Self::Unknown,
                _ if next(4) == 0 => Self::Restart,
                _ => Self::Time { now: next(255) },
            });
        }
        ops
    }
}

/// A durable session as the model sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct World {
    /// Payload of each record; `None` for the one that closed the session.
    records: Vec<Option<String>>,
    /// Epoch and, for each batch, its first seq and count.
    producers: BTreeMap<u8, (u64, Vec<Acked>)>,
    streams: Vec<String>,
    first: u64,
    closed: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Accepted {
    Batch { producer: u8, payloads: Vec<String> },
    Again { producer: u8, sequence: u64 },
    Grant { producer: u8 },
    Define { name: String },
    Close,
    CloseAgain,
    Trim { first: u64 },
}

impl World {
    fn apply(&mut self, accepted: &Accepted) {
        match accepted {
            Accepted::Batch { producer, payloads } => {
                let acked = Acked { first: self.records.len() as u64, count: payloads.len() as u64 };
                self.producers.entry(*producer).or_default().1.push(acked);
                self.records.extend(payloads.iter().cloned().map(Some));
            }
            Accepted::Grant { producer } => self.producers.entry(*producer).or_default().0 += 1,
            Accepted::Define { name } => {
                if !self.streams.contains(name) {
                    self.streams.push(name.clone());
                }
            }
            Accepted::Close => {
                if self.closed.is_none() {
                    self.closed = Some(self.records.len() as u64);
                    self.records.push(None);
                }
            }
            Accepted::Trim { first } => self.first = self.first.max(*first),
            Accepted::Again { .. } | Accepted::CloseAgain => {}
        }
    }

    fn epoch(&self, producer: u8) -> u64 {
        self.producers.get(&producer).map_or(0, |(epoch, _)| *epoch)
    }

    fn batches(&self, producer: u8) -> &[Acked] {
        self.producers.get(&producer).map_or(&[], |(_, batches)| batches)
    }
}

/// What happened in a run, to see that it was not empty.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Batches stored.
    pub stored: u64,
    /// Repetitions recognized.
    pub repeated: u64,
    /// Batches refused.
    pub refused: u64,
    /// Chunks that were not committed.
    pub rolled_back: u64,
    /// Outcomes that were unknown for a while.
    pub unknown: u64,
    /// Restarts.
    pub restarts: u64,
}

struct Run {
    authority: Authority<usize>,
    handles: BTreeMap<u8, ProducerHandle>,
    author: Arc<Author>,
    durable: World,
    accepted: Vec<Accepted>,
    /// Tickets of what waits, in order, with the index of the request.
    expected: BTreeMap<usize, Accepted>,
    uncertain: bool,
    chunks: Vec<Arc<Chunk>>,
    snapshot: Bytes,
    now: u64,
    tickets: usize,
    epoch: u64,
    counts: Counts,
    digest: Digest,
}

/// Bytes of a turn: a few batches, so that histories fill some.
const TURN: usize = 300;

fn incarnation() -> Incarnation {
    Incarnation([7; 16])
}

fn subject() -> Subject {
    Subject::new("tester").unwrap_or_else(|_| unreachable!("a fixed valid subject"))
}

fn key(producer: u8) -> ProducerKey {
    let name = Label::new(&format!("p{producer}")).unwrap_or_else(|_| unreachable!("a valid name"));
    ProducerKey { subject: subject(), name }
}

/// Runs a history through the authority and the model.
///
/// # Panics
///
/// Where the two disagree.
pub fn run(ops: &[Op]) -> Counts {
    play(ops, Digest::default()).0
}

/// What a history comes to, as a hash of everything that can be seen of it.
///
/// # Panics
///
/// Where the authority and the model disagree.
pub fn digest(ops: &[Op]) -> String {
    play(ops, Digest::new()).1.finish()
}

fn play(ops: &[Op], digest: Digest) -> (Counts, Digest) {
    let state = State::new(incarnation());
    let name = SessionName::new("session").unwrap_or_else(|_| unreachable!("a fixed valid name"));
    let mut run = Run {
        snapshot: state.snapshot(),
        authority: Authority::new(state, 1, Some((name, 0))).with_turn(TURN),
        handles: BTreeMap::new(),
        author: Arc::new(Author { subject: subject(), instance: Instance([1; 16]) }),
        durable: World { streams: vec!["main".into()], ..World::default() },
        accepted: Vec::new(),
        expected: BTreeMap::new(),
        uncertain: false,
        chunks: Vec::new(),
        now: 1000,
        tickets: 0,
        epoch: 1,
        counts: Counts::default(),
        digest,
    };
    for op in ops {
        run.step(*op);
        run.compare();
    }
    // Everything that was accepted comes to an end.
    loop {
        run.step(Op::Committed);
        run.compare();
        if run.authority.is_idle() {
            break;
        }
        run.step(Op::Commit);
    }
    run.compare_readers();
    compaction::check_into(&run.chunks, run.now, &mut run.digest);
    run.digest.damaged(run.authority.state(), &run.chunks);
    (run.counts, run.digest)
}

impl Run {
    fn staged(&self) -> World {
        let mut world = self.durable.clone();
        self.accepted.iter().for_each(|accepted| world.apply(accepted));
        world
    }

    fn ticket(&mut self) -> usize {
        self.tickets += 1;
        self.tickets
    }

    fn expect(&mut self, ticket: usize, outcome: Outcome, accepted: Accepted) {
        assert_eq!(outcome, Outcome::Pending, "{accepted:?} should be accepted");
        self.expected.insert(ticket, accepted.clone());
        self.accepted.push(accepted);
    }

    fn refused(&mut self, outcome: &Outcome, code: Code) {
        match outcome {
            Outcome::Refused(refusal) => assert_eq!(refusal.code, code, "{refusal:?}"),
            other => panic!("expected {code}, got {other:?}"),
        }
        self.counts.refused += 1;
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Append { producer, age, ahead, count, stream } => self.append(producer, age, ahead, count, stream),
            Op::Open { producer, keep } => self.open(producer, keep),
            Op::Define { name } => self.define(name),
            Op::Close => self.close(),
            Op::Trim { percent } => self.trim(percent),
            Op::Commit => self.commit(),
            Op::Committed => self.committed(),
            Op::NotCommitted => self.not_committed(),
            Op::Unknown => {
                self.authority.unknown();
                self.uncertain = self.authority.in_flight();
                self.counts.unknown += u64::from(self.uncertain);
            }
            Op::Restart => self.restart(),
            Op::Time { now } => self.now = 1000 + u64::from(now),
        }
        self.authority.prepare();
        self.digest.session(&self.authority);
    }

    fn append(&mut self, producer: u8, age: u8, ahead: u8, count: u8, stream: u8) {
        let Some(handle) = self.handles.get(&producer).cloned() else { return };
        let staged = self.staged();
        let next = staged.batches(producer).len() as u64;
        let sequence = (next + u64::from(ahead)).saturating_sub(4);
        let epoch = staged.epoch(producer).saturating_sub(u64::from(age));
        let ticket = self.ticket();
        let payloads: Vec<String> = (0..count).map(|n| format!("{producer}/{sequence}/{n}")).collect();
        let mut region = Writer::new();
        for payload in &payloads {
            Record::data(u64::from(stream), payload.clone()).put(&mut region);
        }
        let batch = match CheckedBatch::new(u64::from(count), region.freeze()) {
            Ok(batch) => batch,
            Err(error) => panic!("a valid batch was refused: {error}"),
        };
        let (outcome, _) =
            self.authority.append(self.now, &self.author, (&handle, epoch, sequence), None, batch, ticket);
        self.digest.outcome(&outcome);
        let stored = self.durable.batches(producer);
        let window = stored.len().saturating_sub(PRODUCER_WINDOW) as u64;
        let known = (window..stored.len() as u64).contains(&sequence).then(|| stored[sequence as usize]);
        let undefined = u64::from(stream) >= self.durable.streams.len() as u64;
        if self.uncertain {
            return self.refused(&outcome, Code::UNAVAILABLE);
        }
        let in_flight = (stored.len() as u64..next).contains(&sequence);
        if epoch < self.durable.epoch(producer) {
            return self.refused(&outcome, Code::FENCED);
        }
        if epoch > self.durable.epoch(producer) {
            return self.refused(&outcome, Code::PRODUCER_UNKNOWN);
        }
        if let Some(acked) = known {
            assert_eq!(outcome, Outcome::Done(Reply::Appended { sequence, acked }));
            self.counts.repeated += 1;
        } else if in_flight {
            self.expect(ticket, outcome, Accepted::Again { producer, sequence });
            self.counts.repeated += 1;
        } else if self.durable.closed.is_some() {
            self.refused(&outcome, Code::SESSION_CLOSED);
        } else if staged.closed.is_some() {
            self.refused(&outcome, Code::UNAVAILABLE);
        } else if undefined {
            self.refused(&outcome, Code::STREAM_UNDEFINED);
        } else if epoch < staged.epoch(producer) {
            self.refused(&outcome, Code::UNAVAILABLE);
        } else if sequence < stored.len() as u64 {
            self.refused(&outcome, Code::DUPLICATE);
        } else if sequence > next {
            self.refused(&outcome, Code::SEQ_GAP);
        } else if sequence - stored.len() as u64 >= PRODUCER_WINDOW as u64 {
            self.refused(&outcome, Code::LIMIT_EXCEEDED);
        } else {
            self.expect(ticket, outcome, Accepted::Batch { producer, payloads });
        }
    }

    fn open(&mut self, producer: u8, keep: u8) {
        let staged = self.staged();
        let held = staged.epoch(producer).saturating_sub(u64::from(keep).saturating_sub(1));
        let keep = (keep > 0).then_some(held);
        if keep == Some(0) {
            return;
        }
        let ticket = self.ticket();
        let (outcome, _) = self.authority.open_producer(self.now, key(producer), keep, ticket);
        self.digest.outcome(&outcome);
        let durable = self.durable.epoch(producer);
        match keep {
            _ if self.uncertain => self.refused(&outcome, Code::UNAVAILABLE),
            None => self.expect(ticket, outcome, Accepted::Grant { producer }),
            Some(epoch) if epoch < durable => self.refused(&outcome, Code::FENCED),
            Some(epoch) if epoch > durable => self.refused(&outcome, Code::PRODUCER_UNKNOWN),
            Some(epoch) => match outcome {
                Outcome::Done(Reply::Producer { handle, position: ProducerPosition { epoch: answered, next, .. } }) => {
                    assert_eq!((answered, next), (epoch, self.durable.batches(producer).len() as u64));
                    // Whoever held it before does not any more, whatever it sends.
                    if let Some(before) = self.handles.insert(producer, handle) {
                        self.displaced(&before, epoch, next);
                    }
                }
                other => panic!("a current epoch was not confirmed: {other:?}"),
            },
        }
    }

    /// A batch of whoever held an epoch before is refused.
    fn displaced(&mut self, before: &ProducerHandle, epoch: u64, sequence: u64) {
        let mut region = Writer::new();
        Record::data(0, "late").put(&mut region);
        let Ok(batch) = CheckedBatch::new(1, region.freeze()) else { unreachable!("a valid batch") };
        let ticket = self.ticket();
        let producer = (before, epoch, sequence);
        let (outcome, _) = self.authority.append(self.now, &self.author, producer, None, batch, ticket);
        self.digest.outcome(&outcome);
        self.refused(&outcome, Code::FENCED);
    }

    fn define(&mut self, name: u8) {
        let text = format!("s{name}");
        let label = Label::new(&text).unwrap_or_else(|_| unreachable!("a valid name"));
        let ticket = self.ticket();
        let (outcome, _) = self.authority.define_stream(self.now, label.clone(), ticket);
        self.digest.outcome(&outcome);
        let known = self.durable.streams.iter().position(|known| *known == text);
        match known {
            _ if self.uncertain => self.refused(&outcome, Code::UNAVAILABLE),
            Some(id) => assert_eq!(outcome, Outcome::Done(Reply::Stream { id: id as u64, name: label })),
            None => {
                assert!(self.staged().streams.len() < MAX_STREAMS);
                self.expect(ticket, outcome, Accepted::Define { name: text });
            }
        }
    }

    fn close(&mut self) {
        let ticket = self.ticket();
        let (outcome, _) = self.authority.close(self.now, &self.author.clone(), ticket);
        self.digest.outcome(&outcome);
        match self.durable.closed {
            _ if self.uncertain => self.refused(&outcome, Code::UNAVAILABLE),
            Some(seq) => assert_eq!(outcome, Outcome::Done(Reply::Closed { seq })),
            None if self.staged().closed.is_some() => self.expect(ticket, outcome, Accepted::CloseAgain),
            None => self.expect(ticket, outcome, Accepted::Close),
        }
    }

    fn trim(&mut self, percent: u8) {
        let tail = self.durable.records.len() as u64;
        let before = tail * u64::from(percent) / 100;
        let ticket = self.ticket();
        let (outcome, _) = self.authority.trim(self.now, before, ticket);
        self.digest.outcome(&outcome);
        let first = before.min(tail);
        match first > self.durable.first {
            _ if self.uncertain => self.refused(&outcome, Code::UNAVAILABLE),
            true => self.expect(ticket, outcome, Accepted::Trim { first }),
            false => assert_eq!(outcome, Outcome::Done(Reply::Trimmed { first: self.durable.first })),
        }
    }

    fn commit(&mut self) {
        if let Step::Commit(chunk) = self.authority.next_chunk() {
            assert!(!self.uncertain);
            assert_eq!(chunk.header().first, self.durable.records.len() as u64);
            self.chunks.push(chunk);
        }
    }

    fn committed(&mut self) {
        let Ok(answer) = self.authority.committed() else { panic!("a chunk of the authority does not follow it") };
        let Some(Committed { chunk, replies, early }) = answer else { return };
        self.digest.add((&replies, &early));
        self.digest.bytes(chunk.bytes());
        self.uncertain = false;
        // In the order of requests, as many as the chunk took.
        let committed: Vec<Accepted> = self.accepted.drain(..replies.len()).collect();
        let batches = committed.iter().filter(|accepted| matches!(accepted, Accepted::Batch { .. })).count();
        let closes = committed.iter().filter(|accepted| matches!(accepted, Accepted::Close)).count();
        assert_eq!(chunk.header().batches.len(), batches + closes, "every record is a request's");
        for accepted in &committed {
            self.durable.apply(accepted);
            self.counts.stored += u64::from(matches!(accepted, Accepted::Batch { .. }));
        }
        let mut grants: BTreeMap<u8, u64> = BTreeMap::new();
        for ((ticket, reply), accepted) in replies.into_iter().zip(&committed) {
            assert_eq!(self.expected.remove(&ticket).as_ref(), Some(accepted), "answers keep the order of requests");
            match (accepted, reply) {
                (Accepted::Batch { producer, payloads }, Reply::Appended { sequence, acked }) => {
                    assert_eq!(self.durable.batches(*producer)[sequence as usize], acked);
                    assert_eq!(acked.count, payloads.len() as u64);
                }
                (Accepted::Again { producer, sequence }, Reply::Appended { sequence: answered, acked }) => {
                    assert_eq!((answered, acked), (*sequence, self.durable.batches(*producer)[*sequence as usize]));
                }
                (Accepted::Trim { .. }, Reply::Trimmed { .. }) => {}
                (
                    Accepted::Grant { producer },
                    Reply::Producer { handle, position: ProducerPosition { epoch, .. } },
                ) => {
                    let last = grants.insert(*producer, epoch);
                    assert!(last.is_none_or(|last| epoch > last) && epoch <= self.durable.epoch(*producer));
                    self.handles.insert(*producer, handle);
                }
                (Accepted::Define { name }, Reply::Stream { id, .. }) => {
                    assert_eq!(self.durable.streams.get(id as usize), Some(name));
                }
                (Accepted::Close | Accepted::CloseAgain, Reply::Closed { seq }) => {
                    assert_eq!(self.durable.closed, Some(seq));
                }
                (accepted, reply) => panic!("{accepted:?} was answered by {reply:?}"),
            }
        }
        // What is stored is what a disk gives back.
        let Ok(read) = Chunk::decode(chunk.bytes().clone()) else { panic!("a chunk does not decode") };
        assert_eq!(read.header(), chunk.header());
    }

    fn not_committed(&mut self) {
        if !self.authority.in_flight() {
            return;
        }
        let tickets = self.authority.not_committed();
        self.digest.add(&tickets);
        self.chunks.pop();
        assert_eq!(tickets.len(), self.accepted.len(), "everything since the last commit is dropped");
        for ticket in tickets {
            assert!(self.expected.remove(&ticket).is_some());
        }
        self.accepted.clear();
        self.uncertain = false;
        self.counts.rolled_back += 1;
    }

    /// Another server takes over: what was in flight is stored or not, what only waited is not.
    fn restart(&mut self) {
        if self.authority.in_flight() {
            if self.now.is_multiple_of(2) {
                self.committed();
            } else {
                self.not_committed();
            }
        }
        self.accepted.clear();
        self.expected.clear();
        self.uncertain = false;
        let Ok(mut state) = State::restore(&self.snapshot) else { panic!("a snapshot does not restore") };
        for chunk in
            self.chunks.iter().filter(|chunk| chunk.header().number >= state.number()).cloned().collect::<Vec<_>>()
        {
            if let Err(damage) = state.verify(&chunk) {
                panic!("a stored chunk does not follow: {damage}");
            }
        }
        assert_eq!(state.view().hash(), self.authority.state().view().hash());
        assert_eq!(state.snapshot(), self.authority.state().snapshot(), "a state read back is the state that was");
        if self.now.is_multiple_of(3) {
            self.snapshot = state.snapshot();
        }
        self.epoch += 1;
        let created = SessionName::new("session").ok().filter(|_| state.number() == 0).map(|name| (name, 0));
        self.authority = Authority::new(state, self.epoch, created).with_turn(TURN);
        self.handles.clear();
        for producer in self.durable.producers.keys() {
            if let Some(handle) = self.authority.state().producers().find(&key(*producer)) {
                self.handles.insert(*producer, handle);
            }
        }
        self.counts.restarts += 1;
    }

    /// The authority's durable state against the model's.
    fn compare(&self) {
        let state = self.authority.state();
        assert_eq!(state.tail(), self.durable.records.len() as u64);
        assert_eq!(state.first(), self.durable.first);
        assert_eq!(state.view().closed(), self.durable.closed);
        let streams: Vec<&str> = state.streams().names().iter().map(Label::as_str).collect();
        assert_eq!(streams, self.durable.streams);
        for (producer, (epoch, batches)) in &self.durable.producers {
            let handle = state.producers().find(&key(*producer));
            let durable = handle.and_then(|handle| state.producers().durable(&handle));
            let position = ProducerPosition { epoch: *epoch, next: batches.len() as u64, begun: 1 };
            assert_eq!(durable, Some(position));
        }
    }

    /// A subscriber from every position gets exactly the records behind it.
    fn compare_readers(&mut self) {
        let state = self.authority.state();
        let (first, tail) = (state.first(), state.tail());
        for start in (0..=tail).step_by(1 + tail as usize / 8) {
            let request = Subscribe {
                id: 1,
                start: Start::Seq(start),
                streams: vec![],
                kinds: vec![],
                window: None,
                folded: false,
            };
            let (mut feed, verdict) = Feed::new(request, (first, 0), tail);
            self.digest.add((verdict, feed.subscribed(verdict, tail)));
            let mut out = Vec::new();
            while feed.place(first, tail, tail) != Place::AtTail {
                if let Place::Trimmed(first) = feed.place(first, tail, tail) {
                    feed.skip_trimmed(first, &mut out);
                    continue;
                }
                let chunk = self.chunks.iter().find(|chunk| chunk.first() <= feed.next() && feed.next() < chunk.end());
                let Some(chunk) = chunk else { panic!("no chunk holds seq {}", feed.next()) };
                assert!(feed.deliver(chunk, state.streams(), &mut out).is_ok());
            }
            self.digest.add((feed.id(), feed.next(), feed.place(first, tail, tail)));
            self.digest.sent(&out);
            let mut next = start;
            let mut frames = crate::wire::Deframer::new(usize::MAX);
            frames.push(out.concat().into());
            let mut seen = Vec::new();
            while let Ok(Some(raw)) = frames.next_frame() {
                match Frame::decode(&RawFrame { kind: raw.kind, body: raw.body }) {
                    Ok(Some(Frame::Delivery(delivery))) => {
                        assert_eq!(delivery.from, next);
                        next = delivery.to;
                        for record in crate::session::Records::new(&delivery.records) {
                            let Ok(record) = record else { panic!("a delivered record does not decode") };
                            seen.push(String::from_utf8_lossy(&record.payload).into_owned());
                        }
                    }
                    Ok(Some(Frame::Gap(gap))) => next = gap.to,
                    Ok(_) => {}
                    Err(error) => panic!("a delivery does not decode: {error}"),
                }
            }
            let expected = self.durable.records.iter().skip(start.max(first) as usize);
            let expected: Vec<String> = expected.map(|payload| payload.clone().unwrap_or_default()).collect();
            assert_eq!(seen, expected);
            assert_eq!(next, tail.max(start));
        }
    }
}

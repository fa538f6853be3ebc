//! The view: what records mean, and which of them are refused.
//!
//! The model keeps every message and every key in plain maps and decides each batch on a copy.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;

use super::compaction;
use super::counts::counts;
use super::digest::Digest;
use crate::error::Code;
use crate::registry::{KEPT_MESSAGE_BYTES, KEPT_MESSAGES, MAX_FRAME, STREAM_MAIN};
use crate::session::{
    Activity, Author, Authority, Change, CheckedBatch, Chunk, Committed, Expected, Feed, Incarnation, Instance, Key,
    MessageAppend, MessageEnd, MessageId, MessageReplace, MessageStart, Outcome, Payload, PresenceJoined,
    PresenceUpdated, ProducerHandle, ProducerKey, Record, Records, Reply, State, StateChange, StateDeleted, StatePut,
    Status, Step, View,
};
use crate::wire::{Deframer, Detail, Frame, Label, Span, Start, Subject, Subscribe, Writer};

/// One record of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "small numbers that choose a message, a key or a value")]
pub enum Deed {
    /// Something that the view does not look into.
    Data,
    /// Begin a message.
    Start { message: u8 },
    /// Add `len` bytes to a message: the `message`th open one, or one with that id where none is open.
    Append { message: u8, len: u8 },
    /// Replace its bytes.
    Replace { message: u8, len: u8 },
    /// Finish it.
    End { message: u8, status: u8 },
    /// Write a key.
    Put { key: u8, value: u8, lasts: u8 },
    /// Delete a key.
    Delete { key: u8 },
    /// Write or delete a key if it is as expected: 0 as it is, 1 absent, else some revision.
    Compare { key: u8, expected: u8, value: Option<u8> },
    /// Add to a key.
    Increment { key: u8, by: i8 },
    /// Merge a patch into a key.
    Merge { key: u8, patch: u8 },
    /// Say what the author of the batch is doing.
    Say { status: u8 },
}

/// One step of a history.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the same words as the log's operations")]
pub enum Op {
    /// A batch.
    Batch(Vec<Deed>),
    Close,
    Commit,
    Committed,
    NotCommitted,
    Restart,
    /// Time passes, and what is due is written.
    Tick {
        millis: u8,
    },
    /// Somebody joins, or says to be here still.
    Join {
        who: u8,
        status: u8,
    },
    /// Somebody says what it is doing, on its attachment.
    Update {
        who: u8,
        status: u8,
    },
    Leave {
        who: u8,
    },
    /// Nothing was heard of somebody; `late` if that is about an earlier time here.
    Lose {
        who: u8,
        late: bool,
    },
}

impl Op {
    /// Reads operations off arbitrary bytes, for fuzzing.
    pub fn from_bytes(bytes: &[u8]) -> Vec<Self> {
        let mut ops = Vec::new();
        let mut rest = bytes.iter().copied();
        while let Some(tag) = rest.next() {
            ops.push(match tag % 32 {
                0..=14 => {
                    let count = 1 + tag % 3;
                    Self::Batch((0..count).map(|_| Deed::from_bytes(&mut rest)).collect())
                }
                18..=22 => Self::Commit,
                23..=27 => Self::Committed,
                28 => Self::NotCommitted,
                29 => Self::Restart,
                15..=17 => {
                    let (what, status) = (rest.next().unwrap_or(0), rest.next().unwrap_or(0));
                    let who = what / 8 % 3;
                    match what % 8 {
                        0..=2 => Self::Join { who, status },
                        3 | 4 => Self::Update { who, status },
                        5 => Self::Leave { who },
                        more => Self::Lose { who, late: more == 6 },
                    }
                }
                // Rare, or nothing would come after it.
                30 if rest.next().unwrap_or(0) == 0 => Self::Close,
                _ => Self::Tick { millis: rest.next().unwrap_or(0) },
            });
        }
        ops
    }
}

impl Deed {
    fn from_bytes(rest: &mut impl Iterator<Item = u8>) -> Self {
        let mut next = || rest.next().unwrap_or(0);
        let (tag, a, b) = (next(), next(), next());
        let key = a % 6;
        match tag % 16 {
            0 => Self::Data,
            1..=3 => Self::Start { message: a },
            4 | 5 => Self::Append { message: a, len: b },
            6 => Self::Replace { message: a, len: b },
            7 | 8 => Self::End { message: a, status: b },
            9 | 10 => Self::Put { key, value: b, lasts: a / 8 },
            11 => Self::Delete { key },
            12 => Self::Compare { key, expected: b, value: (a >= 64).then_some(b) },
            13 if a >= 128 => Self::Say { status: b },
            13 | 14 => Self::Increment { key, by: b as i8 },
            _ => Self::Merge { key, patch: b },
        }
    }
}

counts! {
    /// What happened in a run, to see that it was not empty.
    Counts {
        /// Batches stored.
        stored,
        /// Batches refused by a rule.
        refused,
        /// Messages finished.
        finished,
        /// Values that expired.
        expired,
        /// Members that left or were lost.
        departed,
        /// Chunks that were not committed.
        rolled_back,
        /// Restarts.
        restarts,
        /// Parts of messages that compaction put together with others.
        compacted,
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Message {
    start: u64,
    through: u64,
    status: Status,
    text: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    revision: u64,
    expires: Option<u64>,
    value: Vec<u8>,
}

/// A session as the model sees it.
#[derive(Debug, Clone, Default)]
struct World {
    tail: u64,
    messages: BTreeMap<u8, Message>,
    /// In the order of their ends.
    ended: Vec<u8>,
    keys: BTreeMap<u8, Held>,
    /// Generation and status of who is here, and the seq that said so.
    members: BTreeMap<u8, (u64, u8, u64)>,
    departed: u64,
    closed: bool,
    finished: u64,
    expired: u64,
}

#[derive(Debug, Clone)]
enum Accepted {
    Batch(Vec<Deed>, u64),
    /// Joins, whoever was there before.
    Join(u8, u8),
    /// Says to be here still.
    Again(u8, u8),
    Update(u8, u8),
    Leave(u8),
    Lose(u8),
    Close,
    Expire(u8),
}

const PATCHES: [&str; 6] =
    [r#"{"a":1}"#, r#"{"a":null,"b":{"c":[1,null],"d":"x"}}"#, r#"{"b":{"d":null}}"#, r#""text""#, "null", "not json"];

fn patched(target: Value, patch: &Value) -> Value {
    let Value::Object(patch) = patch else { return patch.clone() };
    let mut members = match target {
        Value::Object(members) => members,
        _ => serde_json::Map::new(),
    };
    for (name, value) in patch {
        let old = members.remove(name).unwrap_or(Value::Null);
        if !value.is_null() {
            members.insert(name.clone(), patched(old, value));
        }
    }
    Value::Object(members)
}

impl World {
    fn pick(&self, message: u8) -> u8 {
        let open: Vec<u8> = self.messages.iter().filter(|(_, m)| m.status == Status::Open).map(|(id, _)| *id).collect();
        if open.is_empty() { message } else { open[message as usize % open.len()] }
    }

    fn open(&mut self, message: u8) -> Result<&mut Message, Code> {
        let id = self.pick(message);
        self.messages.get_mut(&id).filter(|m| m.status == Status::Open).ok_or(Code::MESSAGE_NOT_OPEN)
    }

    fn perform(&mut self, deed: Deed, who: u8, time: u64) -> Result<(), Code> {
        let seq = self.tail;
        self.tail += 1;
        match deed {
            Deed::Data => {}
            Deed::Say { status } => {
                let member = self.members.get_mut(&who).ok_or(Code::NOT_A_MEMBER)?;
                (member.1, member.2) = (status, seq);
            }
            Deed::Start { message } => {
                if self.messages.contains_key(&message) {
                    return Err(Code::MESSAGE_EXISTS);
                }
                let begun = Message { start: seq, through: seq, status: Status::Open, text: Vec::new() };
                self.messages.insert(message, begun);
                if self.messages.values().filter(|m| m.status == Status::Open).count() > 64 {
                    return Err(Code::LIMIT_EXCEEDED);
                }
            }
            Deed::Append { message, len } => {
                let message = self.open(message)?;
                message.text.extend(bytes(len));
                message.through = seq;
            }
            Deed::Replace { message, len } => {
                let message = self.open(message)?;
                message.text = bytes(len);
                message.through = seq;
            }
            Deed::End { message, status: number } => {
                let id = self.pick(message);
                let message = self.open(message)?;
                (message.status, message.through) = (status(number), seq);
                self.ended.push(id);
                self.finished += 1;
            }
            Deed::Put { key, value, lasts } => self.put(key, value.to_string().into(), seq, lasting(time, lasts)),
            Deed::Delete { key } => drop(self.keys.remove(&key)),
            Deed::Compare { key, expected, value } => {
                let revision = self.keys.get(&key).map(|held| held.revision);
                let fits = match expect(expected, revision) {
                    Expected::Any => true,
                    Expected::Absent => revision.is_none(),
                    Expected::Revision(seq) => revision == Some(seq),
                };
                match value {
                    _ if !fits => return Err(Code::CONFLICT),
                    Some(value) => self.put(key, value.to_string().into(), seq, None),
                    None => drop(self.keys.remove(&key)),
                }
            }
            Deed::Increment { key, by } => {
                let held = self.keys.get(&key);
                let number = match held {
                    None => 0,
                    Some(held) => {
                        let text = String::from_utf8_lossy(&held.value);
                        text.parse::<i64>().map_err(|_| Code::STATE_INVALID)?
                    }
                };
                let expires = held.and_then(|held| held.expires).map(|at| at.max(time + 1));
                self.put(key, (number + i64::from(by)).to_string().into(), seq, expires);
            }
            Deed::Merge { key, patch } => {
                let held = self.keys.get(&key);
                let patch = PATCHES[patch as usize % PATCHES.len()];
                let patch: Value = serde_json::from_str(patch).map_err(|_| Code::STATE_INVALID)?;
                let document = match held {
                    None => Value::Null,
                    Some(held) => serde_json::from_slice(&held.value).map_err(|_| Code::STATE_INVALID)?,
                };
                let expires = held.and_then(|held| held.expires).map(|at| at.max(time + 1));
                self.put(key, patched(document, &patch).to_string().into(), seq, expires);
            }
        }
        Ok(())
    }

    fn put(&mut self, key: u8, value: Vec<u8>, revision: u64, expires: Option<u64>) {
        self.keys.insert(key, Held { revision, expires, value });
    }

    fn apply(&mut self, accepted: &Accepted) -> Result<(), Code> {
        match accepted {
            Accepted::Batch(deeds, time) => {
                deeds.iter().try_for_each(|deed| self.perform(*deed, batch_author(deeds), *time))?;
            }
            Accepted::Join(who, status) => {
                let seq = self.tail;
                self.tail += 1;
                self.members.insert(*who, (seq, *status, seq));
            }
            Accepted::Again(who, status) | Accepted::Update(who, status) => {
                self.perform(Deed::Say { status: *status }, *who, 0)?
            }
            Accepted::Leave(who) | Accepted::Lose(who) => {
                self.tail += 1;
                self.members.remove(who);
                self.departed += 1;
            }
            Accepted::Close => {
                let seq = self.tail;
                self.tail += 1;
                self.closed = true;
                self.members.clear();
                let mut open: Vec<(u64, u8)> = Vec::new();
                for (id, message) in self.messages.iter_mut().filter(|(_, m)| m.status == Status::Open) {
                    (message.status, message.through) = (Status::Interrupted, seq);
                    open.push((message.start, *id));
                }
                open.sort_unstable();
                self.ended.extend(open.into_iter().map(|(_, id)| id));
            }
            Accepted::Expire(key) => {
                self.tail += 1;
                self.keys.remove(key);
                self.expired += 1;
            }
        }
        Ok(())
    }
}

/// Who sends a batch.
fn batch_author(deeds: &[Deed]) -> u8 {
    deeds.len() as u8 % 3
}

fn activity(status: u8) -> Activity {
    Activity { status: label("thinking"), progress: Some(u64::from(status) % 101), data: vec![status; 3].into() }
}

fn bytes(len: u8) -> Vec<u8> {
    (0..u32::from(len) * 7).map(|n| (n % 251) as u8 ^ len).collect()
}

fn status(number: u8) -> Status {
    Status::ALL[1 + number as usize % 4]
}

fn lasting(time: u64, lasts: u8) -> Option<u64> {
    (lasts > 0).then(|| time + u64::from(lasts))
}

/// What a batch expects of a key that has this revision.
fn expect(expected: u8, revision: Option<u64>) -> Expected {
    match (expected % 4, revision) {
        (0, Some(seq)) => Expected::Revision(seq),
        (0 | 1, _) => Expected::Absent,
        (2, _) => Expected::Any,
        (_, _) => Expected::Revision(u64::from(expected) / 4),
    }
}

/// A value as what it means: members of an object have no order.
fn meaning(value: &[u8]) -> Value {
    serde_json::from_slice(value).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(value).into_owned()))
}

fn id(message: u8) -> MessageId {
    MessageId([message; 16])
}

fn key(key: u8) -> Key {
    Key::new(&format!("k/{key}")).unwrap_or_else(|_| unreachable!("a valid key"))
}

fn label(text: &str) -> Label {
    Label::new(text).unwrap_or_else(|_| unreachable!("a valid label"))
}

/// The ticket of who leaves while its departure is on its way.
const AGAIN: usize = 1;

struct Run {
    authority: Authority<usize>,
    handle: ProducerHandle,
    authors: [Arc<Author>; 3],
    durable: World,
    accepted: Vec<Accepted>,
    chunks: Vec<Arc<Chunk>>,
    snapshot: Bytes,
    sequence: u64,
    now: u64,
    epoch: u64,
    counts: Counts,
    digest: Digest,
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
    let subject = Subject::new("tester").unwrap_or_else(|_| unreachable!("a fixed valid subject"));
    let producer = ProducerKey { subject: subject.clone(), name: label("p") };
    let state = State::new(Incarnation([7; 16]));
    let snapshot = state.snapshot();
    let mut authority = Authority::new(state, 1, None).with_turn(2000);
    authority.open_producer(0, producer.clone(), None, 0);
    let Step::Commit(chunk) = authority.next_chunk() else { panic!("a grant makes a chunk") };
    let Ok(Some(_)) = authority.committed() else { panic!("a grant is committed") };
    let Some(handle) = authority.state().producers().find(&producer) else { panic!("a granted producer") };
    let mut run = Run {
        authority,
        handle,
        authors: [0, 1, 2].map(|who| Arc::new(Author { subject: subject.clone(), instance: Instance([who; 16]) })),
        durable: World::default(),
        accepted: Vec::new(),
        chunks: vec![chunk],
        snapshot,
        sequence: 0,
        now: 1000,
        epoch: 1,
        counts: Counts::default(),
        digest,
    };
    for op in ops {
        run.step(op);
    }
    while run.authority.in_flight() || !run.accepted.is_empty() {
        run.step(&Op::Committed);
        run.authority.try_again();
        run.step(&Op::Commit);
    }
    run.refold();
    let compacted = compaction::check_into(&run.chunks, run.now, &mut run.digest);
    run.counts.compacted = compacted.gone;
    run.counts.finished = run.durable.finished;
    run.counts.expired = run.durable.expired;
    run.counts.departed = run.durable.departed;
    run.digest.damaged(run.authority.state(), &run.chunks);
    (run.counts, run.digest)
}

impl Run {
    fn staged(&self) -> World {
        self.staged_but(|_| true)
    }

    /// What is staged, of what `counts`.
    fn staged_but(&self, counts: impl Fn(&Accepted) -> bool) -> World {
        let mut world = self.durable.clone();
        for accepted in self.accepted.iter().filter(|accepted| counts(accepted)) {
            assert_eq!(world.apply(accepted), Ok(()), "what was accepted once stays acceptable");
        }
        world
    }

    fn step(&mut self, op: &Op) {
        match op {
            Op::Batch(deeds) => self.batch(deeds),
            Op::Close => {
                let before = self.staged().closed;
                let (outcome, _) = self.authority.close(self.now, &self.authors[0], 0);
                self.digest.outcome(&outcome);
                if !before {
                    assert_eq!(outcome, Outcome::Pending);
                    self.accepted.push(Accepted::Close);
                }
            }
            Op::Commit => {
                if let Step::Commit(chunk) = self.authority.next_chunk() {
                    self.chunks.push(chunk);
                }
            }
            Op::Committed => self.committed(),
            Op::NotCommitted => self.not_committed(),
            Op::Restart => self.restart(),
            Op::Tick { millis } => self.tick(*millis),
            Op::Join { who, status } => self.join(*who, *status),
            Op::Update { who, status } => self.update(*who, *status),
            Op::Leave { who } => self.leave(*who),
            Op::Lose { who, late } => {
                let staged = self.staged();
                if let Some((generation, _, _)) = self.durable.members.get(who) {
                    let generation = generation + u64::from(*late);
                    self.authority.lose_member(self.now, &self.authors[*who as usize], generation);
                    let here = staged.members.get(who).is_some_and(|member| member.0 == generation);
                    if here && !staged.closed {
                        self.accepted.push(Accepted::Lose(*who));
                    }
                }
            }
        }
        self.authority.prepare();
        self.digest.session(&self.authority);
        self.compare();
    }

    fn record(&self, deed: Deed, staged: &World) -> Record {
        let message = |number: u8, payload: Record| Record { message: Some(id(number)), ..payload };
        match deed {
            Deed::Data => Record::data(STREAM_MAIN, "data"),
            Deed::Start { message: number } => {
                let start = MessageStart { role: label("assistant"), content_type: label("text/plain") };
                message(number, start.record(STREAM_MAIN))
            }
            Deed::Append { message: number, len } => {
                message(staged.pick(number), MessageAppend(bytes(len).into()).record(STREAM_MAIN))
            }
            Deed::Replace { message: number, len } => {
                message(staged.pick(number), MessageReplace(bytes(len).into()).record(STREAM_MAIN))
            }
            Deed::End { message: number, status: how } => {
                let end = MessageEnd { status: status(how), detail: Detail::new("over") };
                message(staged.pick(number), end.record(STREAM_MAIN))
            }
            Deed::Put { key: number, value, lasts } => {
                StatePut { key: key(number), value: value.to_string().into(), lasts: lasts.into() }.record(STREAM_MAIN)
            }
            Deed::Delete { key: number } => StateDeleted { key: key(number) }.record(STREAM_MAIN),
            Deed::Compare { key: number, expected, value } => {
                let revision = staged.keys.get(&number).map(|held| held.revision);
                let change = match value {
                    Some(value) => Change::Put { value: value.to_string().into(), lasts: 0 },
                    None => Change::Delete,
                };
                StateChange { key: key(number), expected: expect(expected, revision), change }.record(STREAM_MAIN)
            }
            Deed::Say { status } => PresenceUpdated { activity: activity(status) }.record(STREAM_MAIN),
            Deed::Increment { key: number, by } => {
                let change = Change::Increment(by.into());
                StateChange { key: key(number), expected: Expected::Any, change }.record(STREAM_MAIN)
            }
            Deed::Merge { key: number, patch } => {
                let patch = PATCHES[patch as usize % PATCHES.len()];
                let change = Change::Merge(Bytes::from_static(patch.as_bytes()));
                StateChange { key: key(number), expected: Expected::Any, change }.record(STREAM_MAIN)
            }
        }
    }

    fn batch(&mut self, deeds: &[Deed]) {
        if deeds.is_empty() {
            return;
        }
        let mut world = self.staged();
        let closed = world.closed;
        let mut region = Writer::new();
        let mut expected = Ok(());
        for deed in deeds {
            self.record(*deed, &world).put(&mut region);
            if expected.is_ok() {
                expected = world.perform(*deed, batch_author(deeds), self.now);
            }
        }
        let batch = match CheckedBatch::new(deeds.len() as u64, region.freeze()) {
            Ok(batch) => batch,
            Err(error) => panic!("a valid batch was refused: {error}"),
        };
        let producer = (&self.handle, 1, self.sequence);
        let author = &self.authors[batch_author(deeds) as usize];
        let (outcome, _) = self.authority.append(self.now, author, producer, None, batch, 0);
        self.digest.outcome(&outcome);
        match outcome {
            Outcome::Pending => {
                assert_eq!((expected, closed), (Ok(()), false), "accepted, and should not: {deeds:?}");
                self.sequence += 1;
                self.accepted.push(Accepted::Batch(deeds.to_vec(), self.now));
            }
            Outcome::Refused(refusal) => {
                let code = refusal.code;
                if closed {
                    assert!(matches!(code, Code::SESSION_CLOSED | Code::UNAVAILABLE), "{refusal:?}");
                } else if code != Code::LIMIT_EXCEEDED || expected.is_err() {
                    assert_eq!(Err(code), expected, "{deeds:?}");
                    self.counts.refused += 1;
                }
            }
            Outcome::Done(reply) => panic!("a new batch was answered at once: {reply:?}"),
        }
    }

    fn committed(&mut self) {
        let Ok(answer) = self.authority.committed() else { panic!("a chunk of the authority does not follow it") };
        let Some(Committed { chunk, replies, early }) = answer else { return };
        self.digest.add((&replies, &early));
        self.digest.bytes(chunk.bytes());
        let (again, replies): (Vec<_>, Vec<_>) = replies.into_iter().partition(|(ticket, _)| *ticket == AGAIN);
        assert!(again.iter().all(|(_, reply)| *reply == Reply::Left), "{again:?}");
        let mut replies = replies.into_iter();
        while self.durable.tail < chunk.end() {
            let accepted = self.accepted.remove(0);
            let first = self.durable.tail;
            assert_eq!(self.durable.apply(&accepted), Ok(()));
            match accepted {
                Accepted::Batch(deeds, _) => {
                    let reply = replies.next().map(|(_, reply)| reply);
                    let Some(Reply::Appended { acked, .. }) = reply else { panic!("a batch has no answer: {reply:?}") };
                    assert_eq!((acked.first, acked.count), (first, deeds.len() as u64));
                    self.counts.stored += 1;
                }
                Accepted::Close => assert!(matches!(replies.next(), Some((_, Reply::Closed { .. })))),
                Accepted::Join(who, _) | Accepted::Again(who, _) => {
                    let reply = replies.next().map(|(_, reply)| reply);
                    let Some(Reply::Joined { generation }) = reply else { panic!("a join has no answer: {reply:?}") };
                    // Where it was here already, or left again in the same chunk, that is what the answer says.
                    assert!(generation < chunk.end());
                    assert!(self.durable.members.contains_key(&who));
                }
                Accepted::Leave(_) => assert!(matches!(replies.next(), Some((_, Reply::Left)))),
                Accepted::Expire(_) | Accepted::Update(..) | Accepted::Lose(_) => {}
            }
        }
    }

    fn not_committed(&mut self) {
        if !self.authority.in_flight() {
            return;
        }
        let refused = self.authority.not_committed();
        self.digest.add(refused);
        self.chunks.pop();
        self.sequence -= self.accepted.iter().filter(|accepted| matches!(accepted, Accepted::Batch(..))).count() as u64;
        // What members said, which nothing answers, still holds.
        let members = &self.durable.members;
        self.accepted.retain(|accepted| matches!(accepted, Accepted::Update(who, _) if members.contains_key(who)));
        self.counts.rolled_back += 1;
    }

    /// Time passes. What the model finds due and unchanged is what the authority writes.
    fn tick(&mut self, millis: u8) {
        self.now += u64::from(millis);
        let staged = self.staged();
        let changed = |number: &u8, held: &Held| staged.keys.get(number) != Some(held);
        if !staged.closed {
            let mut due: Vec<(u64, u8)> = self
                .durable
                .keys
                .iter()
                .filter(|(number, held)| held.expires.is_some_and(|at| at <= self.now) && !changed(number, held))
                .filter_map(|(number, held)| Some((held.expires?, *number)))
                .collect();
            due.sort_unstable();
            self.accepted.extend(due.into_iter().map(|(_, number)| Accepted::Expire(number)));
        }
        self.authority.tick(self.now);
        self.authority.try_again();
    }

    fn refused(outcome: &Outcome, expected: Code) {
        let Outcome::Refused(refusal) = outcome else { panic!("not refused: {outcome:?}") };
        assert_eq!(refusal.code, expected);
    }

    /// Whether a record of the server is refused because the session is closed or being closed.
    fn closed(&self) -> Option<Code> {
        match (self.durable.closed, self.staged().closed) {
            (true, _) => Some(Code::SESSION_CLOSED),
            (_, true) => Some(Code::UNAVAILABLE),
            _ => None,
        }
    }

    fn join(&mut self, who: u8, status: u8) {
        let held = self.durable.members.get(&who).copied();
        let staged = self.staged().members.get(&who).copied();
        let said = |accepted: &Accepted| match accepted {
            Accepted::Join(by, _)
            | Accepted::Again(by, _)
            | Accepted::Update(by, _)
            | Accepted::Leave(by)
            | Accepted::Lose(by) => *by == who,
            Accepted::Batch(deeds, _) => {
                batch_author(deeds) == who && deeds.iter().any(|deed| matches!(deed, Deed::Say { .. }))
            }
            _ => false,
        };
        let pending = self.accepted.iter().any(said);
        let joined = PresenceJoined { name: label("tester"), grace: 1000, activity: activity(status) };
        let generation = held.map(|(generation, _, _)| generation);
        let author = self.authors[who as usize].clone();
        let (outcome, _) = self.authority.join(self.now, &author, joined, 0);
        self.digest.outcome(&outcome);
        let unchanged = !pending && held.is_some_and(|(_, known, _)| known == status);
        match (self.closed(), outcome) {
            (_, Outcome::Done(reply)) => {
                assert!(unchanged, "{reply:?}");
                assert_eq!(Some(reply), generation.map(|generation| Reply::Joined { generation }));
            }
            (Some(code), outcome) => Self::refused(&outcome, code),
            (None, outcome) => {
                assert_eq!(outcome, Outcome::Pending);
                let same = held.is_some() && held.map(|held| held.0) == staged.map(|staged| staged.0);
                self.accepted.push(if same { Accepted::Again(who, status) } else { Accepted::Join(who, status) });
            }
        }
    }

    fn update(&mut self, who: u8, status: u8) {
        let before = self.authority.waiting_bytes();
        let author = self.authors[who as usize].clone();
        let updated = PresenceUpdated { activity: activity(status) };
        let result = self.authority.update(self.now, &author, updated).map_err(|refusal| refusal.code);
        if let Some(code) = self.closed() {
            return assert_eq!(result, Err(code));
        }
        if !self.staged().members.contains_key(&who) {
            return assert_eq!(result, Err(Code::NOT_A_MEMBER));
        }
        assert_eq!(result, Ok(()));
        // One more weighs more than any difference of two.
        if self.authority.waiting_bytes() > before + 32 {
            return self.accepted.push(Accepted::Update(who, status));
        }
        // It took the place of the last thing that was accepted about the member, and that was an update.
        let about = |accepted: &&mut Accepted| match accepted {
            Accepted::Join(by, _) | Accepted::Again(by, _) | Accepted::Update(by, _) => *by == who,
            Accepted::Leave(_) | Accepted::Lose(_) => true,
            Accepted::Batch(deeds, _) => {
                batch_author(deeds) == who && deeds.iter().any(|deed| matches!(deed, Deed::Say { .. }))
            }
            _ => false,
        };
        match self.accepted.iter_mut().rev().find(about) {
            Some(Accepted::Update(by, last)) if *by == who => *last = status,
            other => panic!("an update took the place of {other:?}"),
        }
    }

    fn leave(&mut self, who: u8) {
        let author = self.authors[who as usize].clone();
        // A close makes nobody leave before it is durable.
        let staged = self.staged_but(|accepted| !matches!(accepted, Accepted::Close));
        let (here, staged) = (self.durable.members.contains_key(&who), staged.members.contains_key(&who));
        let ticket = if here && !staged { AGAIN } else { 0 };
        let (outcome, _) = self.authority.leave(self.now, &author, ticket);
        self.digest.outcome(&outcome);
        match (here || staged, self.closed()) {
            (false, _) => assert_eq!(outcome, Outcome::Done(Reply::Left)),
            // What is on its way is waited for.
            (true, _) if !staged => assert_eq!(outcome, Outcome::Pending),
            (true, Some(code)) => Self::refused(&outcome, code),
            (true, None) => {
                assert_eq!(outcome, Outcome::Pending);
                self.accepted.push(Accepted::Leave(who));
            }
        }
    }

    fn restart(&mut self) {
        if self.authority.in_flight() {
            if self.now.is_multiple_of(2) { self.committed() } else { self.not_committed() }
        }
        self.sequence -= self.accepted.iter().filter(|accepted| matches!(accepted, Accepted::Batch(..))).count() as u64;
        self.accepted.clear();
        let Ok(mut state) = State::restore(&self.snapshot) else { panic!("a snapshot does not restore") };
        let behind = self.chunks.iter().filter(|chunk| chunk.header().number >= state.number());
        for chunk in behind.cloned().collect::<Vec<_>>() {
            if let Err(damage) = state.verify(&chunk) {
                panic!("a stored chunk does not follow: {damage}");
            }
        }
        assert_eq!(state.snapshot(), self.authority.state().snapshot(), "a state read back is the state that was");
        if self.now.is_multiple_of(3) {
            self.snapshot = state.snapshot();
        }
        self.epoch += 1;
        let key = self.handle.key().clone();
        self.authority = Authority::new(state, self.epoch, None).with_turn(2000);
        let Some(handle) = self.authority.state().producers().find(&key) else { panic!("a granted producer") };
        self.handle = handle;
        self.counts.restarts += 1;
    }

    /// The durable view against the model's.
    fn compare(&self) {
        // Whatever is accepted, the store is told early enough.
        let wake = (!self.durable.closed).then(|| self.authority.state().wake()).flatten();
        assert!(wake.is_none_or(|at| self.authority.wake().is_some_and(|told| told <= at)));
        let view = self.authority.state().view();
        assert_eq!(view.next(), self.durable.tail);
        let entries = view.state().iter();
        let keys = entries.map(|(key, entry)| (key.clone(), entry.revision, entry.expires, meaning(&entry.value)));
        let expected = self.durable.keys.iter();
        let expected = expected.map(|(number, held)| (key(*number), held.revision, held.expires, meaning(&held.value)));
        assert_eq!(keys.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
        let members = view.members().iter().map(|(author, member)| {
            (author.instance.0[0], (member.generation, member.activity.clone(), member.updated))
        });
        let expected = self
            .durable
            .members
            .iter()
            .map(|(who, (generation, status, updated))| (*who, (*generation, activity(*status), *updated)));
        assert_eq!(members.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
        for message in view.messages().open() {
            self.compare_message(message);
        }
        let open = self.durable.messages.values().filter(|message| message.status == Status::Open);
        assert_eq!(view.messages().open().len(), open.count());
        let finished: Vec<MessageId> = view.messages().finished().map(|message| message.id).collect();
        view.messages().finished().for_each(|message| self.compare_message(message));
        let kept: Vec<MessageId> = self.durable.ended.iter().map(|number| id(*number)).collect();
        assert!(kept.ends_with(&finished), "the newest are kept, in the order of their ends");
        assert!(finished.len() == kept.len().min(KEPT_MESSAGES) || finished.len() * 2000 < KEPT_MESSAGE_BYTES);
        assert_eq!(finished.len() + view.messages().index().count(), kept.len());
    }

    fn compare_message(&self, message: &crate::session::Message) {
        let Some(model) = self.durable.messages.get(&message.id.0[0]) else {
            panic!("{message:?} is not in the model")
        };
        let view = (message.start, message.through, message.status, &message.text);
        assert_eq!(view, (model.start, model.through, model.status, &model.text));
    }

    /// A reader that folds the same records, one by one, has the same view and can pass it on.
    fn refold(&mut self) {
        let mut view = View::default();
        for chunk in &self.chunks {
            for record in chunk.records() {
                let Ok((_, time, author, record)) = record else { panic!("a stored record does not decode") };
                let mut region = Writer::new();
                record.put(&mut region);
                let region = region.freeze();
                let skip = region.len() - record.encoded_len();
                assert_eq!(view.apply(author, time, &region.slice(skip..)), Ok(()));
            }
        }
        let ours = self.authority.state().view();
        assert_eq!(&view, ours);
        assert_eq!(view.hash(), ours.hash());
        let Ok(decoded) = View::decode(&view.encode()) else { panic!("a view does not decode") };
        assert_eq!((&decoded, decoded.hash()), (&view, view.hash()));
        for together in [1, 3, 1000] {
            self.roll_up(together);
        }
    }

    /// A reader of rolled-up deliveries, of so many chunks at a time, has the same messages, state and members at the end of each.
    fn roll_up(&mut self, together: usize) {
        let state = self.authority.state();
        let request =
            Subscribe { id: 1, start: Start::Seq(0), streams: vec![], kinds: vec![], window: Some(0), folded: false };
        let (mut feed, _) = Feed::new(request, (0, 0), state.tail());
        let (mut view, mut exact) = (View::default(), View::default());
        let mut all = self.chunks.iter().flat_map(|chunk| chunk.records());
        for chunks in self.chunks.chunks(together) {
            let mut out = Vec::new();
            assert_eq!(feed.deliver_all(chunks, state.streams(), &mut out), Ok(()));
            self.digest.sent(&out);
            let mut frames = Deframer::new(MAX_FRAME);
            frames.push(out.concat().into());
            while let Ok(Some(raw)) = frames.next_frame() {
                let Ok(Some(Frame::Delivery(delivery))) = Frame::decode(&raw) else { continue };
                let mut records = Records::new(&delivery.records);
                let mut updated = Vec::new();
                for (seq, span) in Span::seqs(delivery.from, delivery.spans.iter().copied()) {
                    let author = Arc::new(delivery.authors[span.author as usize].clone());
                    let Some(Ok(record)) = records.next() else { panic!("a rolled-up record does not decode") };
                    if record.kind == crate::session::Kind::PRESENCE_UPDATED && record.headers.is_empty() {
                        assert!(!updated.contains(&span.author), "an update of a member that is not its last");
                        updated.push(span.author);
                    }
                    view.pass_over(seq);
                    assert_eq!(view.fold_record(&author, delivery.base_time + span.time, &record), Ok(()));
                }
                assert!(records.next().is_none());
                view.pass_over(delivery.to);
                while exact.next() < delivery.to {
                    let Some(Ok((_, time, author, record))) = all.next() else { panic!("a record is missing") };
                    assert_eq!(exact.fold_record(author, time, &record), Ok(()));
                }
                assert_eq!((view.next(), view.time()), (exact.next(), exact.time()));
                assert_eq!(view.messages(), exact.messages());
                assert_eq!(view.state(), exact.state());
                assert_eq!(view.members(), exact.members());
            }
        }
        assert_eq!(view.next(), state.tail());
    }
}

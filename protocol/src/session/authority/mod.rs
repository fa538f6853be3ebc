//! The server's authority over one session: the only place that accepts batches and assigns seqs (spec SESS, PROD, DUR).
//!
//! It keeps the durable [`State`] and, over it, what was accepted and is not durable yet. Decisions look at both;
//! everything that is shown to a client looks at the durable state alone.
//!
//! ```text
//!             append, open, close …                 next                committed
//!   request ───────────────────────▶ waiting ──────────────▶ in flight ───────────▶ durable, answered
//!                    │                  │                       │ not committed
//!                    ▼ refused          └───────────────────────┴──────────────▶ dropped, answered
//! ```
//!
//! At most one chunk is in flight. While it is, and a whole turn waits behind it, the next one is made ahead of time, so that
//! hashing and syncing of a busy session overlap. `T` is the driver's ticket: it comes back with the answer.

mod notifications;
pub(in crate::session) mod runs;

use std::collections::VecDeque;
use std::sync::Arc;

use runs::Standbys;

use super::chain::Chain;
use super::chunk::{Chunk, ChunkBuilder, Control};
use super::kinds::{
    Departure, Intent, Kind, Payload, PresenceJoined, PresenceLeft, PresenceUpdated, RunStart, Signal, StateExpired,
};
use super::overlay::{Bounds, Overlay};
use super::producer::{Admission, ProducerHandle, ProducerKey, ProducerPosition};
use super::record::{CheckedBatch, Record, Records};
use super::resume::{Claimed, ResumeClaim};
use super::state::{Damage, State};
use super::words::{Author, ClientKey, RunId, SessionName, SignalId};
use crate::error::Code;
use crate::planted::{Bug, planted};
use crate::registry::{MAX_GRACE, MAX_STREAMS, MIN_GRACE, STREAM_MAIN, TURN_BYTES};
use crate::wire::Early;
use crate::wire::{Acked, Label};
use bytes::Bytes;

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The registry code.
    pub code: Code,
    /// The number that the code defines, else 0.
    pub value: u64,
    /// What happened, for people.
    pub detail: &'static str,
}

impl Refusal {
    /// A refusal without a value.
    pub const fn new(code: Code, detail: &'static str) -> Self {
        Self { code, value: 0, detail }
    }
}

/// The answer to a request that waited for durability, or needed nothing new.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// A batch is durable: its sequence and seqs.
    Appended {
        /// The batch's sequence.
        sequence: u64,
        /// The seqs that it got.
        acked: Acked,
    },
    /// A producer holds an epoch.
    Producer {
        /// To append with.
        handle: ProducerHandle,
        /// Where it stands.
        position: ProducerPosition,
    },
    /// A stream has an id.
    Stream {
        /// The id.
        id: u64,
        /// Its name.
        name: Label,
    },
    /// The session is closed.
    Closed {
        /// Seq of the record that closed it.
        seq: u64,
    },
    /// The caller is here.
    Joined {
        /// Since the record with this seq.
        generation: u64,
    },
    /// The caller is not here.
    Left,
    /// The caller holds a run.
    Run {
        /// The run.
        run: RunId,
        /// Its epoch: the seq of the record that says so.
        epoch: u64,
        /// The epoch under which it was lost, if it was taken over.
        lost: Option<u64>,
    },
    /// A signal is stored.
    Signalled {
        /// The signal.
        signal: SignalId,
        /// Seq of its record, or of the one that wants the same.
        seq: u64,
    },
    /// The session treats runs and inputs, or tells people, as asked.
    Configured {
        /// Seq of the record that says so.
        seq: u64,
    },
    /// The caller is the client that it was.
    Resumed {
        /// Its key.
        key: ClientKey,
        /// The generation of the token to give it.
        generation: u64,
    },
    /// Records below `first` are released.
    Trimmed {
        /// The first seq that can be read.
        first: u64,
    },
    /// The request had no effect, and what it contradicted is durable now.
    Refused(Refusal),
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It waits for durability; the answer comes out of [`Authority::committed`] or [`Authority::not_committed`].
    Pending,
    /// It was answered at once.
    Done(Reply),
    /// It had no effect.
    Refused(Refusal),
}

/// What the driver does next.
#[derive(Debug)]
pub enum Step {
    /// Commit this chunk, then say what became of it.
    Commit(Arc<Chunk>),
    /// Nothing to do until something is accepted or the chunk in flight is resolved.
    Idle,
}

#[derive(Debug)]
enum Work {
    Batch {
        author: Arc<Author>,
        handle: ProducerHandle,
        epoch: u64,
        sequence: u64,
        time: u64,
        batch: CheckedBatch,
    },
    /// A repetition of a batch that is in flight.
    Again {
        handle: ProducerHandle,
        sequence: u64,
    },
    Grant {
        key: ProducerKey,
        epoch: u64,
    },
    Stream {
        id: u64,
        name: Label,
    },
    /// A record that the server writes, by itself or for somebody.
    Record {
        author: Arc<Author>,
        time: u64,
        record: Record,
    },
    /// The departure of a member, asked for while it is on its way.
    Left,
    /// What contradicts something that is on its way.
    Refused(Refusal),
    Trim {
        first: u64,
    },
    Resume {
        author: Arc<Author>,
        key: ClientKey,
        generation: u64,
    },
    Entry {
        entry: Control,
    },
}

impl Work {
    fn len(&self) -> usize {
        match self {
            Self::Batch { batch, .. } => batch.len() + 64,
            Self::Record { record, .. } => record.encoded_len() + 64,
            _ => 64,
        }
    }

    /// Adds its records that are told early; the first one has the seq `first`.
    fn put_early(&self, first: u64, early: &mut Vec<Early>) {
        match self {
            Self::Batch { author, time, batch, .. } if batch.early => {
                // Checked when the batch came.
                for (seq, record) in (first..).zip(Records::new(&batch.records).flatten()) {
                    if record.kind.is_early() {
                        early.push(Early { seq, time: *time, author: (**author).clone(), record: record.encode() });
                    }
                }
            }
            Self::Record { author, time, record } if record.kind.is_early() => {
                let (author, record) = ((**author).clone(), record.encode());
                early.push(Early { seq: first, time: *time, author, record });
            }
            _ => {}
        }
    }

    /// Seqs that it takes.
    fn count(&self) -> u64 {
        match self {
            Self::Batch { batch, .. } => batch.count,
            Self::Record { .. } => 1,
            _ => 0,
        }
    }
}

#[derive(Debug)]
struct Flight<T> {
    chunk: Arc<Chunk>,
    work: Vec<(Work, Option<T>)>,
}

/// Refusals that wait for what they contradict to be durable: more than one for each of what a chunk can hold are not asked for by anybody
/// who waits for answers.
const MAX_DEFERRED: usize = 1024;

/// Values that expire in one step: a turn must not be all of them.
const EXPIRED_AT_ONCE: usize = 64;

/// A durable chunk and what follows from it.
#[derive(Debug)]
pub struct Committed<T> {
    /// The chunk.
    pub chunk: Arc<Chunk>,
    /// The answers that it gives, in the order of the requests.
    pub replies: Vec<(T, Reply)>,
    /// Its records that are told early (spec SIG-6).
    pub early: Vec<Early>,
}

/// Decides what happens to one session: accepts or refuses requests, assigns seqs, makes chunks, answers once they are durable.
#[derive(Debug)]
pub struct Authority<T> {
    state: State,
    writer_epoch: u64,
    waiting: VecDeque<(Work, Option<T>)>,
    waiting_bytes: usize,
    flight: Option<Flight<T>>,
    /// The chunk behind the one in flight, made ahead of time.
    prepared: Option<Flight<T>>,
    /// Bytes of one chunk, unless a single batch is larger.
    turn: usize,
    /// Durable plus what is accepted.
    staged_closed: bool,
    staged_time: u64,
    staged_streams: Vec<Label>,
    /// The seq of the next record, counting what is accepted.
    staged_tail: u64,
    overlay: Overlay,
    server: Arc<Author>,
    /// What waits without a ticket was not committed before: it is not tried again before something else asks for a chunk, or
    /// [`Authority::try_again`].
    held_back: bool,
    uncertain: bool,
    /// Refusals that wait.
    deferred: usize,
    standbys: Standbys<T>,
}

impl<T> Authority<T> {
    /// Holds the session to these from now on.
    #[must_use]
    pub fn bounded(mut self, bounds: Bounds) -> Self {
        self.overlay = Overlay::bounded(bounds);
        self
    }

    /// Takes over a session under `writer_epoch`, which must be newer than any that wrote to it. The first chunk carries
    /// the fence, and for a new session the creation.
    pub fn new(state: State, writer_epoch: u64, created: Option<(SessionName, u64)>) -> Self {
        let mut this = Self {
            staged_closed: state.view().closed().is_some(),
            staged_time: state.time(),
            staged_tail: state.tail(),
            state,
            writer_epoch,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            flight: None,
            prepared: None,
            turn: TURN_BYTES,
            staged_streams: Vec::new(),
            overlay: Overlay::default(),
            server: Arc::new(Author::server()),
            held_back: false,
            uncertain: false,
            deferred: 0,
            standbys: Standbys::default(),
        };
        if planted(Bug::DedupForgotten) {
            this.state.producers.forget_the_last();
        }
        if let Some((name, time)) = created {
            this.staged_time = this.staged_time.max(time);
            this.push(Work::Entry { entry: Control::Created { name, time } }, None);
        }
        this
    }

    /// Puts at most `bytes` into a chunk instead of the registry's `turn_bytes`; for tests.
    pub fn with_turn(mut self, bytes: usize) -> Self {
        self.turn = bytes;
        self
    }

    /// The durable state: all that a client may be shown.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// When a server must serve the session once the next chunk is stored, whatever becomes of this one (see [`State::wake`]): too
    /// early at worst.
    pub fn wake(&self) -> Option<u64> {
        self.state.wake().into_iter().chain(self.overlay.wake()).min()
    }

    /// Bytes accepted and not yet in a chunk. The driver stops taking requests above a bound of its own.
    pub fn waiting_bytes(&self) -> usize {
        self.waiting_bytes
    }

    /// True if a chunk is being committed.
    pub fn in_flight(&self) -> bool {
        self.flight.is_some()
    }

    /// True if no request waits and nothing is in flight.
    pub fn is_idle(&self) -> bool {
        let waits = self.staged_tail != self.state.tail() || self.waiting.iter().any(|(_, ticket)| ticket.is_some());
        self.flight.is_none() && self.prepared.is_none() && !waits
    }

    fn push(&mut self, work: Work, ticket: Option<T>) {
        self.held_back = false;
        self.waiting_bytes += work.len();
        self.staged_tail += work.count();
        self.waiting.push_back((work, ticket));
    }

    /// The time of something accepted at `now`: a session's time never runs backwards (spec DUR-6).
    fn stamp(&mut self, now: u64) -> u64 {
        self.staged_time = if planted(Bug::TimeRunsBackwards) { now } else { self.staged_time.max(now) };
        self.staged_time
    }

    fn uncertain() -> Refusal {
        Refusal::new(Code::UNAVAILABLE, "the outcome of an earlier commit is being resolved")
    }

    /// Accepts or refuses a batch (spec PROD-6, PROD-8). `now` is wall time in milliseconds since the Unix epoch.
    ///
    /// `producer` is the producer, its epoch and the sequence; `run` the epoch of the run that the batch is part of, if any (spec RUN-3).
    /// A refused batch uses no sequence. Refusals: `SESSION_CLOSED`, `STREAM_UNDEFINED`, `FENCED` with the current epoch, `SEQ_GAP` with the
    /// expected sequence, `DUPLICATE`, `PRODUCER_UNKNOWN`, `LIMIT_EXCEEDED` for too many unacknowledged batches,
    /// `UNAVAILABLE` while an earlier outcome or a newer epoch is not certain; and of a batch that breaks the rules of its records
    /// `MESSAGE_EXISTS`, `MESSAGE_NOT_OPEN`, `CONFLICT` with what the key is, `STATE_INVALID`, `NOT_A_MEMBER`, `RUN_FENCED` with the
    /// epoch of the run or 0, `RUN_ACTIVE`, `RUN_OVER`, `ALREADY_RESOLVED`, `ID_IN_USE`, `LIMIT_EXCEEDED`, `RECORD_MALFORMED`,
    /// `RECORD_TOO_LARGE`, `BATCH_TOO_LARGE`.
    pub fn append(
        &mut self,
        now: u64,
        author: &Arc<Author>,
        producer: (&ProducerHandle, u64, u64),
        run: Option<u64>,
        batch: CheckedBatch,
        ticket: T,
    ) -> (Outcome, Option<T>) {
        let (handle, epoch, sequence) = producer;
        let refused = |code, value, detail| (Outcome::Refused(Refusal { code, value, detail }), None);
        if self.uncertain {
            return (Outcome::Refused(Self::uncertain()), None);
        }
        // What is stored or in flight is answered for what it is; only a new batch asks whether it may come.
        match self.state.producers.admit(handle, epoch, sequence) {
            Admission::Stored(acked) => return (Outcome::Done(Reply::Appended { sequence, acked }), Some(ticket)),
            Admission::InFlight => {
                self.push(Work::Again { handle: handle.clone(), sequence }, Some(ticket));
                return (Outcome::Pending, None);
            }
            Admission::Refused(Code::FENCED, value) if value == epoch => {
                return refused(Code::FENCED, value, "the producer was opened again under its epoch");
            }
            Admission::Refused(code, value) => {
                let detail = match code {
                    Code::FENCED => "a newer epoch of this producer was granted",
                    _ => "the producer is not known under this epoch; open it again",
                };
                return refused(code, value, detail);
            }
            Admission::New => {}
        }
        if let Err(refusal) = self.goes_on() {
            return (Outcome::Refused(refusal), None);
        }
        if batch.max_stream >= self.state.streams().len() {
            return refused(Code::STREAM_UNDEFINED, 0, "the session has no stream with this id");
        }
        if let Err((code, value)) = self.state.producers.expect(handle, sequence) {
            let detail = match code {
                Code::SEQ_GAP => "the batch is ahead of the producer's next sequence",
                Code::DUPLICATE => "the batch was stored long ago",
                Code::LIMIT_EXCEEDED => "too many batches are unacknowledged",
                _ => "a newer epoch of this producer is being granted",
            };
            return refused(code, value, detail);
        }
        let held = match run.map(|epoch| self.held_run(author, epoch)).transpose() {
            Ok(held) => held,
            Err(refusal) => return (Outcome::Refused(refusal), None),
        };
        let time = self.stamp(now);
        let batch = if batch.plain {
            batch
        } else {
            match self.overlay.admit(self.state.view(), (author, held), (self.staged_tail, time), batch) {
                Ok(batch) => batch,
                Err(refusal) => return (Outcome::Refused(refusal), None),
            }
        };
        self.state.producers.take(handle);
        let work = Work::Batch { author: author.clone(), handle: handle.clone(), epoch, sequence, time, batch };
        self.push(work, Some(ticket));
        (Outcome::Pending, None)
    }

    /// Grants the next epoch of a producer, or confirms `keep` (spec PROD-4).
    ///
    /// Refusals: `FENCED` with the current epoch if `keep` is older, `PRODUCER_UNKNOWN` if it was never granted or the
    /// producer was evicted.
    pub fn open_producer(&mut self, now: u64, key: ProducerKey, keep: Option<u64>, ticket: T) -> (Outcome, Option<T>) {
        if self.uncertain {
            return (Outcome::Refused(Self::uncertain()), None);
        }
        if let Some(epoch) = keep {
            let producers = &mut self.state.producers;
            let position = producers.find(&key).and_then(|known| producers.durable(&known));
            let current = position.map_or(0, |position| position.epoch);
            if current == epoch
                && let Some(position) = position
                && let Some(handle) = producers.hold(&key)
            {
                return (Outcome::Done(Reply::Producer { handle, position }), Some(ticket));
            }
            let refusal = if current > epoch {
                let detail = "a newer epoch of this producer was granted";
                Refusal { code: Code::FENCED, value: current, detail }
            } else {
                Refusal::new(Code::PRODUCER_UNKNOWN, "the epoch was never granted, or the producer was evicted")
            };
            return (Outcome::Refused(refusal), None);
        }
        self.stamp(now);
        let epoch = self.state.producers.stage_grant(key.clone());
        if planted(Bug::EpochInMemory) {
            self.state.producers.granted(key.clone(), epoch);
            if let Some(handle) = self.state.producers.hold(&key)
                && let Some(position) = self.state.producers.durable(&handle)
            {
                return (Outcome::Done(Reply::Producer { handle, position }), Some(ticket));
            }
        }
        self.push(Work::Grant { key, epoch }, Some(ticket));
        (Outcome::Pending, None)
    }

    /// Binds a stream id to a name, or finds it (spec SESS-6). Refusals: `LIMIT_EXCEEDED` beyond 256 streams,
    /// `UNAVAILABLE`.
    pub fn define_stream(&mut self, now: u64, name: Label, ticket: T) -> (Outcome, Option<T>) {
        if self.uncertain {
            return (Outcome::Refused(Self::uncertain()), None);
        }
        if let Some(id) = self.state.streams().id(&name) {
            return (Outcome::Done(Reply::Stream { id, name }), Some(ticket));
        }
        let staged = self.staged_streams.iter().position(|known| *known == name);
        let at = staged.unwrap_or(self.staged_streams.len());
        let id = self.state.streams().len() + at as u64;
        if id >= MAX_STREAMS as u64 {
            return (Outcome::Refused(Refusal::new(Code::LIMIT_EXCEEDED, "the session has too many streams")), None);
        }
        if staged.is_none() {
            self.staged_streams.push(name.clone());
        }
        self.stamp(now);
        self.push(Work::Stream { id, name }, Some(ticket));
        (Outcome::Pending, None)
    }

    /// Closes the session (spec SESS-14). Closing again finds the first close. Refusals: `UNAVAILABLE`.
    pub fn close(&mut self, now: u64, author: &Arc<Author>, ticket: T) -> (Outcome, Option<T>) {
        if self.uncertain {
            return (Outcome::Refused(Self::uncertain()), None);
        }
        if let Some(seq) = self.state.view().closed() {
            return (Outcome::Done(Reply::Closed { seq }), Some(ticket));
        }
        // A close that is in flight already is found by the fold, which keeps the first.
        let again = core::mem::replace(&mut self.staged_closed, true);
        let time = self.stamp(now);
        let work = if again {
            Work::Entry { entry: Control::Fence { epoch: self.writer_epoch } }
        } else {
            let record = Record { kind: Kind::SESSION_CLOSED, ..Record::data(STREAM_MAIN, Bytes::new()) };
            Work::Record { author: author.clone(), time, record }
        };
        self.push(work, Some(ticket));
        (Outcome::Pending, None)
    }

    /// Releases records below `before`, at most up to the durable tail (spec SESS-18). The driver removes them from the
    /// store after a snapshot of the state is durable. Refusals: `UNAVAILABLE`.
    pub fn trim(&mut self, now: u64, before: u64, ticket: T) -> (Outcome, Option<T>) {
        if self.uncertain {
            return (Outcome::Refused(Self::uncertain()), None);
        }
        let before = before + u64::from(planted(Bug::TrimTooFar));
        let first = before.min(self.state.tail());
        if first <= self.state.first() {
            return (Outcome::Done(Reply::Trimmed { first: self.state.first() }), Some(ticket));
        }
        self.stamp(now);
        self.push(Work::Trim { first }, Some(ticket));
        (Outcome::Pending, None)
    }

    /// Lets a client go on as the one that it was, or binds its instance to its key (spec RES-4). Refusals: `RESUME_REQUIRED`,
    /// `RESUME_UNKNOWN`, `RESUME_STALE`, `RESUME_INVALID`, `UNAVAILABLE`.
    pub fn resume(&mut self, now: u64, author: &Arc<Author>, claim: &ResumeClaim, ticket: T) -> (Outcome, Option<T>) {
        if self.uncertain {
            return (Outcome::Refused(Self::uncertain()), None);
        }
        let key = claim.key;
        match self.state.resumptions.judge(author, claim) {
            Ok(Claimed::Again(generation)) => (Outcome::Done(Reply::Resumed { key, generation }), Some(ticket)),
            Ok(Claimed::Next(generation)) => {
                self.stamp(now);
                self.state.resumptions.stage((**author).clone(), key, generation);
                self.push(Work::Resume { author: author.clone(), key, generation }, Some(ticket));
                (Outcome::Pending, None)
            }
            Err(refusal) => (Outcome::Refused(refusal), None),
        }
    }

    /// Writes what became due at `now` (see [`State::deadline`]): values, signals and requests that expire (spec STATE-6, SIG-5,
    /// SIG-8). At most 64 values at once; the rest is due again.
    pub fn tick(&mut self, now: u64) {
        if self.uncertain || self.staged_closed {
            return;
        }
        self.expire_signals(now);
        self.emit_jobs(now);
        for _ in 0..EXPIRED_AT_ONCE {
            let Some(key) = self.overlay.expired(self.state.view(), now) else { return };
            let author = self.server.clone();
            // No rule keeps a value from expiring.
            let _ = self.write(now, author, StateExpired { key }.record(STREAM_MAIN), None);
        }
    }

    /// True if something waits that was not committed before and that nothing else asks for.
    pub fn is_held_back(&self) -> bool {
        self.held_back && self.staged_tail != self.state.tail()
    }

    /// Lets what is held back be tried again.
    pub fn try_again(&mut self) {
        self.held_back = false;
    }

    /// Succeeds if records may follow. Refusals: `SESSION_CLOSED`, `UNAVAILABLE`.
    fn goes_on(&self) -> Result<(), Refusal> {
        if self.uncertain {
            return Err(Self::uncertain());
        }
        if self.state.view().closed().is_some() {
            return Err(Refusal::new(Code::SESSION_CLOSED, "the session is closed"));
        }
        if self.staged_closed {
            // The close may still fail to become durable.
            return Err(Refusal::new(Code::UNAVAILABLE, "the session is being closed"));
        }
        Ok(())
    }

    /// Accepts a record that the server writes. Refusals, with the ticket: of the rules, `SESSION_CLOSED`, `UNAVAILABLE`.
    fn write(
        &mut self,
        now: u64,
        author: Arc<Author>,
        record: Record,
        ticket: Option<T>,
    ) -> Result<(), (Refusal, Option<T>)> {
        let admitted = self.goes_on().and_then(|()| {
            let time = self.stamp(now);
            self.overlay.admit_one(self.state.view(), &author, (self.staged_tail, time), &record)?;
            Ok(time)
        });
        match admitted {
            Ok(time) => {
                self.push(Work::Record { author, time, record }, ticket);
                Ok(())
            }
            Err(refusal) => Err((refusal, ticket)),
        }
    }

    /// Somebody is here (spec PRES-1). Who is here already under the same name and grace stays so under the same generation, and
    /// does what it says now. Refusals: `SESSION_CLOSED`, `LIMIT_EXCEEDED` also for a grace that is too short or too long (spec
    /// PRES-4), `UNAVAILABLE`.
    pub fn join(&mut self, now: u64, author: &Arc<Author>, joined: PresenceJoined, ticket: T) -> (Outcome, Option<T>) {
        if !(MIN_GRACE..=MAX_GRACE).contains(&joined.grace) {
            let detail = "the grace of a member is from one second to two minutes";
            return (Outcome::Refused(Refusal::new(Code::LIMIT_EXCEEDED, detail)), None);
        }
        let record = match self.state.view().members().get(author) {
            Some(member) if (&member.name, member.grace) == (&joined.name, joined.grace) => {
                let said = |work: &Work| matches!(work, Work::Record { author: by, .. } if by == author);
                let waits = self.waiting.iter().any(|(work, _)| said(work));
                let pending = waits || self.overlay.changes_member(author);
                if !pending && member.activity == joined.activity && !self.uncertain {
                    return (Outcome::Done(Reply::Joined { generation: member.generation }), Some(ticket));
                }
                match self.overlay.member(self.state.view(), author) == Some(member.generation) {
                    true => PresenceUpdated { activity: joined.activity }.record(STREAM_MAIN),
                    false => joined.record(STREAM_MAIN),
                }
            }
            _ => joined.record(STREAM_MAIN),
        };
        self.ask(now, author, record, ticket)
    }

    /// A member is doing something else (spec PRES-2). Nothing answers it. Refusals: `NOT_A_MEMBER`, `SESSION_CLOSED`,
    /// `LIMIT_EXCEEDED`, `UNAVAILABLE`.
    ///
    /// What the same member said before and is in no chunk yet is replaced: of many updates a busy disk sees the last.
    pub fn update(&mut self, now: u64, author: &Arc<Author>, updated: PresenceUpdated) -> Result<(), Refusal> {
        self.goes_on()?;
        let record = updated.record(STREAM_MAIN);
        let same = |work: &Work| matches!(work, Work::Record { author: by, record, .. } if by == author && record.kind == Kind::PRESENCE_UPDATED);
        // Not in front of anything else that is about the member.
        let about = |work: &Work| match work {
            Work::Batch { author: by, batch, .. } => by == author && !batch.plain,
            Work::Record { author: by, record, .. } => by == author || record.kind == Kind::PRESENCE_LEFT,
            _ => false,
        };
        let last = self.waiting.iter().rposition(|(work, _)| about(work));
        let waiting = last.filter(|&at| self.waiting[at].1.is_none() && same(&self.waiting[at].0));
        match waiting.and_then(|at| self.waiting.get_mut(at)) {
            Some((work @ Work::Record { .. }, _)) if self.overlay.member(self.state.view(), author).is_some() => {
                updated.activity.check()?;
                self.waiting_bytes -= work.len();
                if let Work::Record { record: before, .. } = work {
                    *before = record;
                }
                self.waiting_bytes += work.len();
                Ok(())
            }
            _ => self.write(now, author.clone(), record, None).map_err(|(refusal, _)| refusal),
        }
    }

    /// A member is not here any more (spec PRES-3). One that is not here has left already. Refusals: `SESSION_CLOSED`,
    /// `UNAVAILABLE`.
    pub fn leave(&mut self, now: u64, author: &Arc<Author>, ticket: T) -> (Outcome, Option<T>) {
        let Some(generation) = self.overlay.member(self.state.view(), author) else {
            if self.state.view().members().get(author).is_none() {
                return (Outcome::Done(Reply::Left), Some(ticket));
            }
            if self.uncertain {
                return (Outcome::Refused(Self::uncertain()), None);
            }
            // Answered once the departure that was accepted is durable.
            self.push(Work::Left, Some(ticket));
            return (Outcome::Pending, None);
        };
        let reason = Departure::Left;
        let generation = if planted(Bug::LeaveWithoutGeneration) { 0 } else { generation };
        let left = PresenceLeft { member: (**author).clone(), generation, reason };
        self.ask(now, author, left.record(STREAM_MAIN), ticket)
    }

    /// Nothing was heard of a member for its grace (spec PRES-4). Does nothing if it is not here under this generation, or if it
    /// cannot be written now: who asks asks again.
    pub fn lose_member(&mut self, now: u64, author: &Arc<Author>, generation: u64) {
        if self.overlay.member(self.state.view(), author) == Some(generation) {
            let left = PresenceLeft { member: (**author).clone(), generation, reason: Departure::Lost };
            let server = self.server.clone();
            let _ = self.write(now, server, left.record(STREAM_MAIN), None);
        }
    }

    fn ask(&mut self, now: u64, author: &Arc<Author>, record: Record, ticket: T) -> (Outcome, Option<T>) {
        match self.write(now, author.clone(), record, Some(ticket)) {
            Ok(()) => (Outcome::Pending, None),
            Err((refusal, _)) => (Outcome::Refused(refusal), None),
        }
    }

    /// Refuses a request with what was found. What it contradicts may be accepted and not durable yet, and nothing is told of that (spec
    /// DUR-2): the refusal then comes out of [`Authority::committed`] once it is, or the ticket out of [`Authority::not_committed`].
    /// Returns what is to be told now.
    pub fn refuse(&mut self, refusal: Refusal, ticket: T) -> Option<(Refusal, T)> {
        let by_what_is_stored = matches!(
            refusal.code,
            Code::CONFLICT
                | Code::STATE_INVALID
                | Code::MESSAGE_EXISTS
                | Code::MESSAGE_NOT_OPEN
                | Code::NOT_A_MEMBER
                | Code::RUN_FENCED
                | Code::RUN_ACTIVE
                | Code::RUN_OVER
                | Code::ALREADY_RESOLVED
                | Code::ID_IN_USE
                | Code::LIMIT_EXCEEDED
                | Code::QUOTA_EXCEEDED
        );
        if !by_what_is_stored || self.overlay.is_empty() || planted(Bug::DirtyRefusal) {
            return Some((refusal, ticket));
        }
        if self.deferred == MAX_DEFERRED {
            let detail = "too many requests wait for what they contradict to be durable";
            return Some((Refusal::new(Code::OVERLOADED, detail), ticket));
        }
        self.deferred += 1;
        // With the last of what was accepted: a chunk for its own sake would mostly be one of nothing.
        let work = (Work::Refused(refusal), Some(ticket));
        match (self.waiting.is_empty(), &mut self.prepared, &mut self.flight) {
            (true, Some(last), _) | (true, None, Some(last)) => last.work.push(work),
            _ => {
                let (work, ticket) = work;
                self.push(work, ticket);
            }
        }
        None
    }

    /// The next chunk to commit, if none is in flight and something waits (spec DUR-5): at most 64 KiB of records, or one
    /// larger batch.
    pub fn next_chunk(&mut self) -> Step {
        // The creation alone waits for a request that needs a chunk, or a refused one would be tried again at once, for ever.
        let asks = |(work, ticket): &(Work, Option<T>)| {
            ticket.is_some() || matches!(work, Work::Record { .. }) && !self.held_back
        };
        let asked = self.prepared.is_some() || self.waiting.iter().any(asks);
        if self.flight.is_some() || self.uncertain || !asked {
            return Step::Idle;
        }
        let flight = match self.prepared.take() {
            Some(prepared) => prepared,
            None => {
                let state = &self.state;
                let end = (state.tail(), state.number(), state.time(), state.chain());
                self.make(end, self.writer_epoch != state.writer_epoch())
            }
        };
        let chunk = flight.chunk.clone();
        self.flight = Some(flight);
        Step::Commit(chunk)
    }

    /// Makes the chunk behind the one in flight, if a whole turn waits for it. Less would be smaller chunks for nothing: more may
    /// come until the one in flight is durable.
    pub fn prepare(&mut self) {
        if self.prepared.is_some() || self.uncertain || self.waiting_bytes < self.turn {
            return;
        }
        if let Some(Flight { chunk, .. }) = &self.flight {
            let header = chunk.header();
            let end = (chunk.end(), header.number + 1, chunk.time().max(self.state.time()), header.chain);
            self.prepared = Some(self.make(end, false));
        }
    }

    /// Makes a chunk of what waits, behind a log that ends at this seq, number, time and chain.
    fn make(&mut self, end: (u64, u64, u64, Chain), fence: bool) -> Flight<T> {
        let (tail, number, time, chain) = end;
        let mut times = self.waiting.iter().filter_map(|(work, _)| time_of(work));
        let base_time = match planted(Bug::TimeRunsBackwards) {
            true => times.min().unwrap_or(time),
            false => time.max(times.next().unwrap_or(0)),
        };
        let mut builder = ChunkBuilder::new(
            self.state.incarnation(),
            tail,
            number,
            self.writer_epoch,
            base_time.max(self.staged_time_if_control_only()),
            chain,
        );
        if fence {
            builder.control(Control::Fence { epoch: self.writer_epoch });
        }
        let mut work = Vec::new();
        let mut bytes = 0;
        while let Some((next, _)) = self.waiting.front() {
            if !work.is_empty() && bytes + next.len() > self.turn {
                break;
            }
            let Some((next, ticket)) = self.waiting.pop_front() else {
                break;
            };
            bytes += next.len();
            match &next {
                Work::Batch { author, handle, epoch, sequence, time, batch } => {
                    let half = (planted(Bug::HalfBatch) && batch.count > 2).then(|| batch.without_the_last());
                    builder.batch(author, &handle.key().name, *epoch, *sequence, *time, half.as_ref().unwrap_or(batch));
                }
                Work::Record { author, time, record } => builder.record(author, *time, record),
                Work::Grant { key, epoch } => {
                    let (subject, name) = (key.subject.clone(), key.name.clone());
                    builder.control(Control::Producer { subject, name, epoch: *epoch });
                }
                Work::Stream { id, name } => builder.control(Control::Stream { id: *id, name: name.clone() }),
                Work::Trim { first } => builder.control(Control::Trim { first: *first }),
                Work::Resume { author, key, generation } => {
                    let (author, key, generation) = ((**author).clone(), *key, *generation);
                    builder.control(Control::Resume { author, key, generation });
                }
                Work::Entry { entry } => builder.control(entry.clone()),
                Work::Again { .. } | Work::Left | Work::Refused(_) => {}
            }
            work.push((next, ticket));
        }
        self.waiting_bytes -= bytes;
        match builder.finish() {
            Ok(chunk) => Flight { chunk: Arc::new(chunk), work },
            // The batches were checked when they were accepted; a region that no longer parses cannot happen.
            Err(_) => unreachable!("checked batches make a valid chunk"),
        }
    }

    /// A chunk of control entries alone is stamped with the time of the last request.
    fn staged_time_if_control_only(&self) -> u64 {
        if self.waiting.iter().any(|(work, _)| time_of(work).is_some()) { 0 } else { self.staged_time }
    }

    /// The chunk in flight is durable. Returns it with the answers, in the order of the requests.
    ///
    /// Errors: damage if the chunk does not follow the state; impossible for a chunk of [`Authority::next_chunk`].
    pub fn committed(&mut self) -> Result<Option<Committed<T>>, Damage> {
        let Some(Flight { chunk, work }) = self.flight.take() else {
            return Ok(None);
        };
        self.uncertain = false;
        self.state.apply(&chunk)?;
        let streams = self.state.streams().names();
        self.staged_streams.retain(|name| !streams.contains(name));
        self.overlay.durable(chunk.end());
        let mut first = chunk.first();
        let mut replies = Vec::with_capacity(work.len());
        let mut early = Vec::new();
        for (work, ticket) in work {
            let count = work.count();
            work.put_early(first, &mut early);
            if let Some(ticket) = ticket
                && let Some(reply) = self.reply(work, first)
            {
                replies.push((ticket, reply));
            }
            first += count;
        }
        Ok(Some(Committed { chunk, replies, early }))
    }

    fn reply(&mut self, work: Work, first: u64) -> Option<Reply> {
        let state = &mut self.state;
        Some(match work {
            Work::Batch { sequence, batch, .. } => {
                Reply::Appended { sequence, acked: Acked { first, count: batch.count } }
            }
            Work::Again { handle, sequence } => {
                Reply::Appended { sequence, acked: state.producers.lookup(handle.key(), sequence)? }
            }
            Work::Grant { key, epoch } => {
                let handle = state.producers.hold(&key)?;
                // A newer one may have become durable with it.
                let position = ProducerPosition { epoch, ..state.producers.durable(&handle)? };
                Reply::Producer { handle, position }
            }
            Work::Stream { id, name } => Reply::Stream { id, name },
            Work::Entry { .. } => Reply::Closed { seq: state.view().closed()? },
            Work::Left => Reply::Left,
            Work::Refused(refusal) => {
                self.deferred -= 1;
                Reply::Refused(refusal)
            }
            Work::Trim { .. } => Reply::Trimmed { first: state.first() },
            Work::Resume { key, generation, .. } => Reply::Resumed { key, generation },
            Work::Record { author, record, .. } => match record.kind {
                Kind::SESSION_CLOSED => Reply::Closed { seq: state.view().closed()? },
                Kind::PRESENCE_LEFT => Reply::Left,
                Kind::SESSION_CONFIGURED | Kind::NOTIFY_RULE => Reply::Configured { seq: first },
                Kind::RUN_START => {
                    Reply::Run { run: record.run?, epoch: first, lost: RunStart::of(&record).ok()?.lost }
                }
                kind if Intent::of_kind(kind).is_some() => {
                    Reply::Signalled { signal: Signal::of(&record).ok()?.id, seq: first }
                }
                // Joined, or said anew what it is doing; it may have been lost meanwhile.
                _ => Reply::Joined { generation: state.view().members().get(&author).map_or(first, |m| m.generation) },
            },
        })
    }

    /// The chunk in flight is not stored. Everything accepted since the last commit is dropped; returns its tickets, each
    /// to be refused with the reason that the store gave (spec DUR-4).
    pub fn not_committed(&mut self) -> Vec<T> {
        let made = [self.flight.take(), self.prepared.take()].into_iter().flatten();
        let dropped = made.flat_map(|flight| flight.work).chain(self.waiting.drain(..));
        // What has no ticket was not asked for by anyone and must still be written.
        // Its own records it decides anew, over what is durable. What members said, which nothing answers, still holds.
        let members = self.state.view().members();
        let dropped = dropped.filter(|(work, ticket)| match work {
            Work::Record { author, record, .. } if ticket.is_none() => {
                record.kind == Kind::PRESENCE_UPDATED && members.get(author).is_some()
            }
            _ => true,
        });
        let (kept, tickets): (Vec<_>, Vec<_>) = dropped.partition(|(_, ticket)| ticket.is_none());
        self.waiting.clear();
        self.waiting_bytes = 0;
        self.deferred = 0;
        self.state.producers.roll_back();
        self.state.resumptions.roll_back();
        if !planted(Bug::OverlayKept) {
            self.overlay.roll_back();
        }
        self.staged_tail = self.state.tail();
        self.staged_closed = self.state.view().closed().is_some();
        self.staged_time = self.state.time();
        self.staged_streams.clear();
        self.uncertain = false;
        for (work, _) in kept {
            if let Work::Record { author, time, record } = &work {
                let time = self.stamp(*time);
                // Accepted before, and its member is here: no rule is left that could refuse it.
                let _ = self.overlay.admit_one(self.state.view(), author, (self.staged_tail, time), record);
            }
            self.push(work, None);
        }
        self.held_back = true;
        tickets.into_iter().filter_map(|(_, ticket)| ticket).collect()
    }

    /// It is not known whether the chunk in flight is stored. Nothing is accepted until [`Authority::committed`] or
    /// [`Authority::not_committed`] says so (spec DUR-4).
    pub fn unknown(&mut self) {
        self.uncertain = self.flight.is_some();
    }

    /// True between [`Authority::unknown`] and its resolution.
    pub fn is_uncertain(&self) -> bool {
        self.uncertain
    }
}

fn time_of(work: &Work) -> Option<u64> {
    match work {
        Work::Batch { time, .. } | Work::Record { time, .. } => Some(*time),
        _ => None,
    }
}

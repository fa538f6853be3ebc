//! The fold: the view of a session as a pure function of its records (spec FOLD).

mod changes;
mod entries;
mod members;
mod messages;
mod notifications;
mod runs;
mod signals;

use std::sync::{Arc, OnceLock};

use bytes::Bytes;

pub use entries::{Entries, Entry};
pub use members::{Member, Members};
pub use messages::{IndexedMessage, Message, Messages};
pub use notifications::{Job, Notifications};
pub use runs::{FinishedRun, Input, Run, Runs};
pub use signals::{
    OpenRequest, PendingSignal, RequestOutcome, ResolvedRequest, ResolvedSignal, SignalOutcome, Signals,
};

use super::kinds::{Deed, Departure, Intent, Kind, PresenceJoined, Status};
use super::record::{Head, Record};
use super::words::{Author, MessageId, RequestId, RunId, ViewHash};
use crate::error::ProtocolError;
use crate::planted::{Bug, planted};
use crate::registry::{FOLD_VERSION, MAX_STREAMS};
use crate::wire::{MAX_VARINT, Reader, Subject, Writer};

/// The fold version since which a view knows who wrote the inputs that wait, and that caused runs.
const ASKERS_SINCE: u64 = 6;

/// Bytes that each row of a view, or of a table beside it, is taken to have beside its text or value. Too few, and a buffer of megabytes is made anew
/// while it grows, which takes several times as long as what is written into it.
pub(super) const ROW: usize = 192;

/// Bytes of a member: most of them are what it says that it is doing.
const MEMBER: usize = 1024;

/// What the view knows of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamView {
    /// The stream id.
    pub id: u64,
    /// Records folded.
    pub records: u64,
    /// Payload bytes folded.
    pub bytes: u64,
    /// Seq of the last record.
    pub last: u64,
}

/// How the bytes of messages and values stand in an encoding of a view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Whole, each behind its length.
    Whole,
    /// As the BLAKE3 of each.
    Hashed,
}

impl Form {
    fn put(self, bytes: &[u8], w: &mut Writer) {
        self.put_known(bytes, &Digest::default(), w);
    }

    /// The same of bytes whose hash is kept.
    fn put_known(self, bytes: &[u8], digest: &Digest, w: &mut Writer) {
        match self {
            Self::Whole => w.bytes(bytes),
            Self::Hashed => w.raw(digest.0.get_or_init(|| *blake3::hash(bytes).as_bytes())),
        }
    }
}

/// The hash of bytes that do not change any more, once somebody asked for it: a view of thousands of values is hashed after each change of one.
#[derive(Debug, Clone, Default)]
struct Digest(OnceLock<[u8; 32]>);

impl PartialEq for Digest {
    /// It says nothing that the bytes do not say.
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Digest {}

/// The moment at which a session must be served that may never be out of memory (see [`super::State::wake`]).
pub const AT_ONCE: u64 = 0;
/// The moment of a session that must be served when a worker asks for jobs, and has nothing else to do.
pub const FOR_WORKERS: u64 = 1;

/// The current picture of a session: `fold(records below next)`. Bounded: it grows with what the session holds now, within
/// the registry's limits, never with the number of records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct View {
    next: u64,
    time: u64,
    closed: Option<u64>,
    streams: Vec<StreamView>,
    messages: Messages,
    entries: Entries,
    members: Members,
    runs: Runs,
    signals: Signals,
    notifications: Notifications,
}

impl View {
    /// The first seq that is not folded.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Time of the last record, in milliseconds since the Unix epoch; 0 before the first.
    pub fn time(&self) -> u64 {
        self.time
    }

    /// Seq of the `session.closed` record.
    pub fn closed(&self) -> Option<u64> {
        self.closed
    }

    /// What is known of each stream that has records, ascending by id.
    pub fn streams(&self) -> &[StreamView] {
        &self.streams
    }

    /// The messages.
    pub fn messages(&self) -> &Messages {
        &self.messages
    }

    /// The shared state.
    pub fn state(&self) -> &Entries {
        &self.entries
    }

    /// Who is here.
    pub fn members(&self) -> &Members {
        &self.members
    }

    /// The runs, and the inputs that wait for one.
    pub fn runs(&self) -> &Runs {
        &self.runs
    }

    /// The signals and requests.
    pub fn signals(&self) -> &Signals {
        &self.signals
    }

    /// The rules of notification, and their jobs.
    pub fn notifications(&self) -> &Notifications {
        &self.notifications
    }

    /// Who wrote an input, if it waits, or its message is open or kept whole. *One that waits has its author also where its id was taken
    /// again, once the message was forgotten.*
    pub fn writer_of(&self, id: MessageId) -> Option<&Arc<Author>> {
        let waiting = self.runs.inputs().find(|input| input.message == id).map(|input| input.author.as_ref());
        waiting.unwrap_or_else(|| self.messages.get(id).filter(|of| of.is_input()).map(|message| &message.author))
    }

    /// When the server has something to write, in milliseconds since the Unix epoch: a value, a signal or a request expires, or a job
    /// is due.
    pub(super) fn deadline(&self) -> Option<u64> {
        let value = self.entries.deadlines().next().map(|(at, _)| *at);
        let deadlines = value.into_iter().chain(self.signals.deadline()).chain(self.notifications.deadline());
        deadlines.min().filter(|_| self.closed.is_none())
    }

    /// When a server that is not serving the session must, in milliseconds since the Unix epoch: at once while somebody or something is
    /// held by a lease (spec PRES-4, RUN-4), when a worker asks while it has jobs (spec NOTE-5), else when something expires. One with
    /// jobs and something that expires has no one moment for both, and stays.
    pub(super) fn wake(&self) -> Option<u64> {
        let leased = !self.members.is_empty() || self.runs.active().any(|run| run.lease > 0);
        match (leased, self.notifications.emitted().next().is_some(), self.deadline()) {
            (true, _, _) | (false, true, Some(_)) => Some(AT_ONCE),
            (false, true, None) => Some(FOR_WORKERS),
            (false, false, deadline) => deadline,
        }
    }

    /// Folds the record bytes of the next seq (spec FOLD-2). A record that some version accepted cannot fail; an error
    /// means that the bytes are not a record.
    pub fn apply(&mut self, author: &Arc<Author>, time: u64, record: &Bytes) -> Result<(), ProtocolError> {
        let mut r = Reader::new(record);
        self.fold(author, time, &mut r, record.len(), true)
    }

    /// Goes on at `next`: the records before it were left out by a filter or a roll-up. The counts of streams do not know them.
    pub fn pass_over(&mut self, next: u64) {
        self.next = self.next.max(next);
    }

    /// So many records with payloads of so many bytes were written to a stream: what a chunk that was put together says, in the place
    /// of the counting of its records.
    pub(super) fn count(&mut self, stream: u64, records: u64, bytes: u64) {
        let counts = self.stream_mut(stream);
        counts.records = counts.records.saturating_add(records);
        counts.bytes = counts.bytes.saturating_add(bytes);
    }

    /// Folds a decoded record; as [`View::apply`].
    ///
    /// Errors: `RECORD_MALFORMED` if its payload or ids are not those of its kind.
    pub fn fold_record(&mut self, author: &Arc<Author>, time: u64, record: &Record) -> Result<(), ProtocolError> {
        let deed = Deed::of(record)?;
        self.step(author, time, (record.stream, Some(record.payload.len())), deed);
        Ok(())
    }

    /// Folds the record that `r` stands at; its bytes end at position `end` of the reader's input. Where it is not `counted`, its chunk
    /// says what was written.
    pub(super) fn fold(
        &mut self,
        author: &Arc<Author>,
        time: u64,
        r: &mut Reader<'_>,
        end: usize,
        counted: bool,
    ) -> Result<(), ProtocolError> {
        let start = r.clone();
        let head = Head::get(r)?;
        head.skip_to_payload(r)?;
        let payload =
            end.checked_sub(r.position()).ok_or(ProtocolError::malformed("record fields exceed the record"))?;
        let deed = if head.kind.is_plain() {
            Deed::Plain
        } else {
            let mut whole = start;
            let len = end - whole.position();
            Deed::of(&Record::parse(&whole.take(len)?)?)?
        };
        self.step(author, time, (head.stream, counted.then_some(payload)), deed);
        Ok(())
    }

    /// Folds one record in a stream, of so many payload bytes if it is counted.
    fn step(&mut self, author: &Arc<Author>, time: u64, (stream, payload): (u64, Option<usize>), deed: Deed) {
        let seq = self.next;
        self.next += 1;
        self.time = self.time.max(time);
        let counts = self.stream_mut(stream);
        counts.records += u64::from(payload.is_some());
        counts.bytes += payload.unwrap_or(0) as u64;
        counts.last = seq;
        match deed {
            // A request is never stored; where it is, it means nothing.
            Deed::Plain | Deed::StateChange(_) => {}
            Deed::SessionClosed => {
                self.closed.get_or_insert(seq);
                self.messages.interrupt_all(seq);
                self.members.clear();
                while let Some(run) = self.runs.current().first().map(|run| run.id) {
                    self.finish_run(seq, run, Status::Interrupted);
                }
                self.signals.finish_run(seq, |_| true);
                self.notifications.withdraw(|_| true);
            }
            Deed::MessageStart(id, run, of) => self.messages.start((seq, time, stream), author, (id, run), of),
            Deed::MessageAppend(id, bytes) => self.messages.append(seq, id, &bytes),
            Deed::MessageReplace(id, bytes) => self.messages.replace(seq, id, &bytes),
            Deed::MessageEnd(id, of) => {
                let known = self.messages.get(id).map(|message| message.status);
                match self.messages.end(seq, id, of.status) {
                    Some(input) => self.runs.input(input),
                    None if known == Some(Status::Open) && of.status == Status::Complete => {
                        self.happened((seq, time), Kind::MESSAGE_END, None);
                    }
                    None => {}
                }
            }
            Deed::StatePut(put) => {
                let expires = (put.lasts > 0).then(|| time.saturating_add(put.lasts).min(MAX_VARINT));
                // Its own memory: a chunk would live as long as its smallest value.
                let value = Bytes::copy_from_slice(&put.value);
                self.entries.put(put.key, Entry { revision: seq, author: author.clone(), expires, value });
            }
            Deed::StateDeleted(_) if planted(Bug::DeletionNotFolded) => {}
            Deed::StateDeleted(deleted) => self.entries.remove(&deleted.key),
            Deed::StateExpired(expired) => self.entries.remove(&expired.key),
            Deed::PresenceJoined(of) => {
                let of = PresenceJoined { activity: of.activity.owned(), ..of };
                self.members.join(seq, time, author, of);
                self.seen(&author.subject);
            }
            Deed::PresenceUpdated(of) => self.members.update(seq, author, of.activity.owned()),
            Deed::PresenceLeft(of) => {
                if self.members.leave(&of.member, of.generation) && of.reason == Departure::Lost {
                    self.missed(time, &of.member.subject);
                }
            }
            Deed::SessionConfigured(of) => self.runs.configure(&of),
            Deed::RunStart(id, of) => {
                let asker = of.input.and_then(|input| self.writer_of(input)).cloned();
                for lost in self.runs.start((seq, time), id, (author, asker), &of) {
                    self.finish_run(seq, lost, Status::Interrupted);
                }
                self.messages.reopen(seq, id);
                if let Some(input) = of.input {
                    self.signals.caused(input, id);
                }
            }
            Deed::RunEnd(id, of) => {
                if self.runs.get(id).is_some() {
                    self.happened((seq, time), Kind::RUN_END, None);
                    self.finish_run(seq, id, of.status);
                }
            }
            Deed::RunLost(id, of) => {
                if self.runs.active().any(|run| run.id == id && run.epoch == of.epoch) {
                    self.happened((seq, time), Kind::RUN_LOST, None);
                }
                let (lost, oldest) = self.runs.lose(seq, id, of.epoch);
                if lost {
                    self.messages.suspend(seq, id);
                }
                if let Some(oldest) = oldest {
                    self.finish_run(seq, oldest, Status::Interrupted);
                }
            }
            Deed::RunConsumed(id, of) => self.runs.consume(id, of.through),
            Deed::Signal(run, signal) => {
                if let Some(run) = run.filter(|_| signal.intent == Intent::Interrupt && author.is_server()) {
                    self.runs.interrupted(seq, run);
                }
                self.signals.send((seq, time), author, run, signal);
            }
            Deed::SignalResolved(of) => self.signals.resolve(seq, of.signal, of.outcome.into()),
            Deed::SignalExpired(of) => self.signals.resolve(seq, of.signal, SignalOutcome::Expired),
            Deed::RequestOpened(run, of) => {
                let id = of.request;
                if self.signals.open_request((seq, time), author, run, of) {
                    self.happened((seq, time), Kind::REQUEST_OPENED, Some(id));
                }
            }
            Deed::RequestWithdrawn(of) => self.signals.resolve_request(seq, of.request, RequestOutcome::Withdrawn),
            Deed::RequestExpired(of) => self.signals.resolve_request(seq, of.request, RequestOutcome::Expired),
            Deed::NotifyRule(of) => self.notifications.rule(of),
            Deed::NotifyEmitted(of) => self.notifications.emit(of.job, &of.rule),
            Deed::NotifyDone(of) => self.notifications.withdraw(|job| job.id == of.job && job.rule == of.rule),
        }
        // Of a request that somebody answered nobody needs to be told.
        let signals = &self.signals;
        if self.notifications.jobs().iter().any(|job| job.request.is_some_and(|id| signals.request(id).is_none())) {
            self.notifications.withdraw(|job| job.request.is_some_and(|id| signals.request(id).is_none()));
        }
    }

    /// A run is over, and with it what it was writing, what was wanted of it and what it asked.
    fn finish_run(&mut self, seq: u64, id: RunId, status: Status) {
        if self.runs.finish(seq, id, status) {
            self.messages.finish_run(seq, id);
            self.signals.finish_run(seq, |run| run == Some(id));
        }
    }

    /// Something is about to happen of which people who are not here may want to be told (spec NOTE-2). An agent at work is none of
    /// them, whatever becomes of its work.
    fn happened(&mut self, at: (u64, u64), cause: Kind, request: Option<RequestId>) {
        let (members, runs) = (&self.members, &self.runs);
        let works = |author: &Author| runs.active().any(|run| *run.holder == *author);
        let here = |of: &Subject| members.of(of).any(|author| !works(author));
        self.notifications.happened(at, cause, request, here);
    }

    /// Somebody was lost, and may have been for all of the grace: if nobody of the same subject is here, what is asked is told.
    fn missed(&mut self, time: u64, subject: &Subject) {
        let (members, runs) = (&self.members, &self.runs);
        if !members.of(subject).any(|author| !runs.active().any(|run| *run.holder == **author)) {
            let open: Vec<_> = self.signals.requests().iter().map(|request| (request.seq, request.id)).collect();
            self.notifications.missed(time, subject, &open);
        }
    }

    /// Somebody came: those of the same subject need not be told of what was before.
    fn seen(&mut self, subject: &Subject) {
        if self.notifications.jobs().iter().any(|job| job.principal == *subject) {
            self.notifications.withdraw(|job| job.principal == *subject);
        }
    }

    fn stream_mut(&mut self, id: u64) -> &mut StreamView {
        let at = match self.streams.binary_search_by_key(&id, |stream| stream.id) {
            Ok(at) => at,
            Err(at) => {
                self.streams.insert(at, StreamView { id, records: 0, bytes: 0, last: 0 });
                at
            }
        };
        &mut self.streams[at]
    }

    /// The canonical encoding: equal views have equal bytes (spec FOLD-3).
    pub fn encode(&self) -> Bytes {
        let mut w = Writer::with_capacity(self.weight());
        self.put(&mut w);
        w.freeze()
    }

    /// About how many bytes its canonical encoding has, at least half of them.
    pub fn weight(&self) -> usize {
        self.weight_of_rows() + self.messages.bytes() + self.entries.bytes() + self.signals.bytes()
    }

    /// The same without texts, values and bodies.
    fn weight_of_rows(&self) -> usize {
        let rows = self.streams.len() + self.messages.len() + self.entries.len();
        let rows = rows + self.runs.len() + self.signals.len() + self.notifications.len();
        ROW + rows * ROW + self.members.len() * MEMBER
    }

    /// Writes the canonical encoding.
    pub(in crate::session) fn put(&self, w: &mut Writer) {
        self.put_as(Form::Whole, w);
    }

    fn put_as(&self, form: Form, w: &mut Writer) {
        w.varint(FOLD_VERSION);
        w.varint(self.next);
        w.varint(self.time);
        w.varint(self.closed.map_or(0, |seq| seq + 1));
        w.varint(self.streams.len() as u64);
        for stream in &self.streams {
            w.varint(stream.id);
            w.varint(stream.records);
            w.varint(stream.bytes);
            w.varint(stream.last);
        }
        self.messages.put(form, w);
        self.entries.put_to(form, w);
        self.members.put(w);
        self.runs.put(w);
        self.signals.put(form, w);
        self.notifications.put(w);
    }

    /// Reads a view. Errors: `FRAME_MALFORMED` for anything but a canonical encoding of this fold version.
    pub fn decode(bytes: &Bytes) -> Result<Self, ProtocolError> {
        Self::decode_of(FOLD_VERSION, bytes)
    }

    /// The same of the fold version before, which did not know who wrote an input. Errors: also where the log says it, because it is all
    /// there (`whole`): it has to be folded again.
    pub(super) fn decode_older(bytes: &Bytes, whole: bool) -> Result<Self, ProtocolError> {
        let this = Self::decode_of(ASKERS_SINCE - 1, bytes)?;
        let asked = this.runs.inputs().next().is_some() || this.runs.current().iter().any(|run| run.input.is_some());
        match whole && asked {
            true => Err(ProtocolError::malformed("view is of an older fold version, and does not say who asked")),
            false => Ok(this),
        }
    }

    fn decode_of(version: u64, bytes: &Bytes) -> Result<Self, ProtocolError> {
        let mut r = Reader::new(bytes);
        if r.varint()? != version {
            return Err(ProtocolError::malformed("view is of another fold version"));
        }
        let (next, time) = (r.varint()?, r.varint()?);
        let closed = r.varint()?.checked_sub(1);
        let count = r.count(MAX_STREAMS)?;
        let mut streams: Vec<StreamView> = Vec::with_capacity(count);
        for _ in 0..count {
            let stream = StreamView { id: r.varint()?, records: r.varint()?, bytes: r.varint()?, last: r.varint()? };
            if streams.last().is_some_and(|last| last.id >= stream.id) {
                return Err(ProtocolError::malformed("streams of a view are not in ascending order"));
            }
            if stream.records == 0 || stream.last >= next {
                return Err(ProtocolError::malformed("stream of a view is not consistent"));
            }
            streams.push(stream);
        }
        let messages = Messages::get_from(&mut r, next)?;
        let entries = Entries::get_from(&mut r, next)?;
        let members = Members::get_from(&mut r, next)?;
        let runs = Runs::get_from(&mut r, next, version >= ASKERS_SINCE)?;
        let signals = Signals::get_from(&mut r, next)?;
        let notifications = Notifications::get_from(&mut r, next)?;
        r.finish()?;
        if closed.is_some_and(|seq| seq >= next) {
            return Err(ProtocolError::malformed("view is closed beyond its end"));
        }
        Ok(Self { next, time, closed, streams, messages, entries, members, runs, signals, notifications })
    }

    /// BLAKE3 of the canonical encoding in which the hash of each text and value stands for it (spec FOLD-4).
    pub fn hash(&self) -> ViewHash {
        let mut w = Writer::with_capacity(self.weight_of_rows());
        self.put_as(Form::Hashed, &mut w);
        ViewHash(*blake3::hash(w.as_slice()).as_bytes())
    }
}

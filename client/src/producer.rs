//! Appending: batches on their way, each until it is acknowledged.
//!
//! ```text
//! append ──▶ ready ──▶ flight (numbered) ──▶ sent ──▶ acknowledged
//!                        ▲                     │ refused, or the connection is lost
//!                        └─────────────────────┘
//! ```
//!
//! A batch gets its sequence when it is first sent and keeps it over reconnects, so that the server recognizes it. When a
//! batch is refused for good it used no sequence: those behind it are numbered anew.

use core::future::{Future, IntoFuture};
use core::pin::Pin;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use mainstay_protocol::error::{Advice, Code, ProtocolError};
use mainstay_protocol::planted::{Bug, planted};
use mainstay_protocol::registry::{MAX_BATCH_BYTES, MAX_BATCH_RECORDS, MAX_RECORD, PRODUCER_WINDOW};
use mainstay_protocol::session::{Kind, MessageId, Record, RunId};
use mainstay_protocol::wire::{Ack, Append, Label, Produce, Producer as Granted, Refused, Writer, put_frame};
use mainstay_transport::{Connection, SendStream, StreamError};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::config::Config;
use crate::error::{AppendError, ClientError, Stored};
use crate::link::Link;
use crate::run::Run;
use crate::session::{Session, StreamId};

/// A batch that gathers records stays open up to this many bytes: enough to fill many packets, small enough that the
/// first record does not wait for the last.
const GATHER: usize = 32 * 1024;
/// Bytes handed to the transport in one write.
const BURST: usize = 64 * 1024;
/// Bytes of batches on the way to the server at once.
const SEND_BUDGET: u64 = 4 << 20;

/// The end of one batch: what its tickets wait for.
#[derive(Debug, Default)]
struct Done {
    /// It was handed to a connection at least once.
    sent: AtomicBool,
    result: OnceLock<Result<u64, AppendError>>,
    notify: Notify,
}

impl Done {
    fn set(&self, result: Result<u64, AppendError>) {
        // The first outcome stands.
        let _ = self.result.set(result);
        self.notify.notify_waiters();
    }
}

/// Which records may share a batch: a refusal is of the whole batch, and must not hit what would not be refused alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Group {
    /// No rule refuses one of them.
    Data,
    /// Parts of one message.
    Parts(MessageId),
    /// Nothing joins. Of a message, or not.
    Alone(Option<MessageId>),
}

impl Group {
    fn of(record: &Record) -> Self {
        match (record.kind, record.message) {
            (Kind::DATA, _) => Self::Data,
            (Kind::MESSAGE_APPEND, Some(id)) => Self::Parts(id),
            (_, message) => Self::Alone(message),
        }
    }

    /// The message that all of it is about.
    fn message(self) -> Option<MessageId> {
        match self {
            Self::Data => None,
            Self::Parts(id) => Some(id),
            Self::Alone(message) => message,
        }
    }
}

#[derive(Debug)]
struct Batch {
    count: u64,
    records: Writer,
    group: Group,
    /// Epoch of the run that it is part of.
    run: Option<u64>,
    valid_until: Option<SystemTime>,
    done: Arc<Done>,
}

#[derive(Debug)]
struct Flight {
    sequence: u64,
    count: u64,
    records: Bytes,
    group: Group,
    run: Option<u64>,
    valid_until: Option<SystemTime>,
    done: Arc<Done>,
    /// Sent on the current connection and not answered.
    sent: bool,
    /// Sent on an earlier connection too, without an answer.
    earlier: bool,
    /// Refused on the current connection; to be sent again.
    refused: bool,
    /// Refused for good; its place is given up.
    dead: bool,
}

impl Flight {
    /// What a refusal says about the batch. One for a reason that the server looks at before it looks for the batch, as it does where it
    /// cannot answer now, says nothing about an earlier sending (spec PROD-8).
    fn stored(&self, code: Code) -> Stored {
        let unanswerable = code.is_retryable() && code != Code::SEQ_GAP;
        let of_token = code.advice() == Advice::Reauthenticate;
        let unseen = unanswerable || of_token || matches!(code, Code::FENCED | Code::PRODUCER_UNKNOWN);
        let told = planted(Bug::UnknownToldAsFailed);
        if (code == Code::DUPLICATE || self.earlier && unseen) && !told {
            Stored::Unknown
        } else {
            Stored::NotCommitted
        }
    }
}

#[derive(Debug, Default)]
struct State {
    epoch: u64,
    next: u64,
    /// What is below is known to be stored, whether it was acknowledged or not.
    stored: u64,
    flight: VecDeque<Flight>,
    ready: VecDeque<Batch>,
    bytes: usize,
    ended: Option<ClientError>,
    /// The connection that the batches go over; answers of others are ignored.
    link: Option<u64>,
    /// The one that it has, or had last: what is `sent` is so there.
    sent_on: Option<u64>,
    /// A batch was refused: nothing is sent until everything sent is answered.
    refusing: bool,
    /// Refusals in a row that ask for patience, whether the pause was taken, and since when.
    patience: u32,
    paused: bool,
    /// How long the server asked to wait.
    retry_after: Duration,
    refused_since: Option<Instant>,
    /// Its handle is gone: the stream ends once everything is acknowledged.
    dropped: bool,
    /// A newer epoch was granted: nothing more is sent, what was sent still gets its answers.
    fenced: Option<ClientError>,
    /// Batches given up of which a journal does not know yet: nothing takes their place before it does.
    withheld: usize,
}

impl State {
    /// True if the batch that comes next is certainly not stored.
    fn may_expire(&self) -> bool {
        self.epoch != 0 && self.next >= self.stored
    }

    /// True if the producer needs no connection any more.
    fn is_finished(&self) -> bool {
        self.ended.is_some() || self.dropped && self.flight.is_empty() && self.ready.is_empty()
    }

    /// True if something may still be sent on connection `link`.
    fn goes_on(&self, link: u64) -> bool {
        self.link == Some(link) && !self.is_finished()
    }
}

/// What a journal knows of a producer that goes on after a restart of its application.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Journalled {
    /// The sequence of the first batch that is not known to be stored.
    pub(crate) first: u64,
    /// The sequence behind the last batch that waits.
    pub(crate) end: u64,
    /// An epoch that was granted; `None` if nothing was sent since the sequence began.
    pub(crate) epoch: Option<u64>,
}

/// A producer, shared by its handle, its writing task and the session's driver.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) name: Label,
    config: Arc<Config>,
    /// A journal keeps what became of each batch, and has to know that one was given up before another one takes its sequence.
    journalled: Option<Journalled>,
    state: Mutex<State>,
    /// Something may be sent.
    work: Notify,
    /// There is room again.
    room: Notify,
    /// The last refusal that is being retried.
    trouble: watch::Sender<Option<ClientError>>,
}

impl Shared {
    pub(crate) fn new(name: Label, config: Arc<Config>, journalled: Option<Journalled>) -> Self {
        Self {
            name,
            config,
            journalled,
            state: Mutex::default(),
            work: Notify::new(),
            room: Notify::new(),
            trouble: watch::channel(None).0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The epoch in force; 0 before the first grant.
    pub(crate) fn epoch(&self) -> u64 {
        self.lock().epoch
    }

    /// The epoch to keep on a reconnect; 0 for a new one. A new one tells for certain what is stored: it is asked for where something that
    /// must not be sent any more may be.
    pub(crate) fn kept_epoch(&self) -> u64 {
        let state = self.lock();
        let stale = |flight: &Flight| (flight.sent || flight.earlier) && is_past(flight.valid_until);
        if state.flight.iter().any(stale) { 0 } else { state.epoch }
    }

    /// True while something is sent and not answered.
    pub(crate) fn is_uploading(&self) -> bool {
        self.lock().flight.iter().any(|flight| flight.sent)
    }

    /// True if the producer needs no connection any more.
    pub(crate) fn is_finished(&self) -> bool {
        self.lock().is_finished()
    }

    /// It goes on under its epoch over connection `link`: what is not answered is sent again.
    pub(crate) fn linked(&self, link: u64) {
        let mut state = self.lock();
        (state.link, state.sent_on) = (Some(link), Some(link));
        let (end, kept) = (state.next, state.flight.len() as u64);
        for flight in &mut state.flight {
            flight.earlier |= flight.sent;
            if planted(Bug::TakenForStored) && flight.sent {
                flight.done.set(Ok(0));
            }
            if planted(Bug::SentUnderNewSequence) && flight.sent && flight.sequence < end {
                flight.sequence += kept;
            }
            if !planted(Bug::NeverSentAgain) {
                (flight.sent, flight.refused) = (false, false);
            }
        }
        if planted(Bug::SentUnderNewSequence) {
            state.next += kept;
        }
        self.settle(state);
    }

    /// The server granted or confirmed an epoch on connection `link`. One that it forgot meanwhile has ended: what was sent may be stored.
    /// Errors: the server's sequence contradicts what was acknowledged.
    pub(crate) fn opened(&self, link: u64, granted: &Granted) -> Result<(), ProtocolError> {
        let (epoch, next) = (granted.epoch, granted.next);
        let mut state = self.lock();
        let begins = state.epoch == 0;
        let known = match begins {
            true => self.journalled.and_then(|journalled| journalled.epoch),
            false => Some(state.epoch),
        };
        // Spec PROD-9: a producer that was evicted begins above every epoch that it had.
        if known.is_some_and(|known| granted.begun > known) {
            drop(state);
            self.end(&ClientError::refused(Code::PRODUCER_UNKNOWN, "the server has forgotten the producer"));
            return Ok(());
        }
        if begins {
            state.next = self.journalled.map_or(next, |journalled| journalled.first);
        }
        let end = self.journalled.filter(|_| begins).map_or(0, |journalled| journalled.end).max(state.next);
        if next > end {
            return Err(ProtocolError::new(Code::SEQ_GAP, "the server stored batches that were not sent from here"));
        }
        if epoch != state.epoch {
            // Nothing of an older epoch is stored from here on (spec PROD-4).
            for flight in state.flight.iter_mut().filter(|flight| flight.sequence >= next) {
                (flight.sent, flight.earlier) = (false, false);
            }
        }
        (state.epoch, state.stored) = (epoch, next);
        state.refused_since = None;
        if state.link != Some(link) {
            drop(state);
            self.linked(link);
            state = self.lock();
        }
        let first = state.flight.front().map_or(state.next, |flight| flight.sequence);
        if next < first {
            return Err(ProtocolError::new(Code::SEQ_GAP, "the server lost batches that it had acknowledged"));
        }
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    /// Opening it as `id` was refused: what was sent ahead of the answer is not stored.
    pub(crate) fn not_opened(&self, id: u64) {
        let mut state = self.lock();
        // Where nothing was, what is sent is on its way over the connection before. The end of its stream may have come first.
        if state.sent_on == Some(id) {
            state.flight.iter_mut().for_each(|flight| flight.sent = false);
        }
    }

    /// Opening it was refused for a reason that may pass. False if it has lasted too long.
    pub(crate) fn reopen(&self, error: &ClientError) -> bool {
        let since = *self.lock().refused_since.get_or_insert_with(Instant::now);
        self.trouble.send_replace(Some(error.clone()));
        self.config.give_up_after.is_none_or(|limit| since.elapsed() < limit)
    }

    /// The connection is lost.
    pub(crate) fn unlinked(&self) {
        self.lock().link = None;
        self.work.notify_one();
    }

    /// Nothing will be sent any more; what may have been stored is `Unknown`.
    pub(crate) fn end(&self, error: &ClientError) {
        let mut state = self.lock();
        if state.ended.is_some() {
            return;
        }
        state.ended = Some(error.clone());
        for flight in state.flight.drain(..) {
            // One that was refused, and was sent on no other connection, is certain.
            let stored = if flight.sent || flight.earlier { Stored::Unknown } else { Stored::NotCommitted };
            flight.done.set(Err(AppendError { stored, error: error.clone() }));
        }
        for batch in state.ready.drain(..) {
            batch.done.set(Err(AppendError { stored: Stored::NotCommitted, error: error.clone() }));
        }
        state.bytes = 0;
        drop(state);
        self.work.notify_one();
        self.room.notify_waiters();
    }

    /// A newer epoch was granted. What is in flight still gets its own answers; nothing more is sent.
    pub(crate) fn fence(&self, error: &ClientError) {
        let mut state = self.lock();
        if state.ended.is_some() {
            return;
        }
        let ready = core::mem::take(&mut state.ready);
        for batch in ready {
            state.bytes = state.bytes.saturating_sub(batch.records.len());
            batch.done.set(Err(AppendError { stored: Stored::NotCommitted, error: error.clone() }));
        }
        let waiting = state.flight.iter().any(|flight| flight.sent);
        if !waiting {
            drop(state);
            return self.end(error);
        }
        state.fenced = Some(error.clone());
        drop(state);
        self.room.notify_waiters();
    }

    /// Batches are durable.
    pub(crate) fn acked(&self, ack: &Ack) -> Result<(), ProtocolError> {
        let mut state = self.lock();
        for (sequence, acked) in (ack.sequence..).zip(&ack.batches) {
            let Some(flight) = state.flight.front() else { break };
            if sequence < flight.sequence {
                // An answer to a repetition of something answered before.
                continue;
            }
            if sequence > flight.sequence || flight.count != acked.count {
                return Err(ProtocolError::new(Code::FRAME_UNEXPECTED, "ACK of a batch that was not sent"));
            }
            if let Some(flight) = state.flight.pop_front() {
                state.bytes = state.bytes.saturating_sub(flight.records.len());
                flight.done.set(Ok(acked.first));
            }
        }
        (state.patience, state.refused_since) = (0, None);
        self.settle(state);
        Ok(())
    }

    /// A batch was refused on connection `link`.
    pub(crate) fn refused(&self, link: u64, refused: &Refused) {
        let mut state = self.lock();
        if state.link != Some(link) {
            return;
        }
        let (code, value, message) = (refused.code, refused.value, refused.detail.as_str().to_owned());
        let error = ClientError::Refused { code, value, message };
        let Some(flight) = state.flight.iter_mut().find(|flight| flight.sequence == refused.sequence && flight.sent)
        else {
            return;
        };
        (flight.sent, flight.refused) = (false, true);
        if flight.dead {
            // Given up with another one, and answered now.
            return self.settle(state);
        }
        if flight.stored(refused.code) == Stored::NotCommitted {
            // Nor was it by an earlier sending.
            flight.earlier = false;
        }
        let passes = error.passes(self.config.renewal.is_some());
        let unknown = !passes && flight.stored(refused.code) == Stored::Unknown;
        if !passes {
            flight.dead = true;
            let stored = flight.stored(refused.code);
            flight.done.set(Err(AppendError { stored, error: error.clone() }));
            let given_up = 1 + match (flight.run, flight.group.message()) {
                // Nothing that the run says is stored any more.
                (Some(run), _) if refused.code == Code::RUN_FENCED => {
                    give_up(&mut state, refused.sequence, &error, |_, of| of == Some(run))
                }
                (_, Some(id)) => give_up(&mut state, refused.sequence, &error, |group, _| group.message() == Some(id)),
                _ => 0,
            };
            self.withhold(&mut state, given_up);
        }
        state.refusing = true;
        // A batch of which nobody knows whether it is stored may hold the sequence that the next one would get.
        let ends = matches!(refused.code, Code::FENCED | Code::PRODUCER_UNKNOWN | Code::SESSION_CLOSED) || unknown;
        let answered = !state.flight.iter().any(|flight| flight.sent && flight.sequence < refused.sequence);
        if ends && !answered {
            // Those before it get their answers first.
            state.fenced.get_or_insert(error.clone());
        }
        if ends && answered {
            // What is behind it would be refused for the same reason, and was not stored.
            for flight in &mut state.flight {
                flight.done.set(Err(AppendError { stored: flight.stored(refused.code), error: error.clone() }));
            }
            drop(state);
            return self.end(&error);
        }
        if passes && refused.code != Code::SEQ_GAP {
            let after = refused.code.retry_after(refused.value);
            // What is behind one that is to wait waits with it, and not for longer.
            if state.patience == 0 || state.paused {
                (state.patience, state.paused) = (state.patience.saturating_add(1), false);
                state.retry_after = after;
            }
            state.retry_after = state.retry_after.max(after);
            let since = *state.refused_since.get_or_insert_with(Instant::now);
            self.trouble.send_replace(Some(error.clone()));
            if self.config.give_up_after.is_some_and(|limit| since.elapsed() >= limit) {
                drop(state);
                return self.end(&error);
            }
        }
        self.settle(state);
    }

    /// Batches were given up: where there is a journal it has to know first.
    fn withhold(&self, state: &mut State, given_up: usize) {
        if self.journalled.is_some() {
            state.withheld += given_up;
        }
    }

    /// The journal knows of so many batches that they were given up.
    pub(crate) fn release(&self, known: usize) {
        let mut state = self.lock();
        state.withheld = state.withheld.saturating_sub(known);
        self.settle(state);
    }

    /// Gives up what must not be sent any more, and certainly is not stored.
    fn expire(&self, state: &mut State) {
        let (mut given_up, stored) = (0, state.stored);
        let unsent = |flight: &&mut Flight| {
            !flight.dead && !flight.sent && !flight.earlier && flight.sequence >= stored && is_past(flight.valid_until)
        };
        let mut of_messages = Vec::new();
        for flight in state.flight.iter_mut().filter(unsent) {
            flight.dead = true;
            flight.done.set(Err(AppendError::unsent(ClientError::Expired)));
            given_up += 1;
            of_messages.extend(flight.group.message().map(|id| (flight.sequence, id)));
        }
        while state.may_expire()
            && let Some(batch) = state.ready.pop_front_if(|batch| is_past(batch.valid_until))
        {
            state.bytes = state.bytes.saturating_sub(batch.records.len());
            batch.done.set(Err(AppendError::unsent(ClientError::Expired)));
            given_up += 1;
            of_messages.extend(batch.group.message().map(|id| (state.next, id)));
        }
        // Without a part of it the rest of a message is another text.
        for (sequence, id) in of_messages {
            let of_it = |group: Group, _| group.message() == Some(id);
            given_up += give_up(state, sequence, &ClientError::Expired, of_it);
        }
        self.withhold(state, given_up);
    }

    /// Waits for so long, or until nothing is sent on connection `link` any more.
    async fn pause(&self, link: u64, pause: Duration) {
        let over = async {
            while self.lock().goes_on(link) {
                self.work.notified().await;
            }
        };
        // An end that comes first is what the pause was for as well.
        let _ = tokio::time::timeout(pause, over).await;
    }

    /// Goes on after batches were given up or refused, once everything sent behind the first of them is answered and a journal knows.
    fn settle(&self, mut state: MutexGuard<'_, State>) {
        if self.journalled.is_some() {
            self.expire(&mut state);
        }
        if state.refusing || self.journalled.is_some() {
            let refused = state.flight.iter().any(|flight| flight.refused || flight.dead);
            // Of those before it too: the reason why one is ahead of its sequence may be told later than that it is.
            let open = refused && state.flight.iter().any(|flight| flight.sent);
            if !open && state.withheld == 0 {
                renumber(&mut state);
                state.refusing = false;
            }
        }
        let fenced = state.fenced.clone().filter(|_| !state.flight.iter().any(|flight| flight.sent));
        drop(state);
        if let Some(error) = fenced {
            return self.end(&error);
        }
        self.work.notify_one();
        self.room.notify_waiters();
    }
}

/// A batch was refused for good, and with it what came `about` the same behind it: parts of a message would leave a hole, and a run
/// says nothing any more. It was sent behind a sequence that was not used, and is not stored either.
/// Returns how many.
fn give_up(state: &mut State, behind: u64, error: &ClientError, about: impl Fn(Group, Option<u64>) -> bool) -> usize {
    let lost = || Err(AppendError { stored: Stored::NotCommitted, error: error.clone() });
    let later = |flight: &&mut Flight| !flight.dead && flight.sequence > behind && about(flight.group, flight.run);
    let mut given_up = 0;
    for flight in state.flight.iter_mut().filter(later) {
        flight.dead = true;
        flight.done.set(lost());
        given_up += 1;
    }
    let (dropped, kept): (VecDeque<_>, _) = state.ready.drain(..).partition(|batch| about(batch.group, batch.run));
    state.ready = kept;
    given_up += dropped.len();
    for batch in dropped {
        state.bytes = state.bytes.saturating_sub(batch.records.len());
        batch.done.set(lost());
    }
    given_up
}

/// True if what was valid until then is not any more.
fn is_past(valid_until: Option<SystemTime>) -> bool {
    valid_until.is_some_and(|until| SystemTime::now() >= until)
}

/// Drops what was refused for good and closes the holes that it left.
fn renumber(state: &mut State) {
    let mut gone = 0;
    let mut bytes = 0;
    state.flight.retain_mut(|flight| {
        if flight.dead {
            gone += 1;
            bytes += flight.records.len();
            return false;
        }
        flight.sequence -= gone;
        flight.refused = false;
        true
    });
    state.next -= gone;
    state.bytes = state.bytes.saturating_sub(bytes);
}

/// Writes a producer's batches on one connection until the connection is lost or the producer has ended.
pub(crate) async fn write<C: Connection>(shared: Arc<Shared>, link: Arc<Link<C>>, id: u64) {
    let Some(server) = link.server().await else { return };
    let credit = link.producer_credit(id, &server, SEND_BUDGET, shared.clone());
    let Ok(mut send) = link.transport.open_uni().await else { return };
    let stopped = send.stopped();
    let pump = async {
        let mut out = Writer::new();
        put_frame(&Produce { producer: id }, &mut out);
        let mut expecting = None;
        loop {
            // Lets whoever appends go first, so that records gather into batches.
            tokio::task::yield_now().await;
            let patience = gather(&shared, id, &mut out);
            if shared.lock().flight.is_empty() {
                expecting = None;
            } else if expecting.is_none() {
                expecting = Some(link.expect_answer());
            }
            if out.is_empty() {
                match patience {
                    Next::Wait => shared.work.notified().await,
                    Next::Pause(pause) => shared.pause(id, pause).await,
                    Next::End => return Ok::<_, StreamError>(()),
                }
                continue;
            }
            let mut bytes = out.take();
            while !bytes.is_empty() {
                let available = usize::try_from(credit.available().await).unwrap_or(usize::MAX);
                let part = bytes.split_to(bytes.len().min(available));
                credit.sent(part.len() as u64);
                send.write(&mut [part]).await?;
            }
        }
    };
    tokio::select! {
        result = pump => match result {
            Ok(()) => send.finish(),
            Err(error) => tracing::debug!(producer = %shared.name, %error, "producer stream lost"),
        },
        code = stopped => if let Some(code) = code {
            tracing::debug!(producer = %shared.name, code = %Code(code), "producer stream stopped by the server");
        },
    }
    link.forget_producer(id);
}

/// What a writer with nothing to write does.
enum Next {
    /// Wait for work.
    Wait,
    /// Try again after a pause: the server asked for patience.
    Pause(Duration),
    /// The stream has served its purpose.
    End,
}

/// Takes what may be sent now and encodes it.
fn gather(shared: &Shared, link: u64, out: &mut Writer) -> Next {
    let mut state = shared.lock();
    if !state.goes_on(link) {
        return Next::End;
    }
    if state.refusing || state.withheld > 0 || state.fenced.is_some() {
        return Next::Wait;
    }
    if state.patience > 0 && !state.paused && state.flight.iter().any(|flight| !flight.sent) {
        let pause = Duration::from_millis(25 << state.patience.min(5)).max(state.retry_after);
        if !out.is_empty() {
            return Next::Wait;
        }
        // The next turn sends; another refusal makes the next pause longer.
        state.paused = true;
        return Next::Pause(pause);
    }
    let late = |flight: &Flight| !flight.sent && !flight.earlier && is_past(flight.valid_until);
    if shared.journalled.is_some() && state.flight.iter().any(late) {
        shared.settle(state);
        return Next::Wait;
    }
    for flight in state.flight.iter_mut().filter(|flight| !flight.sent) {
        if out.len() >= BURST {
            return Next::Wait;
        }
        flight.sent = true;
        let (sequence, count, records) = (flight.sequence, flight.count, flight.records.clone());
        put_frame(&Append { sequence, count, records, run_epoch: flight.run }, out);
    }
    while out.len() < BURST && state.flight.len() < PRODUCER_WINDOW {
        if state.may_expire() && state.ready.front().is_some_and(|batch| is_past(batch.valid_until)) {
            shared.settle(state);
            return Next::Wait;
        }
        let next = if planted(Bug::NewestFirst) { state.ready.pop_back() } else { state.ready.pop_front() };
        let Some(batch) = next else { break };
        let (sequence, stored) = (state.next, state.stored);
        state.next += 1;
        let Batch { count, group, run, valid_until, done, records } = batch;
        let records = records.freeze();
        put_frame(&Append { sequence, count, records: records.clone(), run_epoch: run }, out);
        done.sent.store(true, Ordering::Relaxed);
        state.flight.push_back(Flight {
            sequence,
            count,
            records,
            group,
            run,
            valid_until,
            done,
            sent: true,
            // By an application that was restarted.
            earlier: sequence < stored,
            refused: false,
            dead: false,
        });
        if shared.journalled.is_some() {
            shared.room.notify_waiters();
        }
    }
    Next::Wait
}

/// Appends to a session, exactly once, in the order of the calls.
///
/// Records are gathered into batches while earlier ones are on the way; nothing waits for a timer. Dropping a producer does
/// not take back what was appended; [`Producer::flush`] waits for it.
///
/// [`Producer::of_run`] is the same producer, which says that all it appends is part of a run.
#[derive(Debug)]
pub struct Producer {
    handle: Arc<Handle>,
    session: Session,
    /// The run that what it appends is part of, and its epoch.
    run: Option<(RunId, u64)>,
}

/// Ends the producer with the last of those who append through it.
#[derive(Debug)]
struct Handle {
    shared: Arc<Shared>,
}

impl core::ops::Deref for Handle {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.lock().dropped = true;
        self.shared.work.notify_one();
    }
}

impl Producer {
    pub(crate) fn new(shared: Arc<Shared>, session: Session) -> Self {
        Self { handle: Arc::new(Handle { shared }), session, run: None }
    }

    /// The same producer, for what is part of `run`: its records name the run, and are refused with `RUN_FENCED` once the run is lost or
    /// taken over.
    pub fn of_run(&self, run: &Run) -> Self {
        Self { handle: self.handle.clone(), session: self.session.clone(), run: Some((run.id(), run.epoch())) }
    }

    /// The epoch that the server granted.
    pub fn epoch(&self) -> u64 {
        self.handle.epoch()
    }

    /// The session that it appends to.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Appends a `data` record. Waits while too much is on the way; the ticket tells when it is durable.
    ///
    /// Errors: the record is too long, or the producer has ended; then nothing was queued.
    pub async fn append(&self, stream: StreamId, payload: impl Into<Bytes>) -> Result<Ticket, AppendError> {
        self.append_record(Record::data(stream.0, payload)).await
    }

    /// Appends a record. As [`Producer::append`].
    pub async fn append_record(&self, record: Record) -> Result<Ticket, AppendError> {
        let record = self.stamped(record);
        let run = self.run.map(|(_, epoch)| epoch);
        let len = record.encoded_len();
        if len > MAX_RECORD {
            return Err(invalid("the record is longer than 256 KiB"));
        }
        self.room().await?;
        let mut state = self.open()?;
        let group = Group::of(&record);
        let joins = |batch: &Batch| {
            !matches!(group, Group::Alone(_))
                && (batch.group, batch.run) == (group, run)
                && (batch.count as usize) < MAX_BATCH_RECORDS
                && batch.records.len() + len <= GATHER
        };
        if !state.ready.back().is_some_and(joins) {
            let (records, done) = (Writer::new(), Arc::new(Done::default()));
            state.ready.push_back(Batch { count: 0, records, group, run, valid_until: None, done });
        }
        let Some(batch) = state.ready.back_mut() else { unreachable!("a batch was just added") };
        let before = batch.records.len();
        record.put(&mut batch.records);
        let ticket = Ticket { done: batch.done.clone(), index: batch.count };
        batch.count += 1;
        let added = batch.records.len() - before;
        state.bytes += added;
        drop(state);
        self.handle.work.notify_one();
        Ok(ticket)
    }

    /// Appends records that are stored together and contiguously, or not at all. The ticket is that of the first.
    ///
    /// Errors: as [`Producer::append`]; also if there are no records, or more than 1,000, or more than 512 KiB of them.
    pub async fn append_batch(&self, batch: &[Record]) -> Result<Ticket, AppendError> {
        let batch: Vec<Record> = batch.iter().map(|record| self.stamped(record.clone())).collect();
        let run = self.run.map(|(_, epoch)| epoch);
        let (count, records) = (batch.len() as u64, region(&batch).map_err(AppendError::unsent)?);
        let group = Group::Alone(None);
        self.push(Batch { count, records, group, run, valid_until: None, done: Arc::default() }).await
    }

    /// True if a batch can be appended without a wait.
    pub(crate) fn has_room(&self) -> bool {
        self.handle.lock().bytes < self.handle.config.producer_bytes
    }

    /// Appends a batch that a journal keeps. As [`Producer::append_batch`], but does not wait for room: whoever keeps the journal has to go on.
    pub(crate) fn append_kept(
        &self,
        batch: &[Record],
        run: Option<u64>,
        valid_until: Option<SystemTime>,
    ) -> Result<Ticket, AppendError> {
        let (count, records) = (batch.len() as u64, region(batch).map_err(AppendError::unsent)?);
        let group = match batch {
            [record] => Group::of(record),
            records => Group::Alone(records.iter().find_map(|record| record.message)),
        };
        self.push_now(Batch { count, records, group, run, valid_until, done: Arc::default() })
    }

    async fn push(&self, batch: Batch) -> Result<Ticket, AppendError> {
        self.room().await?;
        self.push_now(batch)
    }

    fn push_now(&self, batch: Batch) -> Result<Ticket, AppendError> {
        let mut state = self.open()?;
        state.bytes += batch.records.len();
        let ticket = Ticket { done: batch.done.clone(), index: 0 };
        state.ready.push_back(batch);
        drop(state);
        self.handle.work.notify_one();
        Ok(ticket)
    }

    /// The journal knows of so many batches that they were given up.
    pub(crate) fn release(&self, known: usize) {
        self.handle.release(known);
    }

    /// Resolves when something may have become of a batch, from the first poll on.
    pub(crate) fn progressed(&self) -> tokio::sync::futures::Notified<'_> {
        self.handle.room.notified()
    }

    /// Why it has ended, if it has.
    pub(crate) fn why_ended(&self) -> Option<ClientError> {
        self.handle.lock().ended.clone()
    }

    /// Waits until everything appended so far is durable. Errors: the first failure among what was in flight.
    pub async fn flush(&self) -> Result<(), AppendError> {
        let last: Vec<Arc<Done>> = {
            let state = self.handle.lock();
            let flight = state.flight.iter().map(|flight| flight.done.clone());
            flight.chain(state.ready.iter().map(|batch| batch.done.clone())).collect()
        };
        for done in last {
            Ticket { done, index: 0 }.await?;
        }
        Ok(())
    }

    /// Waits for the next refusal that is being retried, for example for lack of disk space. Cancellation-safe.
    pub async fn trouble(&self) -> ClientError {
        let mut trouble = self.handle.trouble.subscribe();
        loop {
            // The sender lives in `self`.
            let _ = trouble.changed().await;
            if let Some(error) = trouble.borrow_and_update().clone() {
                return error;
            }
        }
    }

    /// Waits until the producer has ended and says why, for example that it was fenced.
    pub async fn ended(&self) -> ClientError {
        loop {
            let room = self.handle.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if let Some(error) = self.handle.lock().ended.clone() {
                return error;
            }
            room.await;
        }
    }

    /// The record as part of the run.
    fn stamped(&self, record: Record) -> Record {
        let run = record.run.or(self.run.map(|(id, _)| id));
        Record { run, ..record }
    }

    fn open(&self) -> Result<MutexGuard<'_, State>, AppendError> {
        let state = self.handle.lock();
        match state.ended.as_ref().or(state.fenced.as_ref()) {
            Some(error) => Err(AppendError { stored: Stored::NotCommitted, error: error.clone() }),
            None => Ok(state),
        }
    }

    /// Waits until there is room for more.
    async fn room(&self) -> Result<(), AppendError> {
        loop {
            let room = self.handle.room.notified();
            tokio::pin!(room);
            room.as_mut().enable();
            if self.open()?.bytes < self.handle.config.producer_bytes {
                return Ok(());
            }
            room.await;
        }
    }
}

fn invalid(what: &str) -> AppendError {
    AppendError::unsent(ClientError::Invalid(what.into()))
}

/// The region of a batch. Errors: `Invalid`, it is no batch.
pub(crate) fn region(batch: &[Record]) -> Result<Writer, ClientError> {
    let mut region = Writer::new();
    if batch.iter().any(|record| record.encoded_len() > MAX_RECORD) {
        return Err(ClientError::Invalid("a record of the batch is longer than 256 KiB".into()));
    }
    batch.iter().for_each(|record| record.put(&mut region));
    if batch.is_empty() || batch.len() > MAX_BATCH_RECORDS || region.len() > MAX_BATCH_BYTES {
        return Err(ClientError::Invalid("a batch has 1 to 1,000 records and at most 512 KiB".into()));
    }
    Ok(region)
}

/// A record on its way. Awaiting it gives the record's seq once it is durable.
#[derive(Debug)]
pub struct Ticket {
    done: Arc<Done>,
    index: u64,
}

impl Ticket {
    /// True once it was sent for the first time.
    pub(crate) fn is_sent(&self) -> bool {
        self.done.sent.load(Ordering::Relaxed)
    }

    /// The seq or the failure, if it is known.
    pub fn outcome(&self) -> Option<Result<u64, AppendError>> {
        Some(self.done.result.get()?.clone().map(|first| first + self.index))
    }

    /// Waits for the outcome. Cancellation-safe.
    pub async fn wait(&self) -> Result<u64, AppendError> {
        loop {
            if let Some(outcome) = self.outcome() {
                return outcome;
            }
            let notified = self.done.notify.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            if self.done.result.get().is_none() {
                notified.await;
            }
        }
    }
}

impl IntoFuture for Ticket {
    type Output = Result<u64, AppendError>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { self.wait().await })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use mainstay_protocol::wire::Acked;

    use super::*;

    /// Opening a producer for a new epoch is refused while a batch is on its way over the connection before, and is too late by then: it may be
    /// stored still.
    #[tokio::test]
    async fn a_refused_opening_says_nothing_of_what_was_sent_before() {
        let journalled = Journalled { first: 0, end: 2, epoch: Some(1) };
        let shared = Shared::new(Label::new("p").unwrap(), Arc::default(), Some(journalled));
        shared.opened(1, &Granted { id: 1, epoch: 1, next: 0, begun: 1 }).unwrap();
        let done = Arc::new(Done::default());
        let until = SystemTime::now() + Duration::from_millis(50);
        let records = region(&[Record::data(0, "late")]).unwrap();
        let batch =
            Batch { count: 1, records, group: Group::Data, run: None, valid_until: Some(until), done: done.clone() };
        shared.lock().ready.push_back(batch);
        gather(&shared, 1, &mut Writer::new());
        assert!(shared.is_uploading());
        shared.unlinked();
        while SystemTime::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // What is stored is asked for, with a new epoch, and refused; twice.
        for id in [2, 3] {
            assert_eq!(shared.kept_epoch(), 0);
            shared.not_opened(id);
            shared.unlinked();
        }
        assert_eq!(shared.kept_epoch(), 0);
        shared.opened(4, &Granted { id: 4, epoch: 2, next: 1, begun: 1 }).unwrap();
        shared.settle(shared.lock());
        assert!(done.result.get().is_none(), "it is sent again, and answered");
        // What is sent ahead of an answer that refuses the opening is not stored.
        shared.linked(5);
        gather(&shared, 5, &mut Writer::new());
        shared.not_opened(5);
        assert!(!shared.is_uploading() && shared.lock().flight[0].earlier);
    }

    /// Found by a test that failed one time in ten: a server that does not know a producer ends its stream and says so, and either may come
    /// first. What was sent ahead for the first time was taken for what may be stored where the end did.
    #[tokio::test]
    async fn what_was_sent_ahead_of_a_refused_opening_is_not_stored_where_its_stream_ends_first() {
        for ended_first in [false, true] {
            let (shared, done) = two_batches();
            shared.unlinked();
            let batch = Arc::new(Done::default());
            let records = region(&[Record::data(0, "new")]).unwrap();
            shared.lock().ready.push_back(Batch {
                count: 1,
                records,
                group: Group::Data,
                run: None,
                valid_until: None,
                done: batch.clone(),
            });
            shared.linked(2);
            gather(&shared, 2, &mut Writer::new());
            if ended_first {
                shared.unlinked();
            }
            shared.not_opened(2);
            shared.end(&ClientError::refused(Code::PRODUCER_UNKNOWN, "evicted"));
            let stored = |done: &Done| done.result.get().and_then(|result| result.as_ref().err()).map(|e| e.stored);
            assert_eq!(done.map(|done| stored(&done)), [Some(Stored::Unknown); 2]);
            assert_eq!(stored(&batch), Some(Stored::NotCommitted));
        }
    }

    /// Found by simulation (seed 6450 of the first simulator): a batch that was stored without an answer was sent again, refused by a server
    /// that could not look for it, and then fenced: the application was told that it is not stored.
    #[tokio::test]
    async fn a_server_that_cannot_answer_now_says_nothing_of_an_earlier_sending() {
        let refused = |code| Refused { producer: 1, sequence: 0, code, value: 0, detail: Default::default() };
        for (code, expected) in [
            (Code::UNAVAILABLE, Stored::Unknown),
            (Code::OVERLOADED, Stored::Unknown),
            // It was looked for, and is not there.
            (Code::SEQ_GAP, Stored::NotCommitted),
        ] {
            let shared = Shared::new(Label::new("p").unwrap(), Arc::default(), None);
            shared.opened(1, &Granted { id: 1, epoch: 1, next: 0, begun: 1 }).unwrap();
            let (done, records) = (Arc::new(Done::default()), region(&[Record::data(0, "once")]).unwrap());
            let batch =
                Batch { count: 1, records, group: Group::Data, run: None, valid_until: None, done: done.clone() };
            shared.lock().ready.push_back(batch);
            gather(&shared, 1, &mut Writer::new());
            shared.unlinked();
            shared.linked(2);
            gather(&shared, 2, &mut Writer::new());
            shared.refused(2, &refused(code));
            // Fenced, without another word about it.
            shared.end(&ClientError::refused(Code::FENCED, "a newer one"));
            let Some(Err(error)) = done.result.get() else { panic!("{code} left it open") };
            assert_eq!(error.stored, expected, "{code}");
        }
    }

    /// What was sent over one connection, and nothing of it answered.
    fn two_batches() -> (Shared, [Arc<Done>; 2]) {
        let shared = Shared::new(Label::new("p").unwrap(), Arc::default(), None);
        shared.opened(1, &Granted { id: 1, epoch: 1, next: 0, begun: 1 }).unwrap();
        let done = [Arc::new(Done::default()), Arc::new(Done::default())];
        for done in &done {
            let records = region(&[Record::data(0, "once")]).unwrap();
            let batch = Batch {
                count: 1,
                records,
                group: Group::Alone(None),
                run: None,
                valid_until: None,
                done: done.clone(),
            };
            shared.lock().ready.push_back(batch);
        }
        gather(&shared, 1, &mut Writer::new());
        (shared, done)
    }

    fn refusal(sequence: u64, code: Code) -> Refused {
        Refused { producer: 1, sequence, code, value: 0, detail: Default::default() }
    }

    /// The first one's refusal waits for what it contradicts; the second one is ahead of its sequence until then, however often it comes.
    #[tokio::test]
    async fn nothing_is_sent_again_before_everything_is_answered() {
        let (shared, done) = two_batches();
        shared.refused(1, &refusal(1, Code::SEQ_GAP));
        let mut out = Writer::new();
        gather(&shared, 1, &mut out);
        assert!(out.is_empty(), "sent again while the one before it is not answered");
        shared.refused(1, &refusal(0, Code::CONFLICT));
        gather(&shared, 1, &mut out);
        assert!(!out.is_empty(), "its turn has come");
        assert!(matches!(done[0].result.get(), Some(Err(error)) if error.stored == Stored::NotCommitted));
        assert_eq!(shared.lock().flight[0].sequence, 0);
    }

    /// A batch that may be stored holds the sequence that the next one would get (spec PROD-8).
    #[tokio::test]
    async fn the_sequence_of_a_batch_that_may_be_stored_is_given_to_no_other() {
        let (shared, done) = two_batches();
        shared.unlinked();
        shared.linked(2);
        gather(&shared, 2, &mut Writer::new());
        shared.refused(2, &refusal(1, Code::TOKEN_EXPIRED));
        assert!(matches!(done[1].result.get(), Some(Err(error)) if error.stored == Stored::Unknown));
        assert!(shared.lock().ended.is_none(), "the one before it gets its answer");
        shared.acked(&Ack { producer: 1, sequence: 0, batches: vec![Acked { first: 7, count: 1 }] }).unwrap();
        assert_eq!(done[0].result.get(), Some(&Ok(7)));
        assert!(shared.lock().ended.is_some(), "and then nothing more is sent under its sequence");
    }
}

//! Sends what an outbox keeps, in order, and writes down what becomes of it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use mainstay_protocol::error::Code;
use mainstay_protocol::registry::{KEPT_SIGNALS, MAX_SIGNALS, PRODUCER_WINDOW};
use mainstay_protocol::session::{Cursor, Signal as SignalRecord};
use mainstay_protocol::wire::{Detail, Label, Signal, Start};

use super::ledger::{Change, Outcome, Queued, What};
use super::{Asked, EntryState, Outbox, OutboxError};
use crate::client::ConnectionWatch;
use crate::driver::Ask;
use crate::error::{AppendError, ClientError, Stored};
use crate::producer::{Producer, Ticket};
use crate::session::{Attaching, Session, StreamId};
use crate::subscription::Event;

/// Why nothing is sent any more. What waits stays in the outbox.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendError {
    /// The server cannot be used, or does not let this client append.
    Client(ClientError),
    /// The outbox cannot be written.
    Outbox(OutboxError),
    /// Somebody else sends through this outbox already.
    Busy,
}

impl core::fmt::Display for SendError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Client(error) => error.fmt(f),
            Self::Outbox(error) => error.fmt(f),
            Self::Busy => f.write_str("the outbox is being sent already"),
        }
    }
}

impl std::error::Error for SendError {}

impl From<ClientError> for SendError {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

impl From<OutboxError> for SendError {
    fn from(error: OutboxError) -> Self {
        Self::Outbox(error)
    }
}

/// The only one who sends.
struct Turn<'a>(&'a Outbox);

impl<'a> Turn<'a> {
    fn take(outbox: &'a Outbox) -> Option<Self> {
        (!outbox.0.sending.swap(true, Ordering::AcqRel)).then_some(Self(outbox))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.0.sending.store(false, Ordering::Release);
    }
}

impl Outbox {
    /// Sends what waits, and what is queued from then on, until that cannot go on; it only ever returns why. Dropping the future stops it: what
    /// was sent and not answered is sent again the next time.
    ///
    /// `session` is the session that the outbox is for, as it is to be attached to: created or not. Where it is another one of the same
    /// name by now, everything that waits is rejected with `SESSION_GONE`.
    pub async fn send(&self, session: Attaching) -> SendError {
        let Some(_turn) = Turn::take(self) else { return SendError::Busy };
        match self.send_on(session).await {
            Ok(never) => match never {},
            Err(error) => {
                // What will not be stored whenever it is sent.
                let over = match &error {
                    SendError::Client(ClientError::Gone) => true,
                    SendError::Client(ClientError::Refused { code, .. }) => *code == Code::SESSION_CLOSED,
                    _ => false,
                };
                if let (true, SendError::Client(why)) = (over, &error)
                    && let Some(outcome) = Outcome::of_refusal(why)
                    && let Err(error) = self.give_up(&outcome).await
                {
                    return error.into();
                }
                error
            }
        }
    }

    /// Everything that waits comes to the same.
    async fn give_up(&self, outcome: &Outcome) -> Result<(), OutboxError> {
        let waiting: Vec<u64> = self.ledger().waiting_from(0).map(|(number, _)| number).collect();
        for some in waiting.chunks(PRODUCER_WINDOW) {
            let settled = some.iter().map(|number| Asked::Change(Change::Settled(*number, outcome.clone())));
            self.commit(settled.collect()).await?;
        }
        Ok(())
    }

    async fn send_on(&self, session: Attaching) -> Result<core::convert::Infallible, SendError> {
        // What whoever sent before wrote down at last is read with the rest.
        self.commit(Vec::new()).await?;
        let known = self.ledger().incarnation;
        let session = match known {
            Some(incarnation) => session.at(Cursor { incarnation, next: 0 }),
            None => session,
        };
        let session = session.attach().await?;
        let incarnation = session.info().incarnation;
        if known != Some(incarnation) {
            self.commit(vec![Asked::Change(Change::Attached(incarnation))]).await?;
        }
        let sender = Sender {
            outbox: self,
            connection: session.client().connection(),
            session,
            producer: None,
            streams: HashMap::new(),
            sent: VecDeque::new(),
            marked: BTreeSet::new(),
            next: 0,
            stored: 0,
        };
        sender.run().await
    }
}

/// Records that may follow a signal before the session may have forgotten it: each resolves at most one that was not there before, and some
/// were.
const REMEMBERED: u64 = (KEPT_SIGNALS - MAX_SIGNALS) as u64;

/// Where a signal is in a session.
enum Found {
    At(u64),
    Nowhere {
        /// Nothing below this seq was left out.
        tail: u64,
    },
}

struct Sender<'a> {
    outbox: &'a Outbox,
    session: Session,
    /// Once there was a batch: signals need none.
    producer: Option<Arc<Producer>>,
    /// Ids of streams.
    streams: HashMap<Label, StreamId>,
    /// Batches that the producer has and the disk does not know the end of: never more than it can learn the end of after a restart.
    sent: VecDeque<(u64, Ticket)>,
    /// Those that this sender marked, and nobody before: of the ones that wait.
    marked: BTreeSet<u64>,
    /// What is below was handed on.
    next: u64,
    /// A seq that the session has.
    stored: u64,
    connection: ConnectionWatch,
}

impl Sender<'_> {
    async fn run(mut self) -> Result<core::convert::Infallible, SendError> {
        let mut version = self.outbox.0.version.subscribe();
        loop {
            version.mark_unchanged();
            let producer = self.producer.clone();
            let mut progressed = pin!(async {
                match &producer {
                    Some(producer) => producer.progressed().await,
                    None => core::future::pending().await,
                }
            });
            // From here on nothing is missed.
            if poll_once(progressed.as_mut()).await {
                continue;
            }
            match self.turn().await {
                Ok(true) => {}
                // A session that ends ends its producers.
                Ok(false) => tokio::select! {
                    () = progressed => {}
                    _ = version.changed() => {}
                    up = self.connection.changed() => if up.is_none() {
                        return Err(self.session.ended().await.into());
                    },
                },
                Err(SendError::Client(ClientError::Refused { code: Code::PRODUCER_UNKNOWN, .. }))
                    if self.producer.is_some() =>
                {
                    self.begin_anew().await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Does what can be done now. False if nothing can.
    async fn turn(&mut self) -> Result<bool, SendError> {
        // Known before the outcomes that it leaves are looked at.
        let ended = self.producer.as_ref().and_then(|producer| producer.why_ended());
        if self.settle().await? || self.hand_on().await? {
            return Ok(true);
        }
        match ended {
            Some(error) => Err(error.into()),
            None => Ok(false),
        }
    }

    /// Goes on with another producer: the server has forgotten this one, and with it what is stored of what was sent (spec OUT-7).
    async fn begin_anew(&mut self) -> Result<(), SendError> {
        // Answered since that was looked at.
        let answered: Vec<(u64, u64)> =
            self.sent.iter().map_while(|(number, ticket)| Some((*number, ticket.outcome()?.ok()?))).collect();
        let is_answered = |number: u64| answered.iter().any(|(answered, _)| *answered == number);
        // Nobody sent it before this sender, and it did not either, or knows that it is not stored.
        let is_unsent = |number: u64| {
            let ticket = self.sent.iter().find(|(sent, _)| *sent == number).map(|(_, ticket)| ticket.outcome());
            let refused = |outcome| matches!(outcome, Some(Err(AppendError { stored: Stored::NotCommitted, .. })));
            self.marked.contains(&number) && ticket.is_none_or(refused)
        };
        let mut sent = self.outbox.ledger().sent();
        sent.retain(|number| !is_answered(*number) && !is_unsent(*number));
        tracing::warn!(batches = sent.len(), "the server has forgotten the producer of the outbox");
        let durable = |(number, seq)| Asked::Change(Change::Settled(number, Outcome::Durable { seq }));
        let mut changes: Vec<Asked> = answered.iter().copied().map(durable).collect();
        changes.push(Asked::Change(Change::Forgotten { producer: super::producer_name()?, sent }));
        self.outbox.commit(changes).await?;
        (self.producer, self.next) = (None, 0);
        self.sent.clear();
        self.marked.clear();
        Ok(())
    }

    /// Writes down what became of batches. False if nothing did.
    async fn settle(&mut self) -> Result<bool, SendError> {
        let (mut settled, mut given_up, mut trouble, mut open) = (Vec::new(), 0, None, false);
        let (stored, marked) = (&mut self.stored, &mut self.marked);
        self.sent.retain(|(number, ticket)| match ticket.outcome().map(Outcome::of) {
            // Answered since the one before it was looked at: that one is looked at first again.
            Some(Ok(Outcome::Durable { .. })) if open => true,
            Some(Ok(outcome)) => {
                if let Outcome::Durable { seq } = outcome {
                    *stored = seq.max(*stored);
                }
                marked.remove(number);
                given_up += usize::from(!matches!(outcome, Outcome::Durable { .. }));
                settled.push(Asked::Change(Change::Settled(*number, outcome)));
                false
            }
            Some(Err(error)) => {
                trouble.get_or_insert(error);
                true
            }
            None => {
                open = true;
                if ticket.is_sent() {
                    self.outbox.sent(*number);
                }
                true
            }
        });
        let any = !settled.is_empty();
        if any {
            self.outbox.commit(settled).await?;
            // Only now may another batch take the sequence of one that was given up.
            if let Some(producer) = &self.producer {
                producer.release(given_up);
            }
        }
        match trouble {
            Some(error) => Err(error.into()),
            None => Ok(any),
        }
    }

    /// Hands the next one on. False if that has to wait.
    async fn hand_on(&mut self) -> Result<bool, SendError> {
        let next = self.outbox.ledger().waiting_from(self.next).next().map(|(number, queued)| (number, queued.clone()));
        let Some((number, queued)) = next else { return Ok(false) };
        let Queued { what, valid_until, sent } = queued;
        match what {
            What::Batch { stream, run, records, .. } => {
                let Some(producer) = self.producer.clone() else {
                    self.open_producer().await?;
                    // Followed from here on.
                    return Ok(true);
                };
                if self.sent.len() >= PRODUCER_WINDOW || !producer.has_room() {
                    return Ok(false);
                }
                if sent.is_none() {
                    if !self.connection.is_up() || producer.why_ended().is_some() {
                        return Ok(false);
                    }
                    return self.mark(&producer).await;
                }
                let stream = match self.stream(&stream).await {
                    Ok(stream) => stream,
                    Err(error) => return self.refused(number, error).await,
                };
                let records = What::records(&records, stream.0).map_err(ClientError::from)?;
                let ticket = match producer.append_kept(&records, run, valid_until) {
                    Ok(ticket) => ticket,
                    Err(AppendError { error: error @ ClientError::Invalid(_), .. }) => {
                        let detail = Detail::new(error.to_string());
                        return self.settled(number, Outcome::Rejected { code: Code::RECORD_TOO_LARGE, detail }).await;
                    }
                    // It has ended; why is told.
                    Err(_) => return Ok(false),
                };
                self.sent.push_back((number, ticket));
                self.next = number + 1;
            }
            What::Signal(signal) => {
                // In the order in which they were queued, whatever becomes of the ones before it. Where nobody can be asked it is not sent.
                if !self.sent.is_empty() || sent.is_none() && !self.connection.is_up() {
                    return Ok(false);
                }
                return match self.signal(number, signal, valid_until, sent).await? {
                    Ok(seq) => {
                        self.stored = self.stored.max(seq);
                        self.settled(number, Outcome::Durable { seq }).await
                    }
                    Err(error) => self.refused(number, error).await,
                };
            }
        }
        Ok(true)
    }

    /// Writes down that what comes next may be sent, and under which epoch: should the server forget the producer, it is known what may be
    /// stored.
    async fn mark(&mut self, producer: &Producer) -> Result<bool, SendError> {
        let (to_send, known) = {
            let ledger = self.outbox.ledger();
            (ledger.to_send(self.next, PRODUCER_WINDOW - self.sent.len()), ledger.epoch)
        };
        let (epoch, from) = (producer.epoch(), self.tail());
        let mark = |number: &u64| Asked::Change(Change::Sent { number: *number, from });
        let mut marks: Vec<Asked> = to_send.iter().map(mark).collect();
        marks.extend((known != Some(epoch)).then_some(Asked::Change(Change::Granted(epoch))));
        self.outbox.commit(marks).await?;
        self.marked.extend(to_send);
        Ok(true)
    }

    /// What is sent from now on has no seq below this.
    fn tail(&self) -> u64 {
        self.session.info().tail.max(self.stored)
    }

    /// Opens the producer, with the first batch.
    async fn open_producer(&mut self) -> Result<(), ClientError> {
        let (name, journalled) = {
            let ledger = self.outbox.ledger();
            (ledger.producer.clone(), ledger.journalled())
        };
        self.producer = Some(Arc::new(self.session.open_producer(name, Some(journalled)).await?));
        Ok(())
    }

    /// One that cannot be handed on is settled, unless that is about who asks.
    async fn refused(&mut self, number: u64, error: ClientError) -> Result<bool, SendError> {
        let Some(outcome) = Outcome::of_refusal(&error) else { return Err(error.into()) };
        self.settled(number, outcome).await
    }

    async fn settled(&mut self, number: u64, outcome: Outcome) -> Result<bool, SendError> {
        self.next = number + 1;
        self.outbox.commit(vec![Asked::Change(Change::Settled(number, outcome))]).await?;
        Ok(true)
    }

    async fn stream(&mut self, name: &Label) -> Result<StreamId, ClientError> {
        if let Some(known) = self.streams.get(name) {
            return Ok(*known);
        }
        let id = if name.as_str() == "main" {
            self.session.main()
        } else {
            self.session.ask_again(|answer| Ask::Stream { name: name.clone(), answer }).await.map(StreamId)?
        };
        self.streams.insert(name.clone(), id);
        Ok(id)
    }

    /// Sends a signal. That it is sent is on the disk before, so that it is known that it may be stored.
    async fn signal(
        &self,
        number: u64,
        signal: Signal,
        valid_until: Option<SystemTime>,
        sent: Option<u64>,
    ) -> Result<Result<u64, ClientError>, OutboxError> {
        let is_late = || valid_until.is_some_and(|until| SystemTime::now() >= until);
        let unknown = |why: String| Ok(Err(ClientError::refused(Code::OUTCOME_UNKNOWN, why)));
        // A connection may have had it, and gave no answer.
        let mut doubt = sent;
        loop {
            let from = match doubt {
                Some(from) => match self.stored(&signal, from).await {
                    Ok(Found::At(seq)) => return Ok(Ok(seq)),
                    Ok(Found::Nowhere { .. }) if is_late() => {
                        return unknown("it was sent before its time was over, and may still be on its way".into());
                    }
                    Ok(Found::Nowhere { tail }) => tail,
                    Err(ClientError::Refused { code: Code::FORBIDDEN | Code::OUTCOME_UNKNOWN, message, .. }) => {
                        if is_late() || self.session.info().tail > from + REMEMBERED {
                            return unknown(format!("it was sent, and cannot be looked for: {message}"));
                        }
                        // The session knows its id still.
                        from
                    }
                    Err(error) => return Ok(Err(error)),
                },
                None if is_late() => return Ok(Err(ClientError::Expired)),
                None => {
                    let from = self.tail();
                    self.outbox.commit(vec![Asked::Change(Change::Sent { number, from })]).await?;
                    from
                }
            };
            self.outbox.sent(number);
            let asked = |answer| Ask::Signal { signal: signal.clone(), valid_until, once: true, answer };
            match self.session.ask_until_lost(asked).await {
                Ok(Some(seq)) => return Ok(Ok(seq)),
                // The connection was lost, or its time is over now.
                Ok(None) => {}
                Err(ClientError::Expired) if doubt.is_some() => {}
                // That says nothing of an earlier sending, which may be on its way.
                Err(error @ ClientError::Refused { .. })
                    if doubt.is_some() && Outcome::of_refusal(&error).is_some() =>
                {
                    return unknown(format!("it was sent, and cannot be sent again: {error}"));
                }
                Err(error) => return Ok(Err(error)),
            }
            doubt = Some(from);
        }
    }

    /// Looks for a signal in the session, from the seq `from` on (spec OUT-8). Errors: `OUTCOME_UNKNOWN` if some of that is not there any more.
    async fn stored(&self, signal: &Signal, from: u64) -> Result<Found, ClientError> {
        let mut records = self.session.subscribe(Start::Seq(from)).kind(signal.intent.kind()).open().await?;
        while let Some(event) = records.next().await {
            match event? {
                Event::Records(batch) => {
                    for read in batch.iter() {
                        let read = read?;
                        if SignalRecord::of(&read.record).is_ok_and(|stored| stored.id == signal.id) {
                            return Ok(Found::At(read.seq));
                        }
                    }
                }
                Event::CaughtUp { tail } => return Ok(Found::Nowhere { tail }),
                // Trimmed, or covered by a view alone.
                Event::Gap { .. } | Event::Snapshot(_) => {
                    let message = "what the session stored then is not there any more";
                    return Err(ClientError::refused(Code::OUTCOME_UNKNOWN, message));
                }
                _ => {}
            }
        }
        Err(ClientError::Closed)
    }
}

impl Outbox {
    /// It is on its way.
    fn sent(&self, number: u64) {
        if let Some(state) = self.states().get(&number) {
            state.send_if_modified(|state| {
                let queued = *state == EntryState::Queued;
                if queued {
                    *state = EntryState::Sent;
                }
                queued
            });
        }
    }
}

/// Polls something once, so that it takes part from then on.
async fn poll_once(future: std::pin::Pin<&mut impl Future<Output = ()>>) -> bool {
    let mut future = Some(future);
    std::future::poll_fn(move |cx| {
        std::task::Poll::Ready(future.take().is_some_and(|future| future.poll(cx).is_ready()))
    })
    .await
}

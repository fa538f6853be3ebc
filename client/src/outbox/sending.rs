//! Sends what an outbox keeps, in order, and writes down what becomes of it.

use std::collections::{HashMap, VecDeque};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use mainstay_protocol::error::Code;
use mainstay_protocol::registry::PRODUCER_WINDOW;
use mainstay_protocol::session::{Cursor, SignalId};
use mainstay_protocol::wire::{Detail, Label, Signal};

use super::ledger::{Change, Outcome, Queued, What};
use super::{Asked, EntryState, Outbox, OutboxError};
use crate::driver::Ask;
use crate::error::{AppendError, ClientError, Stored};
use crate::live::Update;
use crate::producer::{Producer, Ticket};
use crate::session::{Attaching, Session, StreamId};

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

/// What became of a batch. Errors: that is not known, or it may still be stored another time.
fn outcome(result: Result<u64, AppendError>) -> Result<Outcome, ClientError> {
    match result {
        Ok(seq) => Ok(Outcome::Durable { seq }),
        Err(AppendError { stored: Stored::NotCommitted, error }) => refusal(&error).ok_or(error),
        Err(AppendError { stored: Stored::Unknown, error }) => Err(error),
    }
}

/// What a refusal makes of something that is not stored. `None` if it is not about that, but about who asks and when.
fn refusal(error: &ClientError) -> Option<Outcome> {
    match error {
        ClientError::Expired => Some(Outcome::Expired),
        ClientError::Gone => {
            Some(Outcome::Rejected { code: Code::SESSION_GONE, detail: Detail::new("the session was deleted") })
        }
        ClientError::Refused { code, message, .. } => {
            let about_it = !code.is_retryable()
                && !matches!(
                    *code,
                    Code::FENCED
                        | Code::PRODUCER_UNKNOWN
                        | Code::UNAUTHENTICATED
                        | Code::TOKEN_EXPIRED
                        | Code::TOKEN_INVALID
                );
            about_it.then(|| Outcome::Rejected { code: *code, detail: Detail::new(message) })
        }
        _ => None,
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
                    && let Some(outcome) = refusal(why)
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
        let producer = None;
        let sender =
            Sender { outbox: self, session, producer, streams: HashMap::new(), sent: VecDeque::new(), next: 0 };
        sender.run().await
    }
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
    /// What is below was handed on.
    next: u64,
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
            // Known before the outcomes that it leaves are looked at.
            let ended = producer.as_ref().and_then(|producer| producer.why_ended());
            if self.settle().await? || self.hand_on().await? {
                continue;
            }
            if let Some(error) = ended {
                return Err(error.into());
            }
            // A session that ends ends its producers.
            tokio::select! {
                () = progressed => {}
                _ = version.changed() => {}
            }
        }
    }

    /// Writes down what became of batches. False if nothing did.
    async fn settle(&mut self) -> Result<bool, SendError> {
        let (mut settled, mut given_up, mut trouble, mut open) = (Vec::new(), 0, None, false);
        self.sent.retain(|(number, ticket)| match ticket.outcome().map(outcome) {
            // Answered since the one before it was looked at: that one is looked at first again.
            Some(Ok(Outcome::Durable { .. })) if open => true,
            Some(Ok(outcome)) => {
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
                let producer = self.producer().await?;
                if self.sent.len() >= PRODUCER_WINDOW || !producer.has_room() {
                    return Ok(false);
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
                // In the order in which they were queued, whatever becomes of the ones before it.
                if !self.sent.is_empty() {
                    return Ok(false);
                }
                return match self.signal(number, signal, valid_until, sent).await? {
                    Ok(seq) => self.settled(number, Outcome::Durable { seq }).await,
                    Err(error) => self.refused(number, error).await,
                };
            }
        }
        Ok(true)
    }

    /// The producer, opened with the first batch.
    async fn producer(&mut self) -> Result<Arc<Producer>, ClientError> {
        if let Some(producer) = &self.producer {
            return Ok(producer.clone());
        }
        let (name, journalled) = {
            let ledger = self.outbox.ledger();
            (ledger.producer.clone(), ledger.journalled())
        };
        let producer = Arc::new(self.session.open_producer(name, Some(journalled)).await?);
        Ok(self.producer.insert(producer).clone())
    }

    /// One that cannot be handed on is settled, unless that is about who asks.
    async fn refused(&mut self, number: u64, error: ClientError) -> Result<bool, SendError> {
        let Some(outcome) = refusal(&error) else { return Err(error.into()) };
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
        mut sent: bool,
    ) -> Result<Result<u64, ClientError>, OutboxError> {
        let is_late = || valid_until.is_some_and(|until| SystemTime::now() >= until);
        if !sent && !is_late() {
            self.outbox.commit(vec![Asked::Change(Change::Sent(number))]).await?;
            sent = true;
        }
        self.outbox.sent(number);
        let id = signal.id;
        let asked = self.session.ask_again(|answer| Ask::Signal { signal: signal.clone(), valid_until, answer });
        let result = match asked.await {
            // It may have been stored before the connection was lost: the session knows.
            Err(ClientError::Expired) if sent => self.stored(id).await.and_then(|seq| seq.ok_or(ClientError::Expired)),
            result => result,
        };
        Ok(result)
    }

    /// The seq of a signal that is in the session's view as it is now.
    async fn stored(&self, id: SignalId) -> Result<Option<u64>, ClientError> {
        let mut live = self.session.live().await?;
        loop {
            let signals = live.view().signals();
            let pending = signals.pending().iter().find(|pending| pending.signal.id == id).map(|pending| pending.seq);
            let resolved = || signals.resolved().find(|resolved| resolved.id == id).map(|resolved| resolved.seq);
            if let Some(seq) = pending.or_else(resolved) {
                return Ok(Some(seq));
            }
            match live.next().await {
                Some(Ok(Update::CaughtUp { .. } | Update::Ended)) | None => return Ok(None),
                Some(update) => drop(update?),
            }
        }
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

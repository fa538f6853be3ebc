//! Reading: a stream of events that goes on over reconnects without gap or repetition.

use core::pin::Pin;
use core::sync::atomic::{AtomicU64, Ordering};
use core::task::{Context, Poll};
use core::time::Duration;
use std::sync::Arc;

use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::planted::{Bug, planted};
use mainstay_protocol::session::{
    Author, Backoff, CreditReceived, Incarnation, Kind, Progress, Record, Records, Verdict, View,
};
use mainstay_protocol::wire::{Delivery, Frame, Label, Span, Start, Subscribe};
use mainstay_transport::entropy;
use mainstay_transport::{Connection, FrameError, FrameReader, RecvStream};
use tokio::sync::mpsc;

use crate::driver::{Resubscriber, SessionCommand};
use crate::error::{ClientError, is_renewable};
use crate::link::{Incoming, Link};
use crate::session::{ATTACH_PAUSE, Attaching, Session};

/// A subscription that is about to be opened.
#[derive(Debug, Clone)]
pub struct Subscribing {
    of: Of,
    start: Start,
    pub(crate) streams: Vec<String>,
    pub(crate) kinds: Vec<Kind>,
    window: Option<Duration>,
    folded: bool,
}

/// What a subscription wants, beside where it starts.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    streams: Vec<Label>,
    kinds: Vec<u64>,
    window: Option<u64>,
    pub(crate) folded: bool,
}

impl Wanted {
    pub(crate) fn frame(&self, id: u64, start: Start) -> Subscribe {
        let Self { streams, kinds, window, folded } = self.clone();
        Subscribe { id, start, streams, kinds, window, folded }
    }
}

/// What a subscription is of.
#[derive(Debug, Clone)]
enum Of {
    Attached(Session),
    /// The attach goes out in the same flight.
    Attaching(Attaching),
}

impl Subscribing {
    pub(crate) fn new(session: Session, start: Start) -> Self {
        Self { of: Of::Attached(session), start, streams: Vec::new(), kinds: Vec::new(), window: None, folded: false }
    }

    pub(crate) fn attaching(session: Attaching, start: Start) -> Self {
        Self { of: Of::Attaching(session), start, streams: Vec::new(), kinds: Vec::new(), window: None, folded: false }
    }

    /// Delivers only records of this stream, or of others named so. A stream may be defined later.
    pub fn stream(mut self, name: impl Into<String>) -> Self {
        self.streams.push(name.into());
        self
    }

    /// Delivers only records of this kind, or of others named so.
    pub fn kind(mut self, kind: Kind) -> Self {
        self.kinds.push(kind);
        self
    }

    /// Puts the parts of messages together, in deliveries at least so far apart, at most half a second: for slow networks and for
    /// screens that do not show every token. Messages come out the same; hashes of views are not to be compared.
    pub fn rolled_up(mut self, window: Duration) -> Self {
        self.window = Some(window);
        self
    }

    /// Wants the newest state, not every record: where much waits for this reader, a snapshot comes in its place. Not with a filter.
    pub fn folded(mut self) -> Self {
        self.folded = true;
        self
    }

    /// Opens the subscription, and does not wait until it has begun: from [`Event::Started`] on it covers what is appended. With [`Start::Latest`] what was
    /// appended before that, though after this returned, may be before its beginning.
    ///
    /// Errors: `Invalid` for a filter that is folded, `Protocol` with `NAME_INVALID`, `Closed`, and those of the attach where that is part of
    /// it. What else the server refuses is an event.
    pub async fn open(self) -> Result<Subscription, ClientError> {
        if self.folded && !(self.streams.is_empty() && self.kinds.is_empty()) {
            return Err(ClientError::Invalid("a subscription with a filter cannot be folded".into()));
        }
        let streams = self.streams.iter().map(|name| Label::new(name)).collect::<Result<_, _>>()?;
        let kinds = self.kinds.iter().map(|kind| kind.0).collect();
        // A few: the application's back-pressure must reach the server's credit.
        let (events, receiver) = mpsc::channel(4);
        let window = self.window.map(|window| u64::try_from(window.as_millis()).unwrap_or(u64::MAX));
        let wanted = Wanted { streams, kinds, window, folded: self.folded };
        let command = SessionCommand::Subscribe { start: self.start, wanted, events };
        let session = match self.of {
            Of::Attached(session) => {
                session.commands.send(command).await.map_err(|_| ClientError::Closed)?;
                session
            }
            Of::Attaching(attaching) => attaching.attach_and(Some(command)).await?,
        };
        Ok(Subscription { events: receiver, session })
    }
}

/// What a subscription tells.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event {
    /// The subscription has begun. Comes again, with another position, if it starts with the view and the connection was lost
    /// before that came.
    Started {
        /// What became of the position asked for.
        verdict: Verdict,
        /// The first seq that will be covered.
        next: u64,
        /// The session's tail.
        tail: u64,
        /// The session's incarnation.
        incarnation: Incarnation,
    },
    /// The view at a seq; records from there on follow. Comes at the beginning of a subscription that starts so, and at any time of one
    /// that is folded: in the place of what waited.
    Snapshot(Box<View>),
    /// Records, in order.
    Records(RecordBatch),
    /// Everything below this tail was delivered. Comes once for each time that the subscription had fallen behind.
    CaughtUp {
        /// The tail.
        tail: u64,
    },
    /// Records that will never be delivered.
    Gap {
        /// First seq that is missing.
        from: u64,
        /// First seq that follows.
        to: u64,
        /// Why: `trimmed`.
        reason: &'static str,
    },
    /// From now on whole messages may come in the place of their parts: the server has put them together.
    Compacted,
    /// The connection was lost and the subscription goes on.
    Resumed {
        /// What became of the position.
        verdict: Verdict,
        /// The next seq.
        next: u64,
    },
    /// The session is closed and everything was delivered. Nothing follows.
    Ended,
}

/// Records that were delivered together.
#[derive(Debug, Clone)]
pub struct RecordBatch {
    delivery: Delivery,
    streams: Arc<Vec<Option<Label>>>,
}

/// One record as it was read.
#[derive(Debug, Clone)]
pub struct ReadRecord<'a> {
    /// Its seq.
    pub seq: u64,
    /// When the server accepted it, in milliseconds since the Unix epoch.
    pub time: u64,
    /// Who wrote it.
    pub author: &'a Author,
    /// Name of its stream.
    pub stream: &'a str,
    /// The record.
    pub record: Record,
}

impl RecordBatch {
    /// First seq covered.
    pub fn from(&self) -> u64 {
        self.delivery.from
    }

    /// First seq not covered: where to go on.
    pub fn next(&self) -> u64 {
        self.delivery.to
    }

    /// Number of records.
    pub fn len(&self) -> u64 {
        self.delivery.spans.iter().map(|span| span.count).sum()
    }

    /// True if the interval holds no record that passes the filter.
    pub fn is_empty(&self) -> bool {
        self.delivery.spans.is_empty()
    }

    /// Every record. Errors: `Protocol` if the server delivered something that is not a record.
    pub fn iter(&self) -> impl Iterator<Item = Result<ReadRecord<'_>, ClientError>> {
        let seqs = Span::seqs(self.delivery.from, self.delivery.spans.iter().copied());
        seqs.zip(Records::new(&self.delivery.records)).map(|((seq, span), record)| {
            let record = record?;
            let time = self.delivery.base_time + span.time;
            let author = self.delivery.authors.get(span.author as usize);
            let stream = usize::try_from(record.stream).ok().and_then(|id| self.streams.get(id)?.as_ref());
            let unknown = ProtocolError::new(Code::FRAME_MALFORMED, "delivery names something that was not told");
            let (Some(author), Some(stream)) = (author, stream) else { return Err(unknown.into()) };
            Ok(ReadRecord { seq, time, author, stream: stream.as_str(), record })
        })
    }
}

/// A read of a session from a position on. Drop it to end it.
#[derive(Debug)]
pub struct Subscription {
    events: mpsc::Receiver<Result<Event, ClientError>>,
    session: Session,
}

impl Subscription {
    /// The session that it reads.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The next event; `None` after the last. An error is the last. Cancellation-safe.
    pub async fn next(&mut self) -> Option<Result<Event, ClientError>> {
        self.events.recv().await
    }
}

impl futures_core::Stream for Subscription {
    type Item = Result<Event, ClientError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.events.poll_recv(cx)
    }
}

/// What the session's driver hands to a subscription's task.
pub(crate) enum Opened<C: Connection> {
    /// Its stream on a new connection, what is needed to give credit, and the position that was asked for.
    Stream { incoming: Incoming<C>, link: Arc<Link<C>>, incarnation: Incarnation, asked: Option<u64> },
    /// The connection was lost before the stream of this id came.
    Lost(u64),
    /// The server refused the subscription of this id.
    Refused(u64, ClientError),
    /// The session cannot be used any more.
    Failed(ClientError),
}

/// How far a subscription has come, for whoever asks for it on another connection.
#[derive(Debug, Clone)]
pub(crate) struct Position(Arc<AtomicU64>);

/// No seq: it has not begun.
const NOT_BEGUN: u64 = u64::MAX;

impl Default for Position {
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(NOT_BEGUN)))
    }
}

impl Position {
    /// The next seq, once the subscription has begun.
    pub(crate) fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Acquire)).filter(|next| *next != NOT_BEGUN)
    }

    fn of(progress: &Progress) -> Option<u64> {
        progress.has_started().then(|| progress.next())
    }

    fn set(&self, progress: &Progress) {
        self.0.store(Self::of(progress).unwrap_or(NOT_BEGUN), Ordering::Release);
    }
}

/// Reads one subscription over all its connections.
pub(crate) struct Reader<C: Connection> {
    pub(crate) opened: mpsc::Receiver<Opened<C>>,
    pub(crate) events: mpsc::Sender<Result<Event, ClientError>>,
    pub(crate) resubscriber: Resubscriber,
    pub(crate) progress: Progress,
    pub(crate) position: Position,
    /// There is a source of tokens.
    pub(crate) renews: bool,
}

/// How often a new subscription is refused for the limit before that is believed: about two seconds.
const PATIENCE: u32 = 8;

/// The application dropped the subscription.
struct Dropped;

enum Over {
    /// The connection is gone; or the server refuses, and it is tried again, not before that time is over.
    Again { after: Option<Duration> },
    /// Done: every record was delivered.
    Ended,
    /// It cannot go on.
    Failed(ClientError),
}

impl<C: Connection> Reader<C> {
    /// Runs until the subscription ends.
    pub(crate) async fn run(mut self) {
        let mut progress = core::mem::take(&mut self.progress);
        let mut backoff = Backoff::new(ATTACH_PAUSE.0, ATTACH_PAUSE.1);
        loop {
            let opened = tokio::select! {
                opened = self.opened.recv() => opened,
                () = self.events.closed() => return,
            };
            let (of, over) = match opened {
                // Asked for ahead of time, and the connection before delivered more meanwhile.
                Some(Opened::Stream { incoming: (subscribed, mut frames), asked, .. })
                    if Position::of(&progress) != asked =>
                {
                    frames.stop(Code::NO_ERROR.0);
                    (subscribed.id, Over::Again { after: None })
                }
                Some(Opened::Stream { incoming, link, incarnation, .. }) => {
                    let of = incoming.0.id;
                    let read = self.read(incoming, &link, incarnation, &mut progress);
                    match read.await {
                        Ok(over) => (of, over),
                        Err(Dropped) => return,
                    }
                }
                // Of a subscription that was just dropped the server may not know yet.
                Some(Opened::Refused(of, error))
                    if error.passes(self.renews)
                        || matches!(error, ClientError::Refused { code: Code::LIMIT_EXCEEDED, .. })
                            && (progress.has_started() || backoff.failures() < PATIENCE) =>
                {
                    tracing::debug!(%error, "subscription refused; trying again");
                    (of, Over::Again { after: Some(error.pause(Duration::ZERO)) })
                }
                Some(Opened::Refused(of, error)) => (of, Over::Failed(error)),
                Some(Opened::Lost(of)) => (of, Over::Again { after: None }),
                Some(Opened::Failed(error)) => (0, Over::Failed(error)),
                None => return,
            };
            match over {
                Over::Again { after } => {
                    if let Some(after) = after {
                        tokio::select! {
                            () = tokio::time::sleep(backoff.next(entropy::random()).max(after)) => {}
                            () = self.events.closed() => return,
                        }
                    } else {
                        backoff.reset();
                    }
                    self.position.set(&progress);
                    let start = self.position.get().map(Start::Seq);
                    if self.resubscriber.again(of, start).await.is_err() {
                        return;
                    }
                }
                Over::Ended => {
                    // An application that left does not mind.
                    let _ = self.events.send(Ok(Event::Ended)).await;
                    return;
                }
                Over::Failed(error) => {
                    let _ = self.events.send(Err(error)).await;
                    return;
                }
            }
        }
    }

    async fn send(&self, event: Event) -> Result<(), Dropped> {
        self.events.send(Ok(event)).await.map_err(|_| Dropped)
    }

    /// Reads one stream to its end.
    async fn read(
        &self,
        (subscribed, mut frames): Incoming<C>,
        link: &Link<C>,
        incarnation: Incarnation,
        progress: &mut Progress,
    ) -> Result<Over, Dropped> {
        let (verdict, next, tail) = (subscribed.verdict, subscribed.next, subscribed.tail);
        let mut again = progress.has_started();
        if let Err(error) = progress.subscribed(verdict, next, tail) {
            return Ok(broken(&mut frames, error));
        }
        self.send(match again {
            true => Event::Resumed { verdict, next },
            false => Event::Started { verdict, next, tail, incarnation },
        })
        .await?;
        self.caught_up(progress).await?;
        let mut credit = CreditReceived::new(link.window());
        let mut streams: Arc<Vec<Option<Label>>> = Arc::default();
        loop {
            loop {
                let frame = match frames.buffered() {
                    Ok(Some(frame)) => frame,
                    Ok(None) => break,
                    Err(error) => return Ok(broken(&mut frames, error)),
                };
                link.news();
                match frame {
                    Frame::Delivery(delivery) => {
                        if let Err(error) = progress.covered(delivery.from, delivery.to) {
                            return Ok(broken(&mut frames, error));
                        }
                        let batch = RecordBatch { delivery, streams: streams.clone() };
                        if planted(Bug::DeliveredTwice) && core::mem::take(&mut again) {
                            self.send(Event::Records(batch.clone())).await?;
                        }
                        self.send(Event::Records(batch)).await?;
                        self.caught_up(progress).await?;
                    }
                    Frame::Stream(stream) => {
                        let Some(id) = usize::try_from(stream.id).ok().filter(|id| *id < MAX_STREAM) else { continue };
                        let table = Arc::make_mut(&mut streams);
                        if table.len() <= id {
                            table.resize(id + 1, None);
                        }
                        table[id] = Some(stream.name);
                    }
                    Frame::Tail(tail) => progress.tail(tail.tail),
                    Frame::Compacted(_) => self.send(Event::Compacted).await?,
                    Frame::Gap(gap) => {
                        if let Err(error) = progress.covered(gap.from, gap.to) {
                            return Ok(broken(&mut frames, error));
                        }
                        self.send(Event::Gap { from: gap.from, to: gap.to, reason: "trimmed" }).await?;
                        self.caught_up(progress).await?;
                    }
                    Frame::Snapshot(snapshot) => match progress.snapshot(&snapshot) {
                        Ok(Some(view)) => {
                            self.send(Event::Snapshot(Box::new(view))).await?;
                            self.caught_up(progress).await?;
                        }
                        Ok(None) => {}
                        Err(error) => return Ok(broken(&mut frames, error)),
                    },
                    Frame::Error(error) => {
                        let failure = ClientError::answered(&error);
                        if self.renews && is_renewable(error.code) {
                            link.outlived();
                        }
                        return Ok(match error.code {
                            Code::SESSION_GONE => Over::Failed(ClientError::Gone),
                            _ if failure.passes(self.renews) => {
                                Over::Again { after: Some(failure.pause(Duration::ZERO)) }
                            }
                            _ => Over::Failed(failure),
                        });
                    }
                    _ => {
                        let error = ProtocolError::new(Code::FRAME_UNEXPECTED, "not a frame of a subscription");
                        return Ok(broken(&mut frames, error));
                    }
                }
            }
            if let Some(consumed) = credit.consumed(frames.take_taken()) {
                link.credit(subscribed.id, consumed);
            }
            let filled = tokio::select! {
                filled = frames.fill() => filled,
                () = self.events.closed() => return Err(Dropped),
            };
            match filled {
                Ok(true) => {}
                Ok(false) => return Ok(Over::Ended),
                Err(FrameError::Violation(error)) => return Ok(broken(&mut frames, error)),
                Err(FrameError::Lost(_)) => return Ok(Over::Again { after: None }),
            }
        }
    }

    /// Something was handed to the application.
    async fn caught_up(&self, progress: &mut Progress) -> Result<(), Dropped> {
        self.position.set(progress);
        match progress.caught_up() {
            Some(tail) => self.send(Event::CaughtUp { tail }).await,
            None => Ok(()),
        }
    }
}

/// The server broke the protocol: it is told so on this QUIC stream (spec CONN-3).
fn broken<R: RecvStream>(frames: &mut FrameReader<R>, error: ProtocolError) -> Over {
    frames.stop(error.code.0);
    Over::Failed(error.into())
}

/// Streams that a session can have.
const MAX_STREAM: usize = mainstay_protocol::registry::MAX_STREAMS;

//! A session as the application sees it.

use core::time::Duration;
use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::registry::STREAM_MAIN;
use mainstay_protocol::session::{
    Cursor, Incarnation, InputPolicy, Intent, MessageId, NotifyRule, Payload, Record, RunId, RunMode, SessionName,
    Verdict, ViewHash,
};
use mainstay_protocol::wire::{AttachMode, Attached, Label, MAX_VARINT, SetRule, Start};
use mainstay_transport::entropy;
use tokio::sync::{mpsc, oneshot, watch};

use crate::client::Client;
use crate::driver::{Ask, SessionCommand};
use crate::error::ClientError;
use crate::live::{LiveView, Manner};
use crate::membership::{Doing, Membership};
use crate::producer::{Journalled, Producer};
use crate::run::Run;
use crate::signal::{Signalling, Signals};
use crate::subscription::Subscribing;

/// A session that is about to be attached to.
#[derive(Debug, Clone)]
pub struct Attaching {
    client: Client,
    pub(crate) name: SessionName,
    pub(crate) mode: AttachMode,
    pub(crate) cursor: Option<Cursor>,
    pub(crate) wait: bool,
    pub(crate) expire_after: Option<u64>,
}

impl Attaching {
    pub(crate) fn new(client: Client, name: SessionName) -> Self {
        Self { client, name, mode: AttachMode::Attach, cursor: None, wait: false, expire_after: None }
    }

    /// Creates the session if it does not exist.
    pub fn create(mut self) -> Self {
        self.mode = AttachMode::Create;
        self
    }

    /// Creates the session, and fails with `SESSION_EXISTS` if it exists.
    pub fn create_new(mut self) -> Self {
        self.mode = AttachMode::CreateNew;
        self
    }

    /// If this attach creates the session: the server deletes it once it was neither attached nor appended to for so long.
    pub fn expire_after(mut self, unused: Duration) -> Self {
        self.expire_after = Some(u64::try_from(unused.as_millis()).unwrap_or(MAX_VARINT).min(MAX_VARINT));
        self
    }

    /// Waits for the session to exist instead of failing with `SESSION_NOT_FOUND`.
    pub fn wait(mut self) -> Self {
        self.wait = true;
        self
    }

    /// Continues from a cursor: the attach fails with `Gone` if the session has another incarnation now.
    pub fn at(mut self, cursor: Cursor) -> Self {
        self.cursor = Some(cursor);
        self
    }

    /// Attaches and subscribes from `start` on in one flight, which saves a round trip.
    pub fn subscribe(self, start: Start) -> Subscribing {
        Subscribing::attaching(self, start)
    }

    /// Attaches, and follows the session's view from now on, in one flight. Errors: those of [`Attaching::attach`].
    pub async fn live(self) -> Result<LiveView, ClientError> {
        LiveView::open(self.subscribe(Start::Snapshot), Manner::default()).await
    }

    /// The same, rolled up: see [`Subscribing::rolled_up`].
    pub async fn live_rolled_up(self, window: Duration) -> Result<LiveView, ClientError> {
        LiveView::open(self.subscribe(Start::Snapshot), Manner { window: Some(window), folded: false }).await
    }

    /// Attaches. Errors: `Refused`, `Unreachable`, `Gone`.
    pub async fn attach(self) -> Result<Session, ClientError> {
        self.attach_and(None).await
    }

    /// Attaches, with a request that need not wait for the answer.
    pub(crate) async fn attach_and(self, first: Option<SessionCommand>) -> Result<Session, ClientError> {
        // Bounded: handles wait while the session's driver is busy or without a connection.
        let (commands, mailbox) = mpsc::channel(64);
        let (answer, attached) = oneshot::channel();
        let core = self.client.core.clone();
        let client = self.client.clone();
        commands.send(SessionCommand::Attached { answer }).await.map_err(|_| ClientError::Closed)?;
        if let Some(first) = first {
            commands.send(first).await.map_err(|_| ClientError::Closed)?;
        }
        core.drive(self, mailbox, commands.downgrade());
        let info = attached.await.map_err(|_| ClientError::Closed)??;
        Ok(Session { commands, info, client })
    }
}

/// What an attach told about the session.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionInfo {
    /// Its name.
    pub name: SessionName,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// What became of the cursor.
    pub verdict: Verdict,
    /// The seq that the next record will get.
    pub tail: u64,
    /// The first seq that can be read.
    pub first: u64,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created: u64,
    /// True if it is closed.
    pub closed: bool,
    /// Version of the fold that made `view_hash`.
    pub fold_version: u64,
    /// Hash of the view at `tail`.
    pub view_hash: ViewHash,
    /// Names of its streams, by stream id.
    pub streams: Vec<String>,
    /// Name, epoch and next sequence of this subject's producers, most recently granted first.
    pub producers: Vec<(String, u64, u64)>,
}

impl SessionInfo {
    pub(crate) fn new(name: SessionName, attached: Attached) -> Self {
        let producers = attached.positions.into_iter();
        Self {
            name,
            incarnation: attached.incarnation,
            verdict: attached.verdict,
            tail: attached.tail,
            first: attached.first,
            created: attached.created,
            closed: attached.closed,
            fold_version: attached.fold_version,
            view_hash: attached.view_hash,
            streams: attached.streams.iter().map(|name| name.as_str().to_owned()).collect(),
            producers: producers.map(|p| (p.producer.as_str().to_owned(), p.epoch, p.next)).collect(),
        }
    }
}

/// A stream of one session, as records name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StreamId(pub(crate) u64);

impl StreamId {
    /// A record of this payload in this stream, for a batch.
    pub fn record(self, payload: &impl Payload) -> Record {
        payload.record(self.0)
    }

    /// The same record in this stream.
    pub fn place(self, record: Record) -> Record {
        Record { stream: self.0, ..record }
    }

    /// A `data` record in this stream, for a batch.
    pub fn data(self, payload: impl Into<Bytes>) -> Record {
        Record::data(self.0, payload)
    }
}

/// An attachment to a session. It attaches again by itself when the connection is lost, until it is dropped.
#[derive(Debug, Clone)]
pub struct Session {
    pub(crate) commands: mpsc::Sender<SessionCommand>,
    info: Arc<watch::Receiver<SessionInfo>>,
    client: Client,
}

impl Session {
    /// The client that it is attached with.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// What the last attach told.
    pub fn info(&self) -> SessionInfo {
        self.info.borrow().clone()
    }

    /// The stream `main`.
    pub fn main(&self) -> StreamId {
        StreamId(STREAM_MAIN)
    }

    /// The stream called `name`; defines it durably if the session has none of this name.
    ///
    /// Errors: `Refused` with `LIMIT_EXCEEDED` or `FORBIDDEN`, `Protocol` with `NAME_INVALID`.
    pub async fn stream(&self, name: &str) -> Result<StreamId, ClientError> {
        let name = Label::new(name)?;
        self.ask_again(|answer| Ask::Stream { name: name.clone(), answer }).await.map(StreamId)
    }

    /// A producer called `name` within the token's subject. The server grants it the next epoch, which fences every earlier
    /// holder of the name.
    ///
    /// Errors: `Refused`, `Protocol` with `NAME_INVALID`.
    pub async fn producer(&self, name: &str) -> Result<Producer, ClientError> {
        self.open_producer(Label::new(name)?, None).await
    }

    /// The same, of a name of which a journal knows more.
    pub(crate) async fn open_producer(
        &self,
        name: Label,
        journalled: Option<Journalled>,
    ) -> Result<Producer, ClientError> {
        let (answer, opened) = oneshot::channel();
        let config = self.client.core.config().clone();
        let command = SessionCommand::Producer { name, config, journalled, answer };
        self.commands.send(command).await.map_err(|_| ClientError::Closed)?;
        let shared = opened.await.map_err(|_| ClientError::Closed)??;
        Ok(Producer::new(shared, self.clone()))
    }

    /// The session's view, kept up to date from now on. Errors: `Closed`.
    pub async fn live(&self) -> Result<LiveView, ClientError> {
        LiveView::open(self.subscribe(Start::Snapshot), Manner::default()).await
    }

    /// The same, rolled up: see [`Subscribing::rolled_up`].
    pub async fn live_rolled_up(&self, window: Duration) -> Result<LiveView, ClientError> {
        LiveView::open(self.subscribe(Start::Snapshot), Manner { window: Some(window), folded: false }).await
    }

    /// The same, rolled up, for a network that is too slow for every record: see [`Subscribing::folded`].
    pub async fn live_folded(&self, window: Duration) -> Result<LiveView, ClientError> {
        LiveView::open(self.subscribe(Start::Snapshot), Manner { window: Some(window), folded: true }).await
    }

    /// A subscription from `start` on.
    pub fn subscribe(&self, start: Start) -> Subscribing {
        Subscribing::new(self.clone(), start)
    }

    /// Makes this client a member of the session, called `name` by people, until it leaves or nothing is heard of it for `grace`
    /// (1 s to 120 s). A session has one membership of a client; joining again takes it over.
    ///
    /// Errors: `Refused` with `FORBIDDEN` without the operation `join`, `LIMIT_EXCEEDED`; `Protocol` with `NAME_INVALID`.
    pub async fn join(&self, name: &str, grace: Duration, doing: Doing) -> Result<Membership, ClientError> {
        Membership::join(self.commands.clone(), name, grace, doing).await
    }

    /// Says how the session treats runs and inputs from now on. Returns the seq of the record that says so. Errors: `Refused`.
    pub async fn configure(&self, runs: RunMode, inputs: InputPolicy) -> Result<u64, ClientError> {
        self.ask_again(|answer| Ask::Configure { runs, inputs, answer }).await
    }

    /// Puts a rule in force that says whom to tell of what while nobody of them is here, in the place of one of the same name; a rule
    /// without triggers is taken away. Returns the seq from which on it counts. Needs `manage`.
    ///
    /// Errors: `Refused` with `FORBIDDEN`, `LIMIT_EXCEEDED`, `SESSION_CLOSED`.
    pub async fn set_rule(&self, rule: NotifyRule) -> Result<u64, ClientError> {
        let NotifyRule { name, principal, triggers, delay, collapse } = rule;
        let rule = SetRule { name, principal, triggers, delay, collapse };
        self.ask_again(|answer| Ask::Rule { rule: rule.clone(), answer }).await
    }

    /// Begins a run that this client holds, under a lease of 1 s to 10 min, caused by `input`.
    ///
    /// Errors: `Refused` with `RUN_ACTIVE` where another one is and the session has one at a time, `FORBIDDEN`, `LIMIT_EXCEEDED`.
    pub async fn start_run(&self, lease: Duration, input: Option<MessageId>) -> Result<Run, ClientError> {
        self.start_run_as(RunId(entropy::random()), lease, input).await
    }

    /// The same, under an id that is known before; or takes a run of this id over that is lost. Errors: as [`Session::start_run`], and
    /// `RUN_OVER`.
    pub async fn start_run_as(
        &self,
        run: RunId,
        lease: Duration,
        input: Option<MessageId>,
    ) -> Result<Run, ClientError> {
        Run::start(self, run, lease, input).await
    }

    /// Waits until a run is lost, `run` or any, and takes it over: a standby. Dropping the future stops to wait.
    ///
    /// Errors: `Refused` with `RUN_OVER` where `run` is over or unknown, `FORBIDDEN`, `LIMIT_EXCEEDED`.
    pub async fn take_run(&self, run: Option<RunId>, lease: Duration) -> Result<Run, ClientError> {
        Run::take(self.commands.clone(), run, lease).await
    }

    /// A signal to the run that is active, unless it says to which.
    pub fn signal(&self, intent: Intent) -> Signalling {
        Signalling::new(self.clone(), intent)
    }

    /// Signals, as soon as they are durable. A session has one such listener of a client: a new one takes the place of the last.
    /// Errors: `Closed`.
    pub async fn signals(&self) -> Result<Signals, ClientError> {
        Signals::open(self.commands.clone()).await
    }

    /// Closes the session: no record can follow. Returns the seq of the record that says so. Errors: `Refused`.
    pub async fn close(&self) -> Result<u64, ClientError> {
        self.ask_again(|answer| Ask::Close { answer }).await
    }

    /// Releases the records below `before`. Returns the first seq that can still be read. Errors: `Refused`.
    pub async fn trim(&self, before: u64) -> Result<u64, ClientError> {
        self.ask_again(|answer| Ask::Trim { before, answer }).await
    }

    /// Deletes the session. Its name is free afterwards. Errors: `Refused`.
    pub async fn delete(&self) -> Result<(), ClientError> {
        self.ask_again(|answer| Ask::Delete { answer }).await.map(|_| ())
    }

    /// Waits until the session cannot be used any more and says why.
    pub async fn ended(&self) -> ClientError {
        let (answer, ended) = oneshot::channel();
        if self.commands.send(SessionCommand::Ended { answer }).await.is_err() {
            return ClientError::Closed;
        }
        ended.await.unwrap_or(ClientError::Closed)
    }

    /// Asks again while it is refused for a reason that may pass, as long as the configuration says. What is asked must be safe to
    /// repeat.
    pub(crate) async fn ask_again<T>(
        &self,
        ask: impl Fn(oneshot::Sender<Result<T, ClientError>>) -> Ask,
    ) -> Result<T, ClientError> {
        self.ask_until_lost(ask).await?.ok_or(ClientError::Closed)
    }

    /// The same, of what may get no answer: then `None`.
    pub(crate) async fn ask_until_lost<T>(
        &self,
        ask: impl Fn(oneshot::Sender<Result<T, ClientError>>) -> Ask,
    ) -> Result<Option<T>, ClientError> {
        let config = self.client.core.config();
        let (give_up_after, renews) = (config.give_up_after, config.renewal.is_some());
        let begun = tokio::time::Instant::now();
        loop {
            let (answer, asked) = oneshot::channel();
            self.commands.send(SessionCommand::Ask(ask(answer))).await.map_err(|_| ClientError::Closed)?;
            let Ok(answered) = asked.await else { return Ok(None) };
            match answered {
                Err(error)
                    if matches!(error, ClientError::Refused { .. })
                        && error.passes(renews)
                        && give_up_after.is_none_or(|limit| begun.elapsed() < limit) =>
                {
                    tokio::time::sleep(error.pause(ASK_PAUSE)).await;
                }
                answered => return answered.map(Some),
            }
        }
    }
}

/// How long a server that cannot do something now is left alone.
const ASK_PAUSE: Duration = Duration::from_millis(100);

/// How long to wait before attaching again to a session that does not exist yet or is not served yet.
pub(crate) const ATTACH_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));

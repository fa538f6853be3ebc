//! The driver of one session: attaches, attaches again when the connection is lost, and passes requests and answers on.

use core::time::Duration;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::registry::{MAX_FRAME, MAX_RUNS};
use mainstay_protocol::session::{
    Activity, Backoff, Cursor, Incarnation, InputPolicy, MessageId, Progress, Record, RunId, RunMode, SessionName,
    Verdict,
};
use mainstay_protocol::wire::{
    Attach, AttachMode, Attached, Body, CloseSession, Configure, DefineStream, DeleteSession, Early, Frame, Granted,
    Join, Label, Leave, Listen, OpenProducer, Release, Renew, Resume, SetRule, Signal, Start, StartRun, Subscribe,
    TakeRun, Trim, Unsubscribe, Update, Writer, put_frame,
};
use mainstay_transport::entropy;
use mainstay_transport::{Connection, FrameError, FrameReader, Outbox, SendStream, StreamError, priority};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::config::Config;
use crate::continuity::Continuity;
use crate::error::{ClientError, is_renewable};
use crate::link::{Expected, Link};
use crate::live::Folded;
use crate::membership::Wanted;
use crate::producer::{self, Journalled, Shared};
use crate::roam::{Links, Status};
use crate::session::{ATTACH_PAUSE, Attaching, SessionInfo};
use crate::signal::Heard;
use crate::subscription::{self, Event, Opened, Position, Reader};

type Answer<T> = oneshot::Sender<Result<T, ClientError>>;

/// Requests that have one answer each; one at a time is on the wire.
#[derive(Debug)]
pub(crate) enum Ask {
    /// The id of a stream.
    Stream { name: Label, answer: Answer<u64> },
    /// Close the session.
    Close { answer: Answer<u64> },
    /// Trim it.
    Trim { before: u64, answer: Answer<u64> },
    /// Delete it.
    Delete { answer: Answer<u64> },
    /// Be a member of it. Without an answer it was one before.
    Join { wanted: Wanted, answer: Option<Answer<u64>> },
    /// Be none.
    Leave { number: u64, answer: Option<Answer<u64>> },
    /// How runs and inputs are treated.
    Configure { runs: RunMode, inputs: InputPolicy, answer: Answer<u64> },
    /// Whom to tell of what.
    Rule { rule: SetRule, answer: Answer<u64> },
    /// Begin a run.
    StartRun { run: RunId, lease: u64, input: Option<MessageId>, answer: Answer<Granted> },
    /// Want something of a run, unless it is too late for it: then the answer is `Expired`, and it was not sent. One that is sent `once` is not sent
    /// again by itself: it gets no answer where the connection is lost before that comes.
    Signal { signal: Signal, valid_until: Option<SystemTime>, once: bool, answer: Answer<u64> },
}

impl Ask {
    fn frame(&self) -> Frame {
        match self {
            Self::Stream { name, .. } => DefineStream { name: name.clone() }.into(),
            Self::Close { .. } => CloseSession {}.into(),
            Self::Trim { before, .. } => Trim { before: *before }.into(),
            Self::Delete { .. } => DeleteSession {}.into(),
            Self::Join { wanted, .. } => wanted.request.clone().into(),
            Self::Leave { .. } => Leave {}.into(),
            Self::Configure { runs, inputs, .. } => Configure { runs: *runs, inputs: *inputs }.into(),
            Self::Rule { rule, .. } => rule.clone().into(),
            Self::StartRun { run, lease, input, .. } => StartRun { run: *run, lease: *lease, input: *input }.into(),
            Self::Signal { signal, .. } => signal.clone().into(),
        }
    }

    fn kind(&self) -> u64 {
        match self {
            Self::Stream { .. } => DefineStream::KIND,
            Self::Close { .. } => CloseSession::KIND,
            Self::Trim { .. } => Trim::KIND,
            Self::Delete { .. } => DeleteSession::KIND,
            Self::Join { .. } => Join::KIND,
            Self::Leave { .. } => Leave::KIND,
            Self::Configure { .. } => Configure::KIND,
            Self::Rule { .. } => SetRule::KIND,
            Self::StartRun { .. } => StartRun::KIND,
            Self::Signal { .. } => Signal::KIND,
        }
    }

    fn answer(self, result: Result<u64, ClientError>) {
        let answer = match self {
            Self::Stream { answer, .. }
            | Self::Close { answer }
            | Self::Trim { answer, .. }
            | Self::Delete { answer }
            | Self::Configure { answer, .. }
            | Self::Rule { answer, .. }
            | Self::Signal { answer, .. } => Some(answer),
            Self::Join { answer, .. } | Self::Leave { answer, .. } => answer,
            // Granted elsewhere: here it is refused.
            Self::StartRun { answer, .. } => {
                if let Err(error) = result {
                    let _ = answer.send(Err(error));
                }
                return;
            }
        };
        if let Some(answer) = answer {
            // Whoever asked may be gone.
            let _ = answer.send(result);
        }
    }
}

/// Requests to the driver.
pub(crate) enum SessionCommand {
    /// Tell the outcome of the first attach.
    Attached { answer: Answer<Arc<watch::Receiver<SessionInfo>>> },
    /// A request with one answer.
    Ask(Ask),
    /// Wait for a run to be lost.
    TakeRun { run: Option<RunId>, lease: u64, answer: Answer<Granted> },
    /// Say that a run is worked on.
    Renew { epoch: u64 },
    /// Let a run go, or wait for none.
    Release { epoch: Option<u64> },
    /// Hear signals early.
    Listen { records: mpsc::Sender<Folded>, heard: Arc<Heard> },
    /// Hear those again that nobody took.
    ListenAgain,
    /// Say what the member is doing.
    Update { number: u64, activity: Activity },
    /// Open a producer.
    Producer { name: Label, config: Arc<Config>, journalled: Option<Journalled>, answer: Answer<Arc<Shared>> },
    /// Open a subscription.
    Subscribe { start: Start, wanted: subscription::Wanted, events: mpsc::Sender<Result<Event, ClientError>> },
    /// A subscription lost its stream of this id and goes on, from `start` if it had begun.
    Again { subscription: u64, of: u64, start: Option<Start> },
    /// Tell when and why the session ended.
    Ended { answer: oneshot::Sender<ClientError> },
}

/// Lets a subscription ask for a new stream.
pub(crate) struct Resubscriber {
    subscription: u64,
    commands: mpsc::WeakSender<SessionCommand>,
}

impl Resubscriber {
    /// Asks for a new stream in the place of the one of id `of`. Errors: the session is gone.
    pub(crate) async fn again(&self, of: u64, start: Option<Start>) -> Result<(), ()> {
        let commands = self.commands.upgrade().ok_or(())?;
        let command = SessionCommand::Again { subscription: self.subscription, of, start };
        commands.send(command).await.map_err(|_| ())
    }
}

struct ProducerEntry {
    shared: Arc<Shared>,
    /// Its id on the current connection.
    id: Option<u64>,
    /// The id under which it was opened before, whose stream the server has ended. The answer to that may come later than its end.
    before: Option<u64>,
    /// It was opened there for a new epoch: nothing is sent before it is granted.
    begins: bool,
    /// When to open it again after a refusal.
    again: Option<Instant>,
    answer: Option<Answer<Arc<Shared>>>,
}

/// How long a server that cannot open a producer now is left alone.
const REOPEN_PAUSE: Duration = Duration::from_millis(200);

struct SubscriptionEntry<C: Connection> {
    start: Start,
    wants: subscription::Wanted,
    opened: mpsc::Sender<Opened<C>>,
    position: Position,
    /// Its id on the current connection.
    id: Option<u64>,
    /// It waits for a stream.
    wanted: bool,
}

/// An attachment that was asked for on a connection that may become the one: what can be read travels in its first flight (spec EARLY-1).
struct Prefetched<C: Connection> {
    link: Arc<Link<C>>,
    opening: JoinSet<Option<(C::Send, C::Recv)>>,
    subscriptions: Vec<PrefetchedSubscription<C>>,
}

/// A subscription of it: which, its id there, the position that was asked for, and where its stream arrives.
struct PrefetchedSubscription<C: Connection> {
    subscription: u64,
    id: u64,
    asked: Option<u64>,
    arrives: mpsc::Receiver<Expected<C>>,
}

impl<C: Connection> Drop for Prefetched<C> {
    fn drop(&mut self) {
        // Those that were taken over are not here any more.
        self.subscriptions.iter().for_each(|prefetched| self.link.unexpect(prefetched.id));
    }
}

/// A run that is waited for.
struct Taking {
    id: u64,
    run: Option<RunId>,
    lease: u64,
    answer: Answer<Granted>,
    /// When it is asked for again after a refusal that may pass.
    again: Option<Instant>,
}

impl Taking {
    /// Its request, of a client that knows of no run granted from the epoch `since` on.
    fn frame(&self, since: u64) -> TakeRun {
        TakeRun { id: self.id, run: self.run, lease: self.lease, since }
    }
}

/// Where signals are told early.
struct Listener {
    records: mpsc::Sender<Folded>,
    heard: Arc<Heard>,
    /// Behind the last one told.
    next: u64,
}

struct Joining {
    /// The join and when it is asked for again; `None` while it is.
    waiting: Option<(Ask, Instant)>,
    /// Since when it is refused.
    since: Instant,
}

/// Why an attachment ended.
enum Over {
    /// The connection is lost.
    Lost,
    /// To attach again, and not before that time is over.
    Again(Duration),
    /// Every handle was dropped.
    Unused,
    /// It cannot go on.
    Failed(ClientError),
}

/// See the [module](self).
pub(crate) struct Driver<C: Connection> {
    links: watch::Receiver<Links<C>>,
    prefetched: Option<Prefetched<C>>,
    request: Attaching,
    commands: mpsc::Receiver<SessionCommand>,
    again: mpsc::WeakSender<SessionCommand>,
    info: Option<watch::Sender<SessionInfo>>,
    attach_answer: Option<Answer<Arc<watch::Receiver<SessionInfo>>>>,
    asks: VecDeque<Ask>,
    /// The first of `asks` is on the wire.
    asked: bool,
    producers: Vec<ProducerEntry>,
    /// What writes their batches, each until its QUIC stream ends; then its id.
    writers: JoinSet<u64>,
    subscriptions: HashMap<u64, SubscriptionEntry<C>>,
    next_subscription: u64,
    /// The membership that is to be kept.
    member: Option<Wanted>,
    /// A join that was refused for a reason that may pass.
    joining: Option<Joining>,
    /// Runs that are waited for, in the order in which they were asked for.
    taking: VecDeque<Taking>,
    next_taking: u64,
    /// Behind the newest epoch of a run that was granted.
    granted: u64,
    /// Epochs of runs that were renewed while there was no attachment.
    renewed: BTreeSet<u64>,
    listener: Option<Listener>,
    /// When to ask for it again after a refusal that may pass.
    listen_again: Option<Instant>,
    ended: Vec<oneshot::Sender<ClientError>>,
    /// The session's incarnation, once it is known.
    incarnation: watch::Sender<Option<Incarnation>>,
    /// What proves that this is the same client, and whether that was said on the current attachment.
    continuity: Continuity,
    resuming: bool,
    /// That was not answered yet.
    resume_open: bool,
    /// How often this attached again because it may have been told of a RESUME of its own (spec RES-5).
    excused: u32,
    /// When to say it again after a refusal that may pass.
    resume_again: Option<Instant>,
    /// The connection of the current attachment.
    on: Option<Arc<Link<C>>>,
    /// How long refusals that may pass are borne.
    give_up_after: Option<Duration>,
    /// There is a source of tokens.
    renews: bool,
    /// Since when attaching is refused, and who is told why.
    refused_since: Option<Instant>,
    waiting: Waiting,
}

/// Why the server does not attach sessions now that wait for it, by their names. As many as wait.
pub(crate) type Refused = Arc<Mutex<BTreeMap<SessionName, ClientError>>>;

/// What one session has said there, until it waits no more.
struct Waiting {
    name: SessionName,
    refused: Refused,
}

impl Waiting {
    fn say(&self, error: Option<ClientError>) {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        match error {
            Some(error) => refused.insert(self.name.clone(), error),
            None => refused.remove(&self.name),
        };
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.say(None);
    }
}

impl<C: Connection> Driver<C> {
    pub(crate) fn new(
        links: watch::Receiver<Links<C>>,
        request: Attaching,
        commands: mpsc::Receiver<SessionCommand>,
        again: mpsc::WeakSender<SessionCommand>,
        refused: Refused,
        config: &Config,
    ) -> Self {
        Self {
            waiting: Waiting { name: request.name.clone(), refused },
            give_up_after: config.give_up_after,
            renews: config.renewal.is_some(),
            continuity: config.continuity.clone(),
            resuming: false,
            resume_open: false,
            excused: 0,
            resume_again: None,
            on: None,
            links,
            prefetched: None,
            incarnation: watch::channel(request.cursor.map(|cursor| cursor.incarnation)).0,
            request,
            commands,
            again,
            info: None,
            attach_answer: None,
            asks: VecDeque::new(),
            asked: false,
            producers: Vec::new(),
            writers: JoinSet::new(),
            subscriptions: HashMap::new(),
            next_subscription: 0,
            member: None,
            joining: None,
            taking: VecDeque::new(),
            next_taking: 0,
            granted: 0,
            renewed: BTreeSet::new(),
            listener: None,
            listen_again: None,
            ended: Vec::new(),
            refused_since: None,
        }
    }

    /// Runs until every handle is dropped or the session cannot be used any more.
    pub(crate) async fn run(mut self) {
        let mut backoff = Backoff::new(ATTACH_PAUSE.0, ATTACH_PAUSE.1);
        let error = loop {
            let link = match self.next_link().await {
                Some(Ok(link)) => link,
                Some(Err(error)) => break error,
                None => return,
            };
            let over = match link.is_going_away() {
                // It would be refused there.
                true => Over::Lost,
                false => self.attachment(&link).await,
            };
            self.detached(&link);
            match over {
                Over::Unused => return,
                Over::Failed(error) => break error,
                Over::Again(after) if !link.is_going_away() => {
                    let pause = tokio::time::sleep(backoff.next(entropy::random()).max(after));
                    if self.meanwhile(pause).await.is_none() {
                        return;
                    }
                }
                Over::Lost | Over::Again(_) => {
                    backoff.reset();
                    self.refused_since = None;
                    // The supervisor notices the same loss; until then the link is still published.
                    if self.gone(&link).await.is_none() {
                        return;
                    }
                }
            }
        };
        self.fail(&error).await;
    }

    /// Waits for a connection, and asks for what can be read on one that may become it. `None` once every handle was dropped.
    async fn next_link(&mut self) -> Option<Result<Arc<Link<C>>, ClientError>> {
        loop {
            let status = self.look();
            match status {
                Status::Up(link) => return Some(Ok(link)),
                Status::Failed(error) => return Some(Err(error)),
                Status::Down => {}
            }
            if !self.links_changed().await? {
                return Some(Err(ClientError::Closed));
            }
        }
    }

    /// Waits until `link` is not the connection any more. `None` once every handle was dropped.
    async fn gone(&mut self, link: &Arc<Link<C>>) -> Option<()> {
        while matches!(self.look(), Status::Up(now) if Arc::ptr_eq(&now, link)) {
            if !self.links_changed().await? {
                break;
            }
        }
        Some(())
    }

    /// False if there will be no other. `None` once every handle was dropped.
    async fn links_changed(&mut self) -> Option<bool> {
        let mut links = self.links.clone();
        let changed = self.meanwhile(async { links.changed().await.is_ok() }).await;
        // What it was is looked at next.
        self.links = links;
        changed
    }

    /// How the connection is doing; sees to it that what can be read is asked for on the one that may take its place.
    fn look(&mut self) -> Status<C> {
        let (status, candidate) = {
            let links = self.links.borrow_and_update();
            (links.status.clone(), links.candidate.clone())
        };
        let same = |a: &Arc<Link<C>>, b: &Arc<Link<C>>| Arc::ptr_eq(a, b);
        let kept = self.prefetched.as_ref().map(|prefetched| &prefetched.link);
        let wanted = match (&candidate, &status) {
            (None, Status::Up(link)) => Some(link),
            (candidate, _) => candidate.as_ref(),
        };
        if !matches!((kept, wanted), (Some(kept), Some(wanted)) if same(kept, wanted)) {
            self.prefetched = None;
        }
        // What must not exist yet is asked for once: the second time it would find what the first one made.
        let once = self.info.is_none() && self.request.mode == AttachMode::CreateNew;
        if let (Some(link), None, false) = (candidate, &self.prefetched, once) {
            self.prefetched = Some(self.prefetch(&link));
        }
        status
    }

    /// Asks for what can be read on `link`, in one flight.
    fn prefetch(&mut self, link: &Arc<Link<C>>) -> Prefetched<C> {
        let mut flight = Writer::new();
        put_frame(&self.attach_request(), &mut flight);
        self.subscriptions.retain(|_, entry| !entry.opened.is_closed());
        let mut subscriptions = Vec::new();
        for (subscription, entry) in &self.subscriptions {
            let (id, (incoming, arrives)) = (link.new_id(), mpsc::channel(1));
            link.expect(id, incoming);
            let asked = entry.position.get();
            put_frame(&entry.wants.frame(id, asked.map_or(entry.start, Start::Seq)), &mut flight);
            subscriptions.push(PrefetchedSubscription { subscription: *subscription, id, asked, arrives });
        }
        let mut opening = JoinSet::new();
        let transport = link.transport.clone();
        opening.spawn(async move {
            let (mut send, recv) = transport.open_bi().await.ok()?;
            send.set_priority(priority::CONTROL);
            send.write(&mut [flight.freeze()]).await.ok()?;
            Some((send, recv))
        });
        Prefetched { link: link.clone(), opening, subscriptions }
    }

    fn attach_request(&self) -> Attach {
        let cursor = match (self.request.cursor, *self.incarnation.borrow()) {
            (Some(Cursor { incarnation, next }), Some(known)) if incarnation == known => {
                (Some(incarnation), Some(next))
            }
            (_, known) => (known, None),
        };
        // After the first attach the session must be there: creating it again would hide that it was deleted.
        let mode = if self.info.is_some() { AttachMode::Attach } else { self.request.mode };
        Attach {
            mode,
            session: self.request.name.clone(),
            incarnation: cursor.0,
            next: cursor.1,
            expire_after: self.request.expire_after,
        }
    }

    /// Waits, and takes commands meanwhile: whoever gives one must not have to wait for the network. `None` once every handle was
    /// dropped.
    async fn meanwhile<T>(&mut self, wait: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(wait);
        loop {
            tokio::select! {
                biased;
                done = &mut wait => return Some(done),
                command = self.commands.recv() => self.command(command?, None),
            }
        }
    }

    /// Tells everybody that it is over.
    async fn fail(mut self, error: &ClientError) {
        if let Some(answer) = self.attach_answer.take() {
            let _ = answer.send(Err(error.clone()));
        }
        self.asks.drain(..).for_each(|ask| ask.answer(Err(error.clone())));
        self.taking.drain(..).for_each(|taking| drop(taking.answer.send(Err(error.clone()))));
        self.listener = None;
        for entry in self.producers.drain(..) {
            entry.shared.end(error);
            if let Some(answer) = entry.answer {
                let _ = answer.send(Err(error.clone()));
            }
        }
        for (_, entry) in self.subscriptions.drain() {
            let told = Opened::Failed(error.clone());
            tokio::spawn(async move { entry.opened.send(told).await });
        }
        self.ended.drain(..).for_each(|answer| drop(answer.send(error.clone())));
        // Requests that come later get the same answer, until nobody is left to ask.
        while let Some(command) = self.commands.recv().await {
            match command {
                SessionCommand::Attached { answer } => drop(answer.send(Err(error.clone()))),
                SessionCommand::Ask(ask) => ask.answer(Err(error.clone())),
                SessionCommand::Producer { answer, .. } => drop(answer.send(Err(error.clone()))),
                SessionCommand::Subscribe { events, .. } => drop(events.try_send(Err(error.clone()))),
                SessionCommand::TakeRun { answer, .. } => drop(answer.send(Err(error.clone()))),
                SessionCommand::Again { .. }
                | SessionCommand::Update { .. }
                | SessionCommand::Renew { .. }
                | SessionCommand::Release { .. }
                | SessionCommand::Listen { .. }
                | SessionCommand::ListenAgain => {}
                SessionCommand::Ended { answer } => drop(answer.send(error.clone())),
            }
        }
    }

    /// The attachment is gone: what was on it must be asked for again.
    fn detached(&mut self, link: &Link<C>) {
        if self.asked {
            drop(self.asks.pop_front_if(|ask| matches!(ask, Ask::Signal { once: true, .. })));
        }
        (self.asked, self.resuming, self.resume_again, self.listen_again, self.on) = (false, false, None, None, None);
        // It may arrive yet, and stays counted.
        self.resume_open = false;
        for entry in &mut self.producers {
            entry.id = None;
            entry.shared.unlinked();
        }
        for entry in self.subscriptions.values_mut() {
            // One whose stream runs notices by itself and asks. One that waits for its stream is told that it will not come: it
            // may never have been asked for.
            if let Some(id) = entry.id.take() {
                link.unexpect(id);
            }
        }
    }

    async fn attachment(&mut self, link: &Arc<Link<C>>) -> Over {
        let outbox = Outbox::default();
        let streams = match self.prefetched.take() {
            Some(mut prefetched) if Arc::ptr_eq(&prefetched.link, link) => {
                for fetched in core::mem::take(&mut prefetched.subscriptions) {
                    self.adopt(fetched, link, &outbox);
                }
                prefetched.opening.join_next().await.and_then(Result::ok).flatten()
            }
            _ => {
                outbox.push(self.attach_request());
                link.transport.open_bi().await.ok()
            }
        };
        let Some((mut send, recv)) = streams else { return Over::Lost };
        send.set_priority(priority::CONTROL);
        let _using = link.using();
        self.on = Some(link.clone());
        // In the same flight: where the attach is refused the rest is not read.
        self.open_all(link, &outbox);
        let mut frames = FrameReader::new(recv, MAX_FRAME);
        let writing = outbox.write_to(&mut send);
        let over = {
            let serving = self.serve(link, &outbox, &mut frames);
            tokio::pin!(serving, writing);
            tokio::select! {
                over = &mut serving => over,
                // The server stopped reading: whatever it says before the end still counts.
                () = &mut writing => serving.await,
            }
        };
        if matches!(over, Over::Unused) {
            send.finish();
            // What was appended is on its way.
            self.writers.detach_all();
        }
        over
    }

    /// Goes on with a subscription that was asked for before its connection became the one.
    fn adopt(&mut self, fetched: PrefetchedSubscription<C>, link: &Arc<Link<C>>, outbox: &Outbox) {
        let PrefetchedSubscription { subscription, id, asked, arrives } = fetched;
        match self.subscriptions.get_mut(&subscription) {
            // What the connection before delivered meanwhile would come again.
            Some(entry) if entry.position.get() == asked && !entry.opened.is_closed() => {
                (entry.id, entry.wanted) = (Some(id), false);
                self.pass_on(subscription, id, asked, arrives, link);
            }
            // Its reader notices the loss of the one before and asks from where it is.
            _ => {
                link.unexpect(id);
                outbox.push(Unsubscribe { id });
            }
        }
    }

    async fn serve(&mut self, link: &Arc<Link<C>>, outbox: &Outbox, frames: &mut FrameReader<C::Recv>) -> Over {
        let mut attached = false;
        let mut expecting = None;
        let mut beat = Instant::now();
        loop {
            let waits = !attached || self.asked || self.producers.iter().any(|entry| entry.answer.is_some());
            if !waits {
                expecting = None;
            } else if expecting.is_none() {
                expecting = Some(link.expect_answer());
            }
            let again = self.producers.iter().filter_map(|entry| entry.again).min();
            let beats = attached && self.member.is_some();
            let join_again = self.joining.as_ref().and_then(|joining| Some(joining.waiting.as_ref()?.1));
            let join_again = join_again.filter(|_| attached);
            let resume_again = self.resume_again;
            let listen_again = self.listen_again;
            let take_again = self.taking.iter().filter_map(|taking| taking.again).min().filter(|_| attached);
            let mut links = self.links.clone();
            tokio::select! {
                changed = links.changed() => {
                    self.links = links;
                    let up = matches!(self.look(), Status::Up(now) if Arc::ptr_eq(&now, link));
                    if !up || changed.is_err() {
                        return Over::Lost;
                    }
                }
                () = tokio::time::sleep_until(beat), if beats => if let Some(member) = &self.member {
                    beat = Instant::now() + member.beat();
                    let number = member.number;
                    if !member.is_dropped() {
                        link.beat();
                    } else if !self.asks.iter().any(|ask| matches!(ask, Ask::Leave { .. })) {
                        self.ask(Ask::Leave { number, answer: None }, Some(outbox));
                    }
                },
                () = tokio::time::sleep_until(join_again.unwrap_or(beat)), if join_again.is_some() => {
                    if let Some((ask, _)) = self.joining.as_mut().and_then(|joining| joining.waiting.take()) {
                        self.ask(ask, Some(outbox));
                    }
                }
                () = tokio::time::sleep_until(resume_again.unwrap_or(beat)), if resume_again.is_some() => {
                    (self.resuming, self.resume_again) = (false, None);
                    self.resume(outbox);
                }
                () = tokio::time::sleep_until(listen_again.unwrap_or(beat)), if listen_again.is_some() => {
                    self.listen_again = None;
                    if let Some(listener) = &self.listener {
                        outbox.push(Listen { from: listener.next });
                    }
                }
                () = tokio::time::sleep_until(take_again.unwrap_or(beat)), if take_again.is_some() => {
                    self.take_again(outbox);
                }
                () = tokio::time::sleep_until(again.unwrap_or_else(Instant::now)), if attached && again.is_some() => {
                    for at in 0..self.producers.len() {
                        if self.producers[at].again.is_some_and(|again| again <= Instant::now()) {
                            self.open_producer(at, link, outbox);
                        }
                    }
                }
                frame = frames.next() => {
                    let frame = match frame {
                        Ok(Some(frame)) => frame,
                        Err(FrameError::Lost(StreamError::Connection(_) | StreamError::EarlyDataRefused)) => {
                            return Over::Lost;
                        }
                        // A stream that ended alone: attach again on the same connection.
                        Ok(None) | Err(FrameError::Lost(_)) => return Over::Again(Duration::ZERO),
                        Err(FrameError::Violation(error)) => return Over::Failed(error.into()),
                    };
                    link.news();
                    let result = match frame {
                        Frame::Attached(answer) if !attached => {
                            attached = true;
                            self.attached(answer, outbox)
                        }
                        frame => self.handle(frame, attached, link, outbox),
                    };
                    if let Err(over) = result {
                        return over;
                    }
                }
                Some(written) = self.writers.join_next() => if let Ok(id) = written {
                    self.written(id);
                },
                command = self.commands.recv() => match command {
                    Some(command) => self.command(command, Some((attached, link, outbox))),
                    None => return Over::Unused,
                },
            }
        }
    }

    /// Asks for every producer and every subscription that waits.
    fn open_all(&mut self, link: &Arc<Link<C>>, outbox: &Outbox) {
        let waiting: Vec<u64> = self.subscriptions.iter().filter(|(_, s)| s.wanted).map(|(id, _)| *id).collect();
        for subscription in waiting {
            self.subscribe(subscription, link, outbox);
        }
        if let Some(listener) = &self.listener {
            outbox.push(Listen { from: listener.next });
        }
        if self.continuity.is_bound(&self.request.name) {
            self.resume(outbox);
        }
        self.producers.retain(|entry| !entry.shared.is_finished());
        for at in 0..self.producers.len() {
            self.open_producer(at, link, outbox);
        }
        self.taking.retain(|taking| !taking.answer.is_closed());
        if !self.taking.is_empty() {
            self.resume(outbox);
        }
        for taking in &mut self.taking {
            taking.again = None;
            outbox.push(taking.frame(self.granted));
        }
    }

    /// Says who this is, once on each attachment, before anything that an instance holds is asked for: then nobody else can go on with it.
    fn resume(&mut self, outbox: &Outbox) {
        let connection = self.on.as_ref().filter(|_| !self.resuming).map(|link| &link.transport);
        if let Some(proof) = connection.and_then(|on| self.continuity.proof(&self.request.name, on)) {
            self.resuming = true;
            // One at a time: what is said again was answered.
            self.resume_open = true;
            self.continuity.sent(&self.request.name);
            outbox.push(proof);
        }
    }

    /// RESUME was answered.
    fn resume_answered(&mut self) {
        if core::mem::take(&mut self.resume_open) {
            self.continuity.answered(&self.request.name);
        }
    }

    /// True if who went on over another connection may have been this client itself: a RESUME that it sent there was never answered, and came
    /// late. Once for each (spec RES-5).
    fn may_be_own(&mut self) -> bool {
        let others = self.continuity.count_unanswered(&self.request.name).saturating_sub(u32::from(self.resume_open));
        let may = others > self.excused;
        self.excused += u32::from(may);
        may
    }

    /// True if the producer was opened under its own epoch over another connection, which nobody can but this client or a copy (spec RES-1), and
    /// it may have been this one itself.
    fn may_have_displaced_itself(&mut self, id: u64, code: Code, epoch: u64) -> bool {
        let held = self.producer(id).is_some_and(|entry| entry.shared.epoch() == epoch);
        code == Code::FENCED && held && self.may_be_own()
    }

    /// A RESUME that came late, and what came with it, ended what this holds here: it is held again after the next one.
    fn attach_again(&self) -> Over {
        tracing::info!(session = %self.request.name, "a RESUME over a connection that was given up came late; attaching again");
        Over::Again(Duration::ZERO)
    }

    /// Asks again for the runs that were refused a while ago.
    fn take_again(&mut self, outbox: &Outbox) {
        self.taking.retain(|taking| !taking.answer.is_closed());
        for taking in self.taking.iter_mut().filter(|taking| taking.again.is_some_and(|at| at <= Instant::now())) {
            taking.again = None;
            outbox.push(taking.frame(self.granted));
        }
    }

    /// A run was granted that was waited for.
    fn taken(&mut self, granted: Granted, outbox: &Outbox) {
        let at = self.taking.iter().position(|taking| taking.id == granted.id);
        let epoch = granted.epoch;
        let answer = at.and_then(|at| self.taking.remove(at)).map(|taking| taking.answer);
        if answer.is_none_or(|answer| answer.send(Ok(granted)).is_err()) {
            // Nobody waits for it any more: another client may have it.
            outbox.push(Release { epoch: Some(epoch) });
        }
    }

    /// A record came early.
    fn early(&mut self, early: Early) -> Result<(), ProtocolError> {
        let Some(listener) = &mut self.listener else { return Ok(()) };
        let record = Record::parse(&early.record)?;
        if listener.heard.missed.load(Ordering::Acquire) {
            // Told again once the application has taken what it has.
            return Ok(());
        }
        let next = listener.next.max(early.seq + 1);
        let folded = Folded { seq: early.seq, time: early.time, author: Arc::new(early.author), record };
        match listener.records.try_send(folded) {
            Ok(()) => listener.next = next,
            Err(mpsc::error::TrySendError::Full(_)) => listener.heard.missed.store(true, Ordering::Release),
            Err(mpsc::error::TrySendError::Closed(_)) => self.listener = None,
        }
        Ok(())
    }

    /// ATTACHED came.
    fn attached(&mut self, answer: Attached, outbox: &Outbox) -> Result<(), Over> {
        if answer.verdict == Verdict::Gone {
            return Err(Over::Failed(ClientError::Gone));
        }
        self.incarnation.send_replace(Some(answer.incarnation));
        self.refused_since = None;
        self.waiting.say(None);
        // The cursor of the request was for the first attach; subscriptions keep their own.
        self.request.cursor = None;
        let info = SessionInfo::new(self.request.name.clone(), answer);
        match &self.info {
            Some(known) => drop(known.send_replace(info)),
            None => {
                let (known, receiver) = watch::channel(info);
                self.info = Some(known);
                if let Some(answer) = self.attach_answer.take() {
                    let _ = answer.send(Ok(Arc::new(receiver)));
                }
            }
        }
        // What the application renewed last holds until then.
        core::mem::take(&mut self.renewed).into_iter().for_each(|epoch| outbox.push(Renew { epoch }));
        self.rejoin(outbox);
        Ok(())
    }

    /// Asks for the membership again, before anything else, unless it is asked for already.
    fn rejoin(&mut self, outbox: &Outbox) {
        let asked = self.asks.iter().any(|ask| matches!(ask, Ask::Join { .. } | Ask::Leave { .. }));
        if let Some(wanted) = self.member.clone().filter(|_| !asked && self.joining.is_none()) {
            // Behind the one that is on the wire.
            self.asks.insert(usize::from(self.asked), Ask::Join { wanted, answer: None });
        }
        self.ask_next(outbox);
    }

    fn ask(&mut self, ask: Ask, attached: Option<&Outbox>) {
        match ask {
            // What was taken over is no longer the application's to end.
            Ask::Leave { number, answer } if self.member.as_ref().is_none_or(|member| member.number != number) => {
                Ask::Leave { number, answer }.answer(Ok(0));
            }
            ask => self.asks.push_back(ask),
        }
        if let Some(outbox) = attached {
            self.ask_next(outbox);
        }
    }

    /// The answer to a JOIN. Returns the ask and its answer, unless it is asked again.
    fn joined(
        &mut self,
        wanted: Wanted,
        answer: Option<Answer<u64>>,
        result: Result<u64, ClientError>,
        outbox: &Outbox,
    ) -> Option<(Ask, Result<u64, ClientError>)> {
        let since = self.joining.take().map_or_else(Instant::now, |joining| joining.since);
        match &result {
            Ok(_) => {
                // What was said meanwhile counts.
                let mut wanted = wanted.clone();
                if let Some(member) = self.member.take_if(|member| member.number == wanted.number)
                    && member.request.activity != wanted.request.activity
                {
                    outbox.push(Update { activity: member.request.activity.clone() });
                    wanted.request = member.request;
                }
                self.member = Some(wanted);
            }
            // The server cannot do it now.
            Err(error)
                if error.passes(self.renews) && self.give_up_after.is_none_or(|limit| since.elapsed() < limit) =>
            {
                let again = Instant::now() + error.pause(REOPEN_PAUSE);
                self.joining = Some(Joining { waiting: Some((Ask::Join { wanted, answer }, again)), since });
                return None;
            }
            Err(error) => {
                tracing::warn!(%error, "cannot be a member");
                self.member.take_if(|member| member.number == wanted.number);
            }
        }
        Some((Ask::Join { wanted, answer }, result))
    }

    fn open_producer(&mut self, at: usize, link: &Arc<Link<C>>, outbox: &Outbox) {
        self.resume(outbox);
        let entry = &mut self.producers[at];
        let id = link.new_id();
        (entry.id, entry.again) = (Some(id), None);
        let epoch = entry.shared.kept_epoch();
        entry.begins = epoch == 0;
        outbox.push(OpenProducer { id, name: entry.shared.name.clone(), epoch });
        if !entry.begins {
            // Its sequence goes on: what is not answered is sent in the same flight (spec PROD-5).
            entry.shared.linked(id);
            let (shared, link) = (entry.shared.clone(), link.clone());
            self.write(shared, link, id);
        }
    }

    fn write(&mut self, shared: Arc<Shared>, link: Arc<Link<C>>, id: u64) {
        self.writers.spawn(async move {
            producer::write(shared, link, id).await;
            id
        });
    }

    /// The QUIC stream of a producer has ended. One that is still to append is opened again: the server may not have known it in time.
    fn written(&mut self, id: u64) {
        if let Some(entry) = self.producer(id).filter(|entry| !entry.shared.is_finished()) {
            (entry.id, entry.before, entry.again) = (None, entry.id, Some(Instant::now() + REOPEN_PAUSE));
            entry.shared.unlinked();
        }
    }

    fn subscribe(&mut self, subscription: u64, link: &Arc<Link<C>>, outbox: &Outbox) {
        let Some(entry) = self.subscriptions.get_mut(&subscription) else { return };
        if entry.opened.is_closed() {
            self.subscriptions.remove(&subscription);
            return;
        }
        let id = link.new_id();
        entry.id = Some(id);
        entry.wanted = false;
        let asked = entry.position.get();
        outbox.push(entry.wants.frame(id, entry.start));
        let (incoming, arrives) = mpsc::channel(1);
        link.expect(id, incoming);
        self.pass_on(subscription, id, asked, arrives, link);
    }

    /// Passes the stream on, which the connection routes, with what the reader needs.
    fn pass_on(
        &self,
        subscription: u64,
        id: u64,
        asked: Option<u64>,
        mut arrives: mpsc::Receiver<Expected<C>>,
        link: &Arc<Link<C>>,
    ) {
        let Some(entry) = self.subscriptions.get(&subscription) else { return };
        let (opened, link, mut known) = (entry.opened.clone(), link.clone(), self.incarnation.subscribe());
        tokio::spawn(async move {
            let told = match arrives.recv().await {
                // The stream may come before the answer to ATTACH.
                Some(Ok(incoming)) => match known.wait_for(Option::is_some).await.ok().and_then(|known| *known) {
                    Some(incarnation) => Opened::Stream { incoming, link, incarnation, asked },
                    None => Opened::Lost(id),
                },
                Some(Err(error)) => Opened::Refused(id, error),
                None => Opened::Lost(id),
            };
            // A subscription that was dropped meanwhile stops the stream by dropping it.
            let _ = opened.send(told).await;
        });
    }

    fn ask_next(&mut self, outbox: &Outbox) {
        if self.asked {
            return;
        }
        let late =
            |ask: &mut Ask| matches!(ask, Ask::Signal { valid_until: Some(until), .. } if SystemTime::now() >= *until);
        while let Some(ask) = self.asks.pop_front_if(late) {
            ask.answer(Err(ClientError::Expired));
        }
        // Asked for again by itself, and let go of meanwhile.
        let member = self.member.as_ref().map(|member| member.number);
        let unwanted =
            |ask: &mut Ask| matches!(ask, Ask::Join { wanted, answer: None } if Some(wanted.number) != member);
        while self.asks.pop_front_if(unwanted).is_some() {
            self.joining.take_if(|joining| joining.waiting.is_none());
        }
        let Some(ask) = self.asks.front() else { return };
        let (frame, holds) = (ask.frame(), matches!(ask, Ask::Join { .. } | Ask::Leave { .. } | Ask::StartRun { .. }));
        if holds {
            self.resume(outbox);
        }
        outbox.push(frame);
        self.asked = true;
    }

    fn answered(&mut self, result: Result<u64, ClientError>, outbox: &Outbox) {
        self.asked = false;
        if let Some(ask) = self.asks.pop_front() {
            let answered = match ask {
                Ask::Join { wanted, answer } => self.joined(wanted, answer, result, outbox),
                Ask::Leave { number, answer } => {
                    self.member.take_if(|member| member.number == number);
                    let again = |joining: &mut Joining| matches!(&joining.waiting, Some((Ask::Join { wanted, answer: None }, _)) if wanted.number == number);
                    self.joining.take_if(again);
                    Some((Ask::Leave { number, answer }, result))
                }
                ask => Some((ask, result)),
            };
            if let Some((ask, result)) = answered {
                ask.answer(result);
            }
        }
        self.ask_next(outbox);
    }

    /// Takes a command. What there is no attachment for now goes out with the next.
    fn command(&mut self, command: SessionCommand, on: Option<(bool, &Arc<Link<C>>, &Outbox)>) {
        let attached = on.filter(|(attached, ..)| *attached).map(|(_, _, outbox)| outbox);
        match command {
            SessionCommand::Attached { answer } => match &self.info {
                Some(info) => drop(answer.send(Ok(Arc::new(info.subscribe())))),
                None => self.attach_answer = Some(answer),
            },
            SessionCommand::Ask(ask) => {
                self.ask(ask, attached);
            }
            SessionCommand::Update { number, activity } => {
                if let Some(member) = self.member.as_mut().filter(|member| member.number == number) {
                    member.request.activity = activity.clone();
                    if let Some(outbox) = attached {
                        outbox.push(Update { activity });
                    }
                }
            }
            SessionCommand::TakeRun { run, lease, answer } => {
                self.next_taking += 1;
                let taking = Taking { id: self.next_taking, run, lease, answer, again: None };
                if let Some((_, _, outbox)) = on {
                    self.resume(outbox);
                    outbox.push(taking.frame(self.granted));
                }
                self.taking.push_back(taking);
            }
            SessionCommand::Renew { epoch } => {
                if let Some(outbox) = attached {
                    outbox.push(Renew { epoch });
                } else {
                    // Said once there is an attachment: the work went on.
                    self.renewed.insert(epoch);
                    if self.renewed.len() > MAX_RUNS {
                        self.renewed.pop_first();
                    }
                }
            }
            SessionCommand::Release { epoch: None } => {
                let before = self.taking.len();
                self.taking.retain(|taking| !taking.answer.is_closed());
                if let Some((_, _, outbox)) = on.filter(|_| before > self.taking.len()) {
                    outbox.push(Release { epoch: None });
                    self.taking.iter().for_each(|taking| outbox.push(taking.frame(self.granted)));
                }
            }
            // Without an attachment it is lost by itself.
            SessionCommand::Release { epoch } => {
                on.into_iter().for_each(|(_, _, outbox)| outbox.push(Release { epoch }))
            }
            SessionCommand::Listen { records, heard } => {
                self.listener = Some(Listener { records, heard, next: 0 });
                on.into_iter().for_each(|(_, _, outbox)| outbox.push(Listen { from: 0 }));
            }
            SessionCommand::ListenAgain => {
                if let (Some(listener), Some((_, _, outbox))) = (&self.listener, on) {
                    listener.heard.missed.store(false, Ordering::Release);
                    outbox.push(Listen { from: listener.next });
                }
            }
            SessionCommand::Producer { name, config, journalled, answer } => {
                self.producers.retain(|entry| !entry.shared.is_finished());
                let shared = Arc::new(Shared::new(name, config, journalled));
                let answer = Some(answer);
                self.producers.push(ProducerEntry {
                    shared,
                    id: None,
                    before: None,
                    begins: true,
                    again: None,
                    answer,
                });
                if let Some((_, link, outbox)) = on {
                    self.open_producer(self.producers.len() - 1, link, outbox);
                }
            }
            SessionCommand::Subscribe { start, wanted, events } => {
                let subscription = self.next_subscription;
                self.next_subscription += 1;
                let (opened, receiver) = mpsc::channel(1);
                let resubscriber = Resubscriber { subscription, commands: self.again.clone() };
                let progress = Progress::new(start == Start::Snapshot, wanted.folded);
                let position = Position::default();
                let reader = Reader::<C> {
                    opened: receiver,
                    events,
                    resubscriber,
                    progress,
                    position: position.clone(),
                    renews: self.renews,
                };
                tokio::spawn(reader.run());
                let entry = SubscriptionEntry { start, wants: wanted, opened, position, id: None, wanted: true };
                self.subscriptions.insert(subscription, entry);
                if let Some((_, link, outbox)) = on {
                    self.subscribe(subscription, link, outbox);
                }
            }
            // One of another id was asked for since.
            SessionCommand::Again { subscription, of, .. }
                if self.subscriptions.get(&subscription).is_some_and(|entry| entry.id.is_some_and(|id| id != of)) => {}
            SessionCommand::Again { subscription, start, .. } => {
                if let Some(entry) = self.subscriptions.get_mut(&subscription) {
                    let id = entry.id.take();
                    entry.start = start.unwrap_or(entry.start);
                    entry.wanted = true;
                    if let Some((_, link, outbox)) = on {
                        if let Some(id) = id {
                            // It may still run on this connection, after an error of the stream alone.
                            link.unexpect(id);
                            outbox.push(Unsubscribe { id });
                        }
                        self.subscribe(subscription, link, outbox);
                    }
                }
            }
            SessionCommand::Ended { answer } => self.ended.push(answer),
        }
    }

    fn handle(&mut self, frame: Frame, attached: bool, link: &Arc<Link<C>>, outbox: &Outbox) -> Result<(), Over> {
        match frame {
            Frame::Error(error) if error.about == Attach::KIND || error.about == 0 => {
                let waits = self.request.wait && self.info.is_none() && error.code == Code::SESSION_NOT_FOUND;
                let known = self.info.is_some();
                let over = match error.code {
                    Code::SESSION_GONE => Over::Failed(ClientError::Gone),
                    Code::SESSION_NOT_FOUND if known => Over::Failed(ClientError::Gone),
                    Code::RESUME_STALE if self.may_be_own() => self.attach_again(),
                    code if waits => {
                        tracing::debug!(%code, "waiting for the session to be created");
                        Over::Again(Duration::ZERO)
                    }
                    code if code.is_retryable() && self.may_attach_again() => {
                        tracing::warn!(%code, detail = %error.detail, "attaching again");
                        Over::Again(code.retry_after(error.value))
                    }
                    // Another token is on its way.
                    code if is_renewable(code) && self.renews && self.may_attach_again() => {
                        tracing::warn!(%code, detail = %error.detail, "attaching again with another token");
                        link.outlived();
                        Over::Again(Duration::ZERO)
                    }
                    _ => Over::Failed(ClientError::answered(&error)),
                };
                if matches!(over, Over::Again(_)) {
                    self.waiting.say(Some(ClientError::answered(&error)));
                }
                return Err(over);
            }
            _ if !attached => {}
            Frame::Ack(ack) => {
                if let Some(entry) = self.producer(ack.producer) {
                    entry.shared.acked(&ack).map_err(|error| Over::Failed(error.into()))?;
                }
                return Ok(());
            }
            Frame::Refused(refused)
                if self.may_have_displaced_itself(refused.producer, refused.code, refused.value) =>
            {
                return Err(self.attach_again());
            }
            Frame::Refused(refused) => {
                if self.renews && is_renewable(refused.code) {
                    link.outlived();
                }
                if let Some(entry) = self.producer(refused.producer) {
                    entry.shared.refused(refused.producer, &refused);
                }
                return Ok(());
            }
            Frame::Producer(granted) => {
                if let Some(entry) = self.producer(granted.id) {
                    let begins = core::mem::take(&mut entry.begins);
                    let opened = entry.shared.opened(granted.id, &granted);
                    opened.map_err(|error| Over::Failed(error.into()))?;
                    let shared = entry.shared.clone();
                    if let Some(answer) = entry.answer.take() {
                        let _ = answer.send(Ok(shared.clone()));
                    }
                    if begins {
                        self.write(shared, link.clone(), granted.id);
                    }
                }
                return Ok(());
            }
            Frame::Stream(stream) => {
                if matches!(self.asks.front(), Some(Ask::Stream { name, .. }) if *name == stream.name) {
                    self.answered(Ok(stream.id), outbox);
                    return Ok(());
                }
            }
            Frame::Closed(closed) => {
                if matches!(self.asks.front(), Some(Ask::Close { .. })) {
                    self.answered(Ok(closed.seq), outbox);
                    return Ok(());
                }
            }
            Frame::Trimmed(trimmed) => {
                if matches!(self.asks.front(), Some(Ask::Trim { .. })) {
                    self.answered(Ok(trimmed.first), outbox);
                    return Ok(());
                }
            }
            Frame::Joined(joined) => {
                if matches!(self.asks.front(), Some(Ask::Join { .. })) {
                    self.answered(Ok(joined.generation), outbox);
                    return Ok(());
                }
            }
            Frame::Configured(configured) => {
                if matches!(self.asks.front(), Some(Ask::Configure { .. } | Ask::Rule { .. })) {
                    self.answered(Ok(configured.seq), outbox);
                    return Ok(());
                }
            }
            Frame::Granted(granted) => {
                let started = |ask: &Ask| matches!(ask, Ask::StartRun { run, .. } if *run == granted.run);
                self.granted = self.granted.max(granted.epoch + 1);
                if self.asked && self.asks.front().is_some_and(started) {
                    self.asked = false;
                    if let Some(Ask::StartRun { answer, .. }) = self.asks.pop_front() {
                        let epoch = granted.epoch;
                        if answer.send(Ok(granted)).is_err() {
                            // Nobody works on it.
                            outbox.push(Release { epoch: Some(epoch) });
                        }
                    }
                    self.ask_next(outbox);
                } else {
                    self.taken(granted, outbox);
                }
                return Ok(());
            }
            Frame::Resumed(resumed) => {
                self.resume_answered();
                self.continuity.keep(&self.request.name, resumed.token);
                return Ok(());
            }
            Frame::Signalled(signalled) => {
                if matches!(self.asks.front(), Some(Ask::Signal { .. })) {
                    self.answered(Ok(signalled.seq), outbox);
                    return Ok(());
                }
            }
            Frame::Early(early) => return self.early(early).map_err(|error| Over::Failed(error.into())),
            Frame::Left(_) => {
                if self.asked && matches!(self.asks.front(), Some(Ask::Leave { .. })) {
                    self.answered(Ok(0), outbox);
                } else {
                    // Lost, while nothing came through for a while.
                    self.rejoin(outbox);
                }
                return Ok(());
            }
            Frame::Deleted(_) => {
                self.continuity.forget(&self.request.name);
                if matches!(self.asks.front(), Some(Ask::Delete { .. })) {
                    self.answered(Ok(0), outbox);
                    return Ok(());
                }
            }
            Frame::Error(error) => return self.error(&error, link, outbox),
            _ => {}
        }
        Err(Over::Failed(ProtocolError::new(Code::FRAME_UNEXPECTED, "not an answer to what was asked").into()))
    }

    /// True unless attaching was refused for too long.
    fn may_attach_again(&mut self) -> bool {
        let since = *self.refused_since.get_or_insert_with(Instant::now);
        self.give_up_after.is_none_or(|limit| since.elapsed() < limit)
    }

    /// An error about one request.
    fn error(&mut self, error: &mainstay_protocol::wire::Error, link: &Link<C>, outbox: &Outbox) -> Result<(), Over> {
        let failure = match error.code {
            // It is said again in a moment, and then this may be asked.
            Code::RESUME_REQUIRED if error.about != Resume::KIND => {
                self.resume_again.get_or_insert_with(|| Instant::now() + REOPEN_PAUSE / 2);
                ClientError::refused(Code::UNAVAILABLE, error.detail.as_str())
            }
            _ => ClientError::answered(error),
        };
        // Another token is on its way.
        if self.renews && is_renewable(error.code) {
            link.outlived();
        }
        let passes = failure.passes(self.renews);
        let again = Instant::now() + failure.pause(REOPEN_PAUSE);
        if error.about == Resume::KIND {
            self.resume_answered();
        }
        match error.about {
            Resume::KIND => match error.code {
                // Begun anew, as the session was perhaps: what was asked behind it is free of it.
                Code::RESUME_UNKNOWN | Code::RESUME_GONE => {
                    self.continuity.forget(&self.request.name);
                    self.resuming = false;
                    self.resume(outbox);
                }
                // So is what was asked behind it. With another token it may be said.
                Code::FORBIDDEN | Code::UNAUTHENTICATED | Code::TOKEN_EXPIRED | Code::TOKEN_INVALID => {
                    self.resuming = false;
                }
                // What was asked behind it is refused for its own.
                code if code.is_retryable() => self.resume_again = Some(again),
                _ => return Err(Over::Failed(failure)),
            },
            OpenProducer::KIND => {
                let is = |entry: &ProducerEntry| [entry.id, entry.before].contains(&Some(error.id));
                if let Some(at) = self.producers.iter().position(is) {
                    self.producers[at].shared.not_opened(error.id);
                    let crowded = error.code == Code::LIMIT_EXCEEDED && link.may_have_more_producers();
                    // An epoch that is not known any more never is again.
                    let passes = (passes || crowded) && error.code != Code::PRODUCER_UNKNOWN;
                    if passes && self.producers[at].shared.reopen(&failure) {
                        tracing::warn!(code = %error.code, detail = %error.detail, "opening the producer again");
                        (self.producers[at].id, self.producers[at].again) = (None, Some(again));
                        self.producers[at].shared.unlinked();
                        return Ok(());
                    }
                    let entry = self.producers.swap_remove(at);
                    entry.shared.end(&failure);
                    if let Some(answer) = entry.answer {
                        let _ = answer.send(Err(failure));
                    }
                }
            }
            mainstay_protocol::wire::Producer::KIND
                if self.may_have_displaced_itself(error.id, error.code, error.value) =>
            {
                return Err(self.attach_again());
            }
            mainstay_protocol::wire::Producer::KIND => {
                if let Some(entry) = self.producer(error.id) {
                    entry.shared.fence(&failure);
                }
            }
            Subscribe::KIND => {
                if let Some(entry) = self.subscriptions.values_mut().find(|entry| entry.id == Some(error.id)) {
                    entry.id = None;
                    link.refuse(error.id, failure);
                }
            }
            Update::KIND => {
                tracing::debug!(code = %error.code, detail = %error.detail, "update refused");
                if error.code == Code::NOT_A_MEMBER {
                    self.rejoin(outbox);
                } else if passes
                    && self.joining.is_none()
                    && let Some(wanted) = self.member.clone()
                {
                    // A JOIN says it too, and is answered.
                    let waiting = Some((Ask::Join { wanted, answer: None }, again));
                    self.joining = Some(Joining { waiting, since: Instant::now() });
                }
            }
            TakeRun::KIND => {
                let at = self.taking.iter().position(|taking| taking.id == error.id);
                if let Some(taking) = at.and_then(|at| self.taking.get_mut(at))
                    && passes
                {
                    taking.again = Some(again);
                } else if let Some(taking) = at.and_then(|at| self.taking.remove(at)) {
                    let _ = taking.answer.send(Err(failure));
                }
            }
            Listen::KIND if passes => self.listen_again = Some(again),
            // What is appended next is told, and so is who listens.
            Renew::KIND | Release::KIND => tracing::debug!(code = %error.code, "the run is not held any more"),
            about if self.asked && self.asks.front().is_some_and(|ask| ask.kind() == about) => {
                self.answered(Err(failure), outbox);
            }
            about => tracing::warn!(about, code = %error.code, detail = %error.detail, "error about nothing asked"),
        }
        Ok(())
    }

    fn producer(&mut self, id: u64) -> Option<&mut ProducerEntry> {
        self.producers.iter_mut().find(|entry| entry.id == Some(id))
    }
}

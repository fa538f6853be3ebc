//! The owner of a hot session: the one task that changes it.
//!
//! It feeds requests to the [`Authority`], commits one chunk at a time, and when a chunk is durable publishes it to the
//! readers and answers the requests, in this order.

use core::pin::Pin;
use std::collections::HashMap;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use mainstay_protocol::error::Code;
use mainstay_protocol::planted::{Bug, planted};
use mainstay_protocol::registry::{DEPARTED_LEASE, MAX_POSITIONS};
use mainstay_protocol::session::Committed as Durable;
use mainstay_protocol::session::{
    AT_ONCE, Activity, Author, Authority, CheckedBatch, Chunk, FOR_WORKERS, Job, JobOutcome, Leases, NotifyRule,
    Operation, Outcome, PresenceJoined, PresenceUpdated, ProducerKey, ProducerPosition, Refusal, Reply, ResumeClaim,
    ResumeToken, RunId, SessionConfigured, State, Step, ViewHash, is_held,
};
use mainstay_protocol::wire::{
    Ack, Acked, Body, CloseSession, Closed, Configure, Configured, DefineStream, DeleteSession, Deleted, Detail, Early,
    Error, Granted, Join, Joined, Label, Leave, Left, Listen, OpenProducer, Position, Producer, Refused, Release,
    Renew, Resume, Resumed, SetRule, Signal, Signalled, StartRun, Stream, Subject, TakeRun, Trim, Trimmed, Update,
    put_frame,
};
use mainstay_store::{Committing, Outcome as Committed, Pending, SessionStat, StoreError, Writer};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Duration, Instant, Sleep};

use crate::attachment::Attachment;
use crate::jobs::Worker;
use crate::producer::ProducerLink;
use crate::sessions::{Loaded, Session, Sessions, refusal};
use crate::upkeep::{Done, Upkeep};

/// What an attach needs to know.
#[derive(Debug)]
pub(crate) struct Standing {
    pub(crate) tail: u64,
    pub(crate) first: u64,
    pub(crate) compacted: u64,
    pub(crate) created: u64,
    pub(crate) closed: bool,
    pub(crate) view_hash: ViewHash,
    pub(crate) streams: Vec<Label>,
    pub(crate) positions: Vec<Position>,
}

/// Requests to the owner.
#[derive(Debug)]
pub(crate) enum Command {
    /// What an attach by this subject answers.
    Stand { subject: Subject, answer: oneshot::Sender<Standing> },
    /// The view at the tail, for a subscription that starts with it.
    View { answer: oneshot::Sender<(u64, Bytes)> },
    /// Batches of one producer, in order.
    Append { link: Arc<ProducerLink>, batches: Vec<Sent>, permit: Arc<OwnedSemaphorePermit> },
    /// OPEN_PRODUCER.
    OpenProducer { attachment: Arc<Attachment>, request: OpenProducer },
    /// DEFINE_STREAM.
    DefineStream { attachment: Arc<Attachment>, name: Label },
    /// CLOSE_SESSION.
    Close { attachment: Arc<Attachment> },
    /// TRIM.
    Trim { attachment: Arc<Attachment>, before: u64 },
    /// JOIN. Boxed, as UPDATE: every hot session has room for some commands.
    Join { attachment: Arc<Attachment>, request: Box<Join> },
    /// UPDATE.
    Update { attachment: Arc<Attachment>, activity: Box<Activity> },
    /// LEAVE.
    Leave { attachment: Arc<Attachment> },
    /// CONFIGURE.
    Configure { attachment: Arc<Attachment>, request: Configure },
    /// START_RUN.
    StartRun { attachment: Arc<Attachment>, request: Box<StartRun> },
    /// TAKE_RUN.
    TakeRun { attachment: Arc<Attachment>, request: Box<TakeRun> },
    /// RENEW.
    Renew { attachment: Arc<Attachment>, epoch: u64 },
    /// RELEASE.
    Release { attachment: Arc<Attachment>, epoch: Option<u64> },
    /// SIGNAL.
    /// `all` if it may be about anybody's.
    Signal { attachment: Arc<Attachment>, request: Box<Signal>, all: bool },
    /// RESUME, of a client that proved what it claims.
    Resume { attachment: Arc<Attachment>, claim: ResumeClaim },
    /// LISTEN.
    Listen { attachment: Arc<Attachment>, from: u64 },
    /// SET_RULE.
    SetRule { attachment: Arc<Attachment>, request: Box<SetRule> },
    /// A worker takes some jobs.
    Jobs { worker: Arc<Worker>, most: usize, answer: oneshot::Sender<Vec<Job>> },
    /// It is done with one.
    JobDone { author: Arc<Author>, job: u64, rule: Label, outcome: JobOutcome, detail: Detail },
    /// The client closed this connection.
    Departed { conn: u64 },
    /// DELETE_SESSION.
    Delete { attachment: Arc<Attachment> },
    /// End after what was accepted is committed.
    Stop,
}

impl Command {
    /// Who asks, by the type and the id of which frame, where somebody does on an attachment.
    fn asked(&self) -> Option<(&Arc<Attachment>, u64, u64)> {
        Some(match self {
            Self::OpenProducer { attachment, request } => (attachment, OpenProducer::KIND, request.id),
            Self::Join { attachment, .. } => (attachment, Join::KIND, 0),
            Self::Update { attachment, .. } => (attachment, Update::KIND, 0),
            Self::Leave { attachment } => (attachment, Leave::KIND, 0),
            Self::StartRun { attachment, .. } => (attachment, StartRun::KIND, 0),
            Self::TakeRun { attachment, request } => (attachment, TakeRun::KIND, request.id),
            Self::Renew { attachment, .. } => (attachment, Renew::KIND, 0),
            Self::Release { attachment, .. } => (attachment, Release::KIND, 0),
            Self::DefineStream { attachment, .. } => (attachment, DefineStream::KIND, 0),
            Self::Close { attachment } => (attachment, CloseSession::KIND, 0),
            Self::Trim { attachment, .. } => (attachment, Trim::KIND, 0),
            Self::Configure { attachment, .. } => (attachment, Configure::KIND, 0),
            Self::Signal { attachment, .. } => (attachment, Signal::KIND, 0),
            Self::SetRule { attachment, .. } => (attachment, SetRule::KIND, 0),
            Self::Resume { attachment, .. } => (attachment, Resume::KIND, 0),
            Self::Listen { attachment, .. } => (attachment, Listen::KIND, 0),
            Self::Delete { attachment } => (attachment, DeleteSession::KIND, 0),
            Self::Stand { .. }
            | Self::View { .. }
            | Self::Append { .. }
            | Self::Jobs { .. }
            | Self::JobDone { .. }
            | Self::Departed { .. }
            | Self::Stop => return None,
        })
    }
}

/// A batch as it came.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) sequence: u64,
    /// Epoch of the run that it is part of.
    pub(crate) run: Option<u64>,
    pub(crate) batch: CheckedBatch,
}

/// Who holds a run, as far as is known.
#[derive(Debug)]
struct Holder {
    /// When it was heard last.
    heard: Instant,
    /// The connection over which.
    conn: u64,
}

/// Whom to answer.
#[derive(Debug)]
enum Ticket {
    Batch { link: Arc<ProducerLink>, sequence: u64, _permit: Arc<OwnedSemaphorePermit> },
    Request { attachment: Arc<Attachment>, about: u64, id: u64 },
}

impl Ticket {
    fn is_of(&self, of: &Arc<Attachment>) -> bool {
        matches!(self, Self::Request { attachment, .. } if Arc::ptr_eq(attachment, of))
    }

    /// True if it can be answered.
    fn is_alive(&self) -> bool {
        match self {
            Self::Request { attachment, .. } => attachment.is_alive(),
            Self::Batch { link, .. } => link.attachment.is_alive(),
        }
    }
}

/// Who may change the session: nobody until the first request that does.
#[derive(Debug)]
enum Role {
    Reader(Box<State>),
    Writer { authority: Box<Authority<Ticket>>, writer: Arc<Writer> },
}

/// The chunk on its way into the store.
enum Commit {
    None,
    /// The store has it.
    Running(Committing, Arc<Chunk>, Instant),
    /// Its outcome is unknown and asked for.
    Resolving(Pending<bool>, Arc<Chunk>),
    /// The store could not tell yet; it is asked again after the pause.
    Waiting(Pin<Box<Sleep>>, Arc<Chunk>),
}

/// What is known of the chunk in flight.
enum Fate {
    Committed,
    /// It is not stored and never will be.
    NotCommitted(StoreError),
    /// The store has to be asked.
    Unknown,
    /// The store cannot tell yet.
    NotYet,
    /// Nobody can tell; what happened is found at the next load.
    Lost(StoreError),
}

/// See the [module](self).
pub(crate) struct Owner {
    sessions: Arc<Sessions>,
    session: Arc<Session>,
    mailbox: mpsc::Receiver<Command>,
    role: Option<Role>,
    created: u64,
    expire_after: u64,
    /// What the store was told of when the session must be served.
    wake: Option<u64>,
    commit: Commit,
    upkeep: Upkeep,
    /// Who appends as which producer, to tell them when they are fenced.
    holders: HashMap<ProducerKey, Weak<ProducerLink>>,
    /// How long members count as here, and through which attachment they say so.
    leases: Leases<Arc<Author>>,
    present: HashMap<Arc<Author>, Arc<Attachment>>,
    /// What of the members the leases know.
    seen_members: Option<u64>,
    /// How long runs count as held, what of them the leases know, and by epoch who holds them.
    runs: Leases<RunId>,
    seen_runs: Option<u64>,
    run_holders: HashMap<u64, Holder>,
    /// What follows from the durable view was not stored, and is tried again.
    owes: bool,
    /// Who has which job in hand, and what of the jobs they know.
    in_hand: HashMap<(u64, Label), Weak<Worker>>,
    seen_jobs: Option<u64>,
    /// Who hears signals early.
    listeners: Vec<Arc<Attachment>>,
    /// Through which attachments the instances that are bound to keys go on.
    resumed: HashMap<Arc<Author>, Vec<Weak<Attachment>>>,
    /// Where the clock of the leases begins.
    begun: Instant,
    stopping: bool,
    /// What was due when the session was loaded is written before anyone is answered.
    catching_up: bool,
    /// Not before then is looked again for what is due.
    next_tick: Instant,
    /// Not before then is tried again what the store refused.
    next_try: Instant,
    /// The hash of the view at a tail.
    view_hash: Option<(u64, ViewHash)>,
    /// Its encoding at a tail, while others may ask for the same.
    view: Option<(u64, Bytes)>,
}

/// The shortest time between two looks for what is due: what was found waits for its commit meanwhile.
const TICK: Duration = Duration::from_millis(50);
/// How long a store that refused what nobody waits for is left alone.
const AGAIN: Duration = Duration::from_secs(1);
/// The longest time between two looks: the clock may be set.
const RECHECK: Duration = Duration::from_secs(60);

/// How long a store that cannot tell an outcome yet is left alone.
const RESOLVE_PAUSE: Duration = Duration::from_millis(100);

const FENCED: &str = "a newer epoch of this producer was granted";
const DISPLACED: &str = "the producer was opened again under its epoch";

/// Commands taken from the mailbox at once.
const TURN: usize = 32;

impl Owner {
    pub(crate) fn new(
        sessions: Arc<Sessions>,
        session: Arc<Session>,
        mailbox: mpsc::Receiver<Command>,
        loaded: Loaded,
    ) -> Self {
        let upkeep = Upkeep::new(&sessions, &session, &loaded);
        let Loaded { state, stat, .. } = loaded;
        let SessionStat { created, expire_after, wake, .. } = stat;
        Self {
            sessions,
            session,
            mailbox,
            role: Some(Role::Reader(Box::new(state))),
            created,
            expire_after,
            wake,
            commit: Commit::None,
            upkeep,
            holders: HashMap::new(),
            leases: Leases::default(),
            present: HashMap::new(),
            seen_members: None,
            runs: Leases::default(),
            seen_runs: None,
            run_holders: HashMap::new(),
            owes: false,
            in_hand: HashMap::new(),
            seen_jobs: None,
            listeners: Vec::new(),
            resumed: HashMap::new(),
            begun: Instant::now(),
            stopping: false,
            catching_up: true,
            next_tick: Instant::now(),
            next_try: Instant::now(),
            view_hash: None,
            view: None,
        }
    }

    fn state(&self) -> Option<&State> {
        match self.role.as_ref()? {
            Role::Reader(state) => Some(state),
            Role::Writer { authority, .. } => Some(authority.state()),
        }
    }

    fn backlog(&self) -> usize {
        match &self.role {
            Some(Role::Writer { authority, .. }) => authority.waiting_bytes(),
            _ => 0,
        }
    }

    /// Serves until the session is idle, deleted, or can no longer be served.
    pub(crate) async fn run(mut self) {
        let idle = self.sessions.config.idle;
        // Whoever was here before this server has its grace to come back.
        self.hold_leases();
        if planted(Bug::MembersForgotten) {
            self.leases = Leases::default();
        }
        self.offer_jobs();
        self.owe().await;
        let mut commands = Vec::new();
        let mut last_use = Instant::now();
        // It was idle, and somebody has it: that costs nothing until they are gone.
        let mut held = false;
        loop {
            let tick = match self.may_be_due() {
                // On its own: every hot session would carry its size.
                true => Box::pin(self.tick()).await,
                false => None,
            };
            self.start_commit();
            self.catching_up &= !matches!(self.commit, Commit::None);
            if let Some(Role::Writer { authority, .. }) = &mut self.role {
                authority.prepare();
            }
            let idle_store = matches!(self.commit, Commit::None);
            if self.stopping && idle_store && self.mailbox.is_empty() {
                break;
            }
            let open = self.backlog() < self.sessions.config.session_backlog && !self.catching_up;
            tokio::select! {
                // First: whoever asks where the session stands must not be told less than a reader of the store has seen.
                biased;
                fate = commit(&mut self.commit) => {
                    if !self.finish_commit(fate) {
                        break;
                    }
                }
                result = self.upkeep.done() => self.continue_upkeep(result),
                count = self.mailbox.recv_many(&mut commands, TURN), if open => {
                    (last_use, held) = (Instant::now(), false);
                    if count == 0 {
                        break;
                    }
                    for command in commands.drain(..) {
                        self.handle(command).await;
                    }
                    if self.session.extent.borrow().gone.is_some() {
                        break;
                    }
                }
                () = tokio::time::sleep_until(tick.unwrap_or(last_use)), if tick.is_some() => {}
                () = self.session.unused(), if held => (last_use, held) = (Instant::now(), false),
                () = tokio::time::sleep_until(last_use + idle), if idle_store && !held => {
                    last_use = Instant::now();
                    self.view = None;
                    held = !self.session.is_unused();
                    // It may expire from when that is told on, and so it is told before it leaves.
                    if !held && !self.is_needed() && self.postpone_expiry().await {
                        self.tell_wake().await;
                        if self.sessions.leave_if_unused(&self.session) {
                            break;
                        }
                    }
                }
            }
        }
        // On its own: every hot session would carry its size.
        Box::pin(self.end()).await;
    }

    /// Tells everyone that the session is no longer served from here, keeps a snapshot and lets the writer go.
    async fn end(mut self) {
        self.session.extent.send_if_modified(|extent| {
            let first = extent.gone.is_none();
            extent.gone.get_or_insert(Code::GOING_AWAY);
            first
        });
        // Whoever serves it next gives what is left again.
        for ((job, rule), worker) in self.in_hand.drain() {
            if let Some(worker) = worker.upgrade() {
                let _ = worker.withdrawn.send((self.session.id.incarnation, job, rule));
            }
        }
        self.sessions.leave(&self.session);
        if self.is_needed() {
            self.sessions.forsaken.store(true, std::sync::atomic::Ordering::Relaxed);
        }
        let unsnapshotted = self.upkeep.unsnapshotted();
        self.upkeep.end().await;
        let deleted = self.session.extent.borrow().gone == Some(Code::SESSION_GONE);
        if let Some(Role::Writer { authority, writer }) = self.role.take() {
            // Loading again should not repeat more than a page of work.
            if unsnapshotted > self.sessions.config.snapshot_bytes / 64 && !deleted && !authority.is_uncertain() {
                let Sessions { store, apart, .. } = &*self.sessions;
                let state = authority.state();
                let saved = apart.run(state.weight(), || store.put_snapshot(&writer, state.snapshot())).await;
                if let Err(error) = saved {
                    tracing::warn!(session = %self.session.id, %error, "snapshot not kept; loading will read more");
                }
            }
            if let Some(writer) = Arc::into_inner(writer) {
                self.sessions.store.close_writer(writer);
            }
        }
    }

    /// True if the session must be in memory whoever uses it.
    fn is_needed(&self) -> bool {
        let wake = self.state().and_then(State::wake);
        // What waits for workers is not told apart from what is due some time.
        let two = wake == Some(FOR_WORKERS) && self.upkeep.compact_at().is_some();
        wake == Some(AT_ONCE) || two || self.upkeep.needs_session()
    }

    /// Lets the time until the session expires begin now. False if that is not stored.
    async fn postpone_expiry(&mut self) -> bool {
        if self.expire_after == 0 {
            return true;
        }
        let until = (self.sessions.clock)().saturating_add(self.expire_after);
        match self.sessions.store.postpone(self.session.id.clone(), until).await {
            Ok(()) | Err(StoreError::NotFound) => true,
            Err(error) => {
                tracing::warn!(session = %self.session.id, %error, "stays in memory, or it would expire too early");
                false
            }
        }
    }

    /// Lets the store know exactly when the session must be served again. It is loaded too early at worst where that is not stored: what
    /// was told before was no later.
    async fn tell_wake(&mut self) {
        let wake = self.upkeep.wake(self.state().and_then(State::wake));
        if wake == self.wake {
            return;
        }
        match self.sessions.store.set_wake(self.session.id.clone(), wake).await {
            Ok(()) | Err(StoreError::NotFound) => self.wake = wake,
            Err(error) => tracing::debug!(session = %self.session.id, %error, "cannot say when it is due"),
        }
    }

    /// True if something becomes due some time.
    fn may_be_due(&self) -> bool {
        let held_back = matches!(&self.role, Some(Role::Writer { authority, .. }) if authority.is_held_back());
        held_back
            || self.owes
            || self.upkeep.compact_at().is_some()
            || !self.leases.is_empty()
            || !self.runs.is_empty()
            || self.state().is_some_and(|state| state.deadline().is_some())
    }

    /// Writes what is due, unless that was looked for a moment ago. Returns when to look again.
    async fn tick(&mut self) -> Option<Instant> {
        if self.stopping {
            return None;
        }
        let leases = self.lapse().await;
        let runs = self.lapse_runs().await;
        let values = self.expire().await;
        let compaction = self.compact().await;
        leases.into_iter().chain(runs).chain(values).chain(compaction).chain(self.try_again()).min()
    }

    /// Begins to put finished messages together once they are finished for long enough. Returns when to look again.
    async fn compact(&mut self) -> Option<Instant> {
        let at = self.upkeep.compact_at()?;
        let now = (self.sessions.clock)();
        if at > now {
            return Some(Instant::now() + Duration::from_millis(at - now).min(RECHECK));
        }
        if self.upkeep.may_compact(now) {
            match self.authority().await {
                Ok(_) => self.keep_up(),
                Err(refusal) => {
                    tracing::debug!(session = %self.session.id, code = %refusal.code, "cannot be compacted now");
                    match refusal.code.is_retryable() {
                        true => self.upkeep.postpone(now),
                        false => self.upkeep.give_up(),
                    }
                }
            }
        }
        // Other upkeep may be on its way, or the store not ready.
        self.upkeep.compact_at().map(|_| Instant::now() + AGAIN)
    }

    /// Lets be tried again what a store refused that nobody else asks for. Returns when to look again.
    fn try_again(&mut self) -> Option<Instant> {
        let Some(Role::Writer { authority, .. }) = &mut self.role else { return None };
        if !authority.is_held_back() && !self.owes {
            return None;
        }
        if self.next_try <= Instant::now() {
            self.next_try = Instant::now() + AGAIN;
            authority.try_again();
            if core::mem::take(&mut self.owes) {
                self.follow_up();
            }
        }
        Some(self.next_try)
    }

    /// Loses the members of whom nothing was heard. Returns when to look again.
    async fn lapse(&mut self) -> Option<Instant> {
        let (begun, present, skew) = (self.begun, &self.present, self.skew());
        let now = since(begun, Instant::now()) + skew;
        if self.leases.deadline()? <= now {
            let lapsed = self.leases.lapsed(now, |author, _| Some(since(begun, present.get(author)?.heard()) + skew));
            let wall = (self.sessions.clock)();
            for (author, generation) in lapsed {
                match self.authority().await {
                    Ok(authority) => authority.lose_member(wall, &author, generation),
                    Err(refusal) => {
                        tracing::warn!(session = %self.session.id, code = %refusal.code, "cannot write who is lost now");
                        break;
                    }
                }
            }
        }
        Some(self.begun + Duration::from_millis(self.leases.deadline()?.saturating_sub(skew)))
    }

    /// For [`Bug::LeaseOnWallClock`]: what a clock that jumps shows beside the time that has passed.
    fn skew(&self) -> u64 {
        if !planted(Bug::LeaseOnWallClock) {
            return 0;
        }
        (self.sessions.clock)().saturating_sub(since(self.begun, Instant::now()))
    }

    /// Loses the runs whose holder was not heard for their lease. Returns when to look again.
    async fn lapse_runs(&mut self) -> Option<Instant> {
        let (begun, holders) = (self.begun, &self.run_holders);
        let now = since(begun, Instant::now());
        if self.runs.deadline()? <= now {
            let lapsed = self.runs.lapsed(now, |_, epoch| Some(since(begun, holders.get(&epoch)?.heard)));
            let wall = (self.sessions.clock)();
            for (run, epoch) in lapsed {
                match self.authority().await {
                    Ok(authority) => authority.lose_run(wall, run, epoch),
                    Err(refusal) => {
                        tracing::warn!(session = %self.session.id, code = %refusal.code, "cannot write which run is lost now");
                        break;
                    }
                }
            }
        }
        Some(self.begun + Duration::from_millis(self.runs.deadline()?))
    }

    /// Writes the values, signals and requests that expired. Returns when to look again.
    async fn expire(&mut self) -> Option<Instant> {
        let deadline = self.state()?.deadline()?;
        let now = (self.sessions.clock)();
        if deadline > now {
            let wait = Duration::from_millis(deadline - now).min(RECHECK);
            return Some(self.next_tick.max(Instant::now() + wait));
        }
        if self.next_tick <= Instant::now() || self.catching_up {
            self.next_tick = Instant::now() + TICK;
            match self.authority().await {
                Ok(authority) => authority.tick(now),
                Err(refusal) => {
                    tracing::warn!(session = %self.session.id, code = %refusal.code, "cannot write what is due now");
                    self.catching_up = false;
                    self.next_tick = Instant::now() + RECHECK;
                }
            }
        }
        Some(self.next_tick)
    }

    fn start_commit(&mut self) {
        if !matches!(self.commit, Commit::None) {
            return;
        }
        if let Some(Role::Writer { authority, writer }) = &mut self.role
            && let Step::Commit(chunk) = authority.next_chunk()
        {
            let wake = self.upkeep.wake(authority.wake());
            self.wake = wake;
            let committing = self.sessions.store.append(writer, chunk.clone(), wake);
            self.commit = Commit::Running(committing, chunk, Instant::now());
            if planted(Bug::ShownBeforeDurable) {
                self.finish_commit(Fate::Committed);
            }
        }
    }

    /// Applies what is known of the chunk in flight. False if the session cannot be served any more.
    fn finish_commit(&mut self, fate: Fate) -> bool {
        let metrics = &self.sessions.metrics;
        let chunk = match core::mem::replace(&mut self.commit, Commit::None) {
            Commit::None => return true,
            Commit::Running(_, chunk, since) => {
                metrics.commit.observe(since.elapsed().as_secs_f64());
                chunk
            }
            Commit::Resolving(_, chunk) | Commit::Waiting(_, chunk) => chunk,
        };
        let Some(Role::Writer { authority, writer }) = &mut self.role else {
            return true;
        };
        // Whatever became of it: reads go on.
        self.catching_up &= matches!(fate, Fate::Committed);
        match fate {
            Fate::Committed => match authority.committed() {
                Ok(Some(committed)) => self.publish(committed),
                Ok(None) => {}
                Err(damage) => {
                    tracing::error!(session = %self.session.id, %damage, "a chunk does not follow its session");
                    self.gone(Code::SESSION_DAMAGED);
                    return false;
                }
            },
            Fate::NotCommitted(error) => {
                metrics.not_committed.inc();
                let refusal = refusal(&error);
                for ticket in authority.not_committed() {
                    refuse(&ticket, &refusal);
                }
                self.owes = true;
                if matches!(refusal.code, Code::WRITER_FENCED | Code::SESSION_GONE | Code::SESSION_DAMAGED) {
                    self.gone(refusal.code);
                    return false;
                }
            }
            Fate::Unknown => {
                if !authority.is_uncertain() {
                    metrics.unknown.inc();
                    tracing::warn!(session = %self.session.id, "outcome of a commit is unknown; reading it back");
                }
                authority.unknown();
                self.commit = Commit::Resolving(self.sessions.store.resolve(writer, chunk.clone()), chunk);
            }
            Fate::NotYet => self.commit = Commit::Waiting(Box::pin(tokio::time::sleep(RESOLVE_PAUSE)), chunk),
            // The requests stay without an answer: any would be a guess (spec DUR-4).
            Fate::Lost(error) => {
                tracing::error!(session = %self.session.id, %error, "the outcome of a commit cannot be found out");
                self.gone(refusal(&error).code);
                return false;
            }
        }
        true
    }

    fn gone(&mut self, code: Code) {
        self.session.extent.send_modify(|extent| extent.gone = Some(code));
    }

    /// Shows a durable chunk to the readers, then answers the requests that it holds.
    fn publish(&mut self, Durable { chunk, replies, early }: Durable<Ticket>) {
        let Some(state) = self.state() else { return };
        let header = chunk.header();
        let (metrics, bytes) = (&self.sessions.metrics, chunk.bytes().len() as u64);
        metrics.chunks.inc();
        metrics.records.inc_by(chunk.end() - header.first);
        metrics.bytes.inc_by(bytes);
        self.session.used.stored(bytes);
        self.session.prefixes.iter().for_each(|prefix| prefix.stored(bytes));
        if !header.controls.is_empty() && self.session.streams().len() != state.streams().len() {
            self.session.set_streams(state.streams());
        }
        let (first, closed) = (state.first(), state.view().closed().is_some());
        self.session.ring().push(chunk.clone());
        if header.count > 0 || first != self.session.extent.borrow().first {
            self.session.extent.send_modify(|extent| {
                (extent.first, extent.tail, extent.closed) = (first, chunk.end(), closed);
            });
        }
        self.hold_leases();
        self.offer_jobs();
        self.view = None;
        self.tell(&early);
        self.answer(replies);
        self.follow_up();
        let now = (self.sessions.clock)();
        if let Some(Role::Writer { authority, .. }) = &self.role
            && self.upkeep.committed(&chunk, authority.state(), now)
        {
            // The next chunk says so too. A request that nobody waits for is done all the same.
            self.wake = self.upkeep.wake(self.wake);
            drop(self.sessions.store.set_wake(self.session.id.clone(), self.wake));
        }
        self.keep_up();
    }

    /// Holds those who are members now, and the runs that are active.
    fn hold_leases(&mut self) {
        let now = since(self.begun, Instant::now());
        let skew = self.skew();
        let view = match &self.role {
            Some(Role::Reader(state)) => state.view(),
            Some(Role::Writer { authority, .. }) => authority.state().view(),
            None => return,
        };
        // Of thousands of members most commits change none.
        if self.seen_members != Some(view.members().changes()) {
            self.seen_members = Some(view.members().changes());
            let members = view.members().iter();
            let grace = |grace: u64| if planted(Bug::GraceTooShort) { grace / 10 } else { grace };
            self.leases
                .follow(now + skew, members.map(|(author, of)| (author.clone(), of.generation, grace(of.grace))));
            self.present.retain(|author, attachment| {
                let here = view.members().get(author).is_some();
                if !here {
                    // It did not ask for that: it may want to come back.
                    attachment.outbox.push(Left {});
                }
                here
            });
        }
        if self.seen_runs != Some(view.runs().changes()) {
            self.seen_runs = Some(view.runs().changes());
            let leased = view.runs().active().filter(|run| run.lease > 0);
            self.runs.follow(now, leased.map(|run| (run.id, run.epoch, run.lease)));
            let active = |epoch: &u64| view.runs().active().any(|run| run.epoch == *epoch);
            self.run_holders.retain(|epoch, _| *epoch >= view.next() || active(epoch));
        }
    }

    /// Lets workers know of jobs that came, and of those in hand that went.
    fn offer_jobs(&mut self) {
        let view = match &self.role {
            Some(Role::Reader(state)) => state.view(),
            Some(Role::Writer { authority, .. }) => authority.state().view(),
            None => return,
        };
        let notifications = view.notifications();
        if self.seen_jobs == Some(notifications.changes()) {
            return;
        }
        self.seen_jobs = Some(notifications.changes());
        let incarnation = self.session.id.incarnation;
        self.in_hand.retain(|(job, rule), worker| {
            let wanted = notifications.job(*job, rule).is_some();
            if let Some(worker) = worker.upgrade().filter(|_| !wanted) {
                // A worker that is about to end does not hear it.
                let _ = worker.withdrawn.send((incarnation, *job, rule.clone()));
            }
            wanted
        });
        let in_hand = &self.in_hand;
        match notifications.emitted().next() {
            Some(_) => {
                let free = notifications.emitted().any(|job| !in_hand.contains_key(&(job.id, job.rule.clone())));
                self.sessions.offers.set(&self.session.id.name, free);
            }
            None => self.sessions.offers.remove(&self.session.id.name),
        }
    }

    /// Gives a worker jobs that nobody has in hand.
    fn give_jobs(&mut self, worker: &Arc<Worker>, most: usize) -> Vec<Job> {
        self.in_hand.retain(|_, worker| worker.strong_count() > 0);
        let in_hand = &self.in_hand;
        let free = |job: &&Job| !in_hand.contains_key(&(job.id, job.rule.clone()));
        let jobs: Vec<Job> = match &self.role {
            Some(Role::Reader(state)) => {
                state.view().notifications().emitted().filter(free).take(most).cloned().collect()
            }
            Some(Role::Writer { authority, .. }) => authority.offered_jobs().filter(free).take(most).cloned().collect(),
            None => Vec::new(),
        };
        self.in_hand.extend(jobs.iter().map(|job| ((job.id, job.rule.clone()), Arc::downgrade(worker))));
        if jobs.len() < most
            && self.state().is_some_and(|state| state.view().notifications().emitted().next().is_some())
        {
            self.sessions.offers.set(&self.session.id.name, false);
        }
        jobs
    }

    /// Writes what a server that died between a cause and its effect did not.
    async fn owe(&mut self) {
        if self.state().is_some_and(State::owes_follow_up) {
            match self.authority().await {
                Ok(_) => self.follow_up(),
                // The next commit follows up, too.
                Err(refusal) => {
                    tracing::debug!(session = %self.session.id, code = %refusal.code, "cannot be written now")
                }
            }
        }
    }

    /// Who holds a run under `epoch` is at work, over the connection of `attachment`.
    fn renew(&mut self, epoch: u64, attachment: &Attachment) {
        let Some(conn) = attachment.conn.upgrade() else { return };
        conn.hold_run(&self.session);
        self.run_holders.insert(epoch, Holder { heard: Instant::now(), conn: conn.id });
    }

    /// A client closed its connection: it holds its runs for a moment only, unless it comes back.
    fn departed(&mut self, conn: u64) {
        let now = since(self.begun, Instant::now());
        let until = now.saturating_add(DEPARTED_LEASE);
        let Some(Role::Writer { authority, .. }) = &self.role else { return };
        for run in authority.state().view().runs().active() {
            if self.run_holders.get(&run.epoch).is_some_and(|holder| holder.conn == conn) {
                self.runs.hasten(&run.id, run.epoch, (now, until));
            }
        }
    }

    /// Tells records early to who listens.
    fn tell(&mut self, early: &[Early]) {
        if early.is_empty() {
            return;
        }
        self.listeners.retain(|attachment| attachment.is_alive());
        let name = &self.session.id.name;
        // The token may have become a narrower one since LISTEN, and a wider one may come.
        let may_read = |attachment: &&Arc<Attachment>| {
            attachment.conn.upgrade().is_some_and(|conn| conn.allow(Operation::Read, name).is_ok())
        };
        for attachment in self.listeners.iter().filter(may_read) {
            early.iter().for_each(|frame| attachment.outbox.add(|w| put_frame(frame, w)));
        }
    }

    /// Lets the authority do what follows from what is durable.
    fn follow_up(&mut self) {
        let now = (self.sessions.clock)();
        let Some(Role::Writer { authority, .. }) = &mut self.role else { return };
        if authority.has_standbys() {
            authority.retain_standbys(Ticket::is_alive);
        }
        for (ticket, refusal) in authority.follow_up(now) {
            refuse(&ticket, &refusal);
        }
    }

    /// Answers LISTEN: every signal that nobody took, from `from` on, and from now on every one that comes.
    fn listen(&mut self, attachment: Arc<Attachment>, from: u64) {
        if let Some(state) = self.state() {
            state.view().signals().early_from(from).for_each(|frame| attachment.outbox.push(frame));
        }
        self.listeners.retain(|listener| listener.is_alive() && !Arc::ptr_eq(listener, &attachment));
        self.listeners.push(attachment);
    }

    /// Starts what is due on the store and not running.
    fn keep_up(&mut self) {
        let now = (self.sessions.clock)();
        if let Some(Role::Writer { authority, writer }) = &self.role {
            self.upkeep.keep_up(authority.state(), writer, now);
        }
    }

    fn continue_upkeep(&mut self, result: Result<Done, StoreError>) {
        let now = (self.sessions.clock)();
        if let Some(Role::Writer { authority, writer }) = &self.role {
            self.upkeep.go_on(result, authority.state(), writer, now);
        }
    }

    fn answer(&mut self, replies: Vec<(Ticket, Reply)>) {
        let mut acks: Option<(Arc<ProducerLink>, Ack)> = None;
        for (ticket, reply) in replies {
            match (ticket, reply) {
                (Ticket::Batch { link, .. }, Reply::Appended { sequence, acked }) => {
                    acknowledge(&mut acks, link, sequence, acked);
                }
                (ticket, Reply::Refused(refusal)) => refuse(&ticket, &refusal),
                (Ticket::Request { attachment, id, .. }, reply) => self.answer_request(&attachment, id, reply),
                (Ticket::Batch { .. }, _) => {}
            }
        }
        if let Some((link, ack)) = acks {
            link.attachment.outbox.push(ack);
        }
    }

    fn answer_request(&mut self, attachment: &Arc<Attachment>, id: u64, reply: Reply) {
        let outbox = &attachment.outbox;
        match reply {
            Reply::Producer { handle, position: ProducerPosition { epoch, next, begun } } => {
                let session = self.session.clone();
                let key = handle.key().clone();
                let attachment = attachment.clone();
                let link = Arc::new(ProducerLink { id, handle, epoch, session, attachment: attachment.clone() });
                if self.holders.len() >= self.holders.capacity() {
                    self.holders.retain(|_, holder| holder.strong_count() > 0);
                }
                let held = self.holders.insert(key, Arc::downgrade(&link)).and_then(|held| held.upgrade());
                if let Some(old) = held {
                    let error = Error {
                        about: Producer::KIND,
                        id: old.id,
                        code: Code::FENCED,
                        value: epoch,
                        detail: Detail::new(if old.epoch < epoch { FENCED } else { DISPLACED }),
                    };
                    old.attachment.outbox.push(error);
                }
                // An attachment that has ended has dropped its producers already.
                if let Some(conn) = attachment.conn.upgrade()
                    && !conn.add_producer(&link)
                {
                    return;
                }
                outbox.push(Producer { id, epoch, next, begun });
            }
            Reply::Joined { generation } => {
                // It may have been lost again in the same moment.
                if self.state().is_some_and(|state| state.view().members().get(&attachment.author).is_some()) {
                    self.present.insert(attachment.author.clone(), attachment.clone());
                }
                outbox.push(Joined { generation });
            }
            Reply::Left => outbox.push(Left {}),
            Reply::Run { run, epoch, lost } => {
                outbox.push(Granted { id, run, epoch, lost });
                self.renew(epoch, attachment);
                if !attachment.is_alive() {
                    // Nobody works on it.
                    let now = since(self.begun, Instant::now());
                    self.runs.hasten(&run, epoch, (now, now.saturating_add(DEPARTED_LEASE)));
                }
            }
            // Told where its ticket says what it is about.
            Reply::Refused(_) => {}
            Reply::Signalled { signal, seq } => outbox.push(Signalled { id: signal, seq }),
            Reply::Configured { seq } => outbox.push(Configured { seq }),
            Reply::Stream { id, name } => outbox.push(Stream { id, name }),
            Reply::Closed { seq } => outbox.push(Closed { seq }),
            Reply::Trimmed { first } => outbox.push(Trimmed { first }),
            Reply::Resumed { key, generation } => {
                let (incarnation, author) = (self.session.id.incarnation, (*attachment.author).clone());
                let token = ResumeToken { incarnation, author, key, generation };
                match self.sessions.resume_keys.seal(&token) {
                    Some(token) => outbox.push(Resumed { token: token.into() }),
                    // It comes again and gets the same one.
                    None => outbox.push(Error {
                        about: Resume::KIND,
                        id: 0,
                        code: Code::INTERNAL,
                        value: 0,
                        detail: Detail::new("the token could not be sealed"),
                    }),
                }
                self.go_on_through(attachment);
            }
            Reply::Appended { .. } => {}
        }
    }

    async fn handle(&mut self, command: Command) {
        let now = (self.sessions.clock)();
        if command.asked().is_some_and(|(attachment, ..)| attachment.is_superseded()) {
            return;
        }
        if let Some((attachment, about, id)) = command.asked()
            && is_held(about)
            && !attachment.has_resumed()
            && self.state().is_some_and(|state| state.resumptions().is_bound(&attachment.author))
        {
            let detail = "the instance is bound to a client key; resume first";
            return attachment.refuse(about, id, &Refusal::new(Code::RESUME_REQUIRED, detail));
        }
        match command {
            Command::Stand { subject, answer } => {
                if let Some(standing) = self.standing(&subject) {
                    // Whoever asked may be gone.
                    let _ = answer.send(standing);
                }
            }
            Command::View { answer } => {
                if let Some(state) = self.state() {
                    let tail = state.tail();
                    let view = match &self.view {
                        Some((at, view)) if *at == tail => view.clone(),
                        _ => self.sessions.apart.run(state.view().weight(), || state.view().encode()),
                    };
                    // Shared by all who come before the next commit.
                    self.view = Some((tail, view.clone()));
                    let _ = answer.send((tail, view));
                }
            }
            Command::Append { link, batches, permit } => self.append(now, &link, batches, &permit).await,
            Command::OpenProducer { attachment, request } => {
                let OpenProducer { id, name, epoch } = request;
                let key = ProducerKey { subject: attachment.author.subject.clone(), name };
                let keep = (epoch > 0).then_some(epoch);
                self.request(attachment, OpenProducer::KIND, id, |authority, ticket| {
                    authority.open_producer(now, key, keep, ticket)
                })
                .await;
            }
            Command::DefineStream { attachment, name } => {
                self.request(attachment, DefineStream::KIND, 0, |authority, ticket| {
                    authority.define_stream(now, name, ticket)
                })
                .await;
            }
            Command::Close { attachment } => {
                let author = attachment.author.clone();
                self.request(attachment, CloseSession::KIND, 0, |authority, ticket| {
                    authority.close(now, &author, ticket)
                })
                .await;
            }
            Command::Trim { attachment, before } => {
                self.request(attachment, Trim::KIND, 0, |authority, ticket| authority.trim(now, before, ticket)).await;
            }
            Command::Join { attachment, request } => {
                let Join { name, grace, activity } = *request;
                let (author, joined) = (attachment.author.clone(), PresenceJoined { name, grace, activity });
                if self.state().is_some_and(|state| state.view().members().get(&author).is_some()) {
                    // From now on, however long the answer takes.
                    self.present.insert(author.clone(), attachment.clone());
                }
                self.request(attachment, Join::KIND, 0, |authority, ticket| {
                    authority.join(now, &author, joined, ticket)
                })
                .await;
            }
            Command::Update { attachment, activity } => {
                let updated = match self.authority().await {
                    Ok(authority) => authority.update(now, &attachment.author, PresenceUpdated { activity: *activity }),
                    Err(refusal) => Err(refusal),
                };
                if let Err(refusal) = updated {
                    self.turn_down(&attachment, Update::KIND, refusal);
                }
            }
            Command::Leave { attachment } => {
                let author = attachment.author.clone();
                self.present.remove(&author);
                self.request(attachment, Leave::KIND, 0, |authority, ticket| authority.leave(now, &author, ticket))
                    .await;
            }
            Command::Configure { attachment, request } => {
                let author = attachment.author.clone();
                let configured = SessionConfigured { runs: request.runs, inputs: request.inputs };
                self.request(attachment, Configure::KIND, 0, |authority, ticket| {
                    authority.configure(now, &author, configured, ticket)
                })
                .await;
            }
            Command::StartRun { attachment, request } => {
                let author = attachment.author.clone();
                let StartRun { run, lease, input } = *request;
                self.request(attachment, StartRun::KIND, 0, |authority, ticket| {
                    authority.start_run(now, &author, run, (lease, input), ticket)
                })
                .await;
            }
            Command::TakeRun { attachment, request } => {
                let author = attachment.author.clone();
                let TakeRun { id, run, lease, since } = *request;
                self.request(attachment, TakeRun::KIND, id, |authority, ticket| {
                    authority.retain_standbys(Ticket::is_alive);
                    authority.take_run(&author, (run, lease, since), ticket)
                })
                .await;
                self.follow_up();
            }
            Command::Renew { attachment, epoch } => match self.held_run(&attachment, epoch).await {
                Ok(_) => self.renew(epoch, &attachment),
                Err(refusal) => self.turn_down(&attachment, Renew::KIND, refusal),
            },
            Command::Release { attachment, epoch: Some(epoch) } => match self.held_run(&attachment, epoch).await {
                Ok((authority, run)) => authority.lose_run(now, run, epoch),
                Err(refusal) => self.turn_down(&attachment, Release::KIND, refusal),
            },
            Command::Release { attachment, epoch: None } => {
                if let Some(Role::Writer { authority, .. }) = &mut self.role {
                    authority.retain_standbys(|ticket| !ticket.is_of(&attachment));
                }
            }
            Command::Signal { attachment, request, all } => {
                let author = attachment.author.clone();
                let Signal { id, intent, target, lasts, text } = *request;
                self.request(attachment, Signal::KIND, 0, |authority, ticket| {
                    authority.signal(now, (&author, all), (id, intent, target), (lasts, text), ticket)
                })
                .await;
            }
            Command::SetRule { attachment, request } => {
                let author = attachment.author.clone();
                let SetRule { name, principal, triggers, delay, collapse } = *request;
                let rule = NotifyRule { name, principal, triggers, delay, collapse };
                self.request(attachment, SetRule::KIND, 0, |authority, ticket| {
                    authority.set_rule(now, &author, rule, ticket)
                })
                .await;
            }
            Command::Jobs { worker, most, answer } => {
                let jobs = self.give_jobs(&worker, most);
                if let Err(jobs) = answer.send(jobs) {
                    jobs.into_iter().for_each(|job| drop(self.in_hand.remove(&(job.id, job.rule))));
                }
            }
            Command::JobDone { author, job, rule, outcome, detail } => {
                let key = (job, rule);
                self.in_hand.remove(&key);
                match self.authority().await {
                    Ok(authority) => authority.finish_job(now, &author, key, (outcome, detail)),
                    Err(refusal) => {
                        tracing::debug!(session = %self.session.id, code = %refusal.code, "a job is given again");
                    }
                }
            }
            Command::Resume { attachment, claim } => {
                let author = attachment.author.clone();
                // What is asked behind it is judged as if it were done; where it is not committed, neither is that.
                attachment.set_resumed(true);
                self.request(attachment, Resume::KIND, 0, |authority, ticket| {
                    authority.resume(now, &author, &claim, ticket)
                })
                .await;
            }
            Command::Listen { attachment, from } => self.listen(attachment, from),
            Command::Departed { conn } => self.departed(conn),
            Command::Delete { attachment } => self.delete(&attachment).await,
            Command::Stop => self.stopping = true,
        }
    }

    /// The client of `attachment` proved to be the one that its instance is bound to: whoever else was it, over another connection, is not.
    fn go_on_through(&mut self, attachment: &Arc<Attachment>) {
        if self.resumed.len() == self.resumed.capacity() {
            // Of those that left nothing is kept.
            self.resumed.retain(|_, through| through.iter().any(|attachment| attachment.strong_count() > 0));
        }
        let through = self.resumed.entry(attachment.author.clone()).or_default();
        through.retain(|other| match other.upgrade() {
            Some(other) if !other.is_alive() => false,
            Some(other) if !other.conn.ptr_eq(&attachment.conn) => {
                other.supersede();
                false
            }
            other => other.is_some_and(|other| !Arc::ptr_eq(&other, attachment)),
        });
        through.push(Arc::downgrade(attachment));
    }

    fn standing(&mut self, subject: &Subject) -> Option<Standing> {
        let state = self.state()?;
        let view_hash = match self.view_hash {
            Some((tail, hash)) if tail == state.tail() => hash,
            _ => self.sessions.apart.run(state.view().weight(), || state.view().hash()),
        };
        let positions = state
            .producers()
            .positions()
            .into_iter()
            .filter(|(key, _, _)| key.subject == *subject)
            .take(MAX_POSITIONS)
            .map(|(key, epoch, next)| (key, epoch, next + u64::from(planted(Bug::PositionTooFar))))
            .map(|(key, epoch, next)| Position { producer: key.name.clone(), epoch, next })
            .collect();
        let standing = Standing {
            tail: state.tail(),
            first: state.first(),
            compacted: self.session.extent.borrow().compacted,
            created: self.created,
            closed: state.view().closed().is_some(),
            view_hash,
            streams: state.streams().names().to_vec(),
            positions,
        };
        // A thousand clients that come back to a large view should not cost a thousand hashes.
        self.view_hash = Some((standing.tail, view_hash));
        Some(standing)
    }

    /// Becomes the writer if it is not yet.
    async fn authority(&mut self) -> Result<&mut Authority<Ticket>, Refusal> {
        if let Some(Role::Reader(_)) = &self.role {
            let writer = self.sessions.store.open_writer(self.session.id.clone()).await.map_err(|e| refusal(&e))?;
            if let Some(Role::Reader(state)) = self.role.take() {
                let created = (state.number() == 0).then(|| (self.session.id.name.clone(), self.created));
                let bounds = self.sessions.config.quotas.session.bounds;
                let authority = Box::new(Authority::new(*state, writer.epoch, created).bounded(bounds));
                self.role = Some(Role::Writer { authority, writer: Arc::new(writer) });
            }
        }
        match &mut self.role {
            Some(Role::Writer { authority, .. }) => Ok(authority),
            _ => Err(Refusal::new(Code::INTERNAL, "the session has no owner")),
        }
    }

    async fn append(
        &mut self,
        now: u64,
        link: &Arc<ProducerLink>,
        batches: Vec<Sent>,
        permit: &Arc<OwnedSemaphorePermit>,
    ) {
        let authority = match self.authority().await {
            Ok(authority) => authority,
            Err(refusal) => {
                for Sent { sequence, .. } in batches {
                    refuse_batch(link, sequence, &refusal);
                }
                return;
            }
        };
        let (mut acks, mut renewed) = (None, Vec::new());
        for Sent { sequence, run, batch } in batches {
            let ticket = || Ticket::Batch { link: link.clone(), sequence, _permit: permit.clone() };
            let author = &link.attachment.author;
            let (outcome, _) =
                authority.append(now, author, (&link.handle, link.epoch, sequence), run, batch, ticket());
            match outcome {
                // A repetition of one that is on its way was not held to its run.
                Outcome::Pending => renewed
                    .extend(run.filter(|run| renewed.last() != Some(run) && authority.held_run(author, *run).is_ok())),
                Outcome::Done(Reply::Appended { sequence, acked }) => {
                    acknowledge(&mut acks, link.clone(), sequence, acked);
                }
                Outcome::Done(_) => {}
                Outcome::Refused(refusal) => turn_down(authority, refusal, ticket()),
            }
        }
        if let Some((link, ack)) = acks {
            link.attachment.outbox.push(ack);
        }
        renewed.into_iter().for_each(|epoch| self.renew(epoch, &link.attachment));
    }

    /// The run that the client of `attachment` holds under `epoch`. Refusals: `RUN_FENCED`, those of becoming the writer.
    async fn held_run(
        &mut self,
        attachment: &Attachment,
        epoch: u64,
    ) -> Result<(&mut Authority<Ticket>, RunId), Refusal> {
        let authority = self.authority().await?;
        let run = authority.held_run(&attachment.author, epoch)?;
        Ok((authority, run))
    }

    /// Refuses something that has no id.
    fn turn_down(&mut self, attachment: &Arc<Attachment>, about: u64, refusal: Refusal) {
        match &mut self.role {
            Some(Role::Writer { authority, .. }) => {
                turn_down(authority, refusal, Ticket::Request { attachment: attachment.clone(), about, id: 0 });
            }
            _ => attachment.refuse(about, 0, &refusal),
        }
    }

    async fn request(
        &mut self,
        attachment: Arc<Attachment>,
        about: u64,
        id: u64,
        ask: impl FnOnce(&mut Authority<Ticket>, Ticket) -> (Outcome, Option<Ticket>),
    ) {
        let ticket = || Ticket::Request { attachment: attachment.clone(), about, id };
        let authority = match self.authority().await {
            Ok(authority) => authority,
            Err(refusal) => return refuse(&ticket(), &refusal),
        };
        match ask(authority, ticket()).0 {
            Outcome::Pending => {}
            Outcome::Done(reply) => self.answer_request(&attachment, id, reply),
            Outcome::Refused(refusal) => turn_down(authority, refusal, ticket()),
        }
    }

    async fn delete(&mut self, attachment: &Arc<Attachment>) {
        // Let what is in flight land first, so that its answers are honest.
        match core::mem::replace(&mut self.commit, Commit::None) {
            Commit::None => {}
            running @ Commit::Running(..) => {
                self.commit = running;
                let fate = commit(&mut self.commit).await;
                if !self.finish_commit(fate) {
                    return;
                }
            }
            uncertain => self.commit = uncertain,
        }
        if !matches!(self.commit, Commit::None) {
            let detail = "the outcome of an earlier commit is being resolved";
            return attachment.refuse(DeleteSession::KIND, 0, &Refusal::new(Code::UNAVAILABLE, detail));
        }
        match self.sessions.store.delete(self.session.id.clone()).await {
            Ok(()) => {
                self.sessions.deleted(&self.session.id.name);
                attachment.outbox.push(Deleted {});
                if let Some(Role::Writer { authority, .. }) = &mut self.role {
                    let refusal = Refusal::new(Code::SESSION_GONE, "the session was deleted");
                    for ticket in authority.not_committed() {
                        refuse(&ticket, &refusal);
                    }
                }
                self.gone(Code::SESSION_GONE);
            }
            Err(error) => attachment.refuse(DeleteSession::KIND, 0, &refusal(&error)),
        }
    }
}

/// Milliseconds from `begun` to `at`.
fn since(begun: Instant, at: Instant) -> u64 {
    u64::try_from(at.saturating_duration_since(begun).as_millis()).unwrap_or(u64::MAX)
}

/// Adds an acknowledgement to the ACK being gathered, or sends that and begins another.
fn acknowledge(acks: &mut Option<(Arc<ProducerLink>, Ack)>, link: Arc<ProducerLink>, sequence: u64, acked: Acked) {
    if let Some((same, ack)) = acks {
        if Arc::ptr_eq(same, &link)
            && ack.sequence + ack.batches.len() as u64 == sequence
            && ack.batches.len() < mainstay_protocol::registry::PRODUCER_WINDOW
        {
            ack.batches.push(acked);
            return;
        }
        same.attachment.outbox.add(|w| put_frame(ack, w));
    }
    let ack = Ack { producer: link.id, sequence, batches: vec![acked] };
    *acks = Some((link, ack));
}

/// Refuses a request: now, or once what it contradicts is durable.
fn turn_down(authority: &mut Authority<Ticket>, refusal: Refusal, ticket: Ticket) {
    if let Some((refusal, ticket)) = authority.refuse(refusal, ticket) {
        refuse(&ticket, &refusal);
    }
}

fn refuse(ticket: &Ticket, refusal: &Refusal) {
    match ticket {
        Ticket::Batch { link, sequence, .. } => refuse_batch(link, *sequence, refusal),
        Ticket::Request { attachment, about, id } => attachment.refuse(*about, *id, refusal),
    }
}

fn refuse_batch(link: &ProducerLink, sequence: u64, refusal: &Refusal) {
    link.attachment.outbox.push(Refused {
        producer: link.id,
        sequence,
        code: refusal.code,
        value: refusal.value,
        detail: Detail::new(refusal.detail),
    });
}

/// Waits until something is known of the chunk in flight, for ever if there is none. Cancellation-safe.
async fn commit(commit: &mut Commit) -> Fate {
    match commit {
        Commit::None => core::future::pending().await,
        Commit::Running(append, ..) => match append.await {
            Committed::Committed => Fate::Committed,
            Committed::NotCommitted(error) => Fate::NotCommitted(error),
            Committed::Unknown(_) if planted(Bug::UnknownIsLost) => Fate::NotCommitted(StoreError::Overloaded),
            Committed::Unknown(_) if planted(Bug::UnknownIsStored) => Fate::Committed,
            Committed::Unknown(_) => Fate::Unknown,
        },
        Commit::Resolving(resolve, _) => match resolve.await {
            Ok(true) => Fate::Committed,
            Ok(false) => Fate::NotCommitted(StoreError::Overloaded),
            // Not now. Everything else leaves it open for good.
            Err(error) if error.is_retryable() => Fate::NotYet,
            Err(error) => Fate::Lost(error),
        },
        Commit::Waiting(pause, _) => {
            pause.await;
            Fate::Unknown
        }
    }
}

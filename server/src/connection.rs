//! One connection: its control stream, who is at the other end, and the streams that the peer opens.

use core::future::Future;
use core::time::Duration;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};

use mainstay_protocol::error::{Advice, Code, ProtocolError};
use mainstay_protocol::planted::{Bug, planted};
use mainstay_protocol::registry::{
    DEFAULT_BULK_STREAMS, DEFAULT_BULK_WINDOW, MAX_BATCH_BYTES, MAX_BATCH_RECORDS, MAX_FRAME,
    MAX_FRAME_UNAUTHENTICATED, MAX_RECORD, MIN_BULK_WINDOW, PRODUCER_WINDOW,
};
use mainstay_protocol::session::{
    Author, CreditSent, Grants, Incarnation, Instance, Operation, Refusal, Refusals, SessionName, Stretch, may_be_early,
};
use mainstay_protocol::wire::{
    Authenticated, Body, Detail, Error, Expiring, Frame, Hello, Pong, Produce, Subject, Token, put_grease,
};
use mainstay_transport::entropy;
use mainstay_transport::{
    Connection, ConnectionError, FrameError, FrameReader, Outbox, RecvStream, SendStream, StreamError, priority,
};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::auth::{AuthError, CertificatePin, Verified};
use crate::metrics::Limit;
use crate::namespace::Space;
use crate::owner::Command;
use crate::producer::{self, ProducerLink};
use crate::quota::{Conduct, Cost, Seat, SubjectConnection};
use crate::server::Shared;
use crate::sessions::{Session, Sessions};
use crate::status::ConnectionStatus;
use crate::subscription::SubscriptionCredit;
use crate::{
    attachment::{self, Attachment},
    jobs, requests,
};

/// Who is at the other end.
#[derive(Debug)]
enum Identity {
    /// Nobody that a token was verified for, and why.
    Nobody(Refusal),
    /// The holder of a verified token.
    Known { author: Arc<Author>, verified: Arc<Verified>, subject: Arc<SubjectConnection> },
}

/// What the transport knows of the peer.
struct Peer {
    remote: String,
    rtt: Duration,
    path_changes: u64,
    /// Of the certificate that it proved to have.
    certificate: Option<CertificatePin>,
}

/// What the peer allows this side.
#[derive(Debug, Clone, Copy)]
struct PeerLimits {
    bulk_window: u64,
    bulk_streams: u64,
}

#[derive(Debug, Default)]
struct Opened {
    producers: HashMap<u64, Arc<ProducerLink>>,
    /// Producers asked for and not answered yet.
    reserved: HashMap<u64, Arc<Attachment>>,
    /// QUIC streams that came before their producers were opened.
    awaited: HashMap<u64, oneshot::Sender<Arc<ProducerLink>>>,
    subscriptions: HashMap<u64, Arc<SubscriptionCredit>>,
    /// Sessions with runs that are held over this connection.
    runs: BTreeMap<Incarnation, Weak<Session>>,
}

type Task = core::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// What all tasks of a connection share.
pub(crate) struct Conn {
    pub(crate) id: u64,
    pub(crate) server: Arc<Shared>,
    pub(crate) control: Outbox,
    hello: watch::Sender<Option<PeerLimits>>,
    instance: RwLock<Option<Instance>>,
    identity: watch::Sender<Identity>,
    /// The namespace of the first token that was believed: a connection never changes it.
    space: OnceLock<Arc<Space>>,
    /// Its subject: what was begun in its name goes on in it.
    subject: OnceLock<Subject>,
    peer: Box<dyn Fn() -> Peer + Send + Sync>,
    conduct: Conduct,
    /// Why the connection is to be closed, once there is a reason.
    thrown_out: watch::Sender<Option<ProtocolError>>,
    begun: Instant,
    /// Bytes that subscriptions may hold while they wait for credit.
    pub(crate) held: Semaphore,
    opened: Mutex<Opened>,
    attachments: AtomicUsize,
    /// When a frame came on control last.
    heard: Arc<Mutex<Instant>>,
    tasks: mpsc::UnboundedSender<Task>,
}

impl core::fmt::Debug for Conn {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Conn({})", self.id)
    }
}

/// How many seconds before a token expires that is told (spec AUTH-10), if it does not last for less than four times as long.
const NOTICE: i64 = 60;

/// How long a token that has not expired is taken for granted.
const RECHECK: Duration = Duration::from_secs(60);

impl Conn {
    fn opened(&self) -> MutexGuard<'_, Opened> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a task for as long as the connection lives.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        // Refused only when the connection has ended, and its tasks with it.
        let _ = self.tasks.send(Box::pin(task));
    }

    /// The verified author of what this connection writes. Refusals: `UNAUTHENTICATED`, `TOKEN_INVALID`, `TOKEN_EXPIRED`.
    pub(crate) fn author(&self) -> Result<Arc<Author>, Refusal> {
        self.with_identity(|author, _| Ok(author.clone()))
    }

    /// Succeeds if the token in force allows `operation` on `session`. Refusals: those of [`Conn::author`], `FORBIDDEN`.
    pub(crate) fn allow(&self, operation: Operation, session: &SessionName) -> Result<(), Refusal> {
        self.with_identity(|_, grants| {
            if grants.allow(operation, session.as_str()) {
                return Ok(());
            }
            let detail = match operation {
                Operation::Read => "the token does not grant `read` on this session",
                Operation::Append => "the token does not grant `append` on this session",
                Operation::Create => "the token does not grant `create` on this session",
                Operation::Manage => "the token does not grant `manage` on this session",
                Operation::Join => "the token does not grant `join` on this session",
                Operation::Run => "the token does not grant `run` on this session",
                Operation::Signal => "the token does not grant `signal` on this session",
                Operation::Notify => "the token does not grant `notify` on this session",
                Operation::Mint => "the token does not grant `mint` on this session",
                Operation::SignalOwn => "the token does not grant `signal-own` on this session",
            };
            Err(Refusal::new(Code::FORBIDDEN, detail))
        })
    }

    /// The same for one of several operations, or for nothing at all. Refusals: those for the first of them.
    pub(crate) fn allow_any(&self, operations: &[Operation], session: &SessionName) -> Result<(), Refusal> {
        let Some(first) = operations.first() else { return Ok(()) };
        let refused = self.allow(*first, session);
        match operations[1..].iter().any(|operation| self.allow(*operation, session).is_ok()) {
            true => Ok(()),
            false => refused,
        }
    }

    /// The names of sessions that begin with `prefix` and that the token in force allows to read. Refusals: those of [`Conn::allow`] but
    /// `FORBIDDEN`.
    pub(crate) fn readable(&self, prefix: &str) -> Result<Vec<Stretch>, Refusal> {
        self.with_identity(|_, grants| Ok(grants.stretches(Operation::Read, prefix)))
    }

    /// The author, if the token in force allows `notify` on some session. Refusals: those of [`Conn::allow`].
    pub(crate) fn worker(&self) -> Result<Arc<Author>, Refusal> {
        self.with_identity(|author, grants| match grants.allow_somewhere(Operation::Notify) {
            true => Ok(author.clone()),
            false => Err(Refusal::new(Code::FORBIDDEN, "the token does not grant `notify` on any session")),
        })
    }

    fn with_identity<T>(&self, f: impl FnOnce(&Arc<Author>, &Grants) -> Result<T, Refusal>) -> Result<T, Refusal> {
        match &*self.identity.borrow() {
            Identity::Nobody(refusal) => Err(refusal.clone()),
            Identity::Known { verified, .. } if verified.claims.expires < self.server.now_seconds() => {
                Err(Refusal::new(Code::TOKEN_EXPIRED, "the token has expired; present a new one"))
            }
            Identity::Known { author, verified, .. } => f(author, &verified.claims.grants),
        }
    }

    /// The namespace of the connection. Refusals: `UNAUTHENTICATED` before a token was believed.
    pub(crate) fn space(&self) -> Result<&Arc<Space>, Refusal> {
        self.space.get().ok_or(Refusal::new(Code::UNAUTHENTICATED, "no token was presented"))
    }

    /// The sessions of its namespace. Refusals: as [`Conn::space`].
    pub(crate) fn sessions(&self) -> Result<&Arc<Sessions>, Refusal> {
        let space = if planted(Bug::NamespaceIgnored) { self.server.spaces.first() } else { self.space.get() };
        self.space().map(|own| &space.unwrap_or(own).sessions)
    }

    /// The token in force, and what its subject does. Refusals: those of [`Conn::author`].
    pub(crate) fn verified(&self) -> Result<(Arc<Verified>, Arc<SubjectConnection>), Refusal> {
        self.author()?;
        match &*self.identity.borrow() {
            Identity::Nobody(refusal) => Err(refusal.clone()),
            Identity::Known { verified, subject, .. } => Ok((verified.clone(), subject.clone())),
        }
    }

    /// Counts a request against what its subject may do. Refusals: those of [`Conn::author`], `RATE_LIMITED`.
    pub(crate) fn charge(&self, cost: Cost) -> Result<(), Refusal> {
        let metrics = &self.sessions()?.metrics;
        self.verified()?.1.request(cost, metrics)
    }

    /// What the subject of the token in force does; `None` while none is.
    fn subject(&self) -> Option<Arc<SubjectConnection>> {
        self.verified().ok().map(|(_, subject)| subject)
    }

    /// A request is refused: how much later that is told, if it happens too often (spec LIM-7).
    pub(crate) fn later(&self) -> Duration {
        let later = self.conduct.refusal(self.subject().as_deref().map(|subject| &**subject));
        self.served_later(Limit::SubjectRefusals, later);
        later
    }

    /// A producer goes on regardless: for how long nothing is read of it.
    pub(crate) fn regardless(&self) -> Duration {
        let [chance] = entropy::random();
        let deaf = Refusals::deaf(chance);
        self.served_later(Limit::ProducerRegardless, deaf);
        deaf
    }

    /// Waits that long, on a QUIC stream of its own for one request, unless the server is about to stop.
    pub(crate) async fn linger(&self) {
        let later = self.later();
        if !later.is_zero() {
            let mut goaway = self.server.goaway();
            let _ = tokio::time::timeout(later, goaway.wait_for(Option::is_some)).await;
        }
    }

    /// Takes room for a QUIC stream more; or says when to try again: not with all of the subject's connections in one moment, of which the
    /// first would take all the room there is, each time. `waits` says that there was none before.
    fn room(&self, waits: bool) -> Option<Instant> {
        let later = self.conduct.stream(self.subject().as_deref().map(|subject| &**subject));
        if !waits {
            self.served_later(Limit::SubjectStreams, later);
        }
        let spread: [u8; 1] = entropy::random();
        (!later.is_zero()).then(|| Instant::now() + later + later * u32::from(spread[0]) / 256)
    }

    fn served_later(&self, limit: Limit, later: Duration) {
        if let Ok(sessions) = self.sessions()
            && !later.is_zero()
        {
            sessions.metrics.refused(limit);
        }
    }

    /// Waits until the token in force does not allow `operation` on `session` any more, and says why.
    pub(crate) async fn forbidden(&self, operation: Operation, session: &SessionName) -> Refusal {
        let mut changed = self.identity.subscribe();
        loop {
            changed.mark_unchanged();
            if let Err(refusal) = self.allow(operation, session) {
                return refusal;
            }
            // The sender lives in `self`.
            let _ = changed.changed().await;
        }
    }

    /// Waits until the connection has no token any more that is believed, whatever it allowed, and says why.
    pub(crate) async fn disowned(&self) -> Refusal {
        let mut changed = self.identity.subscribe();
        loop {
            if let Identity::Nobody(refusal) = &*changed.borrow_and_update() {
                return refusal.clone();
            }
            // The sender lives in `self`.
            let _ = changed.changed().await;
        }
    }

    /// Looks after the token in force: asks for another one before it expires, and wakes whoever waits in [`Conn::forbidden`] when it has or is
    /// not believed any more: one clock for all of them. Returns once the connection was without one for too long, and why.
    async fn watch_token(&self) -> Refusal {
        let mut changed = self.identity.subscribe();
        let mut told: Option<Arc<Verified>> = None;
        let mut began: Option<(Arc<Verified>, i64)> = None;
        let mut without: Option<Instant> = None;
        let mut trust = None;
        loop {
            let now = self.server.now_seconds();
            let known = match &*changed.borrow_and_update() {
                Identity::Known { verified, .. } => Ok(verified.clone()),
                Identity::Nobody(refusal) => Err(refusal.clone()),
            };
            let wait = match &known {
                Ok(verified) if verified.claims.expires >= now => {
                    without = None;
                    let left = verified.claims.expires - now + 1;
                    // From when it came in force here: a token that was made from an old one says that it is as old.
                    let (_, since) = match &began {
                        Some(began) if Arc::ptr_eq(&began.0, verified) => began,
                        _ => began.insert((verified.clone(), now)),
                    };
                    let life = verified.claims.expires.saturating_sub(*since).max(0);
                    let notice = NOTICE.min(life / 4);
                    let is_told = told.as_ref().is_some_and(|told| Arc::ptr_eq(told, verified));
                    if left <= notice && !is_told {
                        self.control.push(Expiring { left: (left.max(0) as u64).saturating_mul(1000) });
                        told = Some(verified.clone());
                    }
                    let wait = if left > notice { left - notice } else { left };
                    Duration::from_secs(u64::try_from(wait).unwrap_or(0)).min(RECHECK)
                }
                _ => {
                    let since = *without.get_or_insert_with(|| {
                        // Those who wait look for themselves.
                        self.identity.send_modify(|_| ());
                        changed.mark_unchanged();
                        Instant::now()
                    });
                    let left = self.server.config().unauthenticated.saturating_sub(since.elapsed());
                    if left.is_zero() {
                        let expired = Refusal::new(Code::TOKEN_EXPIRED, "the token has expired and no other one came");
                        return known.err().unwrap_or(expired);
                    }
                    left
                }
            };
            let anchors = async {
                match (&mut trust, self.space.get()) {
                    // The sender lives in the namespace.
                    (Some(trust), _) => {
                        let trust: &mut watch::Receiver<_> = trust;
                        drop(trust.changed().await);
                    }
                    // What changed before is looked at once.
                    (trust, Some(space)) => *trust = Some(space.trust.changes()),
                    (None, None) => core::future::pending().await,
                }
            };
            tokio::select! {
                // The clock may be set meanwhile: it is looked at from time to time.
                () = tokio::time::sleep(wait) => {}
                // The sender lives in `self`.
                _ = changed.changed() => {}
                () = anchors => {}
            }
            self.believe_still();
        }
    }

    /// Puts the token in force out of it if it is not believed any more.
    fn believe_still(&self) {
        let Some(space) = self.space.get() else { return };
        self.identity.send_if_modified(|identity| {
            let Identity::Known { verified, author, .. } = identity else { return false };
            if planted(Bug::RevocationLate) {
                return false;
            }
            let Err(error) = space.trust.anchors().still(verified) else { return false };
            tracing::info!(conn = self.id, subject = %author.subject, code = %error.code, "token put out of force");
            *identity = Identity::Nobody(Refusal { value: error.value, ..Refusal::new(error.code, error.detail) });
            true
        });
    }

    /// When a frame came on control last: the sign of life of members (spec PRES-4).
    pub(crate) fn heard(&self) -> Arc<Mutex<Instant>> {
        self.heard.clone()
    }

    /// What its operator sees of it.
    pub(crate) fn status(&self) -> ConnectionStatus {
        let Peer { remote, rtt, path_changes, .. } = (self.peer)();
        let (producers, subscriptions) = {
            let opened = self.opened();
            (opened.producers.len(), opened.subscriptions.values().filter_map(|one| one.status()).collect())
        };
        ConnectionStatus {
            id: self.id,
            remote,
            namespace: self.space.get().map(|space| space.name.clone()),
            subject: self.author().ok().map(|author| author.subject.as_str().to_owned()),
            rtt_ms: rtt.as_secs_f64() * 1000.0,
            age_s: self.begun.elapsed().as_secs(),
            path_changes,
            attachments: self.attachments.load(Ordering::Relaxed),
            producers,
            subscriptions,
        }
    }

    fn is_authenticated(&self) -> bool {
        self.author().is_ok()
    }

    /// Takes a token: says AUTHENTICATED, or why not. A bad token leaves what was granted before in force.
    fn authenticate(&self, token: &[u8]) {
        match self.judge(token) {
            Ok((space, verified, instance, subject)) => {
                let _ = (self.space.set(space.clone()), self.subject.set(verified.claims.subject.clone()));
                let author = Arc::new(Author { subject: verified.claims.subject.clone(), instance });
                let (name, expires) = (verified.claims.subject.clone(), verified.claims.expires);
                let verified = Arc::new(verified);
                self.identity.send_replace(Identity::Known { author, verified, subject });
                // It may have been revoked in between, before anybody here listened.
                self.believe_still();
                self.control.push(Authenticated { subject: name, expires: expires.max(0) as u64 });
            }
            Err(error) => {
                tracing::debug!(conn = self.id, code = %error.code, "token refused: {}", error.detail);
                if error.code == Code::TOKEN_INVALID {
                    self.violated(&ProtocolError::new(error.code, error.detail));
                }
                self.identity.send_if_modified(|identity| {
                    let nobody = matches!(identity, Identity::Nobody(..));
                    if nobody {
                        *identity =
                            Identity::Nobody(Refusal { value: error.value, ..Refusal::new(error.code, error.detail) });
                    }
                    nobody
                });
                self.control.push(Error {
                    about: Token::KIND,
                    id: 0,
                    code: error.code,
                    value: error.value,
                    detail: Detail::new(error.detail),
                });
            }
        }
    }

    /// Whether a token is believed on this connection. Errors: `TOKEN_INVALID`, `TOKEN_EXPIRED`, `TOKEN_REVOKED`, `QUOTA_EXCEEDED` where the
    /// subject has too many connections.
    fn judge(&self, token: &[u8]) -> Result<(Arc<Space>, Verified, Instance, Arc<SubjectConnection>), AuthError> {
        let now = self.server.now_seconds();
        let (space, verified) = self.server.verify(self.space.get(), token, now)?;
        let judged = self.fits(space, &verified);
        space.sessions.metrics.token(judged.as_ref().err().map_or(Code::NO_ERROR, |error| error.code));
        let (instance, subject) = judged?;
        Ok((space.clone(), verified, instance, subject))
    }

    /// Whether a token that is believed is good for this client. Errors: as [`Conn::judge`].
    fn fits(&self, space: &Space, verified: &Verified) -> Result<(Instance, Arc<SubjectConnection>), AuthError> {
        let claims = &verified.claims;
        let instance = *self.instance.read().unwrap_or_else(PoisonError::into_inner);
        let instance = instance.ok_or(AuthError::invalid("HELLO states no instance"))?;
        if claims.device.is_some_and(|device| device != instance) {
            return Err(AuthError::invalid("the token is bound to another device"));
        }
        if claims.certificate.is_some() && claims.certificate != (self.peer)().certificate {
            return Err(AuthError::invalid("the token is bound to a certificate that the client did not show"));
        }
        if self.subject.get().is_some_and(|subject| *subject != claims.subject) {
            return Err(AuthError::invalid("the token is for another subject than the connection"));
        }
        if let Identity::Known { subject, .. } = &*self.identity.borrow() {
            return Ok((instance, subject.clone()));
        }
        // What was made from a token counts as what that does.
        let subject = space.subjects.connect(&claims.root_subject(), &space.sessions.metrics);
        let Refusal { code, value, detail } = match subject {
            Ok(subject) => return Ok((instance, Arc::new(subject))),
            Err(refusal) => refusal,
        };
        Err(AuthError { code, value, detail })
    }

    /// The peer broke the protocol on a stream; who does that too often is thrown out, with the code of the last time.
    pub(crate) fn violated(&self, error: &ProtocolError) {
        let is_wrong = error.code == Code::TOKEN_INVALID
            || error.code.advice() == Advice::Fix && error.code != Code::LIMIT_EXCEEDED;
        if is_wrong && self.conduct.violated() {
            self.thrown_out.send_replace(Some(error.clone()));
        }
    }

    /// Waits until the peer is to be thrown out, and says why.
    async fn thrown_out(&self) -> ProtocolError {
        let mut thrown_out = self.thrown_out.subscribe();
        loop {
            if let Some(error) = thrown_out.borrow_and_update().clone() {
                return error;
            }
            // The sender lives in `self`.
            let _ = thrown_out.changed().await;
        }
    }

    /// Waits until the peer said HELLO.
    async fn greeted(&self) {
        let mut hello = self.hello.subscribe();
        // The sender lives in `self`.
        let _ = hello.wait_for(Option::is_some).await;
    }

    /// Makes room for a producer. Refusals: `LIMIT_EXCEEDED`, `ID_IN_USE`.
    pub(crate) fn reserve_producer(&self, id: u64, attachment: &Arc<Attachment>) -> Result<(), Refusal> {
        let mut opened = self.opened();
        if opened.producers.contains_key(&id) || opened.reserved.contains_key(&id) {
            return Err(Refusal::new(Code::ID_IN_USE, "the producer id is in use on this connection"));
        }
        let open = opened.producers.len() + opened.reserved.len();
        if open as u64 >= self.server.config().producers {
            return Err(Refusal::new(Code::LIMIT_EXCEEDED, "the connection has too many producers"));
        }
        opened.reserved.insert(id, attachment.clone());
        Ok(())
    }

    /// A producer was granted: its QUIC stream may come. False if its attachment has ended.
    pub(crate) fn add_producer(&self, link: &Arc<ProducerLink>) -> bool {
        let mut opened = self.opened();
        opened.reserved.remove(&link.id);
        // Under the lock that `drop_producers` takes after the end.
        let open = !link.attachment.has_ended();
        let awaited = opened.awaited.remove(&link.id);
        if open {
            opened.producers.insert(link.id, link.clone());
            // A stream that has ended meanwhile does not care.
            awaited.into_iter().for_each(|awaited| drop(awaited.send(link.clone())));
        }
        open
    }

    /// A producer was refused.
    pub(crate) fn release_producer(&self, id: u64) {
        let mut opened = self.opened();
        opened.reserved.remove(&id);
        opened.awaited.remove(&id);
    }

    /// A producer's QUIC stream has ended.
    pub(crate) fn drop_producer(&self, link: &Arc<ProducerLink>) {
        let mut opened = self.opened();
        // The id may be another producer's by now.
        if opened.producers.get(&link.id).is_some_and(|held| Arc::ptr_eq(held, link)) {
            opened.producers.remove(&link.id);
        }
    }

    /// The producer of a QUIC stream, which may come before its producer was opened, or even asked for, on another one (spec PROD-5).
    async fn producer(&self, id: u64) -> Option<Arc<ProducerLink>> {
        let mut told = {
            let mut opened = self.opened();
            if let Some(link) = opened.producers.get(&id) {
                return Some(link.clone());
            }
            let (tell, told) = oneshot::channel();
            // One that waited before is the stream of nothing any more. No more of them than there may be streams.
            opened.awaited.insert(id, tell);
            told
        };
        loop {
            if let Ok(told) = tokio::time::timeout(self.server.config().hello_timeout, &mut told).await {
                return told.ok();
            }
            let mut opened = self.opened();
            // Once it is asked for, it is answered, however long that takes.
            if !opened.reserved.contains_key(&id) {
                opened.awaited.remove(&id);
                // In the same moment.
                return told.try_recv().ok();
            }
        }
    }

    /// A run of `session` is held over this connection.
    pub(crate) fn hold_run(&self, session: &Arc<Session>) {
        let mut opened = self.opened();
        // With each batch of a run: nothing but a look, once it is known.
        if !opened.runs.contains_key(&session.id.incarnation) {
            opened.runs.retain(|_, held| held.strong_count() > 0);
            opened.runs.insert(session.id.incarnation, Arc::downgrade(session));
        }
    }

    /// The client closed the connection: what it held over it is in question.
    async fn departed(&self) {
        let held = core::mem::take(&mut self.opened().runs);
        for session in held.values().filter_map(Weak::upgrade) {
            // An owner that has ended has told everybody.
            let _ = session.commands.send(Command::Departed { conn: self.id }).await;
        }
    }

    /// Makes room for a subscription. Refusals: `LIMIT_EXCEEDED` beyond what the client allows, `ID_IN_USE`, `QUOTA_EXCEEDED` beyond what the
    /// session allows.
    pub(crate) fn open_subscription(
        &self,
        id: u64,
        session: &Arc<Session>,
    ) -> Result<(Arc<SubscriptionCredit>, Seat), Refusal> {
        let limits = (*self.hello.borrow())
            .unwrap_or(PeerLimits { bulk_window: DEFAULT_BULK_WINDOW, bulk_streams: DEFAULT_BULK_STREAMS });
        let mut opened = self.opened();
        if opened.subscriptions.contains_key(&id) {
            return Err(Refusal::new(Code::ID_IN_USE, "the subscription id is in use on this connection"));
        }
        if opened.subscriptions.len() as u64 >= limits.bulk_streams {
            let detail = "the connection has as many subscriptions as the client's HELLO allows";
            return Err(Refusal::new(Code::LIMIT_EXCEEDED, detail));
        }
        let budget = self.server.config().delivery_budget;
        let credit = CreditSent::new(limits.bulk_window, limits.bulk_streams, budget);
        let sessions = self.sessions()?;
        let seat = session.used.subscribe(sessions.config.quotas.session.subscriptions, &sessions.metrics)?;
        let credit = Arc::new(SubscriptionCredit::new(credit, session));
        opened.subscriptions.insert(id, credit.clone());
        Ok((credit, seat))
    }

    /// The client wants no more of a subscription.
    pub(crate) fn end_subscription(&self, id: u64) {
        if let Some(credit) = self.opened().subscriptions.get(&id) {
            credit.end();
        }
    }

    /// A subscription has ended.
    pub(crate) fn forget_subscription(&self, id: u64) {
        self.opened().subscriptions.remove(&id);
    }

    /// The attachment has ended: so have its producers, and those that it asked for.
    pub(crate) fn drop_producers(&self, attachment: &Arc<Attachment>) {
        let mut opened = self.opened();
        opened.producers.retain(|_, link| !Arc::ptr_eq(&link.attachment, attachment));
        let ended = opened.reserved.extract_if(|_, asked| Arc::ptr_eq(asked, attachment));
        let ended: Vec<u64> = ended.map(|(id, _)| id).collect();
        ended.iter().for_each(|id| drop(opened.awaited.remove(id)));
    }

    /// Counts an attachment for as long as the result lives.
    fn attached(self: &Arc<Self>) -> Result<Attached, Refusal> {
        let attached = Attached(self.clone());
        self.server.attached();
        if self.attachments.fetch_add(1, Ordering::Relaxed) as u64 >= self.server.config().attachments as u64 {
            return Err(Refusal::new(Code::LIMIT_EXCEEDED, "the connection has too many attachments"));
        }
        Ok(attached)
    }
}

/// A connection that its operator sees, for as long as it lives.
struct Listed(Arc<Conn>);

impl Listed {
    fn new(conn: &Arc<Conn>) -> Self {
        conn.server.connections.add(conn);
        Self(conn.clone())
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.0.server.connections.remove(self.0.id);
    }
}

/// One of a connection's attachments.
struct Attached(Arc<Conn>);

impl Drop for Attached {
    fn drop(&mut self) {
        self.0.attachments.fetch_sub(1, Ordering::Relaxed);
        self.0.server.detached();
    }
}

/// Serves a connection until it ends.
pub(crate) async fn run<C: Connection>(transport: C, server: Arc<Shared>, id: u64) {
    let (tasks, mut spawned) = mpsc::unbounded_channel();
    let conn = Arc::new(Conn {
        id,
        server: server.clone(),
        control: Outbox::default(),
        hello: watch::channel(None).0,
        instance: RwLock::new(None),
        identity: watch::channel(Identity::Nobody(Refusal::new(Code::UNAUTHENTICATED, "no token was presented"))).0,
        subject: OnceLock::new(),
        space: OnceLock::new(),
        peer: {
            let transport = transport.clone();
            Box::new(move || Peer {
                remote: transport.remote(),
                rtt: transport.rtt(),
                path_changes: transport.path_changes(),
                certificate: transport.certificate(),
            })
        },
        conduct: Conduct::new(&server.config().connection),
        thrown_out: watch::channel(None).0,
        begun: Instant::now(),
        held: Semaphore::new(usize::try_from(server.config().delivery_budget).unwrap_or(Semaphore::MAX_PERMITS)),
        opened: Mutex::default(),
        attachments: AtomicUsize::new(0),
        heard: Arc::new(Mutex::new(Instant::now())),
        tasks,
    });
    tracing::debug!(conn = id, remote = %transport.remote(), "connected");
    let mut running = JoinSet::new();
    let _listed = Listed::new(&conn);
    let patience = server.config().hello_timeout;
    let confirmed = OnceLock::new();
    let late = async {
        // How long the handshake may take is the transport's business.
        let _ = transport.confirmed().await;
        tokio::time::sleep_until(*confirmed.get_or_init(Instant::now) + patience).await;
    };
    let control = tokio::select! {
        control = transport.accept_bi() => match control {
            Ok(control) => control,
            Err(_) => return,
        },
        () = late => return transport.close(Code::HELLO_TIMEOUT.0, "no HELLO came in time"),
    };
    // One that opens control late has not more time for what it says there.
    let deadline = *confirmed.get_or_init(Instant::now) + patience;
    running.spawn(Box::pin(control_stream(transport.clone(), conn.clone(), control, deadline)) as Task);
    let mut goaway = server.goaway();
    let mut token = core::pin::pin!(conn.watch_token());
    // Before there is room for a stream none is taken: until then they wait in what QUIC allows.
    let mut wait = conn.room(false);
    let mut identity = conn.identity.subscribe();
    loop {
        tokio::select! {
            // What a subject may is more than what somebody unknown may. The sender lives in `conn`.
            _ = identity.changed(), if wait.is_some() => wait = conn.room(true),
            () = tokio::time::sleep_until(wait.unwrap_or_else(Instant::now)), if wait.is_some() => wait = conn.room(true),
            stream = transport.accept_bi(), if wait.is_none() => match stream {
                Ok((send, recv)) => {
                    wait = conn.room(false);
                    running.spawn(Box::pin(bidirectional(transport.clone(), conn.clone(), send, recv)));
                }
                Err(_) => break,
            },
            stream = transport.accept_uni(), if wait.is_none() => match stream {
                Ok(recv) => {
                    wait = conn.room(false);
                    running.spawn(Box::pin(unidirectional::<C>(conn.clone(), recv)));
                }
                Err(_) => break,
            },
            Some(task) = spawned.recv() => {
                running.spawn(task);
            }
            Some(_) = running.join_next() => {}
            Ok(()) = goaway.changed() => {
                if let Some(frame) = goaway.borrow_and_update().clone() {
                    conn.control.push(frame);
                }
            }
            error = conn.thrown_out() => {
                transport.close(error.code.0, error.detail);
                break;
            }
            // It can do nothing, and costs memory.
            refusal = &mut token => {
                transport.close(refusal.code.0, refusal.detail);
                break;
            }
        }
    }
    // Nothing of it is left when this returns.
    running.shutdown().await;
    // One that makes another connection says so by another code (spec RUN-4).
    if matches!(transport.closed().await, ConnectionError::Closed { code, .. } if code == Code::NO_ERROR.0) {
        conn.departed().await;
    }
    tracing::debug!(conn = id, "disconnected");
}

/// Serves the control stream. Ends the connection on a violation: nothing else could be trusted.
async fn control_stream<C: Connection>(
    transport: C,
    conn: Arc<Conn>,
    (mut send, recv): (C::Send, C::Recv),
    deadline: Instant,
) {
    let config = conn.server.config();
    let hello = Hello {
        agent: Some(bytes::Bytes::from_static(concat!("mainstay/", env!("CARGO_PKG_VERSION")).as_bytes())),
        bulk_window: Some(config.producer_window),
        bulk_streams: Some(config.producers),
        max_frame: Some(MAX_FRAME as u64),
        max_record: Some(MAX_RECORD as u64),
        max_batch_records: Some(MAX_BATCH_RECORDS as u64),
        max_batch_bytes: Some(MAX_BATCH_BYTES as u64),
        producer_window: Some(PRODUCER_WINDOW as u64),
        max_attachments: Some(config.attachments as u64),
        ..Hello::default()
    };
    conn.control.push(hello);
    conn.control.add(|w| put_grease(entropy::random(), &[0; 3], w));
    send.set_priority(priority::CONTROL);
    let reading = async {
        match read_control(&conn, &transport, recv, deadline).await {
            Ok(()) => transport.close(Code::NO_ERROR.0, "the client ended its control stream"),
            Err(FrameError::Lost(StreamError::Connection(_))) => {}
            // Without control nothing could be told to it (spec CONN-3).
            Err(FrameError::Lost(_)) => {
                transport.close(Code::FRAME_UNEXPECTED.0, "the client reset its control stream");
            }
            Err(FrameError::Violation(error)) => {
                tracing::debug!(conn = conn.id, %error, "control stream violated");
                transport.close(error.code.0, error.detail);
            }
        }
    };
    tokio::select! {
        // What is read is answered in the same turn.
        biased;
        () = reading => {}
        // It ends only if the client let its control frames gather: nothing could be told to it any more (spec CONN-3).
        () = conn.control.write_to(&mut send) => {
            transport.close(Code::CONTROL_BACKLOG.0, "the client does not read its control stream");
        }
    }
}

async fn read_control<C: Connection>(
    conn: &Arc<Conn>,
    transport: &C,
    recv: C::Recv,
    deadline: Instant,
) -> Result<(), FrameError> {
    let mut frames = FrameReader::new(recv, MAX_FRAME_UNAUTHENTICATED);
    let mut greeted = false;
    loop {
        let next = if greeted {
            frames.next().await?
        } else {
            let late = ProtocolError::new(Code::HELLO_TIMEOUT, "no HELLO came in time");
            tokio::time::timeout_at(deadline, frames.next()).await.map_err(|_| late)??
        };
        let Some(frame) = next else { return Ok(()) };
        *conn.heard.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        if !may_be_early(&frame) {
            handshake(transport).await?;
        }
        match frame {
            Frame::Hello(hello) if !greeted => {
                greeted = true;
                greet(conn, transport, hello)?;
                if conn.is_authenticated() {
                    frames.set_limit(MAX_FRAME);
                }
            }
            _ if !greeted => {
                return Err(ProtocolError::new(Code::FRAME_UNEXPECTED, "the first frame is not HELLO").into());
            }
            Frame::Token(Token { token }) => {
                conn.conduct.token()?;
                conn.authenticate(&token);
                allow_streams(conn, transport);
                if conn.is_authenticated() {
                    frames.set_limit(MAX_FRAME);
                }
            }
            Frame::Ping(ping) => {
                // The others of its frames wait with it.
                loop {
                    let room = conn.conduct.question();
                    if room.is_zero() {
                        break;
                    }
                    tokio::time::sleep(room).await;
                }
                conn.control.answer(Pong { nonce: ping.nonce });
            }
            Frame::Pong(_) => {}
            Frame::Credit(credit) => {
                let subscription = conn.opened().subscriptions.get(&credit.id).cloned();
                // One that has ended may still be credited.
                if let Some(subscription) = subscription {
                    subscription.credited(credit.consumed)?;
                }
            }
            _ => {
                return Err(ProtocolError::new(Code::FRAME_UNEXPECTED, "not a frame of the control stream").into());
            }
        }
    }
}

/// Waits until the peer is known not to be a replay (spec EARLY-2).
pub(crate) async fn handshake<C: Connection>(transport: &C) -> Result<(), FrameError> {
    if transport.is_confirmed() {
        return Ok(());
    }
    match transport.confirmed().await {
        Ok(true) => Ok(()),
        // The handshake failed.
        Ok(false) => Err(FrameError::Lost(StreamError::Connection(transport.closed().await))),
        Err(error) => Err(FrameError::Lost(StreamError::Connection(error))),
    }
}

fn greet<C: Connection>(conn: &Arc<Conn>, transport: &C, hello: Hello) -> Result<(), ProtocolError> {
    let bulk_window = hello.bulk_window.unwrap_or(DEFAULT_BULK_WINDOW);
    let bulk_streams = hello.bulk_streams.unwrap_or(DEFAULT_BULK_STREAMS);
    let most = conn.server.config().delivery_budget / MIN_BULK_WINDOW;
    if bulk_window < MIN_BULK_WINDOW || bulk_streams > most {
        return Err(ProtocolError::new(Code::LIMIT_EXCEEDED, "HELLO states a bulk window or count out of range"));
    }
    *conn.instance.write().unwrap_or_else(PoisonError::into_inner) = hello.instance;
    if let Some(token) = &hello.token {
        conn.authenticate(token);
    }
    allow_streams(conn, transport);
    conn.hello.send_replace(Some(PeerLimits { bulk_window, bulk_streams }));
    Ok(())
}

/// Allows as many streams as are open and some more; before authentication only a few.
fn allow_streams<C: Connection>(conn: &Conn, transport: &C) {
    if conn.is_authenticated() {
        let open = conn.attachments.load(Ordering::Relaxed) as u32;
        let bidirectional = (open / STEP * STEP + 2 * STEP).min(conn.server.config().attachments as u32 + STEP);
        transport.allow_streams(bidirectional, conn.server.config().producers as u32);
    }
}

/// Streams are allowed in steps of this many, so that idle connections stay small.
const STEP: u32 = 4;

/// Reads the first frame of a stream, which says what the stream is for.
async fn first_frame<R: RecvStream>(conn: &Conn, frames: &mut FrameReader<R>) -> Result<Option<Frame>, FrameError> {
    conn.greeted().await;
    if conn.is_authenticated() {
        frames.set_limit(MAX_FRAME);
    }
    frames.next().await
}

async fn bidirectional<C: Connection>(transport: C, conn: Arc<Conn>, mut send: C::Send, recv: C::Recv) {
    let mut frames = FrameReader::new(recv, MAX_FRAME_UNAUTHENTICATED);
    let first = match first_frame(&conn, &mut frames).await {
        Ok(Some(frame)) if !may_be_early(&frame) => handshake(&transport).await.map(|()| Some(frame)),
        first => first,
    };
    let error = match first {
        Ok(None) => return send.finish(),
        Ok(Some(Frame::Attach(request))) => match conn.attached() {
            Ok(_attached) => {
                allow_streams(&conn, &transport);
                return attachment::run(transport, conn, request, send, frames).await;
            }
            Err(refusal) => ProtocolError::new(refusal.code, refusal.detail),
        },
        Ok(Some(Frame::Mint(request))) => return requests::mint(&conn, request, &mut send).await,
        Ok(Some(Frame::Pull(request))) => match conn.attached() {
            // Counted among the attachments: both stay open.
            Ok(_attached) => {
                allow_streams(&conn, &transport);
                return Box::pin(jobs::pull(&conn, request, send, frames)).await;
            }
            Err(refusal) => ProtocolError::new(refusal.code, refusal.detail),
        },
        Ok(Some(Frame::List(request))) => return requests::list(&conn, request, &mut send).await,
        Ok(Some(_)) => ProtocolError::new(Code::FRAME_UNEXPECTED, "no stream begins with this frame"),
        Err(FrameError::Violation(error)) => error,
        Err(FrameError::Lost(_)) => return,
    };
    tracing::debug!(conn = conn.id, %error, "stream refused");
    conn.violated(&error);
    conn.linger().await;
    let detail = Detail::new(error.detail);
    let frame = Frame::from(Error { about: 0, id: 0, code: error.code, value: 0, detail });
    // Told in words where the client still reads, and by the code of the stop in any case.
    if send.write(&mut [frame.to_bytes()]).await.is_ok() {
        send.finish();
    }
    frames.stop(error.code.0);
}

async fn unidirectional<C: Connection>(conn: Arc<Conn>, recv: C::Recv) {
    let mut frames = FrameReader::new(recv, MAX_FRAME_UNAUTHENTICATED);
    let error = match first_frame(&conn, &mut frames).await {
        Ok(None) => return,
        Ok(Some(Frame::Produce(Produce { producer }))) => match conn.producer(producer).await {
            Some(link) => return producer::run(conn, link, frames).await,
            // Nobody's fault: its attachment may have ended meanwhile.
            None => return frames.stop(Code::PRODUCER_UNKNOWN.0),
        },
        Ok(Some(_)) => ProtocolError::new(Code::FRAME_UNEXPECTED, "no stream begins with this frame"),
        Err(FrameError::Violation(error)) => error,
        Err(FrameError::Lost(_)) => return,
    };
    tracing::debug!(conn = conn.id, %error, "stream refused");
    conn.violated(&error);
    conn.linger().await;
    frames.stop(error.code.0);
}

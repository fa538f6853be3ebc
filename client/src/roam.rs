//! Keeps the connection: makes it, moves it to another path, and makes another one beside it when that may be sooner. What is done when is
//! decided by [`Roaming`].

use core::time::Duration;
use std::net::SocketAddr;
use std::sync::Arc;

use mainstay_protocol::Code;
use mainstay_protocol::session::{Manners, PathFacts, Roaming, RoamingStep, moved_to, sent_on_to};
use mainstay_transport::entropy;
use mainstay_transport::{Connection, ConnectionError, Connector};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::config::Config;
use crate::error::ClientError;
use crate::link::Link;
use crate::tokens::Tokens;

/// How the connection is doing.
pub(crate) enum Status<C: Connection> {
    /// There is none, and one is being made.
    Down,
    /// There is one.
    Up(Arc<Link<C>>),
    /// There will be none.
    Failed(ClientError),
}

impl<C: Connection> Clone for Status<C> {
    fn clone(&self) -> Self {
        match self {
            Self::Down => Self::Down,
            Self::Up(link) => Self::Up(link.clone()),
            Self::Failed(error) => Self::Failed(error.clone()),
        }
    }
}

/// The connection, and the one that may take its place.
pub(crate) struct Links<C: Connection> {
    pub(crate) status: Status<C>,
    /// What is read over it may be asked for already: it is the next one if it is sooner.
    pub(crate) candidate: Option<Arc<Link<C>>>,
}

impl<C: Connection> Links<C> {
    pub(crate) fn none() -> Self {
        Self { status: Status::Down, candidate: None }
    }

    /// True if `link` is the connection.
    pub(crate) fn is_up(&self, link: &Arc<Link<C>>) -> bool {
        matches!(&self.status, Status::Up(now) if Arc::ptr_eq(now, link))
    }
}

/// Waits for a connection. Cancellation-safe.
pub(crate) async fn up<C: Connection>(links: &mut watch::Receiver<Links<C>>) -> Result<Arc<Link<C>>, ClientError> {
    loop {
        match links.borrow_and_update().status.clone() {
            Status::Up(link) => return Ok(link),
            Status::Failed(error) => return Err(error),
            Status::Down => {}
        }
        if links.changed().await.is_err() {
            return Err(ClientError::Closed);
        }
    }
}

/// What the application knows of its network and of who looks at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Nudge {
    NetworkChanged,
    Foreground,
    Background,
}

/// What became of the path.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PathEvent {
    /// There is a connection.
    Connected,
    /// There is none any more; another one is being made.
    Lost,
    /// The connection goes on over another path: nothing was lost, and nothing must be done.
    PathChanged,
    /// Another connection took the place of the one that there was, which was not heard any more: subscriptions resume on it.
    Moved,
    /// There is no connection, and this is why, as far as it could be found out: what was tried, and what came of it. Told within three
    /// seconds. It is tried further for as long as the configuration says.
    Unreachable(ClientError),
}

/// What the task that keeps the connection shares with the client.
pub(crate) struct Supervised<C: Connection> {
    pub(crate) config: Arc<Config>,
    pub(crate) tokens: Arc<Tokens>,
    pub(crate) links: watch::Sender<Links<C>>,
    /// True while there is a connection over which the server has greeted.
    pub(crate) connected: watch::Sender<bool>,
    /// How often each path event has happened.
    pub(crate) paths: watch::Sender<Paths>,
    /// Why nothing answers, once that was looked into.
    pub(crate) trouble: watch::Sender<Option<ClientError>>,
    pub(crate) finish: watch::Sender<bool>,
    pub(crate) nudges: mpsc::Receiver<Nudge>,
}

/// Counts of what became of the path, since the client was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Paths {
    /// Connections that were used.
    pub connections: u64,
    /// Of these, the ones whose early data was taken: they cost no round trip.
    pub early: u64,
    /// Changes of path that a connection outlived.
    pub changes: u64,
    /// Times that another connection took the place of one that lived.
    pub moves: u64,
    /// Times that the connection was lost.
    pub losses: u64,
}

impl Paths {
    /// What happened since `seen`, one event at a time.
    pub(crate) fn news(&self, seen: &mut Self) -> Option<PathEvent> {
        let newer = |seen: &mut u64, now: u64| core::mem::replace(seen, now) != now;
        if newer(&mut seen.changes, self.changes) {
            return Some(PathEvent::PathChanged);
        }
        if newer(&mut seen.losses, self.losses) {
            return Some(PathEvent::Lost);
        }
        if newer(&mut seen.moves, self.moves) {
            seen.connections = self.connections;
            return Some(PathEvent::Moved);
        }
        newer(&mut seen.connections, self.connections).then_some(PathEvent::Connected)
    }
}

/// How long a client that closes waits for the server to be told.
const FAREWELL: Duration = Duration::from_millis(200);
/// How long a connection that is not used waits for the tickets of its handshake.
const LINGER: Duration = Duration::from_secs(1);
/// How long a server that can be reached may take to judge a token.
const JUDGE: Duration = Duration::from_secs(5);
/// Without a connection for so long it is found out why: so that it can be said within three seconds.
const DIAGNOSE: Duration = Duration::from_secs(2);
/// A path that is in doubt for so long is told of as lost, although the connection may go on later.
const DOUBTED: Duration = Duration::from_secs(3);
/// Milliseconds for which a server may keep its clients waiting, at most.
const MAX_SPREAD: u64 = 60_000;
/// What a new path is begun with: a server that has not validated it says three datagrams first, and a few more may follow where these are
/// lost. Less than another handshake.
const PADDING: &[u8] = &[0; 3000];
/// How often it is looked whether a path in doubt works.
const LOOK: Duration = Duration::from_millis(10);

/// What a second connection tells.
enum Told<C: Connection> {
    /// It can be asked for what may be asked early.
    Made(Arc<Link<C>>),
    /// The server has answered.
    Ready { early: bool },
    /// It came to nothing.
    Failed(ConnectionError),
}

/// Presents the token that the application wants, if no server has judged it. Nothing is asked before its verdict: what the
/// token before allows may be less, and a bad one must not refuse what that allows.
async fn present_wanted<C: Connection>(link: &Link<C>, tokens: &Tokens) {
    while let Some(token) = tokens.wanted() {
        match link.present(token).await {
            Ok(_) => {}
            // The connection is lost.
            Err(_) => return,
        }
    }
}

/// Makes a connection.
async fn challenge<T: Connector>(
    connector: Arc<T>,
    hopeful: bool,
    config: Arc<Config>,
    tokens: Arc<Tokens>,
    tell: mpsc::Sender<Told<T::Connection>>,
) {
    let attempt = async {
        tokens.refresh(config.renewal.as_ref()).await;
        let transport = connector.connect(hopeful).await?;
        let mut unused = Unused(Some(transport.clone()));
        let mut early = !transport.is_confirmed();
        let mut link = Link::start(transport.clone(), &config, &tokens, early).await?;
        let judged = tokens.wanted().is_none();
        if judged && tell.send(Told::Made(link.clone())).await.is_ok() {
            unused.0 = None;
        }
        if !transport.confirmed().await? {
            // What was sent early never arrived.
            early = false;
            link = Link::start(transport, &config, &tokens, false).await?;
        }
        let presented = tokio::time::timeout(JUDGE, present_wanted(&link, &tokens));
        presented.await.map_err(|_| ConnectionError::TimedOut)?;
        if tell.send(Told::Made(link)).await.is_ok() {
            unused.0 = None;
        }
        Ok(early)
    };
    let told = match attempt.await {
        Ok(early) => Told::Ready { early },
        Err(error) => Told::Failed(error),
    };
    // Whoever asked may have given it up.
    let _ = tell.send(told).await;
}

/// Closes a connection that nobody was told of.
struct Unused<C: Connection>(Option<C>);

impl<C: Connection> Drop for Unused<C> {
    fn drop(&mut self) {
        if let Some(transport) = &self.0 {
            transport.close(Code::GOING_AWAY.0, "another connection goes on");
        }
    }
}

/// The second connection, while there is one.
struct Challenger<C: Connection> {
    /// Ends with this.
    _task: JoinSet<()>,
    told: mpsc::Receiver<Told<C>>,
    link: Option<Arc<Link<C>>>,
    /// The server has answered on it.
    ready: bool,
}

impl<C: Connection> Challenger<C> {
    /// What it tells next. Cancellation-safe.
    async fn next(&mut self) -> Told<C> {
        match &self.link {
            // It waits for the moment in which it is wanted.
            Some(link) if self.ready => Told::Failed(link.transport.closed().await),
            _ => self
                .told
                .recv()
                .await
                .unwrap_or_else(|| Told::Failed(ConnectionError::Failed("the attempt ended".into()))),
        }
    }

    /// The server is told that this one is not used: a little later, when it has given what the next attempt can use in its place.
    fn withdraw(mut self) {
        while let Ok(told) = self.told.try_recv() {
            if let Told::Made(link) = told {
                self.link = Some(link);
            }
        }
        let Some(link) = self.link else { return };
        tokio::spawn(async move {
            let confirmed = tokio::time::timeout(LINGER, link.transport.confirmed()).await;
            if matches!(confirmed, Ok(Ok(_))) {
                tokio::time::sleep((2 * link.transport.rtt()).min(LINGER)).await;
            }
            link.transport.close(Code::GOING_AWAY.0, "another connection goes on");
        });
    }
}

struct Supervisor<T: Connector> {
    connector: Arc<T>,
    shared: Supervised<T::Connection>,
    roaming: Roaming,
    begun: Instant,
    current: Option<Arc<Link<T::Connection>>>,
    challenger: Option<Challenger<T::Connection>>,
    /// Since when there is no connection, and the last reason.
    down_since: Instant,
    last: ConnectionError,
    /// The path of the current connection was changed and nothing was heard since.
    rebound: bool,
    early: bool,
    /// The server has greeted on the current connection.
    greeted: bool,
    diagnosis: JoinSet<ConnectionError>,
    diagnosed: bool,
}

/// Makes the connection, and keeps it until the client is closed or gives up.
pub(crate) async fn supervise<T: Connector>(
    connector: T,
    shared: Supervised<T::Connection>,
    mut stopping: watch::Receiver<bool>,
) {
    let begun = Instant::now();
    let manners = shared.config.manners();
    let mut this = Supervisor {
        connector: Arc::new(connector),
        shared,
        roaming: Roaming::new(manners, Duration::ZERO),
        begun,
        current: None,
        challenger: None,
        down_since: begun,
        last: ConnectionError::TimedOut,
        rebound: false,
        early: false,
        greeted: false,
        diagnosis: JoinSet::new(),
        diagnosed: false,
    };
    let failed = loop {
        // Nobody listens any more, or somebody said stop.
        if this.shared.links.is_closed() || stopping.has_changed().is_err() || *stopping.borrow() {
            break ClientError::Closed;
        }
        if let Some(failed) = this.given_up() {
            break failed;
        }
        this.act();
        this.tell_connected();
        this.wait(&mut stopping).await;
    };
    this.shared.links.send_replace(Links { status: Status::Failed(failed.clone()), candidate: None });
    if let Some(challenger) = this.challenger.take() {
        challenger.withdraw();
    }
    if let Some(link) = this.current.take() {
        let told = this.connector.farewell(&link.transport, Code::NO_ERROR.0, "the client closed");
        let _ = tokio::time::timeout(FAREWELL, told).await;
    }
    this.shared.connected.send_replace(false);
    this.shared.finish.send_replace(true);
}

impl<T: Connector> Supervisor<T> {
    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    fn facts(&self) -> PathFacts {
        self.current.as_ref().map_or_else(PathFacts::default, |link| link.facts())
    }

    /// Why no further attempt is made, if none is.
    fn given_up(&self) -> Option<ClientError> {
        let without = match &self.current {
            Some(_) => self.roaming.doubted_for(self.now())?,
            None => self.down_since.elapsed(),
        };
        let late = self.shared.config.give_up_after.is_some_and(|limit| without >= limit);
        let hopeless = self.current.is_none() && matches!(self.last, ConnectionError::Untrusted(_));
        (late || hopeless).then(|| self.unreachable(self.last.clone()))
    }

    fn unreachable(&self, last: ConnectionError) -> ClientError {
        ClientError::Unreachable { target: self.connector.target(), last }
    }

    fn count(&self, count: impl FnOnce(&mut Paths)) {
        self.shared.paths.send_modify(count);
    }

    /// Does what is to be done now.
    fn act(&mut self) {
        loop {
            let (now, facts) = (self.now(), self.facts());
            let doubted = self.roaming.in_doubt();
            let step = self.roaming.step(now, &facts, entropy::random());
            if doubted && !self.roaming.in_doubt() && self.rebound && !matches!(step, Some(RoamingStep::Move)) {
                tracing::info!("the connection goes on over another path");
                self.count(|paths| paths.changes += 1);
                self.rebound = false;
            }
            match step {
                Some(RoamingStep::Ask(nonce)) => self.current.iter().for_each(|link| link.ask(nonce, &[])),
                Some(RoamingStep::Rebind { nonce, amply }) => {
                    if let Some(link) = &self.current {
                        match link.transport.rebind() {
                            Ok(()) => self.rebound = true,
                            Err(error) => tracing::debug!(%error, "the path stays"),
                        }
                        link.ask(nonce, if amply { PADDING } else { &[] });
                    }
                }
                Some(RoamingStep::Challenge { hopeful }) => self.challenge(hopeful),
                Some(RoamingStep::Withdraw) => self.withdraw(),
                Some(RoamingStep::Move) => self.take_over(),
                None => return,
            }
        }
    }

    /// Says whether there is a connection: one whose path stays in doubt is none to whoever follows it.
    fn tell_connected(&mut self) {
        let doubted = self.roaming.doubted_for(self.now()).is_some_and(|doubted| doubted >= DOUBTED);
        let (there, greeted) = (self.current.is_some() && !doubted, self.greeted);
        // One that takes the place of another goes on as connected before its server has greeted.
        self.shared.connected.send_if_modified(|connected| {
            let now = there && (greeted || *connected);
            core::mem::replace(connected, now) != now
        });
    }

    fn challenge(&mut self, hopeful: bool) {
        // What is made, and that it is ready.
        let (tell, told) = mpsc::channel(4);
        let mut task = JoinSet::new();
        let (config, tokens) = (self.shared.config.clone(), self.shared.tokens.clone());
        task.spawn(challenge(self.connector.clone(), hopeful, config, tokens, tell));
        self.challenger = Some(Challenger { _task: task, told, link: None, ready: false });
    }

    fn withdraw(&mut self) {
        self.shared.links.send_modify(|links| links.candidate = None);
        if let Some(challenger) = self.challenger.take() {
            challenger.withdraw();
        }
    }

    /// The second connection is the one from now on.
    fn take_over(&mut self) {
        let Some(link) = self.challenger.take().and_then(|challenger| challenger.link) else { return };
        let before = self.current.replace(link.clone());
        self.shared.links.send_replace(Links { status: Status::Up(link.clone()), candidate: None });
        self.greeted = false;
        self.rebound = false;
        let early = self.early;
        self.count(|paths| {
            paths.connections += 1;
            paths.early += u64::from(early);
            paths.moves += u64::from(before.is_some());
        });
        if let Some(before) = before {
            tracing::info!("another connection takes the place of one that is not heard any more");
            before.transport.close(Code::GOING_AWAY.0, "another connection takes its place");
        }
        if let Some(token) = self.shared.tokens.wanted() {
            // Given after the connection had looked and before anybody could see it.
            drop(link.present(token));
        }
    }

    /// The current connection has ended.
    fn lost(&mut self, lost: ConnectionError) {
        tracing::info!(%lost, "connection lost");
        // Said by the server or a process in its place: it can be reached.
        let hopeful = matches!(lost, ConnectionError::Closed { .. } | ConnectionError::Reset);
        let greeted = core::mem::take(&mut self.greeted);
        if let (Some(link), ConnectionError::Closed { code, reason }) = (&self.current, &lost)
            && *code == Code::GOING_AWAY.0
            && link.goaway().is_none()
            && let Some(told) = moved_to(reason)
        {
            // Its GOAWAY was not read before the connection was closed.
            self.sent_on(link, told);
        }
        self.current = None;
        self.rebound = false;
        if greeted {
            let doubted = self.roaming.doubted_for(self.now()).unwrap_or_default();
            (self.down_since, self.diagnosed) = (Instant::now() - doubted, false);
        }
        self.last = lost;
        self.count(|paths| paths.losses += 1);
        self.shared.links.send_modify(|links| links.status = Status::Down);
        // A server that takes connections and ends them at once is not asked in a loop.
        self.roaming.lost(self.now(), hopeful && greeted, entropy::random());
    }

    fn told(&mut self, told: Told<T::Connection>) {
        match told {
            Told::Made(link) => {
                if let Some(challenger) = &mut self.challenger {
                    challenger.link = Some(link.clone());
                    self.shared.links.send_modify(|links| links.candidate = Some(link));
                }
            }
            Told::Ready { early } => {
                self.early = early;
                if let Some(challenger) = &mut self.challenger {
                    challenger.ready = true;
                }
                self.roaming.ready();
            }
            Told::Failed(error) => {
                tracing::debug!(%error, "an attempt to connect failed");
                if self.current.is_none() {
                    self.last = error;
                }
                self.withdraw();
                self.roaming.failed(self.now(), entropy::random());
            }
        }
    }

    /// Waits until there may be something to do.
    async fn wait(&mut self, stopping: &mut watch::Receiver<bool>) {
        let facts = self.facts();
        let now = self.now();
        let mut due = self.roaming.due(&facts).map(|due| due.max(now));
        if self.roaming.listens(now, facts.rtt) {
            // What comes over the path wakes nobody, but for the answer to a question.
            due = Some(due.map_or(now + LOOK, |due| due.min(now + LOOK)));
        }
        if self.current.is_none() {
            let late = self.shared.config.give_up_after.map(|limit| self.down_since + limit);
            let diagnose = (!self.diagnosed).then_some(self.down_since + DIAGNOSE);
            for at in [late, diagnose].into_iter().flatten() {
                let at = at.saturating_duration_since(self.begun).max(now);
                due = Some(due.map_or(at, |due| due.min(at)));
            }
            if !self.diagnosed && self.down_since.elapsed() >= DIAGNOSE {
                self.diagnosed = true;
                let connector = self.connector.clone();
                self.diagnosis.spawn(async move { connector.diagnose().await });
            }
        }
        let sleep = tokio::time::sleep_until(self.begun + due.unwrap_or(FOREVER));
        let current = self.current.clone();
        let stirred = async {
            match &current {
                Some(link) => link.stirred().await,
                None => core::future::pending().await,
            }
        };
        let unknown = !self.greeted;
        let greeted = async {
            match &current {
                Some(link) if unknown && link.server().await.is_some() => {}
                _ => core::future::pending().await,
            }
        };
        let closed = async {
            match &current {
                Some(link) => link.transport.closed().await,
                None => core::future::pending().await,
            }
        };
        let told = async {
            match &mut self.challenger {
                Some(challenger) => challenger.next().await,
                None => core::future::pending().await,
            }
        };
        tokio::select! {
            // What was told before the end counts.
            biased;
            _ = stopping.wait_for(|stop| *stop) => {}
            () = greeted => {
                self.greeted = true;
                self.shared.trouble.send_replace(None);
            }
            lost = closed => self.lost(lost),
            told = told => self.told(told),
            Some(nudge) = self.shared.nudges.recv() => self.nudged(nudge),
            () = self.connector.network_changed() => {
                tracing::info!("the network changed");
                self.roaming.network_changed(self.now());
            }
            Some(Ok(error)) = self.diagnosis.join_next() => if self.current.is_none() {
                let trouble = self.unreachable(error.clone());
                tracing::debug!(%trouble, "nothing answers");
                self.last = error;
                self.shared.trouble.send_replace(Some(trouble));
            },
            () = stirred => self.stirred(),
            () = sleep => {}
        }
    }

    /// The server of `link` says where the process is that takes its place.
    fn sent_on(&self, link: &Link<T::Connection>, told: SocketAddr) {
        if let Some(address) = sent_on_to(link.transport.remote().parse().ok(), told) {
            self.connector.redirect(address);
        }
    }

    fn stirred(&mut self) {
        let Some(link) = &self.current else { return };
        if let Some(going) = link.goaway().filter(|_| !self.roaming.is_leaving()) {
            if let Some(told) = going.address {
                self.sent_on(link, told);
            }
            let spread = Duration::from_millis(going.spread.min(MAX_SPREAD)).mul_f64(entropy::random());
            self.roaming.going_away(self.now(), spread, entropy::random());
        }
    }

    fn nudged(&mut self, nudge: Nudge) {
        let now = self.now();
        match nudge {
            Nudge::NetworkChanged => self.roaming.network_changed(now),
            Nudge::Foreground => {
                self.roaming.set_manners(self.shared.config.manners());
                self.roaming.woken(now);
            }
            Nudge::Background => {
                self.roaming.set_manners(Manners::background(self.shared.config.background_keep_alive));
            }
        }
    }
}

/// Nothing to do for now.
const FOREVER: Duration = Duration::from_secs(3600);

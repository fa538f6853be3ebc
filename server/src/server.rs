//! The server as a whole: accepts connections, and stops in good order.

use core::time::Duration;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use mainstay_protocol::error::Code;
use mainstay_protocol::session::moved_reason;
use mainstay_protocol::wire::{Detail, Frame, GoAway};
use mainstay_store::Store;
use mainstay_transport::{Listener, entropy};
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::apart::Apart;
use crate::auth::{AuthError, Trust, Verified};
use crate::config::Config;
use crate::connection;
use crate::load::{Load, Work};
use crate::metrics::ServerMetrics;
use crate::namespace::{Namespace, Space};
use crate::owner::Command;
use crate::resume::ResumeKeys;
use crate::status::{Connections, Status};

/// What all connections share.
pub(crate) struct Shared {
    config: Config,
    pub(crate) spaces: Vec<Arc<Space>>,
    clock: fn() -> u64,
    pub(crate) load: Arc<Load>,
    pub(crate) connections: Connections,
    goaway: watch::Sender<Option<Frame>>,
    /// Attachments that may still have something to say.
    attachments: watch::Sender<usize>,
}

impl Shared {
    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// Verifies a token at `now`, for a namespace if it is known, else for the first one that believes its key.
    ///
    /// Errors: `TOKEN_INVALID`, `TOKEN_EXPIRED`, `TOKEN_REVOKED`.
    pub(crate) fn verify(
        &self,
        space: Option<&Arc<Space>>,
        token: &[u8],
        now: i64,
    ) -> Result<(&Arc<Space>, Verified), AuthError> {
        let mut refused = None;
        for one in &self.spaces {
            match one.trust.anchors().verify(token, now) {
                Ok(verified) if space.is_none_or(|space| Arc::ptr_eq(space, one)) => return Ok((one, verified)),
                Ok(_) => return Err(AuthError::invalid("the token is for another namespace than the connection")),
                // What the first namespace says that knows its key counts: what is revoked there is believed nowhere else.
                Err(error) if error.code != Code::TOKEN_INVALID => {
                    refused = Some(error);
                    break;
                }
                Err(error) => drop(refused.get_or_insert(error)),
            }
        }
        let refused = refused.unwrap_or_else(|| AuthError::invalid("no namespace is served"));
        if let Some(space) = space.or(self.spaces.first()) {
            space.sessions.metrics.token(refused.code);
        }
        Err(refused)
    }

    pub(crate) fn now_seconds(&self) -> i64 {
        ((self.clock)() / 1000) as i64
    }

    pub(crate) fn goaway(&self) -> watch::Receiver<Option<Frame>> {
        self.goaway.subscribe()
    }

    /// An attachment more.
    pub(crate) fn attached(&self) {
        self.attachments.send_modify(|count| *count += 1);
    }

    /// One less: its last answer was received, or nobody is there to receive it.
    pub(crate) fn detached(&self) {
        self.attachments.send_modify(|count| *count -= 1);
    }
}

/// Milliseconds since the Unix epoch; a clock before it reads 0.
fn wall_clock() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// How a server stops.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stop {
    /// Where the process that takes its place listens, if that is elsewhere.
    pub address: Option<SocketAddr>,
    /// Another process waits for the place: clients that miss the goodbye learn of it from that one, so it is not waited for.
    pub succeeded: bool,
}

impl Stop {
    /// For a process that takes the place, and listens at `address` if that is elsewhere.
    pub fn for_successor(address: Option<SocketAddr>) -> Self {
        Self { address, succeeded: true }
    }
}

/// A Mainstay server over one store.
///
/// ```no_run
/// # async fn example(listener: mainstay_transport::quic::QuicListener, keys: mainstay_server::auth::Keyring) -> Result<(), String> {
/// use std::sync::Arc;
/// use mainstay_server::{Config, ResumeKeys, Server};
///
/// let store = Arc::new(mainstay_store::MemoryStore::new());
/// let server = Server::new(store, keys, ResumeKeys::generate()?, Config::default());
/// server.serve(listener, std::future::pending()).await;
/// # Ok(())
/// # }
/// ```
pub struct Server {
    shared: Arc<Shared>,
    metrics: Arc<ServerMetrics>,
    /// Bytes of memory in use.
    memory: Option<fn() -> Option<usize>>,
}

impl Server {
    /// A server of the sessions in `store` for the holders of tokens that `trust` believes. What `resume` sealed it opens, also in another
    /// process.
    pub fn new(store: Arc<dyn Store>, trust: impl Into<Trust>, resume: ResumeKeys, config: Config) -> Self {
        let (trust, quotas) = (trust.into(), config.quotas.clone());
        Self::with_namespaces(vec![Namespace { name: "default".into(), store, trust, resume, quotas }], config)
    }

    /// A server of several namespaces, each with sessions, tokens and quotas of its own; of `config` the quotas are not used.
    pub fn with_namespaces(namespaces: Vec<Namespace>, config: Config) -> Self {
        Self::with_clock(namespaces, config, wall_clock)
    }

    /// The same, which reads the time off `clock`: milliseconds since the Unix epoch. It may jump, as clocks of machines do.
    pub fn with_clock(namespaces: Vec<Namespace>, config: Config, clock: fn() -> u64) -> Self {
        let metrics = Arc::new(ServerMetrics::default());
        let apart = Arc::new(Apart::new());
        let space = |one| Arc::new(Space::new(one, &config, clock, apart.clone()));
        let spaces = namespaces.into_iter().map(space).collect();
        let shared = Shared {
            config,
            spaces,
            clock,
            load: Arc::new(Load::new(metrics.clone())),
            connections: Connections::default(),
            goaway: watch::channel(None).0,
            attachments: watch::channel(0).0,
        };
        Self { shared: Arc::new(shared), metrics, memory: None }
    }

    /// Reads the memory in use off `memory`, in bytes, so that load is shed before [`Config::memory`] is reached.
    #[must_use]
    pub fn measuring(mut self, memory: fn() -> Option<usize>) -> Self {
        self.memory = Some(memory);
        self
    }

    /// Makes what it counts part of what `registry` shows.
    pub fn register(&self, registry: &mut Registry) {
        self.metrics.register(registry);
        for space in &self.shared.spaces {
            space.sessions.metrics.register(registry, &space.name);
        }
    }

    /// What it is doing now; more than `most` sessions and connections are only counted.
    pub fn status(&self, most: usize) -> Status {
        Status::of(&self.shared.spaces, &self.shared.connections, &self.shared.load, most)
    }

    /// Serves the connections of `listener` until `stop` is ready, then stops in good order: GOAWAY to every client, no new
    /// connections, everything accepted is committed and answered, then the connections are closed with `GOING_AWAY`.
    pub async fn serve<L: Listener>(&self, listener: L, stop: impl Future<Output = Stop>) {
        let mut connections = JoinSet::new();
        tokio::pin!(stop);
        // What is done for each namespace as long as it is served.
        let mut chores = JoinSet::new();
        for space in &self.shared.spaces {
            let (expiring, waking, counting) = (space.sessions.clone(), space.sessions.clone(), space.clone());
            chores.spawn(async move { expiring.expire().await });
            chores.spawn(async move { waking.wake().await });
            chores.spawn(async move { counting.count().await });
        }
        let load = self.shared.load.clone();
        let memory = self.memory.zip(self.shared.config.memory);
        let watching = load.watch(memory);
        tokio::pin!(watching);
        let stop = loop {
            let room = connections.len() < self.shared.config.connections && load.takes(Work::Connection);
            listener.admit(room);
            tokio::select! {
                stop = &mut stop => break stop,
                () = &mut watching => {}
                Some(_) = connections.join_next() => {
                    self.metrics.connections.set(connections.len() as i64);
                }
                connection = listener.accept() => match connection {
                    Some(connection) => {
                        let id = entropy::unique();
                        connections.spawn(connection::run(connection, self.shared.clone(), id));
                        self.metrics.accepted.inc();
                        self.metrics.connections.set(connections.len() as i64);
                    }
                    None => break Stop::default(),
                },
                () = load.changed() => {}
            }
        };
        drop(chores);
        listener.admit(false);
        let deadline = tokio::time::Instant::now() + GRACE;
        // Before anyone is told: who comes back on the same connection must find that it stops.
        self.shared.spaces.iter().for_each(|space| space.sessions.stop());
        let frame = GoAway {
            deadline: GRACE.as_millis() as u64,
            spread: (connections.len() as u64).min(MAX_SPREAD) * SPREAD,
            detail: Detail::new("the server stops"),
            address: stop.address,
        };
        self.shared.goaway.send_replace(Some(frame.into()));
        self.commit_all(deadline).await;
        // Closing a connection throws away what is still on its way.
        let mut attachments = self.shared.attachments.subscribe();
        let until = deadline.min(tokio::time::Instant::now() + LAST_WORDS);
        let _ = tokio::time::timeout_at(until, attachments.wait_for(|count| *count == 0)).await;
        let patience = if stop.succeeded { SUCCEEDED } else { LAST_WORDS };
        listener.close(Code::GOING_AWAY.0, &moved_reason(stop.address), patience).await;
        // They end because they are closed; whatever does not is ended.
        let ended = async { while connections.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(LAST_WORDS, ended).await;
        connections.shutdown().await;
    }

    /// Lets every session commit and answer what it accepted, until the deadline.
    async fn commit_all(&self, deadline: tokio::time::Instant) {
        // At once, so that one whose store does not answer takes no time from the others.
        let mut all = JoinSet::new();
        for space in self.shared.spaces.clone() {
            all.spawn(async move { Self::commit_all_of(&space, deadline).await });
        }
        while all.join_next().await.is_some() {}
    }

    async fn commit_all_of(space: &Space, deadline: tokio::time::Instant) {
        let sessions = &space.sessions;
        loop {
            let left = sessions.left.notified();
            let (hot, loading) = sessions.all();
            if hot.is_empty() && loading == 0 {
                // Snapshots are written behind that.
                if tokio::time::timeout_at(deadline, sessions.ended()).await.is_err() {
                    tracing::warn!("the store did not take the last snapshots in time; the next start reads more");
                }
                return;
            }
            for session in hot {
                // One that has ended is about to leave.
                let _ = session.commands.try_send(Command::Stop);
            }
            let turn = tokio::time::Instant::now() + Duration::from_millis(20);
            let _ = tokio::time::timeout_at(turn.min(deadline), left).await;
            if tokio::time::Instant::now() >= deadline {
                tracing::warn!(
                    "sessions did not come to rest in time; what they had not answered is unknown to clients"
                );
                return;
            }
        }
    }
}

/// Milliseconds over which clients spread their return for each connection: about what its handshake costs the next process.
const SPREAD: u64 = 1;
/// Connections that are counted for that: nobody is kept waiting for more than 5 s.
const MAX_SPREAD: u64 = 5000;
/// How long the goodbye of a server whose place is waited for may take.
const SUCCEEDED: Duration = Duration::from_millis(50);
/// How long the last answers may be on their way after everything was committed: a client that is gone does not hold up the stop.
pub(crate) const LAST_WORDS: Duration = Duration::from_secs(1);
/// After how long at the latest a server that stops closes its connections, last answers included (spec CONN-10).
const GRACE: Duration = Duration::from_secs(5);

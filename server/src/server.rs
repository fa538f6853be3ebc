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
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use crate::auth::Keyring;
use crate::config::Config;
use crate::connection;
use crate::owner::Command;
use crate::resume::ResumeKeys;
use crate::sessions::Sessions;

/// What all connections share.
pub(crate) struct Shared {
    sessions: Arc<Sessions>,
    keyring: Keyring,
    ingest: Arc<Semaphore>,
    goaway: watch::Sender<Option<Frame>>,
    /// Attachments that may still have something to say.
    attachments: watch::Sender<usize>,
}

impl Shared {
    pub(crate) fn config(&self) -> &Config {
        &self.sessions.config
    }

    pub(crate) fn sessions(&self) -> &Arc<Sessions> {
        &self.sessions
    }

    pub(crate) fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    pub(crate) fn now_seconds(&self) -> i64 {
        ((self.sessions.clock)() / 1000) as i64
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

    /// Room for `bytes` of batches; waits until there is. Given back when the permit is dropped.
    pub(crate) async fn ingest(&self, bytes: usize) -> OwnedSemaphorePermit {
        let most = self.config().ingest_budget;
        let bytes = u32::try_from(bytes.min(most)).unwrap_or(u32::MAX);
        match self.ingest.clone().acquire_many_owned(bytes).await {
            Ok(permit) => permit,
            Err(_) => unreachable!("the semaphore is never closed"),
        }
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
}

impl Server {
    /// A server of the sessions in `store` for the holders of tokens that `keyring` verifies. What `resume` sealed it opens, also in another
    /// process.
    pub fn new(store: Arc<dyn Store>, keyring: Keyring, resume: ResumeKeys, config: Config) -> Self {
        Self::with_clock(store, keyring, resume, config, wall_clock)
    }

    /// The same, which reads the time off `clock`: milliseconds since the Unix epoch. It may jump, as clocks of machines do.
    pub fn with_clock(
        store: Arc<dyn Store>,
        keyring: Keyring,
        resume: ResumeKeys,
        config: Config,
        clock: fn() -> u64,
    ) -> Self {
        let ingest = Arc::new(Semaphore::new(config.ingest_budget));
        let sessions = Arc::new(Sessions::new(store, resume, config, clock));
        Self {
            shared: Arc::new(Shared {
                sessions,
                keyring,
                ingest,
                goaway: watch::channel(None).0,
                attachments: watch::channel(0).0,
            }),
        }
    }

    /// Serves the connections of `listener` until `stop` is ready, then stops in good order: GOAWAY to every client, no new
    /// connections, everything accepted is committed and answered, then the connections are closed with `GOING_AWAY`.
    pub async fn serve<L: Listener>(&self, listener: L, stop: impl Future<Output = Stop>) {
        let mut connections = JoinSet::new();
        tokio::pin!(stop);
        let expiring = self.shared.sessions.expire();
        let waking = self.shared.sessions.wake();
        tokio::pin!(expiring, waking);
        let stop = loop {
            tokio::select! {
                stop = &mut stop => break stop,
                () = &mut expiring => {}
                () = &mut waking => {}
                Some(_) = connections.join_next() => {}
                connection = listener.accept() => match connection {
                    Some(connection) => {
                        let id = entropy::unique();
                        connections.spawn(connection::run(connection, self.shared.clone(), id));
                    }
                    None => break Stop::default(),
                },
            }
        };
        listener.refuse_new();
        let deadline = tokio::time::Instant::now() + GRACE;
        // Before anyone is told: who comes back on the same connection must find that it stops.
        self.shared.sessions.stop();
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
        let sessions = &self.shared.sessions;
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

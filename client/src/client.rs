//! The client as a whole: keeps a connection, and makes sessions on it.

use core::future::Future;
use core::pin::Pin;
use core::time::Duration;
use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::registry::{ALPN, MAX_FRAME, MAX_LISTED};
use mainstay_protocol::session::{Backoff, SessionName};
use mainstay_protocol::wire::{Frame, List, ListedSession};
use mainstay_transport::quic::QuicConnector;
use mainstay_transport::{Connection, ConnectionError, Connector, FrameReader, SendStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::config::{Config, ConnectFile};
use crate::driver::{Driver, SessionCommand};
use crate::error::ClientError;
use crate::jobs::{self, Jobs};
use crate::link::Link;
use crate::session::Attaching;
use crate::tokens::{Judged, Tokens};

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

/// Waits for a connection. Cancellation-safe.
pub(crate) async fn up<C: Connection>(status: &mut watch::Receiver<Status<C>>) -> Result<Arc<Link<C>>, ClientError> {
    loop {
        match status.borrow_and_update().clone() {
            Status::Up(link) => return Ok(link),
            Status::Failed(error) => return Err(error),
            Status::Down => {}
        }
        if status.changed().await.is_err() {
            return Err(ClientError::Closed);
        }
    }
}

pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What handles need of a connection, whatever its transport.
pub(crate) trait Core: Send + Sync {
    /// Starts the driver of a session.
    fn drive(
        &self,
        session: Attaching,
        commands: mpsc::Receiver<SessionCommand>,
        again: mpsc::WeakSender<SessionCommand>,
    );
    /// Waits for a connection.
    fn connected(&self) -> BoxFuture<'_, Result<(), ClientError>>;
    /// One page of sessions and where the next starts.
    fn list(&self, request: List) -> BoxFuture<'_, Result<(Vec<ListedSession>, Bytes), ClientError>>;
    /// Takes jobs.
    fn jobs(&self, prefix: &str, limit: usize) -> Jobs;
    /// Uses another token from now on.
    fn renew(&self, token: String) -> BoxFuture<'_, Result<(), ClientError>>;
    /// The configuration.
    fn config(&self) -> &Arc<Config>;
    /// True while there is a connection.
    fn connection(&self) -> watch::Receiver<bool>;
    /// Closes the connection for good.
    fn close(&self);
    /// Waits until it is closed.
    fn closed(&self) -> BoxFuture<'_, ()>;
}

struct Wired<C: Connection> {
    status: watch::Receiver<Status<C>>,
    config: Arc<Config>,
    connected: watch::Receiver<bool>,
    stop: watch::Sender<bool>,
    /// True once nothing of the connection is left.
    finished: watch::Receiver<bool>,
    tokens: Arc<Tokens>,
}

impl<C: Connection> Core for Wired<C> {
    fn drive(
        &self,
        session: Attaching,
        commands: mpsc::Receiver<SessionCommand>,
        again: mpsc::WeakSender<SessionCommand>,
    ) {
        tokio::spawn(Driver::new(self.status.clone(), session, commands, again, self.config.give_up_after).run());
    }

    fn connected(&self) -> BoxFuture<'_, Result<(), ClientError>> {
        let mut status = self.status.clone();
        Box::pin(async move {
            let link = up(&mut status).await?;
            link.server().await.map(drop).ok_or(ClientError::Closed)
        })
    }

    fn list(&self, request: List) -> BoxFuture<'_, Result<(Vec<ListedSession>, Bytes), ClientError>> {
        let mut status = self.status.clone();
        Box::pin(async move {
            loop {
                let link = up(&mut status).await?;
                if let Some(answer) = list(&link, request.clone()).await {
                    return answer;
                }
                // The connection was lost before the answer came; asking again changes nothing.
                if status.changed().await.is_err() {
                    return Err(ClientError::Closed);
                }
            }
        })
    }

    fn jobs(&self, prefix: &str, limit: usize) -> Jobs {
        jobs::start(self.status.clone(), prefix, limit)
    }

    fn renew(&self, token: String) -> BoxFuture<'_, Result<(), ClientError>> {
        self.tokens.want(token.clone());
        let mut status = self.status.clone();
        Box::pin(async move {
            let link = match &*status.borrow() {
                Status::Up(link) => link.clone(),
                Status::Down => return Ok(()),
                Status::Failed(error) => return Err(error.clone()),
            };
            if let Ok(answer) = link.present(token.clone()).await {
                return answer;
            }
            // The connection was lost first. The next one presents it before it is used.
            let same = |status: &Status<C>| matches!(status, Status::Up(now) if Arc::ptr_eq(now, &link));
            let _ = status.wait_for(|status| !same(status)).await;
            loop {
                let link = up(&mut status).await?;
                match self.tokens.judged(&token) {
                    Judged::Taken => return Ok(()),
                    Judged::Refused(error) => return Err(error),
                    // Lost again before the server could say.
                    Judged::Open => {
                        let same = |status: &Status<C>| matches!(status, Status::Up(now) if Arc::ptr_eq(now, &link));
                        let _ = status.wait_for(|status| !same(status)).await;
                    }
                }
            }
        })
    }

    fn config(&self) -> &Arc<Config> {
        &self.config
    }

    fn connection(&self) -> watch::Receiver<bool> {
        let mut connected = self.connected.clone();
        connected.mark_unchanged();
        connected
    }

    fn close(&self) {
        self.stop.send_replace(true);
    }

    fn closed(&self) -> BoxFuture<'_, ()> {
        let mut finished = self.finished.clone();
        Box::pin(async move {
            // The other end of it says so too.
            let _ = finished.wait_for(|finished| *finished).await;
        })
    }
}

async fn list<C: Connection>(
    link: &Link<C>,
    request: List,
) -> Option<Result<(Vec<ListedSession>, Bytes), ClientError>> {
    let (mut send, recv) = link.transport.open_bi().await.ok()?;
    send.write(&mut [Frame::from(request).to_bytes()]).await.ok()?;
    send.finish();
    Some(match FrameReader::new(recv, MAX_FRAME).next().await.ok()?? {
        Frame::Listed(listed) => Ok((listed.sessions, listed.next)),
        Frame::Error(error) => Err(ClientError::refused(error.code, error.detail.as_str())),
        _ => Err(ProtocolError::new(Code::FRAME_UNEXPECTED, "not an answer to LIST").into()),
    })
}

/// A client of one server. Clones share its connection, which is closed when the last clone and everything made from it
/// are dropped.
#[derive(Clone)]
pub struct Client {
    pub(crate) core: Arc<dyn Core>,
}

impl core::fmt::Debug for Client {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Client")
    }
}

/// First pause after a lost connection, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// How long a client that closes waits for the server to be told.
const FAREWELL: Duration = Duration::from_millis(200);
/// How long one attempt to connect may take.
const ATTEMPT: Duration = Duration::from_secs(5);

impl Client {
    /// A client of the server that `connector` leads to. Returns at once; the connection is made in the background, and
    /// requests wait for it. Must be called inside a tokio runtime.
    pub fn new<T: Connector>(connector: T, config: Config) -> Self {
        let config = Arc::new(config);
        let (publish, status) = watch::channel(Status::Down);
        let (stop, stopping) = watch::channel(false);
        let (tell, connected) = watch::channel(false);
        let (finish, finished) = watch::channel(false);
        let tokens = Arc::new(Tokens::new(config.token.clone()));
        let supervised = Supervised { config: config.clone(), tokens: tokens.clone(), publish, tell, finish };
        tokio::spawn(supervise(connector, supervised, stopping));
        Self { core: Arc::new(Wired { status, config, connected, stop, finished, tokens }) }
    }

    /// A client over QUIC of the server that a connection file names. Errors: `Invalid`.
    pub fn connect_quic(file: &ConnectFile, mut config: Config) -> Result<Self, ClientError> {
        if config.token.is_none() {
            config.token = Some(file.token.clone());
        }
        let connector = QuicConnector::new(file.addr, &file.trust()?, &config.transport_limits(), ALPN);
        Ok(Self::new(connector.map_err(ClientError::Invalid)?, config))
    }

    /// Presents another token on the connection and on those that follow it; what was attached, subscribed and opened goes
    /// on under it. While there is no connection it is kept for the next.
    ///
    /// Errors: `Refused` with `TOKEN_INVALID` or `TOKEN_EXPIRED`; then what the token before allowed goes on until it expires,
    /// on later connections too.
    pub async fn renew_token(&self, token: impl Into<String>) -> Result<(), ClientError> {
        self.core.renew(token.into()).await
    }

    /// Waits until the server has answered. Errors: `Unreachable`, `Closed`.
    pub async fn connected(&self) -> Result<(), ClientError> {
        self.core.connected().await
    }

    /// Follows whether there is a connection.
    pub fn connection(&self) -> ConnectionWatch {
        ConnectionWatch(self.core.connection())
    }

    /// A session to attach to. Errors: `Protocol` with `NAME_INVALID`.
    pub fn session(&self, name: &str) -> Result<Attaching, ClientError> {
        Ok(Attaching::new(self.clone(), SessionName::new(name)?))
    }

    /// Every session whose name starts with `prefix` and that the token lets this client read, by name.
    ///
    /// Errors: `Refused`, `Unreachable`.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ListedSession>, ClientError> {
        let mut all = Vec::new();
        let mut after = Bytes::new();
        loop {
            let prefix = Bytes::copy_from_slice(prefix.as_bytes());
            let (page, next) = self.core.list(List { prefix, after, limit: MAX_LISTED as u64 }).await?;
            all.extend(page);
            if next.is_empty() {
                return Ok(all);
            }
            after = next;
        }
    }

    /// Takes jobs of notification of the sessions whose name starts with `prefix` and for which the token grants `notify`, at most
    /// `limit` (1 to 256) at once. Must be called inside a tokio runtime.
    pub fn jobs(&self, prefix: &str, limit: usize) -> Jobs {
        self.core.jobs(prefix, limit)
    }

    /// Closes the connection; everything made from this client ends.
    pub fn close(&self) {
        self.core.close();
    }

    /// Closes the connection and waits, for a fifth of a second at most, until the server was told. A process that ends
    /// without it leaves the server to find out.
    pub async fn finish(&self) {
        self.core.close();
        self.core.closed().await;
    }
}

/// Tells when the connection is lost and when it is back.
#[derive(Debug, Clone)]
pub struct ConnectionWatch(watch::Receiver<bool>);

impl ConnectionWatch {
    /// Waits for a change; true if there is a connection now, `None` once the client is closed. Cancellation-safe.
    pub async fn changed(&mut self) -> Option<bool> {
        self.0.changed().await.ok()?;
        Some(*self.0.borrow_and_update())
    }
}

/// What the task that keeps the connection shares with the client.
struct Supervised<C: Connection> {
    config: Arc<Config>,
    tokens: Arc<Tokens>,
    publish: watch::Sender<Status<C>>,
    tell: watch::Sender<bool>,
    finish: watch::Sender<bool>,
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

/// Makes the connection, and makes it again when it is lost.
async fn supervise<T: Connector>(
    connector: T,
    supervised: Supervised<T::Connection>,
    mut stopping: watch::Receiver<bool>,
) {
    let Supervised { config, tokens, publish, tell, finish } = supervised;
    let mut backoff = Backoff::new(PAUSE.0, PAUSE.1);
    let mut down_since = Instant::now();
    loop {
        let attempt = async {
            let transport = tokio::time::timeout(ATTEMPT, connector.connect());
            let transport = transport.await.unwrap_or(Err(ConnectionError::TimedOut))?;
            let link = Link::start(transport, &config, &tokens).await?;
            let judged = tokio::time::timeout(ATTEMPT, present_wanted(&link, &tokens));
            judged.await.map_err(|_| ConnectionError::TimedOut)?;
            Ok(link)
        };
        let result = tokio::select! {
            result = attempt => result,
            _ = stopping.wait_for(|stop| *stop) => Err(ConnectionError::ClosedHere),
        };
        let last = match result {
            Ok(link) => {
                publish.send_replace(Status::Up(link.clone()));
                if let Some(token) = tokens.wanted() {
                    // Given after the connection had looked and before anybody could see it.
                    drop(link.present(token));
                }
                let answered = tokio::select! {
                    hello = link.server() => hello.is_some(),
                    _ = stopping.wait_for(|stop| *stop) => false,
                };
                if answered {
                    backoff.reset();
                    tell.send_replace(true);
                }
                let lost = tokio::select! {
                    lost = link.transport.closed() => lost,
                    () = async { drop(stopping.wait_for(|stop| *stop).await) } => {
                        publish.send_replace(Status::Failed(ClientError::Closed));
                        let told = connector.farewell(&link.transport, Code::NO_ERROR.0, "the client closed");
                        let _ = tokio::time::timeout(FAREWELL, told).await;
                        ConnectionError::ClosedHere
                    }
                };
                if answered {
                    down_since = Instant::now();
                }
                publish.send_replace(Status::Down);
                tell.send_replace(false);
                tracing::info!(%lost, "connection lost");
                lost
            }
            Err(error) => error,
        };
        // Nobody listens any more, or somebody said stop.
        if publish.is_closed() || stopping.has_changed().is_err() || *stopping.borrow() {
            publish.send_replace(Status::Failed(ClientError::Closed));
            finish.send_replace(true);
            return;
        }
        let late = config.give_up_after.is_some_and(|limit| down_since.elapsed() >= limit);
        if late || matches!(last, ConnectionError::Untrusted(_)) {
            publish.send_replace(Status::Failed(ClientError::Unreachable { target: connector.target(), last }));
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(backoff.next(rand::random())) => {}
            _ = stopping.wait_for(|stop| *stop) => {}
        }
    }
}

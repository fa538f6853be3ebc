//! The client as a whole: keeps a connection, and makes sessions on it.

use core::future::Future;
use core::pin::Pin;
use core::time::Duration;
use std::sync::{Arc, PoisonError, Weak};

use bytes::Bytes;
use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::registry::{ALPN, MAX_FRAME, MAX_LISTED};
use mainstay_protocol::session::{Grants, Instance, SessionName};
use mainstay_protocol::wire::{Frame, Label, List, ListedSession, Mint};
use mainstay_transport::quic::{Identity, QuicConnector};
use mainstay_transport::{Connection, Connector, FrameError, FrameReader, SendStream};
use tokio::sync::{mpsc, watch};

use crate::config::{Certificate, Config, ConnectFile};
use crate::driver::{Driver, Refused, SessionCommand};
use crate::error::ClientError;
use crate::jobs::{self, Jobs};
use crate::roam::{Links, Nudge, PathEvent, Paths, Status, Supervised, supervise, up};
use crate::session::Attaching;
use crate::tokens::{Judged, Renewal, Tokens};

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
    /// Asks for a narrower token.
    fn mint(&self, request: Mint) -> BoxFuture<'_, Result<MintedToken, ClientError>>;
    /// Takes jobs.
    fn jobs(&self, prefix: &str, limit: usize) -> Jobs;
    /// Uses another token from now on.
    fn renew(&self, token: String) -> BoxFuture<'_, Result<(), ClientError>>;
    /// The configuration.
    fn config(&self) -> &Arc<Config>;
    /// True while there is a connection.
    fn connection(&self) -> watch::Receiver<bool>;
    /// What became of the path, and why there is no connection.
    fn paths(&self) -> watch::Receiver<Paths>;
    /// Why there is no connection, once that is known.
    fn trouble(&self) -> watch::Receiver<Option<ClientError>>;
    /// Why the server does not attach a session now that waits for it.
    fn refusal(&self, session: &str) -> Option<ClientError>;
    /// The application knows something about its network.
    fn nudge(&self, nudge: Nudge);
    /// Closes the connection for good.
    fn close(&self);
    /// Waits until it is closed.
    fn closed(&self) -> BoxFuture<'_, ()>;
}

struct Wired<C: Connection> {
    links: watch::Receiver<Links<C>>,
    config: Arc<Config>,
    connected: watch::Receiver<bool>,
    stop: watch::Sender<bool>,
    /// True once nothing of the connection is left.
    finished: watch::Receiver<bool>,
    tokens: Arc<Tokens>,
    paths: watch::Receiver<Paths>,
    trouble: watch::Receiver<Option<ClientError>>,
    refused: Refused,
    nudges: mpsc::Sender<Nudge>,
}

impl<C: Connection> Core for Wired<C> {
    fn drive(
        &self,
        session: Attaching,
        commands: mpsc::Receiver<SessionCommand>,
        again: mpsc::WeakSender<SessionCommand>,
    ) {
        let refused = self.refused.clone();
        tokio::spawn(Driver::new(self.links.clone(), session, commands, again, refused, &self.config).run());
    }

    fn connected(&self) -> BoxFuture<'_, Result<(), ClientError>> {
        let mut links = self.links.clone();
        Box::pin(async move {
            loop {
                let link = up(&mut links).await?;
                if link.server().await.is_some() {
                    return Ok(());
                }
                // Lost before the server said a word: it is tried again, for as long as it may be.
                let lost = links.wait_for(|links| !links.is_up(&link)).await;
                lost.map_err(|_| ClientError::Closed)?;
            }
        })
    }

    fn list(&self, request: List) -> BoxFuture<'_, Result<(Vec<ListedSession>, Bytes), ClientError>> {
        let links = self.links.clone();
        Box::pin(async move {
            match answer(links, request.into()).await? {
                Frame::Listed(listed) => Ok((listed.sessions, listed.next)),
                Frame::Error(error) => Err(ClientError::answered(&error)),
                _ => Err(ProtocolError::new(Code::FRAME_UNEXPECTED, "not an answer to LIST").into()),
            }
        })
    }

    fn mint(&self, request: Mint) -> BoxFuture<'_, Result<MintedToken, ClientError>> {
        let links = self.links.clone();
        Box::pin(async move {
            match answer(links, request.into()).await? {
                Frame::Minted(minted) => {
                    let token = String::from_utf8(minted.token.to_vec());
                    let token = token.map_err(|_| ProtocolError::malformed("the token is not text"))?;
                    Ok(MintedToken { token, expires: minted.expires })
                }
                Frame::Error(error) => Err(ClientError::answered(&error)),
                _ => Err(ProtocolError::new(Code::FRAME_UNEXPECTED, "not an answer to MINT").into()),
            }
        })
    }

    fn jobs(&self, prefix: &str, limit: usize) -> Jobs {
        jobs::start(self.links.clone(), prefix, limit, self.config.renewal.is_some())
    }

    fn renew(&self, token: String) -> BoxFuture<'_, Result<(), ClientError>> {
        self.tokens.want(token.clone());
        let mut links = self.links.clone();
        Box::pin(async move {
            let link = match &links.borrow().status {
                Status::Up(link) => link.clone(),
                Status::Down => return Ok(()),
                Status::Failed(error) => return Err(error.clone()),
            };
            if let Ok(answer) = link.present(token.clone()).await {
                return answer;
            }
            // The connection was lost first. The next one presents it before it is used.
            let _ = links.wait_for(|links| !links.is_up(&link)).await;
            loop {
                let link = up(&mut links).await?;
                match self.tokens.judged(&token) {
                    Judged::Taken => return Ok(()),
                    Judged::Refused(error) => return Err(error),
                    // Lost again before the server could say.
                    Judged::Open => drop(links.wait_for(|links| !links.is_up(&link)).await),
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

    fn paths(&self) -> watch::Receiver<Paths> {
        self.paths.clone()
    }

    fn trouble(&self) -> watch::Receiver<Option<ClientError>> {
        self.trouble.clone()
    }

    fn refusal(&self, session: &str) -> Option<ClientError> {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.iter().find(|(name, _)| name.as_str() == session).map(|(_, error)| error.clone())
    }

    fn nudge(&self, nudge: Nudge) {
        // Where so many wait, this one says nothing new.
        let _ = self.nudges.try_send(nudge);
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

/// The one answer to a request that has a stream of its own, and may be made twice: if the connection is lost first, it is made again on the
/// next one.
async fn answer<C: Connection>(mut links: watch::Receiver<Links<C>>, request: Frame) -> Result<Frame, ClientError> {
    let bytes = request.to_bytes();
    loop {
        let link = up(&mut links).await?;
        let _expecting = link.expect_answer();
        let asked = async {
            let (mut send, recv) = link.transport.open_bi().await.ok()?;
            send.write(&mut [bytes.clone()]).await.ok()?;
            send.finish();
            Some(FrameReader::new(recv, MAX_FRAME).next().await)
        };
        match asked.await {
            Some(Ok(Some(frame))) => return Ok(frame),
            Some(Err(FrameError::Violation(error))) => return Err(error.into()),
            Some(Ok(None) | Err(FrameError::Lost(_))) | None => {}
        }
        let lost = links.wait_for(|links| !links.is_up(&link));
        match tokio::time::timeout(NO_ANSWER, lost).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return Err(ClientError::Closed),
            Err(_) => {
                return Err(ProtocolError::new(Code::FRAME_UNEXPECTED, "the stream ended without an answer").into());
            }
        }
    }
}

/// How long a connection lives on at least whose server ended a request's stream without an answer: one that is lost is known to be by then.
const NO_ANSWER: Duration = Duration::from_secs(1);

/// A token that the server made from the client's own.
#[derive(Clone, PartialEq, Eq)]
pub struct MintedToken {
    /// The token. It is a secret.
    pub token: String,
    /// When it expires, in seconds since the Unix epoch.
    pub expires: u64,
}

impl core::fmt::Debug for MintedToken {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("MintedToken").field("expires", &self.expires).finish_non_exhaustive()
    }
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

impl Client {
    /// A client of the server that `connector` leads to. Returns at once; the connection is made in the background, and
    /// requests wait for it. Must be called inside a tokio runtime.
    pub fn new<T: Connector>(connector: T, config: Config) -> Self {
        let config = Arc::new(config);
        let (publish, links) = watch::channel(Links::none());
        let (stop, stopping) = watch::channel(false);
        let (tell, connected) = watch::channel(false);
        let (finish, finished) = watch::channel(false);
        let (count, paths) = watch::channel(Paths::default());
        let (complain, trouble) = watch::channel(None);
        let (nudges, nudged) = mpsc::channel(4);
        let refused = Refused::default();
        let tokens = Arc::new(Tokens::new(config.token.clone()));
        let supervised = Supervised {
            config: config.clone(),
            tokens: tokens.clone(),
            links: publish,
            connected: tell,
            paths: count,
            trouble: complain,
            finish,
            nudges: nudged,
        };
        tokio::spawn(supervise(connector, supervised, stopping));
        let renewal = config.renewal.clone();
        let wired =
            Arc::new(Wired { links, config, connected, stop, finished, tokens, paths, trouble, refused, nudges });
        if let Some(renewal) = renewal {
            tokio::spawn(renew(renewal, wired.tokens.clone(), wired.finished.clone(), Arc::downgrade(&wired)));
        }
        Self { core: wired }
    }

    /// A client over QUIC of the server that a connection file names. Errors: `Invalid`.
    pub fn connect_quic(file: &ConnectFile, mut config: Config) -> Result<Self, ClientError> {
        if config.token.is_none() {
            config.token = Some(file.token.clone());
        }
        let (limits, trust) = (config.transport_limits(), file.trust()?);
        let connector = match config.certificate.as_ref().or(file.certificate.as_ref()) {
            None => QuicConnector::new(file.addr.clone(), &trust, &limits, ALPN),
            Some(Certificate { chain, key }) => {
                let identity = Identity::from_pem_files(chain, key).map_err(ClientError::Invalid)?;
                QuicConnector::showing(identity, file.addr.clone(), &trust, &limits, ALPN)
            }
        };
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

    /// Asks the server for a narrower token, for a sub-agent or a tool: its subject is this client's with `/name` behind it, it is good for at
    /// most `lasts` seconds and never longer than this client's own, for one instance where `device` names it, and for nothing but `grants`.
    ///
    /// Errors: `Refused` with `FORBIDDEN` for what this client's token does not allow, or may not pass on (`mint`), `LIMIT_EXCEEDED` where too
    /// many were made from each other, `RATE_LIMITED`; `Unreachable`.
    pub async fn mint(
        &self,
        name: &str,
        grants: Grants,
        lasts: u64,
        device: Option<Instance>,
    ) -> Result<MintedToken, ClientError> {
        let name = Label::new(name)?;
        self.core.mint(Mint { name, lasts, device, grants }).await
    }

    /// Waits until the server has answered. Errors: `Unreachable`, `Closed`.
    pub async fn connected(&self) -> Result<(), ClientError> {
        self.core.connected().await
    }

    /// Who it is to the sessions that it is in: see [`Continuity`](crate::Continuity).
    pub fn instance(&self) -> Instance {
        self.core.config().continuity.instance()
    }

    /// Follows whether there is a connection.
    pub fn connection(&self) -> ConnectionWatch {
        ConnectionWatch(self.core.connection())
    }

    /// Counts what became of the path.
    pub fn paths(&self) -> Paths {
        *self.core.paths().borrow()
    }

    /// Follows what becomes of the path from now on.
    pub fn path_changes(&self) -> PathWatch {
        let (paths, trouble) = (self.core.paths(), self.core.trouble());
        let seen = *paths.borrow();
        PathWatch { paths, trouble, seen }
    }

    /// Why the server does not attach this session now, which waits for that: what it said last, `None` where nothing waits or nothing was said.
    /// The client asks again by itself until [`Config::give_up_after`]; this is for whoever wants to tell people why that takes long.
    pub fn refusal(&self, session: &str) -> Option<ClientError> {
        self.core.refusal(session)
    }

    /// Says that the network is another one now, or back: for hosts that are told so by their system and know it better than this library,
    /// on Android and iOS. The connection moves to the new network at once.
    pub fn network_changed(&self) {
        self.core.nudge(Nudge::NetworkChanged);
    }

    /// Says that somebody looks at the application again: the connection is looked after as [`Config::keep_alive`] says, and if nothing was
    /// heard for a while it is tried at once, over a new socket: a system that puts applications to sleep may have taken the old one.
    pub fn on_foreground(&self) {
        self.core.nudge(Nudge::Foreground);
    }

    /// Says that nobody looks at the application: the connection is kept alive as [`Config::background_keep_alive`] says, so that a
    /// radio can sleep.
    pub fn on_background(&self) {
        self.core.nudge(Nudge::Background);
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

/// Presents another token whenever one is needed, until the client is closed.
async fn renew<C: Connection>(
    renewal: Renewal,
    tokens: Arc<Tokens>,
    mut finished: watch::Receiver<bool>,
    client: Weak<Wired<C>>,
) {
    let work = async {
        loop {
            tokens.needed.notified().await;
            while tokens.is_needed() {
                // Nobody is kept waiting for a source that is slow: what the client is renewed for may be dropped meanwhile.
                if let Some(token) = renewal.ask().await {
                    let Some(client) = client.upgrade() else { return };
                    match client.renew(token).await {
                        Ok(()) => break,
                        Err(error) => tracing::warn!(%error, "the other token was not taken"),
                    }
                } else if client.strong_count() == 0 {
                    return;
                }
                tokio::time::sleep(ASK_AGAIN).await;
            }
        }
    };
    tokio::select! {
        () = work => {}
        // The other end of it says so too.
        _ = finished.wait_for(|finished| *finished) => {}
    }
}

/// How soon a source of tokens that failed, or whose token was not taken, is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// Tells when the connection is lost and when it is back.
#[derive(Debug, Clone)]
pub struct ConnectionWatch(watch::Receiver<bool>);

impl ConnectionWatch {
    /// True if there is a connection.
    pub fn is_up(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits for a change; true if there is a connection now, `None` once the client is closed. Cancellation-safe.
    pub async fn changed(&mut self) -> Option<bool> {
        self.0.changed().await.ok()?;
        Some(*self.0.borrow_and_update())
    }
}

/// Tells what becomes of the path.
#[derive(Debug, Clone)]
pub struct PathWatch {
    paths: watch::Receiver<Paths>,
    trouble: watch::Receiver<Option<ClientError>>,
    seen: Paths,
}

impl PathWatch {
    /// Waits for the next event; `None` once the client is closed. Of several of a kind that came between two calls one is told.
    /// Cancellation-safe.
    pub async fn next(&mut self) -> Option<PathEvent> {
        loop {
            let now = *self.paths.borrow_and_update();
            if let Some(event) = now.news(&mut self.seen) {
                return Some(event);
            }
            tokio::select! {
                changed = self.paths.changed() => changed.ok()?,
                changed = self.trouble.changed() => {
                    changed.ok()?;
                    if let Some(error) = self.trouble.borrow_and_update().clone() {
                        return Some(PathEvent::Unreachable(error));
                    }
                }
            }
        }
    }
}

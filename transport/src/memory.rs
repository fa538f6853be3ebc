//! Links inside one process: streams with QUIC's flow control, priorities left out because nothing queues.
//!
//! Used by tests of the server and the client that need no network. Links are perfect; with [`Weather`] what travels takes its time,
//! connections are cut with something on its way, and each end learns that later, from a seed and in tokio's time.

use core::time::Duration;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex as Lock, MutexGuard, OnceLock, PoisonError, Weak};

use bytes::{Buf, Bytes};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep, sleep_until};

use crate::entropy;
use crate::sim::Random;
use crate::{Connection, ConnectionError, Connector, Limits, Listener, RecvStream, SendStream, StreamError};

/// What links do to what travels on them. Nothing by default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Weather {
    /// How long everything takes.
    pub delay: Duration,
    /// Up to so much more. What is on one stream stays in order; streams overtake each other.
    pub jitter: Duration,
    /// How long at most it takes until an end learns that its connection is cut.
    pub unnoticed: Duration,
    /// No connection can be made.
    pub down: bool,
}

/// A place to listen on and connect to.
#[derive(Debug)]
pub struct MemoryNetwork {
    server: Limits,
    client: Limits,
    inner: Lock<Inner>,
}

#[derive(Debug)]
struct Inner {
    incoming: mpsc::Sender<MemoryConnection>,
    /// The listener takes no new connections now.
    refusing: Arc<AtomicBool>,
    weather: Weather,
    random: Random,
    links: Vec<Weak<Line>>,
}

impl MemoryNetwork {
    /// A network with the flow-control limits of both sides, and its listener.
    pub fn new(server: Limits, client: Limits) -> (Arc<Self>, MemoryListener) {
        Self::with_seed(server, client, 0)
    }

    /// The same, whose [`Weather`] decides from a seed.
    pub fn with_seed(server: Limits, client: Limits, seed: u64) -> (Arc<Self>, MemoryListener) {
        let (incoming, listener) = listener();
        let (weather, random, refusing) = (Weather::default(), Random::new(seed), listener.refusing.clone());
        let inner = Inner { incoming, refusing, weather, random, links: Vec::new() };
        (Arc::new(Self { server, client, inner: Lock::new(inner) }), listener)
    }

    /// Another listener takes the place of the one before: it gets the connections that are made from now on.
    pub fn listen(&self) -> MemoryListener {
        let (incoming, listener) = listener();
        let mut inner = self.lock();
        (inner.incoming, inner.refusing) = (incoming, listener.refusing.clone());
        drop(inner);
        listener
    }

    /// Changes what links do from now on.
    pub fn set_weather(&self, weather: Weather) {
        self.lock().weather = weather;
    }

    /// Cuts every connection: what has not arrived never will, and each end learns of it in its own time.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn cut(&self) {
        let links = core::mem::take(&mut self.lock().links);
        links.iter().filter_map(Weak::upgrade).for_each(|line| self.cut_line(&line));
    }

    /// Cuts one of the connections, chosen by chance. False if there is none.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn cut_one(&self) -> bool {
        let mut inner = self.lock();
        inner.links.retain(|line| line.upgrade().is_some_and(|line| !line.is_over()));
        let count = inner.links.len() as u64;
        let one = inner.random.below(count) as usize;
        let Some(line) = inner.links.get(one).and_then(Weak::upgrade) else { return false };
        drop(inner);
        self.cut_line(&line);
        true
    }

    fn cut_line(&self, line: &Arc<Line>) {
        line.cut.get_or_init(Instant::now);
        for side in [0, 1] {
            let mut inner = self.lock();
            let most = inner.weather.unnoticed.as_micros() as u64;
            let unnoticed = Duration::from_micros(inner.random.below(most + 1));
            drop(inner);
            line.end_after(side, unnoticed, Ended::Lost);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the next thing takes; `None` where that is no time at all.
    fn takes(&self) -> Option<Duration> {
        let mut inner = self.lock();
        let Weather { delay, jitter, .. } = inner.weather;
        let jitter = Duration::from_micros(inner.random.below(jitter.as_micros() as u64 + 1));
        Some(delay + jitter).filter(|takes| !takes.is_zero())
    }
}

fn listener() -> (mpsc::Sender<MemoryConnection>, MemoryListener) {
    let (incoming, ready) = mpsc::channel(64);
    (incoming, MemoryListener { ready: Mutex::new(ready), refusing: Arc::default() })
}

/// How long it takes to find out that no connection can be made.
const UNREACHABLE: Duration = Duration::from_secs(2);

impl Connector for Arc<MemoryNetwork> {
    type Connection = MemoryConnection;

    async fn connect(&self, _hopeful: bool) -> Result<MemoryConnection, ConnectionError> {
        if let Some(takes) = self.takes() {
            sleep(takes).await;
        }
        let (down, refusing, incoming) = {
            let inner = self.lock();
            (inner.weather.down, inner.refusing.clone(), inner.incoming.clone())
        };
        if down {
            sleep(UNREACHABLE).await;
            return Err(ConnectionError::TimedOut);
        }
        if refusing.load(Ordering::Relaxed) {
            return Err(ConnectionError::Failed("the server takes no connections".into()));
        }
        let line = Arc::new(Line::new(self.clone()));
        let inboxes = [Inboxes::new(), Inboxes::new()];
        let [(client_in, client_rx), (server_in, server_rx)] = inboxes;
        // What a side may have unread at the other is the other's window.
        let client = MemoryConnection::new(server_in, client_rx, &self.server, line.clone(), 0);
        let server = MemoryConnection::new(client_in, server_rx, &self.client, line.clone(), 1);
        incoming.send(server).await.map_err(|_| ConnectionError::Failed("nobody listens".into()))?;
        self.lock().links.push(Arc::downgrade(&line));
        Ok(client)
    }

    fn target(&self) -> String {
        "memory".into()
    }
}

/// Takes the connections of a [`MemoryNetwork`].
#[derive(Debug)]
pub struct MemoryListener {
    ready: Mutex<mpsc::Receiver<MemoryConnection>>,
    /// It takes no new connections now.
    refusing: Arc<AtomicBool>,
}

impl Listener for MemoryListener {
    type Connection = MemoryConnection;

    async fn accept(&self) -> Option<MemoryConnection> {
        self.ready.lock().await.recv().await
    }

    fn local_addr(&self) -> Option<SocketAddr> {
        None
    }

    fn admit(&self, new: bool) {
        self.refusing.store(!new, Ordering::Relaxed);
    }

    async fn close(&self, _code: u64, _reason: &str, _patience: Duration) {
        self.admit(false);
        if let Ok(mut ready) = self.ready.try_lock() {
            ready.close();
        }
    }
}

type Pair = (MemorySend, MemoryRecv);

#[derive(Debug, Clone)]
struct Inboxes {
    bi: mpsc::UnboundedSender<Pair>,
    uni: mpsc::UnboundedSender<MemoryRecv>,
}

#[derive(Debug)]
struct Arrivals {
    bi: Mutex<mpsc::UnboundedReceiver<Pair>>,
    uni: Mutex<mpsc::UnboundedReceiver<MemoryRecv>>,
}

impl Inboxes {
    fn new() -> (Self, Arrivals) {
        // Bounded by the semaphores below, one permit per open stream.
        let (bi, bi_rx) = mpsc::unbounded_channel();
        let (uni, uni_rx) = mpsc::unbounded_channel();
        (Self { bi, uni }, Arrivals { bi: Mutex::new(bi_rx), uni: Mutex::new(uni_rx) })
    }
}

/// How a connection ended, for one of its ends.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ended {
    Here,
    There { code: u64, reason: String },
    Lost,
}

/// What the two ends of a connection share.
#[derive(Debug)]
struct Line {
    network: Arc<MemoryNetwork>,
    ended: [watch::Sender<Option<Ended>>; 2],
    /// What arrives later than this does not.
    cut: OnceLock<Instant>,
    /// What the two sides share and nobody else knows.
    secret: [u8; 32],
}

impl Line {
    fn new(network: Arc<MemoryNetwork>) -> Self {
        let ended = [watch::channel(None).0, watch::channel(None).0];
        Self { network, ended, cut: OnceLock::new(), secret: entropy::random() }
    }

    fn is_cut(&self) -> bool {
        self.cut.get().is_some()
    }

    fn is_over(&self) -> bool {
        self.ended.iter().any(|ended| ended.borrow().is_some())
    }

    fn end(&self, side: usize, how: Ended) {
        self.ended[side].send_if_modified(|ended| {
            let first = ended.is_none();
            if first {
                *ended = Some(how);
            }
            first
        });
    }

    fn end_after(self: &Arc<Self>, side: usize, after: Duration, how: Ended) {
        let this = self.clone();
        tokio::spawn(async move {
            sleep(after).await;
            this.end(side, how);
        });
    }

    fn error(&self, side: usize) -> ConnectionError {
        match self.ended[side].borrow().clone() {
            Some(Ended::Here) => ConnectionError::ClosedHere,
            Some(Ended::There { code, reason }) => ConnectionError::Closed { code, reason },
            Some(Ended::Lost) => ConnectionError::Reset,
            None => ConnectionError::Failed("the peer is gone".into()),
        }
    }

    async fn over(&self, side: usize) {
        let mut ended = self.ended[side].subscribe();
        // The sender lives in `self`.
        let _ = ended.wait_for(Option::is_some).await;
    }
}

/// One side of a link.
#[derive(Debug, Clone)]
pub struct MemoryConnection {
    peer: Inboxes,
    arrivals: Arc<Arrivals>,
    /// Bytes that this side may have unread at the peer, on all streams.
    window: Arc<Semaphore>,
    stream_window: usize,
    line: Arc<Line>,
    side: usize,
    /// Unread bytes of this side at the peer, for tests.
    unread: Arc<AtomicU64>,
}

impl MemoryConnection {
    fn new(peer: Inboxes, arrivals: Arrivals, peer_limits: &Limits, line: Arc<Line>, side: usize) -> Self {
        Self {
            peer,
            arrivals: Arc::new(arrivals),
            window: Arc::new(Semaphore::new(peer_limits.receive_window() as usize)),
            stream_window: peer_limits.stream_window() as usize,
            line,
            side,
            unread: Arc::default(),
        }
    }

    /// Bytes that this side sent and the peer has not read, on all streams.
    pub fn unread(&self) -> u64 {
        self.unread.load(Ordering::Relaxed)
    }

    fn pipe(&self) -> (MemorySend, MemoryRecv) {
        let (pieces, inbox) = mpsc::unbounded_channel();
        let (stopped, stop_seen) = watch::channel(None);
        let send = MemorySend {
            pieces: Some(pieces),
            window: self.window.clone(),
            stream_window: Arc::new(Semaphore::new(self.stream_window)),
            stopped: stop_seen,
            line: self.line.clone(),
            side: self.side,
            unread: self.unread.clone(),
            last_due: None,
        };
        let recv = MemoryRecv { inbox, stopped, line: self.line.clone(), side: 1 - self.side, travelling: None };
        (send, recv)
    }

    fn error(&self) -> ConnectionError {
        self.line.error(self.side)
    }

    fn is_over(&self) -> bool {
        self.line.ended[self.side].borrow().is_some()
    }
}

impl Connection for MemoryConnection {
    type Send = MemorySend;
    type Recv = MemoryRecv;

    async fn open_bi(&self) -> Result<Pair, ConnectionError> {
        if self.is_over() {
            return Err(self.error());
        }
        let peer = Self { side: 1 - self.side, ..self.clone() };
        let (send, far_recv) = self.pipe();
        // The way back has its own windows; the peer's are the same numbers for a stream, and shared with this link's.
        let (far_send, recv) = peer.pipe();
        if !self.line.is_cut() {
            self.peer.bi.send((far_send, far_recv)).map_err(|_| self.error())?;
        }
        Ok((send, recv))
    }

    async fn open_uni(&self) -> Result<MemorySend, ConnectionError> {
        if self.is_over() {
            return Err(self.error());
        }
        let (send, recv) = self.pipe();
        if !self.line.is_cut() {
            self.peer.uni.send(recv).map_err(|_| self.error())?;
        }
        Ok(send)
    }

    async fn accept_bi(&self) -> Result<Pair, ConnectionError> {
        let next = async { self.arrivals.bi.lock().await.recv().await };
        tokio::select! {
            pair = next => pair.ok_or_else(|| self.error()),
            () = self.line.over(self.side) => Err(self.error()),
        }
    }

    async fn accept_uni(&self) -> Result<MemoryRecv, ConnectionError> {
        let next = async { self.arrivals.uni.lock().await.recv().await };
        tokio::select! {
            recv = next => recv.ok_or_else(|| self.error()),
            () = self.line.over(self.side) => Err(self.error()),
        }
    }

    fn allow_streams(&self, _bidirectional: u32, _unidirectional: u32) {}

    fn close(&self, code: u64, reason: &str) {
        self.line.end(self.side, Ended::Here);
        let (there, reason) = (1 - self.side, reason.to_owned());
        match self.line.network.takes() {
            _ if self.line.is_cut() => {}
            None => self.line.end(there, Ended::There { code, reason }),
            Some(takes) => self.line.end_after(there, takes, Ended::There { code, reason }),
        }
    }

    async fn closed(&self) -> ConnectionError {
        self.line.over(self.side).await;
        self.error()
    }

    fn export(&self, label: &[u8], context: &[u8]) -> Result<[u8; 32], ConnectionError> {
        let mut hash = blake3::Hasher::new_keyed(&self.line.secret);
        hash.update(&(label.len() as u64).to_be_bytes()).update(label).update(context);
        Ok(*hash.finalize().as_bytes())
    }

    fn remote(&self) -> String {
        "memory".into()
    }

    fn rtt(&self) -> Duration {
        Duration::ZERO
    }
}

#[derive(Debug)]
struct Piece {
    bytes: Bytes,
    /// Returned to the sender when the piece is read.
    _permits: [OwnedSemaphorePermit; 2],
    unread: Unread,
}

/// Counts a piece as unread until dropped.
#[derive(Debug)]
struct Unread(Arc<AtomicU64>, u64);

impl Drop for Unread {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
enum Message {
    Piece(Piece),
    Finish,
    Reset(u64),
}

/// A message, and when it arrives; at once if nothing is said.
type Travelling = (Option<Instant>, Message);

/// The sending half. Dropping it without [`SendStream::finish`] resets the stream with code 0.
#[derive(Debug)]
pub struct MemorySend {
    pieces: Option<mpsc::UnboundedSender<Travelling>>,
    window: Arc<Semaphore>,
    stream_window: Arc<Semaphore>,
    stopped: watch::Receiver<Option<u64>>,
    line: Arc<Line>,
    side: usize,
    unread: Arc<AtomicU64>,
    /// When the last message arrives.
    last_due: Option<Instant>,
}

/// Longest piece on a link, so that a piece never needs more than a window holds.
const PIECE: usize = 1024;

impl MemorySend {
    /// When a message that is sent now arrives.
    fn due(&mut self) -> Option<Instant> {
        if let Some(takes) = self.line.network.takes() {
            self.last_due = self.last_due.max(Some(Instant::now() + takes));
        }
        self.last_due
    }

    /// The last message of the stream.
    fn last(&mut self, message: Message) {
        let due = self.due();
        if let Some(pieces) = self.pieces.take()
            && !self.line.is_cut()
        {
            let _ = pieces.send((due, message));
        }
    }

    async fn send(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        if self.pieces.is_none() {
            return Err(StreamError::Ended);
        }
        let len = bytes.len() as u32;
        let permits = async {
            let stream = self.stream_window.clone().acquire_many_owned(len).await;
            let connection = self.window.clone().acquire_many_owned(len).await;
            stream.ok().zip(connection.ok())
        };
        let mut stopped = self.stopped.clone();
        let permits = tokio::select! {
            permits = permits => permits.ok_or(StreamError::Ended)?,
            Ok(code) = async { stopped.wait_for(Option::is_some).await.map(|code| *code) } => {
                return Err(StreamError::Stopped(code.unwrap_or(0)));
            }
            () = self.line.over(self.side) => return Err(StreamError::Connection(self.line.error(self.side))),
        };
        self.unread.fetch_add(u64::from(len), Ordering::Relaxed);
        let unread = Unread(self.unread.clone(), u64::from(len));
        let piece = Piece { bytes, _permits: [permits.0, permits.1], unread };
        if self.line.is_cut() {
            return Ok(());
        }
        let due = self.due();
        let Some(pieces) = &self.pieces else { return Err(StreamError::Ended) };
        pieces.send((due, Message::Piece(piece))).map_err(|_| StreamError::Stopped(0))
    }
}

impl SendStream for MemorySend {
    async fn write(&mut self, pieces: &mut [Bytes]) -> Result<(), StreamError> {
        if let Some(code) = *self.stopped.borrow() {
            return Err(StreamError::Stopped(code));
        }
        for piece in pieces {
            while piece.has_remaining() {
                let part = piece.split_to(piece.len().min(PIECE));
                self.send(part).await?;
            }
        }
        Ok(())
    }

    fn set_priority(&self, _priority: i32) {}

    fn finish(&mut self) {
        self.last(Message::Finish);
    }

    fn reset(&mut self, code: u64) {
        if self.pieces.is_some() {
            self.last(Message::Reset(code));
        }
    }

    fn stopped(&self) -> impl Future<Output = Option<u64>> + Send + use<> {
        let mut stopped = self.stopped.clone();
        async move { stopped.wait_for(Option::is_some).await.ok().and_then(|code| *code) }
    }
}

impl Drop for MemorySend {
    fn drop(&mut self) {
        self.reset(0);
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct MemoryRecv {
    inbox: mpsc::UnboundedReceiver<Travelling>,
    stopped: watch::Sender<Option<u64>>,
    line: Arc<Line>,
    side: usize,
    /// Has left and not arrived.
    travelling: Option<Travelling>,
}

impl MemoryRecv {
    /// The next message that arrives; `None` if the connection ended first.
    async fn arrive(&mut self) -> Option<Message> {
        if self.travelling.is_none() {
            self.travelling = self.inbox.recv().await;
        }
        let due = match &self.travelling {
            Some((due, _)) => *due,
            // Its sender is gone without a word, as behind a cut.
            None => {
                self.line.over(self.side).await;
                return None;
            }
        };
        if let Some(due) = due {
            sleep_until(due).await;
            if self.line.cut.get().is_some_and(|cut| due > *cut) {
                self.line.over(self.side).await;
                return None;
            }
        }
        self.travelling.take().map(|(_, message)| message)
    }
}

impl RecvStream for MemoryRecv {
    async fn read(&mut self) -> Result<Option<Bytes>, StreamError> {
        let (line, side) = (self.line.clone(), self.side);
        let message = tokio::select! {
            biased;
            message = self.arrive() => message,
            () = line.over(side) => None,
        };
        match message {
            Some(Message::Piece(Piece { bytes, unread, .. })) => {
                drop(unread);
                Ok(Some(bytes))
            }
            Some(Message::Finish) => Ok(None),
            Some(Message::Reset(code)) => Err(StreamError::Reset(code)),
            None => Err(StreamError::Connection(self.line.error(self.side))),
        }
    }

    fn stop(&mut self, code: u64) {
        if !self.line.is_cut() {
            self.stopped.send_replace(Some(code));
        }
    }
}

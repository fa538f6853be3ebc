//! Links inside one process: streams with QUIC's flow control, priorities left out because nothing queues.
//!
//! Used by tests of the server and the client that need no network.

use core::time::Duration;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, Bytes};
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, watch};

use crate::{Connection, ConnectionError, Connector, Limits, Listener, RecvStream, SendStream, StreamError};

/// A place to listen on and connect to.
#[derive(Debug)]
pub struct MemoryNetwork {
    server: Limits,
    client: Limits,
    incoming: mpsc::Sender<MemoryConnection>,
}

impl MemoryNetwork {
    /// A network with the flow-control limits of both sides, and its listener.
    pub fn new(server: Limits, client: Limits) -> (Arc<Self>, MemoryListener) {
        let (incoming, ready) = mpsc::channel(64);
        (Arc::new(Self { server, client, incoming }), MemoryListener { ready: Mutex::new(ready) })
    }
}

impl Connector for MemoryNetwork {
    type Connection = MemoryConnection;

    async fn connect(&self, _hopeful: bool) -> Result<MemoryConnection, ConnectionError> {
        let (closed, _) = watch::channel(None);
        let closed = Arc::new(closed);
        let secret = rand::random();
        let inboxes = [Inboxes::new(), Inboxes::new()];
        let [(client_in, client_rx), (server_in, server_rx)] = inboxes;
        // What a side may have unread at the other is the other's window.
        let client = MemoryConnection::new(server_in, client_rx, &self.server, closed.clone(), 0, secret);
        let server = MemoryConnection::new(client_in, server_rx, &self.client, closed, 1, secret);
        self.incoming.send(server).await.map_err(|_| ConnectionError::Failed("nobody listens".into()))?;
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
}

impl Listener for MemoryListener {
    type Connection = MemoryConnection;

    async fn accept(&self) -> Option<MemoryConnection> {
        self.ready.lock().await.recv().await
    }

    fn local_addr(&self) -> Option<SocketAddr> {
        None
    }

    fn refuse_new(&self) {
        if let Ok(mut ready) = self.ready.try_lock() {
            ready.close();
        }
    }

    async fn close(&self, _code: u64, _reason: &str, _patience: Duration) {
        self.refuse_new();
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

type Closed = Arc<watch::Sender<Option<(u8, u64, String)>>>;

/// One side of a link.
#[derive(Debug, Clone)]
pub struct MemoryConnection {
    peer: Inboxes,
    arrivals: Arc<Arrivals>,
    /// Bytes that this side may have unread at the peer, on all streams.
    window: Arc<Semaphore>,
    stream_window: usize,
    closed: Closed,
    side: u8,
    /// What the two sides share and nobody else knows.
    secret: [u8; 32],
    /// Unread bytes of this side at the peer, for tests.
    unread: Arc<AtomicU64>,
}

impl MemoryConnection {
    fn new(
        peer: Inboxes,
        arrivals: Arrivals,
        peer_limits: &Limits,
        closed: Closed,
        side: u8,
        secret: [u8; 32],
    ) -> Self {
        Self {
            peer,
            arrivals: Arc::new(arrivals),
            window: Arc::new(Semaphore::new(peer_limits.receive_window() as usize)),
            stream_window: peer_limits.stream_window() as usize,
            closed,
            side,
            secret,
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
            closed: self.closed.clone(),
            side: self.side,
            unread: self.unread.clone(),
        };
        let recv = MemoryRecv { inbox, stopped, closed: self.closed.clone(), side: 1 - self.side };
        (send, recv)
    }

    fn error(&self) -> ConnectionError {
        error(&self.closed, self.side)
    }
}

fn error(closed: &Closed, side: u8) -> ConnectionError {
    match closed.borrow().clone() {
        Some((by, _, _)) if by == side => ConnectionError::ClosedHere,
        Some((_, code, reason)) => ConnectionError::Closed { code, reason },
        None => ConnectionError::Failed("the peer is gone".into()),
    }
}

async fn closing(closed: &Closed) {
    let mut closed = closed.subscribe();
    // The sender lives in the caller.
    let _ = closed.wait_for(Option::is_some).await;
}

impl Connection for MemoryConnection {
    type Send = MemorySend;
    type Recv = MemoryRecv;

    async fn open_bi(&self) -> Result<Pair, ConnectionError> {
        if self.closed.borrow().is_some() {
            return Err(self.error());
        }
        let peer = Self { side: 1 - self.side, ..self.clone() };
        let (send, far_recv) = self.pipe();
        // The way back has its own windows; the peer's are the same numbers for a stream, and shared with this link's.
        let (far_send, recv) = peer.pipe();
        self.peer.bi.send((far_send, far_recv)).map_err(|_| self.error())?;
        Ok((send, recv))
    }

    async fn open_uni(&self) -> Result<MemorySend, ConnectionError> {
        if self.closed.borrow().is_some() {
            return Err(self.error());
        }
        let (send, recv) = self.pipe();
        self.peer.uni.send(recv).map_err(|_| self.error())?;
        Ok(send)
    }

    async fn accept_bi(&self) -> Result<Pair, ConnectionError> {
        let next = async { self.arrivals.bi.lock().await.recv().await };
        tokio::select! {
            pair = next => pair.ok_or_else(|| self.error()),
            () = closing(&self.closed) => Err(self.error()),
        }
    }

    async fn accept_uni(&self) -> Result<MemoryRecv, ConnectionError> {
        let next = async { self.arrivals.uni.lock().await.recv().await };
        tokio::select! {
            recv = next => recv.ok_or_else(|| self.error()),
            () = closing(&self.closed) => Err(self.error()),
        }
    }

    fn allow_streams(&self, _bidirectional: u32, _unidirectional: u32) {}

    fn close(&self, code: u64, reason: &str) {
        self.closed.send_if_modified(|closed| {
            let first = closed.is_none();
            if first {
                *closed = Some((self.side, code, reason.to_owned()));
            }
            first
        });
    }

    async fn closed(&self) -> ConnectionError {
        closing(&self.closed).await;
        self.error()
    }

    fn export(&self, label: &[u8], context: &[u8]) -> Result<[u8; 32], ConnectionError> {
        let mut hash = blake3::Hasher::new_keyed(&self.secret);
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

/// The sending half. Dropping it without [`SendStream::finish`] resets the stream with code 0.
#[derive(Debug)]
pub struct MemorySend {
    pieces: Option<mpsc::UnboundedSender<Message>>,
    window: Arc<Semaphore>,
    stream_window: Arc<Semaphore>,
    stopped: watch::Receiver<Option<u64>>,
    closed: Closed,
    side: u8,
    unread: Arc<AtomicU64>,
}

/// Longest piece on a link, so that a piece never needs more than a window holds.
const PIECE: usize = 1024;

impl MemorySend {
    async fn send(&self, bytes: Bytes) -> Result<(), StreamError> {
        let Some(pieces) = &self.pieces else {
            return Err(StreamError::Ended);
        };
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
            () = closing(&self.closed) => return Err(StreamError::Connection(error(&self.closed, self.side))),
        };
        self.unread.fetch_add(u64::from(len), Ordering::Relaxed);
        let unread = Unread(self.unread.clone(), u64::from(len));
        let piece = Piece { bytes, _permits: [permits.0, permits.1], unread };
        pieces.send(Message::Piece(piece)).map_err(|_| StreamError::Stopped(0))
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
        if let Some(pieces) = self.pieces.take() {
            let _ = pieces.send(Message::Finish);
        }
    }

    fn reset(&mut self, code: u64) {
        if let Some(pieces) = self.pieces.take() {
            let _ = pieces.send(Message::Reset(code));
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
    inbox: mpsc::UnboundedReceiver<Message>,
    stopped: watch::Sender<Option<u64>>,
    closed: Closed,
    side: u8,
}

impl RecvStream for MemoryRecv {
    async fn read(&mut self) -> Result<Option<Bytes>, StreamError> {
        let message = tokio::select! {
            biased;
            message = self.inbox.recv() => message,
            () = closing(&self.closed) => None,
        };
        match message {
            Some(Message::Piece(Piece { bytes, unread, .. })) => {
                drop(unread);
                Ok(Some(bytes))
            }
            Some(Message::Finish) => Ok(None),
            Some(Message::Reset(code)) => Err(StreamError::Reset(code)),
            None => Err(StreamError::Connection(error(&self.closed, self.side))),
        }
    }

    fn stop(&mut self, code: u64) {
        self.stopped.send_replace(Some(code));
    }
}

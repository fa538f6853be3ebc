//! A quinn connection and its streams.

use core::time::Duration;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use quinn::{Endpoint, VarInt, ZeroRttAccepted};
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;

use super::drivers::Drivers;
use super::identity::Pin;
use super::socket::{CountingSocket, Sent, Sockets};
use super::{headroom, varint};
use crate::{Connection, ConnectionError, RecvStream, SendStream, StreamError};

/// A quinn connection.
#[derive(Debug, Clone)]
pub struct QuicConnection {
    connection: quinn::Connection,
    /// Whether the handshake was confirmed with the early data taken, once that is known.
    confirmed: watch::Receiver<Option<bool>>,
    /// Where a client's streams end up that were opened before that was known.
    early: Arc<Early>,
    home: Option<Arc<Home>>,
}

/// Streams that were opened while the handshake went on, and are not used any more. If early data is refused, streams that are opened later
/// have their ids, and by its id quinn forgets who waits for a stream when a half of it is dropped: these are dropped behind all others of
/// the connection. No more of them than the peer of an earlier connection allowed.
#[derive(Debug, Default)]
struct Early(Mutex<Vec<Unused>>);

/// Where the halves of a stream end up.
#[derive(Debug, Clone)]
struct Parking {
    early: Arc<Early>,
    /// They may be of refused early data.
    kept: bool,
}

/// A half of a stream, kept for the sake of others.
#[derive(Debug)]
enum Unused {
    Send { _half: quinn::SendStream },
    Recv { _half: quinn::RecvStream },
}

impl Parking {
    fn park(&self, unused: Unused) {
        if self.kept {
            self.early.0.lock().unwrap_or_else(PoisonError::into_inner).push(unused);
        }
    }
}

/// What a client's connection has for itself.
#[derive(Debug)]
pub(super) struct Home {
    pub(super) endpoint: Endpoint,
    pub(super) drivers: Arc<Drivers>,
    pub(super) sockets: Arc<dyn Sockets>,
    pub(super) sent: Arc<Sent>,
}

impl QuicConnection {
    /// A connection whose handshake goes on.
    pub(super) fn early(connection: quinn::Connection, accepted: ZeroRttAccepted) -> Self {
        let (tell, confirmed) = watch::channel(None);
        let this = connection.clone();
        tokio::spawn(async move {
            let taken = accepted.await;
            // A server is told whether there was early data; what matters to it is that the handshake did not fail.
            let server = this.side().is_server() && this.close_reason().is_none();
            tell.send_replace(Some(taken || server));
        });
        Self { connection, confirmed, early: Arc::default(), home: None }
    }

    /// A connection whose handshake is done.
    pub(super) fn done(connection: quinn::Connection) -> Self {
        Self { connection, confirmed: watch::channel(Some(true)).1, early: Arc::default(), home: None }
    }

    pub(super) fn at_home(mut self, home: Home) -> Self {
        self.home = Some(Arc::new(home));
        self
    }

    /// The connection underneath, for measurements and tests.
    pub fn inner(&self) -> &quinn::Connection {
        &self.connection
    }

    /// Of streams that are opened from here on.
    fn parking(&self) -> Parking {
        let undecided = self.connection.side().is_client() && self.confirmed.borrow().is_none();
        Parking { early: self.early.clone(), kept: undecided }
    }

    /// Of streams that the peer opened: none of them comes before the handshake is confirmed, or its id is never another's.
    fn parking_of_peers(&self) -> Parking {
        Parking { early: self.early.clone(), kept: false }
    }

    /// Closes the connection and waits until a packet that says so was sent. quinn says when a closed connection is forgotten, which is three
    /// probe timeouts later, not when the peer was told.
    pub(super) async fn farewell(&self, code: u64, reason: &str) {
        if self.connection.close_reason().is_some() {
            return;
        }
        let before = self.home.as_ref().map(|home| (home, home.sent.count()));
        self.close(code, reason);
        if let Some((home, before)) = before {
            home.sent.beyond(before).await;
        }
    }
}

impl Connection for QuicConnection {
    type Send = QuicSend;
    type Recv = QuicRecv;

    async fn open_bi(&self) -> Result<(QuicSend, QuicRecv), ConnectionError> {
        // Asked for first: what is decided meanwhile was perhaps not when quinn opened them.
        let parking = self.parking();
        let (send, recv) = self.connection.open_bi().await?;
        Ok((QuicSend::new(send, parking.clone()), QuicRecv::new(recv, parking)))
    }

    async fn open_uni(&self) -> Result<QuicSend, ConnectionError> {
        let parking = self.parking();
        Ok(QuicSend::new(self.connection.open_uni().await?, parking))
    }

    async fn accept_bi(&self) -> Result<(QuicSend, QuicRecv), ConnectionError> {
        let (send, recv) = self.connection.accept_bi().await?;
        Ok((QuicSend::new(send, self.parking_of_peers()), QuicRecv::new(recv, self.parking_of_peers())))
    }

    async fn accept_uni(&self) -> Result<QuicRecv, ConnectionError> {
        Ok(QuicRecv::new(self.connection.accept_uni().await?, self.parking_of_peers()))
    }

    fn allow_streams(&self, bidirectional: u32, unidirectional: u32) {
        self.connection.set_max_concurrent_bi_streams(headroom(bidirectional).into());
        self.connection.set_max_concurrent_uni_streams(headroom(unidirectional).into());
    }

    fn close(&self, code: u64, reason: &str) {
        self.connection.close(varint(code), reason.as_bytes());
    }

    async fn closed(&self) -> ConnectionError {
        self.connection.closed().await.into()
    }

    async fn confirmed(&self) -> Result<bool, ConnectionError> {
        let mut confirmed = self.confirmed.clone();
        let known = async { confirmed.wait_for(Option::is_some).await.ok().and_then(|known| *known) };
        match known.await {
            Some(taken) if self.connection.close_reason().is_none() => Ok(taken),
            _ => Err(self.closed().await),
        }
    }

    fn is_confirmed(&self) -> bool {
        *self.confirmed.borrow() == Some(true)
    }

    fn export(&self, label: &[u8], context: &[u8]) -> Result<[u8; 32], ConnectionError> {
        let mut secret = [0; 32];
        let exported = self.connection.export_keying_material(&mut secret, label, context);
        exported.map_err(|_| ConnectionError::Failed("the connection exports no secret yet".into()))?;
        Ok(secret)
    }

    fn rebind(&self) -> Result<(), ConnectionError> {
        let failed = |error: std::io::Error| ConnectionError::Failed(format!("no new socket: {error}"));
        let Some(home) = &self.home else {
            return Err(ConnectionError::Failed("a server does not choose the path".into()));
        };
        let socket = home.sockets.bind(self.connection.remote_address()).map_err(failed)?;
        let socket = Arc::new(CountingSocket { socket, sent: home.sent.clone() });
        home.drivers.settled(|| match self.connection.close_reason() {
            None => home.endpoint.rebind_abstract(socket).map_err(failed),
            Some(ended) => Err(ended.into()),
        })
    }

    fn certificate(&self) -> Option<[u8; 32]> {
        let shown = self.connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
        Pin::of(shown.first()?).ok().map(|pin| pin.0)
    }

    fn remote(&self) -> String {
        // An IPv4 peer of a dual-stack socket is shown as what it is.
        let addr = self.connection.remote_address();
        SocketAddr::new(addr.ip().to_canonical(), addr.port()).to_string()
    }

    fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    fn heard(&self) -> Option<u64> {
        Some(self.connection.stats().udp_rx.datagrams)
    }
}

impl From<quinn::ConnectionError> for ConnectionError {
    fn from(error: quinn::ConnectionError) -> Self {
        match error {
            quinn::ConnectionError::ApplicationClosed(close) => Self::Closed {
                code: close.error_code.into_inner(),
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            quinn::ConnectionError::LocallyClosed => Self::ClosedHere,
            quinn::ConnectionError::TimedOut => Self::TimedOut,
            quinn::ConnectionError::Reset => Self::Reset,
            quinn::ConnectionError::TransportError(error) if is_certificate_error(error.code) => {
                Self::Untrusted(error.to_string())
            }
            other => Self::Failed(other.to_string()),
        }
    }
}

/// TLS alerts 42 to 49 are about certificates; QUIC carries them as 0x100 plus the alert.
fn is_certificate_error(code: quinn_proto::TransportErrorCode) -> bool {
    (0x12a..=0x131).contains(&u64::from(code))
}

/// The sending half of a quinn stream. Dropping it without [`SendStream::finish`] resets the stream with code 0.
#[derive(Debug)]
pub struct QuicSend {
    /// Until it is dropped.
    stream: Option<quinn::SendStream>,
    /// Finished, or reset.
    ended: bool,
    parking: Parking,
}

impl QuicSend {
    fn new(stream: quinn::SendStream, parking: Parking) -> Self {
        Self { stream: Some(stream), ended: false, parking }
    }
}

impl Drop for QuicSend {
    /// quinn would finish it, which the peer would take for an orderly end.
    fn drop(&mut self) {
        self.reset(0);
        if let Some(half) = self.stream.take() {
            self.parking.park(Unused::Send { _half: half });
        }
    }
}

impl SendStream for QuicSend {
    async fn write(&mut self, pieces: &mut [Bytes]) -> Result<(), StreamError> {
        let stream = self.stream.as_mut().ok_or(StreamError::Ended)?;
        stream.write_all_chunks(pieces).await.map_err(|error| match error {
            quinn::WriteError::Stopped(code) => StreamError::Stopped(code.into_inner()),
            quinn::WriteError::ConnectionLost(error) => StreamError::Connection(error.into()),
            quinn::WriteError::ClosedStream => StreamError::Ended,
            quinn::WriteError::ZeroRttRejected => StreamError::EarlyDataRefused,
        })
    }

    fn set_priority(&self, priority: i32) {
        // Only a stream that has ended refuses.
        let _ = self.stream.as_ref().map(|stream| stream.set_priority(priority));
    }

    fn finish(&mut self) {
        self.ended = true;
        let _ = self.stream.as_mut().map(quinn::SendStream::finish);
    }

    fn reset(&mut self, code: u64) {
        if !core::mem::replace(&mut self.ended, true) {
            let _ = self.stream.as_mut().map(|stream| stream.reset(varint(code)));
        }
    }

    fn stopped(&self) -> impl Future<Output = Option<u64>> + Send + use<> {
        let stopped = self.stream.as_ref().map(quinn::SendStream::stopped);
        async move { stopped?.await.ok().flatten().map(VarInt::into_inner) }
    }
}

/// The receiving half of a quinn stream.
#[derive(Debug)]
pub struct QuicRecv {
    /// Until it is dropped.
    stream: Option<quinn::RecvStream>,
    parking: Parking,
}

impl QuicRecv {
    fn new(stream: quinn::RecvStream, parking: Parking) -> Self {
        Self { stream: Some(stream), parking }
    }
}

impl Drop for QuicRecv {
    fn drop(&mut self) {
        if let Some(mut half) = self.stream.take() {
            // As quinn does with what is dropped. One that has ended, or was stopped, refuses.
            let _ = half.stop(VarInt::from_u32(0));
            self.parking.park(Unused::Recv { _half: half });
        }
    }
}

/// Longest piece that one read returns, in bytes.
const MAX_PIECE: usize = 64 * 1024;

impl RecvStream for QuicRecv {
    async fn read(&mut self) -> Result<Option<Bytes>, StreamError> {
        let stream = self.stream.as_mut().ok_or(StreamError::Ended)?;
        match stream.read_chunk(MAX_PIECE, true).await {
            Ok(chunk) => Ok(chunk.map(|chunk| chunk.bytes)),
            Err(quinn::ReadError::Reset(code)) => Err(StreamError::Reset(code.into_inner())),
            Err(quinn::ReadError::ConnectionLost(error)) => Err(StreamError::Connection(error.into())),
            Err(quinn::ReadError::ZeroRttRejected) => Err(StreamError::EarlyDataRefused),
            Err(_) => Err(StreamError::Ended),
        }
    }

    fn is_early(&self) -> bool {
        self.stream.as_ref().is_some_and(quinn::RecvStream::is_0rtt)
    }

    fn stop(&mut self, code: u64) {
        let _ = self.stream.as_mut().map(|stream| stream.stop(varint(code)));
    }
}

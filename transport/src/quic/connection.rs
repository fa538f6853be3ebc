//! A quinn connection and its streams.

use core::time::Duration;
use std::net::SocketAddr;
use std::sync::Arc;

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
    home: Option<Arc<Home>>,
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
        Self { connection, confirmed, home: None }
    }

    /// A connection whose handshake is done.
    pub(super) fn done(connection: quinn::Connection) -> Self {
        Self { connection, confirmed: watch::channel(Some(true)).1, home: None }
    }

    pub(super) fn at_home(mut self, home: Home) -> Self {
        self.home = Some(Arc::new(home));
        self
    }

    /// The connection underneath, for measurements and tests.
    pub fn inner(&self) -> &quinn::Connection {
        &self.connection
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
        let (send, recv) = self.connection.open_bi().await?;
        Ok((QuicSend::new(send), QuicRecv(recv)))
    }

    async fn open_uni(&self) -> Result<QuicSend, ConnectionError> {
        Ok(QuicSend::new(self.connection.open_uni().await?))
    }

    async fn accept_bi(&self) -> Result<(QuicSend, QuicRecv), ConnectionError> {
        let (send, recv) = self.connection.accept_bi().await?;
        Ok((QuicSend::new(send), QuicRecv(recv)))
    }

    async fn accept_uni(&self) -> Result<QuicRecv, ConnectionError> {
        Ok(QuicRecv(self.connection.accept_uni().await?))
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
    stream: quinn::SendStream,
    /// Finished, or reset.
    ended: bool,
}

impl QuicSend {
    fn new(stream: quinn::SendStream) -> Self {
        Self { stream, ended: false }
    }
}

impl Drop for QuicSend {
    /// quinn would finish it, which the peer would take for an orderly end.
    fn drop(&mut self) {
        self.reset(0);
    }
}

impl SendStream for QuicSend {
    async fn write(&mut self, pieces: &mut [Bytes]) -> Result<(), StreamError> {
        self.stream.write_all_chunks(pieces).await.map_err(|error| match error {
            quinn::WriteError::Stopped(code) => StreamError::Stopped(code.into_inner()),
            quinn::WriteError::ConnectionLost(error) => StreamError::Connection(error.into()),
            quinn::WriteError::ClosedStream => StreamError::Ended,
            quinn::WriteError::ZeroRttRejected => StreamError::EarlyDataRefused,
        })
    }

    fn set_priority(&self, priority: i32) {
        // Only a stream that has ended refuses.
        let _ = self.stream.set_priority(priority);
    }

    fn finish(&mut self) {
        self.ended = true;
        let _ = self.stream.finish();
    }

    fn reset(&mut self, code: u64) {
        if !core::mem::replace(&mut self.ended, true) {
            let _ = self.stream.reset(varint(code));
        }
    }

    fn stopped(&self) -> impl Future<Output = Option<u64>> + Send + use<> {
        let stopped = self.stream.stopped();
        async move { stopped.await.ok().flatten().map(VarInt::into_inner) }
    }
}

/// The receiving half of a quinn stream.
#[derive(Debug)]
pub struct QuicRecv(quinn::RecvStream);

/// Longest piece that one read returns, in bytes.
const MAX_PIECE: usize = 64 * 1024;

impl RecvStream for QuicRecv {
    async fn read(&mut self) -> Result<Option<Bytes>, StreamError> {
        match self.0.read_chunk(MAX_PIECE, true).await {
            Ok(chunk) => Ok(chunk.map(|chunk| chunk.bytes)),
            Err(quinn::ReadError::Reset(code)) => Err(StreamError::Reset(code.into_inner())),
            Err(quinn::ReadError::ConnectionLost(error)) => Err(StreamError::Connection(error.into())),
            Err(quinn::ReadError::ZeroRttRejected) => Err(StreamError::EarlyDataRefused),
            Err(_) => Err(StreamError::Ended),
        }
    }

    fn is_early(&self) -> bool {
        self.0.is_0rtt()
    }

    fn stop(&mut self, code: u64) {
        let _ = self.0.stop(varint(code));
    }
}

//! A client made by hand: it says what it is told to say, and nothing else.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use mainstay_client::Config as ClientConfig;
use mainstay_protocol::Code;
use mainstay_protocol::registry::{ALPN, MAX_FRAME};
use mainstay_protocol::session::{Instance, Operation, Record};
use mainstay_protocol::wire::{
    Append, Attach, AttachMode, Error, Frame, Hello, OpenProducer, Produce, Start, Subscribe, Writer,
};
use mainstay_transport::quic::{QuicConnection, QuicConnector, Trust};
use mainstay_transport::{Connection, ConnectionError, Connector, FrameReader, SendStream};
use tokio::time::timeout;

use crate::harness::{QuicServer, claims};

/// Nothing that a raw client waits for takes longer.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The sending half of a stream.
pub type Send = <QuicConnection as Connection>::Send;
/// The receiving half of a stream.
pub type Recv = <QuicConnection as Connection>::Recv;

/// A connection on which nothing is said that the test does not say.
pub struct Raw {
    /// The connection.
    pub connection: QuicConnection,
    /// Its control stream.
    pub control: (Send, FrameReader<Recv>),
}

impl Raw {
    /// Connects to `addr` and sends `first` on the control stream. Errors: no connection was made.
    pub async fn try_at(addr: SocketAddr, trust: &Trust, first: &[u8]) -> Result<Self, ConnectionError> {
        let limits = ClientConfig::default().transport_limits();
        let connector = QuicConnector::new(addr, trust, &limits, ALPN).map_err(ConnectionError::Failed)?;
        Self::try_over(&connector, first).await
    }

    /// The same over a connector.
    pub async fn try_over(connector: &QuicConnector, first: &[u8]) -> Result<Self, ConnectionError> {
        let connection = connector.connect(true).await?;
        let (mut send, recv) = connection.open_bi().await?;
        send.write(&mut [Bytes::copy_from_slice(first)])
            .await
            .map_err(|error| ConnectionError::Failed(error.to_string()))?;
        Ok(Self { connection, control: (send, FrameReader::new(recv, MAX_FRAME)) })
    }

    /// Connects to a server and sends `first` on the control stream.
    ///
    /// # Panics
    ///
    /// If no connection is made.
    pub async fn connect(server: &QuicServer, first: &[u8]) -> Self {
        Self::try_at(server.addr, server.trust(), first).await.expect("a connection")
    }

    /// Connects and says HELLO with a token that allows everything.
    pub async fn hello(server: &QuicServer) -> Self {
        let token = server.key.mint(&claims("mallory", "", Operation::ALL)).expect("a token");
        Self::hello_with(server, token, [3; 16]).await
    }

    /// Connects and says HELLO with a token, as an instance.
    pub async fn hello_with(server: &QuicServer, token: String, instance: [u8; 16]) -> Self {
        Self::connect(server, &hello(token, instance)).await
    }

    /// Opens a stream and sends `first` on it.
    ///
    /// # Panics
    ///
    /// If the server closed the connection.
    pub async fn open(&self, first: &[u8]) -> (Send, FrameReader<Recv>) {
        self.try_open(first).await.expect("a stream")
    }

    /// The same; `None` if the server closed the connection.
    pub async fn try_open(&self, first: &[u8]) -> Option<(Send, FrameReader<Recv>)> {
        let (mut send, recv) = self.connection.open_bi().await.ok()?;
        // A server that refused what came before may have stopped the stream already.
        let _ = send.write(&mut [Bytes::copy_from_slice(first)]).await;
        Some((send, FrameReader::new(recv, MAX_FRAME)))
    }

    /// Attaches to session `name`.
    ///
    /// # Panics
    ///
    /// If the server does not attach it.
    pub async fn attach(&self, name: &str) -> (Send, FrameReader<Recv>) {
        let (send, mut frames) = self.open(&attach(name)).await;
        assert!(matches!(frames.next().await, Ok(Some(Frame::Attached(_)))));
        (send, frames)
    }

    /// Opens producer `id` of an attachment, with a QUIC stream for its batches.
    ///
    /// # Panics
    ///
    /// If the server does not open it.
    pub async fn producer(&self, (send, frames): &mut (Send, FrameReader<Recv>), id: u64) -> Send {
        let open = OpenProducer { id, name: "p".parse().expect("a name"), epoch: 0 };
        send.write(&mut [Frame::from(open).to_bytes()]).await.expect("write");
        assert!(matches!(frames.next().await, Ok(Some(Frame::Producer(_)))));
        let mut batches = self.connection.open_uni().await.expect("a stream");
        batches.write(&mut [Frame::from(Produce { producer: id }).to_bytes()]).await.expect("write");
        batches
    }

    /// The code with which the server closes the connection.
    ///
    /// # Panics
    ///
    /// If it does not.
    pub async fn closed(&self) -> Code {
        match timeout(PATIENCE, self.connection.closed()).await.expect("the server closes") {
            ConnectionError::Closed { code, .. } => Code(code),
            other => panic!("not closed by the server: {other}"),
        }
    }
}

/// HELLO with a token, as an instance.
pub fn hello(token: String, instance: [u8; 16]) -> Bytes {
    let hello = Hello { instance: Some(Instance(instance)), token: Some(token.into()), ..Hello::default() };
    Frame::from(hello).to_bytes()
}

/// The code and the value of the error that the server answers with, passing over other frames.
///
/// # Panics
///
/// If none comes.
pub async fn refusal(frames: &mut FrameReader<Recv>) -> (Code, u64) {
    loop {
        match timeout(PATIENCE, frames.next()).await.expect("an answer") {
            Ok(Some(Frame::Error(Error { code, value, .. }))) => return (code, value),
            Ok(Some(Frame::Refused(refused))) => return (refused.code, refused.value),
            Ok(Some(_)) => {}
            other => panic!("no error came: {other:?}"),
        }
    }
}

/// The code alone.
pub async fn error(frames: &mut FrameReader<Recv>) -> Code {
    refusal(frames).await.0
}

/// A batch of one record of so many bytes.
pub fn append(sequence: u64, bytes: usize) -> Bytes {
    let mut records = Writer::new();
    Record::data(0, vec![b'x'; bytes]).put(&mut records);
    Frame::from(Append { sequence, count: 1, records: records.freeze(), run_epoch: None }).to_bytes()
}

/// SUBSCRIBE from the beginning.
pub fn subscribe(id: u64) -> Bytes {
    let (start, streams, kinds) = (Start::Earliest, vec![], vec![]);
    Frame::from(Subscribe { id, start, streams, kinds, window: None, folded: false }).to_bytes()
}

/// ATTACH, which creates the session.
///
/// # Panics
///
/// If the name is not valid.
pub fn attach(name: &str) -> Bytes {
    let session = name.parse().expect("a valid name");
    Frame::from(Attach { mode: AttachMode::Create, session, incarnation: None, next: None, expire_after: None })
        .to_bytes()
}

//! How frames travel: one small trait, so that the server and the client know no QUIC crate.
//!
//! A [`Connection`] is a set of QUIC streams between two peers. The bindings:
//!
//! - [`quic`]: quinn over UDP, and over any socket that quinn accepts.
//! - [`memory`]: links inside one process, with the flow control of QUIC and nothing else of it.
//! - [`sim`]: a simulated UDP network for quinn that lives in tokio's paused time.
//!
//! What a new binding must bring: ordered reliable streams in both kinds, per-stream and per-connection flow control,
//! reset and stop with a code, and strict priorities among what is ready to be sent.

pub mod entropy;
mod frames;
mod gather;
pub mod memory;
mod network;
mod outbox;
pub mod quic;
pub mod rate;
pub mod sim;

use core::fmt;
use core::future::Future;
use core::time::Duration;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::registry::CONTROL_RESERVE;

pub use frames::{FrameError, FrameReader};
pub use outbox::Outbox;

/// Why a connection ended or could not be made.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionError {
    /// The peer closed it with an application code.
    Closed {
        /// The code, from the error registry.
        code: u64,
        /// What the peer said, for people.
        reason: String,
    },
    /// This side closed it.
    ClosedHere,
    /// Nothing came back for too long.
    TimedOut,
    /// The peer lost its state, usually by a restart, and said so.
    Reset,
    /// The peer's certificate is not the expected one.
    Untrusted(String),
    /// Nothing at all came back, not even a refusal: UDP is blocked on the way, or the machine is not there. Says what was tried.
    Silent(String),
    /// Anything else that the transport reports.
    Failed(String),
}

impl fmt::Display for ConnectionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { code, reason } => {
                write!(f, "closed by the peer with code {code:#x}: {reason}")
            }
            Self::ClosedHere => f.write_str("closed by this side"),
            Self::TimedOut => f.write_str("timed out"),
            Self::Reset => f.write_str("reset by the peer, which lost its state"),
            Self::Untrusted(why) => write!(f, "the server's certificate is not trusted: {why}"),
            Self::Silent(tried) => write!(f, "nothing came back; UDP seems to be blocked on the way: {tried}"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for ConnectionError {}

/// Why a stream ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamError {
    /// The peer gave up sending, with a code.
    Reset(u64),
    /// The peer does not want to receive more, with a code.
    Stopped(u64),
    /// The connection is gone.
    Connection(ConnectionError),
    /// This side ended the stream before.
    Ended,
    /// The server did not take the early data that it was part of. The connection goes on; what was sent is sent again on new streams.
    EarlyDataRefused,
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset(code) => write!(f, "stream reset with code {code:#x}"),
            Self::Stopped(code) => write!(f, "stream stopped with code {code:#x}"),
            Self::Connection(error) => write!(f, "connection lost: {error}"),
            Self::Ended => f.write_str("stream has ended"),
            Self::EarlyDataRefused => f.write_str("the server did not take early data"),
        }
    }
}

impl std::error::Error for StreamError {}

/// The sending half of a stream.
pub trait SendStream: Send + Sync + 'static {
    /// Sends all `pieces` in order without copying them; waits for flow control. Not cancellation-safe: a dropped future
    /// leaves it open how much was sent.
    fn write(&mut self, pieces: &mut [Bytes]) -> impl Future<Output = Result<(), StreamError>> + Send;

    /// Sets the priority among the streams of the connection; higher goes first. See [`priority`].
    fn set_priority(&self, priority: i32);

    /// Ends the stream after what was written.
    fn finish(&mut self);

    /// Gives the stream up with a code.
    fn reset(&mut self, code: u64);

    /// Waits until the peer stops the stream, or has received all of a finished one; returns the code if it stopped.
    fn stopped(&self) -> impl Future<Output = Option<u64>> + Send + use<Self>;
}

/// The receiving half of a stream.
pub trait RecvStream: Send + Sync + 'static {
    /// The next piece, or `None` at the orderly end. Cancellation-safe.
    fn read(&mut self) -> impl Future<Output = Result<Option<Bytes>, StreamError>> + Send;

    /// Tells the peer that no more is wanted, with a code.
    fn stop(&mut self, code: u64);

    /// True on a server if the stream came with a client's first flight (spec EARLY).
    fn is_early(&self) -> bool {
        false
    }
}

/// A connection to a peer. Clones are the same connection; it stays open until closed or lost.
pub trait Connection: Clone + Send + Sync + 'static {
    /// Sending halves.
    type Send: SendStream;
    /// Receiving halves.
    type Recv: RecvStream;

    /// Opens a bidirectional stream; waits until the peer allows one more.
    fn open_bi(&self) -> impl Future<Output = Result<(Self::Send, Self::Recv), ConnectionError>> + Send;

    /// Opens a unidirectional stream; waits until the peer allows one more.
    fn open_uni(&self) -> impl Future<Output = Result<Self::Send, ConnectionError>> + Send;

    /// The next bidirectional stream that the peer opened. Cancellation-safe.
    fn accept_bi(&self) -> impl Future<Output = Result<(Self::Send, Self::Recv), ConnectionError>> + Send;

    /// The next unidirectional stream that the peer opened. Cancellation-safe.
    fn accept_uni(&self) -> impl Future<Output = Result<Self::Recv, ConnectionError>> + Send;

    /// Sets how many streams of each kind the peer may have open at once.
    fn allow_streams(&self, bidirectional: u32, unidirectional: u32);

    /// Closes the connection with a code; what was not delivered yet is lost.
    fn close(&self, code: u64, reason: &str);

    /// Waits until the connection is gone and says why.
    fn closed(&self) -> impl Future<Output = ConnectionError> + Send;

    /// Waits until the handshake is confirmed: until then a server may have the replay of another connection's first flight before it, and
    /// nothing that it asks for may have an effect (spec EARLY-2). `false` on a client whose early data was not taken: the streams that it
    /// has opened are gone, the connection goes on. Cancellation-safe.
    fn confirmed(&self) -> impl Future<Output = Result<bool, ConnectionError>> + Send {
        core::future::ready(Ok(true))
    }

    /// True once [`Connection::confirmed`] would answer `true` at once.
    fn is_confirmed(&self) -> bool {
        true
    }

    /// A secret that only the two ends of this connection can know, the same at both for the same `label` and `context`. Errors: the
    /// handshake is not confirmed yet.
    fn export(&self, label: &[u8], context: &[u8]) -> Result<[u8; 32], ConnectionError>;

    /// On a client: goes on over a new socket, on whatever network the system has now, and asks the server to follow. What is on its way is
    /// sent again. Errors: the system gives no socket, or the transport has no paths to choose from; the connection goes on as it was.
    fn rebind(&self) -> Result<(), ConnectionError> {
        Err(ConnectionError::Failed("this transport does not change paths".into()))
    }

    /// Where the peer is now, for logs.
    fn remote(&self) -> String;

    /// The current estimate of the round-trip time.
    fn rtt(&self) -> Duration;

    /// SHA-256 of the public key of the certificate that the peer proved to have, if it showed one.
    fn certificate(&self) -> Option<[u8; 32]> {
        None
    }

    /// How often the peer came from another address.
    fn path_changes(&self) -> u64 {
        0
    }

    /// Datagrams that came from the peer so far, where there are such.
    fn heard(&self) -> Option<u64> {
        None
    }
}

/// Takes connections.
pub trait Listener: Send + Sync + 'static {
    /// What it takes.
    type Connection: Connection;

    /// The next connection, or `None` once closed. Its handshake may not be confirmed yet. Cancellation-safe.
    fn accept(&self) -> impl Future<Output = Option<Self::Connection>> + Send;

    /// Where it listens, if that is a socket address.
    fn local_addr(&self) -> Option<SocketAddr>;

    /// Takes new connections from now on, or refuses them at once; those that exist go on.
    fn admit(&self, new: bool);

    /// Closes every connection with a code, tells the peers, and waits until they know or `patience` has passed.
    fn close(&self, code: u64, reason: &str, patience: Duration) -> impl Future<Output = ()> + Send;
}

/// Makes connections.
pub trait Connector: Send + Sync + 'static {
    /// What it makes.
    type Connection: Connection;

    /// Connects to the server that it was made for. With early data where the transport and an earlier connection allow it: then the connection
    /// is there at once, and [`Connection::confirmed`] says when the server has answered. An attempt that is `hopeful`, because something
    /// says that the server can be reached, may use what can be used once. Cancellation-safe.
    fn connect(&self, hopeful: bool) -> impl Future<Output = Result<Self::Connection, ConnectionError>> + Send;

    /// Tries `addr` first from now on, as long as it answers: the server moves there.
    fn redirect(&self, addr: SocketAddr) {
        let _ = addr;
    }

    /// Waits until the way to the server may have changed: another local address, another route, a network that is back. Cancellation-safe.
    fn network_changed(&self) -> impl Future<Output = ()> + Send {
        core::future::pending()
    }

    /// Finds out why nothing answers, within a second: what was tried, and what came of it.
    fn diagnose(&self) -> impl Future<Output = ConnectionError> + Send {
        core::future::ready(ConnectionError::TimedOut)
    }

    /// The server, for messages to people.
    fn target(&self) -> String;

    /// Closes one of its connections with a code and waits until that was sent. What the network does with it is not known.
    fn farewell(&self, connection: &Self::Connection, code: u64, reason: &str) -> impl Future<Output = ()> + Send {
        connection.close(code, reason);
        core::future::ready(())
    }
}

impl<C: Connector> Connector for Arc<C> {
    type Connection = C::Connection;

    fn connect(&self, hopeful: bool) -> impl Future<Output = Result<Self::Connection, ConnectionError>> + Send {
        C::connect(self, hopeful)
    }

    fn redirect(&self, addr: SocketAddr) {
        C::redirect(self, addr);
    }

    fn network_changed(&self) -> impl Future<Output = ()> + Send {
        C::network_changed(self)
    }

    fn diagnose(&self) -> impl Future<Output = ConnectionError> + Send {
        C::diagnose(self)
    }

    fn target(&self) -> String {
        C::target(self)
    }

    fn farewell(&self, connection: &Self::Connection, code: u64, reason: &str) -> impl Future<Output = ()> + Send {
        C::farewell(self, connection, code, reason)
    }
}

/// Priorities of streams (spec FLOW-7): few levels, strict between them.
pub mod priority {
    /// Control and attachments.
    pub const CONTROL: i32 = 100;
    /// Live deliveries, appends.
    pub const LIVE: i32 = 0;
    /// Deliveries of history.
    pub const CATCH_UP: i32 = -10;
}

/// Flow-control limits of one side, derived from what it states in HELLO (spec FLOW-2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one bulk stream that the peer may send beyond what was credited.
    pub bulk_window: u64,
    /// Bulk streams that the peer may open.
    pub bulk_streams: u64,
    /// Bytes of bulk that this side is willing to have on the way.
    pub send_budget: u64,
    /// How often an idle connection is kept alive, if at all.
    pub keep_alive: Option<Duration>,
    /// After how long without a packet a connection is lost.
    pub idle: Duration,
    /// Bidirectional streams that the peer may open at first.
    pub bidirectional: u32,
    /// Unidirectional streams that the peer may open at first.
    pub unidirectional: u32,
}

impl Limits {
    /// The connection's receive window: all bulk windows and the control reserve, so that control always fits.
    pub fn receive_window(&self) -> u64 {
        self.bulk_window * self.bulk_streams + CONTROL_RESERVE as u64
    }

    /// The connection's send window, by the same rule.
    pub fn send_window(&self) -> u64 {
        self.send_budget + CONTROL_RESERVE as u64
    }

    /// The receive window of one stream: a bulk window, and enough for control streams.
    pub fn stream_window(&self) -> u64 {
        self.bulk_window.max(64 * 1024)
    }
}

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

mod frames;
mod gather;
pub mod memory;
mod outbox;
pub mod quic;
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
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset(code) => write!(f, "stream reset with code {code:#x}"),
            Self::Stopped(code) => write!(f, "stream stopped with code {code:#x}"),
            Self::Connection(error) => write!(f, "connection lost: {error}"),
            Self::Ended => f.write_str("stream has ended"),
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

    /// Where the peer is now, for logs.
    fn remote(&self) -> String;

    /// The current estimate of the round-trip time.
    fn rtt(&self) -> Duration;

    /// Datagrams that came from the peer so far, where there are such.
    fn heard(&self) -> Option<u64> {
        None
    }
}

/// Takes connections.
pub trait Listener: Send + Sync + 'static {
    /// What it takes.
    type Connection: Connection;

    /// The next connection whose handshake is done, or `None` once closed. Cancellation-safe.
    fn accept(&self) -> impl Future<Output = Option<Self::Connection>> + Send;

    /// Where it listens, if that is a socket address.
    fn local_addr(&self) -> Option<SocketAddr>;

    /// Takes no more connections; those that exist go on.
    fn refuse_new(&self);

    /// Closes every connection with a code, tells the peers, and waits until they know or a moment has passed.
    fn close(&self, code: u64, reason: &str) -> impl Future<Output = ()> + Send;
}

/// Makes connections.
pub trait Connector: Send + Sync + 'static {
    /// What it makes.
    type Connection: Connection;

    /// Connects to the server that it was made for.
    fn connect(&self) -> impl Future<Output = Result<Self::Connection, ConnectionError>> + Send;

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

    fn connect(&self) -> impl Future<Output = Result<Self::Connection, ConnectionError>> + Send {
        C::connect(self)
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

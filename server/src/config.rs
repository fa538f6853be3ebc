//! Every knob, its default and what it costs.

use core::time::Duration;

use mainstay_transport::Limits;
use mainstay_transport::quic::IDLE;

/// Limits and delays of a server. `Default` is right for one machine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// Bytes of one producer's QUIC stream that may be sent beyond what was credited. With `producers` it bounds what one
    /// connection can make the server hold: 4 MiB by default.
    pub producer_window: u64,
    /// Producers that one connection may have open.
    pub producers: u64,
    /// Bytes of deliveries that one connection may have on the way, shared by the subscriptions that the client says it
    /// may open.
    pub delivery_budget: u64,
    /// Attachments that one connection may have open.
    pub attachments: usize,
    /// Bytes of batches that all connections together may have between arrival and answer.
    pub ingest_budget: usize,
    /// Bytes of batches that one session may have accepted and not yet in a commit.
    pub session_backlog: usize,
    /// Bytes of recent chunks kept in memory for each hot session, for its live subscribers.
    pub ring_bytes: usize,
    /// Bytes of recent chunks kept in memory for all sessions together.
    pub ring_budget: usize,
    /// How often it is looked for sessions that are due: to be deleted, or because they have something to write.
    pub due_pause: Duration,
    /// How long a session without attachments stays in memory.
    pub idle: Duration,
    /// How long a connection may take to say HELLO, once its handshake is confirmed.
    pub hello_timeout: Duration,
    /// After how long without a packet a connection is lost. A phone that was without network for less goes on where it was.
    pub idle_timeout: Duration,
    /// How long after its end the parts of a message are put together in storage; `None` for never. Readers that lag so long behind
    /// get the whole text in their place.
    pub compact_after: Option<Duration>,
    /// Chunk bytes after which a snapshot of a session is kept, so that loading it reads at most about this much.
    pub snapshot_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            producer_window: 128 * 1024,
            producers: 32,
            delivery_budget: 4 << 20,
            attachments: 1024,
            ingest_budget: 64 << 20,
            session_backlog: 1 << 20,
            ring_bytes: 256 * 1024,
            ring_budget: 256 << 20,
            due_pause: Duration::from_secs(1),
            idle: Duration::from_secs(10),
            hello_timeout: Duration::from_secs(5),
            idle_timeout: IDLE,
            compact_after: Some(Duration::from_secs(60)),
            snapshot_bytes: 8 << 20,
        }
    }
}

impl Config {
    /// What the transport must be set up with, so that control always fits beside bulk (spec FLOW-2).
    pub fn transport_limits(&self) -> Limits {
        Limits {
            bulk_window: self.producer_window,
            bulk_streams: self.producers,
            send_budget: self.delivery_budget,
            // Keep-alive is the clients' business: only they know what it costs them.
            keep_alive: None,
            idle: self.idle_timeout,
            // Few at first: QUIC implementations set memory aside for each stream that they allow.
            bidirectional: 4,
            unidirectional: 4,
        }
    }
}

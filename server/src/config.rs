//! Every knob, its default and what it costs.

use core::time::Duration;

use mainstay_protocol::session::Bounds;
use mainstay_transport::Limits;
use mainstay_transport::quic::IDLE;
use mainstay_transport::rate::Rate;

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
    /// Connections of the whole server. Beyond them handshakes are refused.
    pub connections: usize,
    /// How long a connection may be without a token in force. Who has none can do nothing, and costs memory.
    pub unauthenticated: Duration,
    /// Bytes of memory from which on load is shed, and never reached (spec LIM-6); `None` for no bound.
    pub memory: Option<usize>,
    /// What one connection may do, whoever it is.
    pub connection: ConnectionQuotas,
    /// Who may have and do how much.
    pub quotas: Quotas,
}

/// What one connection may do before it is known what it wants: no program that keeps to the protocol comes near that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConnectionQuotas {
    /// QUIC streams opened: an application that attaches to everything it has, again and again.
    pub streams: Rate,
    /// Streams opened, and requests refused, before a token is in force: what comes with the first flight, and now and then something more.
    pub without_token: Rate,
    /// PINGs: a sign of life of every membership there can be, each second.
    pub pings: Rate,
    /// TOKENs: the one of a client is good for minutes.
    pub tokens: Rate,
    /// Streams that break the protocol, and tokens that are not believed. One is a bug of a program; this many are its purpose.
    pub violations: usize,
}

impl Default for ConnectionQuotas {
    fn default() -> Self {
        Self {
            streams: Rate { per_second: 1000, burst: 4096 },
            without_token: Rate { per_second: 1, burst: 16 },
            pings: Rate { per_second: 1024, burst: 4096 },
            tokens: Rate { per_second: 1, burst: 20 },
            violations: 16,
        }
    }
}

/// Namespaces of one process: each has a store, with caches and a thread of its own (spec LIM-5).
pub const MAX_NAMESPACES: usize = 64;

/// Connections at once to the listener of an operator: scrapers and probes are few (spec LIM-5).
pub const OPERATOR_CONNECTIONS: usize = 64;

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
            connections: 16_384,
            unauthenticated: Duration::from_secs(10),
            memory: None,
            connection: ConnectionQuotas::default(),
            quotas: Quotas::default(),
        }
    }
}

/// Who may have and do how much, beside what each connection may (spec, section 22). `Default` is for one application that trusts its
/// users: as much as the machine can do. [`Quotas::public`] is for users who are strangers to each other.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Quotas {
    /// Of one subject of a token.
    pub subject: SubjectQuotas,
    /// Of one session.
    pub session: SessionQuotas,
    /// Of all sessions under some prefix; the empty one stands for the namespace.
    pub prefixes: Vec<PrefixQuotas>,
}

/// What one subject may have and do, over all of its connections. `None` is no limit.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SubjectQuotas {
    /// Connections at once.
    pub connections: usize,
    /// Connections made.
    pub connects: Option<Rate>,
    /// Records appended.
    pub appends: Option<Rate>,
    /// Bytes of records appended.
    pub append_bytes: Option<Rate>,
    /// Attachments made.
    pub attaches: Option<Rate>,
    /// Sessions created.
    pub creates: Option<Rate>,
    /// Pages of lists, and tokens made.
    pub lookups: Option<Rate>,
    /// Joins and updates of members.
    pub presence: Option<Rate>,
    /// Signals.
    pub signals: Option<Rate>,
    /// Other requests that have an effect.
    pub requests: Option<Rate>,
    /// QUIC streams opened, by which everything is asked. What is beyond is taken a second later.
    pub streams: Option<Rate>,
    /// Requests that are refused, whatever for. What is refused beyond that is told a second later.
    pub refusals: Option<Rate>,
}

impl Default for SubjectQuotas {
    fn default() -> Self {
        Self {
            connections: usize::MAX,
            connects: None,
            appends: None,
            append_bytes: None,
            attaches: None,
            creates: None,
            lookups: None,
            presence: None,
            signals: None,
            requests: None,
            streams: None,
            refusals: None,
        }
    }
}

/// What one session may have.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SessionQuotas {
    /// Attachments at once.
    pub attachments: usize,
    /// Subscriptions at once.
    pub subscriptions: usize,
    /// Members, keys of state and bytes of state; never more than the protocol allows.
    pub bounds: Bounds,
    /// Records appended.
    pub appends: Option<Rate>,
    /// Bytes of records appended.
    pub append_bytes: Option<Rate>,
    /// Bytes stored. To know them, the server reads a session that it loads once more in the background.
    pub stored_bytes: Option<u64>,
}

impl Default for SessionQuotas {
    fn default() -> Self {
        Self {
            attachments: usize::MAX,
            subscriptions: usize::MAX,
            bounds: Bounds::default(),
            appends: None,
            append_bytes: None,
            stored_bytes: None,
        }
    }
}

/// What the sessions under one prefix may have together.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct PrefixQuotas {
    /// Which sessions: as the prefix of a grant covers them (spec AUTH-7).
    pub prefix: String,
    /// How many there may be.
    pub sessions: Option<u64>,
    /// Bytes stored. To know them, the server reads all of these sessions after its start and now and then, in the background, for at most a
    /// fiftieth of the time.
    pub stored_bytes: Option<u64>,
    /// Records appended.
    pub appends: Option<Rate>,
    /// Bytes of records appended.
    pub append_bytes: Option<Rate>,
}

impl Quotas {
    /// For users who are strangers to each other. The reason of each number is in the specification (section 22).
    pub fn public() -> Self {
        let rate = |per_second, burst| Some(Rate { per_second, burst });
        Self {
            subject: SubjectQuotas {
                connections: 64,
                connects: rate(2, 64),
                appends: rate(1000, 2000),
                append_bytes: rate(256 << 10, 768 << 10),
                attaches: rate(10, 200),
                creates: rate(2, 30),
                lookups: rate(2, 20),
                presence: rate(5, 50),
                signals: rate(5, 50),
                requests: rate(20, 200),
                streams: rate(50, 512),
                refusals: rate(20, 200),
            },
            session: SessionQuotas {
                attachments: 8192,
                subscriptions: 8192,
                appends: rate(5000, 20_000),
                append_bytes: rate(1 << 20, 8 << 20),
                ..SessionQuotas::default()
            },
            prefixes: Vec::new(),
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

//! Numbers of the wire and of the log that are not frame types or error codes: limits, kinds, parameters, reserved
//! ranges. `spec/registry.toml` is their only home; `tests/registry.rs` compares it with this file.

/// The ALPN token of this protocol version (spec CONN-1).
pub const ALPN: &[u8] = b"mainstay/1";

/// Version byte of the chunk envelope (spec CHUNK-1).
pub const CHUNK_VERSION: u8 = 1;

/// Version byte of the envelope of chunks that compaction put together (spec CHUNK-8).
pub const COMPACTED_VERSION: u8 = 2;

/// Version byte of a state snapshot (spec DUR-9).
pub const SNAPSHOT_VERSION: u8 = 4;

/// The oldest version of a state snapshot that is read (spec DUR-9).
pub const OLDEST_SNAPSHOT_VERSION: u8 = 1;

/// Version of the fold and of the view encoding (spec FOLD-1).
pub const FOLD_VERSION: u64 = 6;

/// Longest session name in bytes of UTF-8 (spec SESS-1).
pub const MAX_NAME: usize = 512;
/// Longest name of a stream or of a producer in bytes of UTF-8 (spec SESS-2).
pub const MAX_LABEL: usize = 128;
/// Longest subject of a capability token in bytes of UTF-8 (spec AUTH-3).
pub const MAX_SUBJECT: usize = 256;
/// Longest capability token in bytes (spec AUTH-2).
pub const MAX_TOKEN: usize = 3072;
/// Grants of one token (spec AUTH-2).
pub const MAX_GRANTS: usize = 32;
/// Longest id of a token in bytes of UTF-8 (spec AUTH-8).
pub const MAX_TOKEN_ID: usize = 64;
/// Tokens that one may have been made from, one after the other (spec AUTH-9).
pub const MAX_DELEGATIONS: usize = 8;
/// The longest time in milliseconds after which a server asks to try again (spec ERR-6).
pub const MAX_RETRY_AFTER: u64 = 60_000;
/// Longest record in bytes of record encoding (spec REC-2).
pub const MAX_RECORD: usize = 256 * 1024;
/// Most headers of one record (spec REC-5).
pub const MAX_HEADERS: usize = 32;
/// Most records of one batch (spec PROD-3).
pub const MAX_BATCH_RECORDS: usize = 1000;
/// Most bytes of one batch's record region (spec PROD-3).
pub const MAX_BATCH_BYTES: usize = 512 * 1024;
/// Longest frame body in bytes once authenticated (spec WIRE-5).
pub const MAX_FRAME: usize = 576 * 1024;
/// Longest frame body in bytes before authentication (spec WIRE-5).
pub const MAX_FRAME_UNAUTHENTICATED: usize = 4096;
/// Longest human-readable message in a frame, in bytes of UTF-8 (spec ERR-4).
pub const MAX_DETAIL: usize = 512;
/// Batches of one producer that may be unacknowledged, and for which original seqs are kept (spec PROD-6).
pub const PRODUCER_WINDOW: usize = 256;
/// Streams of one session (spec SESS-6).
pub const MAX_STREAMS: usize = 256;
/// Producers of one session that the server keeps (spec PROD-9).
pub const MAX_PRODUCERS: usize = 1024;
/// Instances of one session that are bound to client keys (spec RES-4).
pub const MAX_RESUMPTIONS: usize = 1024;
/// Longest resume token in bytes (spec RES-2).
pub const MAX_RESUME_TOKEN: usize = 1024;
/// Chunk bytes that one session may put into one commit turn, unless a single batch is larger (spec DUR-5).
pub const TURN_BYTES: usize = 64 * 1024;
/// Longest encoded chunk: one batch of the largest size under the largest header.
pub const MAX_CHUNK: usize = MAX_FRAME;
/// Sessions in one LISTED frame (spec SESS-20).
pub const MAX_LISTED: usize = 256;
/// Producer positions of the caller in one ATTACHED frame (spec SESS-9).
pub const MAX_POSITIONS: usize = 32;
/// Entries of a subscription filter, streams and kinds together (spec SUB-4).
pub const MAX_FILTER: usize = 64;
/// Messages of one session that may be open (spec MSG-5).
pub const MAX_OPEN_MESSAGES: usize = 64;
/// Bytes of one message (spec MSG-5).
pub const MAX_MESSAGE: usize = 1024 * 1024;
/// Bytes of all open messages of one session (spec MSG-5).
pub const MAX_OPEN_BYTES: usize = 4 * 1024 * 1024;
/// Finished messages whose bytes a view keeps (spec FOLD-5).
pub const KEPT_MESSAGES: usize = 100;
/// Bytes of finished messages that a view keeps (spec FOLD-5).
pub const KEPT_MESSAGE_BYTES: usize = 1024 * 1024;
/// Older messages that a view knows without their bytes (spec FOLD-5).
pub const INDEXED_MESSAGES: usize = 1024;
/// Longest key of the shared state in bytes of UTF-8 (spec STATE-1).
pub const MAX_KEY: usize = 512;
/// Keys of one session's shared state that may have a value (spec STATE-2).
pub const MAX_STATE_KEYS: usize = 4096;
/// Bytes of all keys and values of one session's shared state (spec STATE-2).
pub const MAX_STATE_BYTES: usize = 8 * 1024 * 1024;
/// Longest canonical encoding of a view in bytes (spec SUB-6): what the other limits add up to, and room.
pub const MAX_VIEW: usize = 24 * 1024 * 1024;
/// Longest window of a roll-up in milliseconds (spec SUB-13).
pub const MAX_WINDOW: u64 = 500;
/// Members of one session (spec PRES-5).
pub const MAX_MEMBERS: usize = 4096;
/// Bytes of a member's data (spec PRES-2).
pub const MAX_MEMBER_DATA: usize = 512;
/// Progress of a member that is done, in percent (spec PRES-2).
pub const MAX_PROGRESS: u64 = 100;
/// Shortest grace of a member in milliseconds (spec PRES-4).
pub const MIN_GRACE: u64 = 1000;
/// Longest grace of a member in milliseconds (spec PRES-4).
pub const MAX_GRACE: u64 = 120_000;
/// Role of the messages that are for an agent (spec RUN-8).
pub const INPUT_ROLE: &str = "user";
/// Runs of one session that may be active (spec RUN-2).
pub const MAX_RUNS: usize = 64;
/// Lost runs of one session that may still be taken over (spec RUN-5).
pub const KEPT_LOST_RUNS: usize = 16;
/// Runs that are over which a view knows (spec FOLD-8).
pub const KEPT_RUNS: usize = 64;
/// Inputs that no run has read which a view knows (spec RUN-8).
pub const MAX_INPUTS: usize = 256;
/// Clients of one session that may wait for a run to be lost (spec RUN-7).
pub const MAX_STANDBYS: usize = 64;
/// Shortest lease of a run in milliseconds (spec RUN-4).
pub const MIN_LEASE: u64 = 1000;
/// Longest lease of a run in milliseconds (spec RUN-4).
pub const MAX_LEASE: u64 = 600_000;
/// Milliseconds for which a run is held on whose holder closed its connection: it may be on its way back (spec RUN-4).
pub const DEPARTED_LEASE: u64 = 500;
/// Signals of one session that nobody took yet (spec SIG-3).
pub const MAX_SIGNALS: usize = 64;
/// Of those, for cancels and interrupts alone (spec SIG-3).
pub const RESERVED_SIGNALS: usize = 16;
/// Signals that nobody took, of subjects with the same first part, from which on those who may send them about their own alone send no more,
/// but to cancel (spec SIG-9).
pub const MAX_OWN_SIGNALS: usize = 16;
/// Bytes of a signal's text (spec SIG-3): all that are pending fit into what a peer may leave unread of control.
pub const MAX_SIGNAL_TEXT: usize = 2048;
/// Signals that something became of which a view knows (spec FOLD-9).
pub const KEPT_SIGNALS: usize = 256;
/// Requests of one session that nobody answered yet (spec SIG-7).
pub const MAX_REQUESTS: usize = 64;
/// Bytes of a request's body (spec SIG-7).
pub const MAX_REQUEST_BODY: usize = 16 * 1024;
/// Requests that something became of which a view knows (spec FOLD-9).
pub const KEPT_REQUESTS: usize = 256;
/// Rules of notification of one session (spec NOTE-1).
pub const MAX_RULES: usize = 32;
/// Kinds of records of which one rule tells (spec NOTE-2).
pub const MAX_TRIGGERS: usize = 4;
/// Jobs of one session that nobody has done (spec NOTE-3).
pub const MAX_JOBS: usize = 64;
/// Jobs that one worker may have in hand (spec NOTE-5).
pub const MAX_PULLED: usize = 256;
/// Milliseconds after which a worker that sends nothing on control has no jobs in hand any more (spec NOTE-5).
pub const WORKER_SILENCE: u64 = 20_000;
/// Longest time in milliseconds after which a signal or a request expires: one day (spec SIG-3, SIG-7).
pub const MAX_LASTS: u64 = 86_400_000;
/// Control bytes that always fit beside bulk, in bytes (spec FLOW-2).
pub const CONTROL_RESERVE: usize = 256 * 1024;
/// Smallest bulk window that a peer may state, in bytes (spec FLOW-3).
pub const MIN_BULK_WINDOW: u64 = 4096;

/// Bulk window of a peer whose HELLO states none, in bytes (spec FLOW-3).
pub const DEFAULT_BULK_WINDOW: u64 = 256 * 1024;
/// Bulk QUIC streams of a peer whose HELLO states none (spec FLOW-3).
pub const DEFAULT_BULK_STREAMS: u64 = 8;

/// Reason of a GAP: the records were trimmed (spec SUB-8).
pub const GAP_TRIMMED: u64 = 0;

/// Stream id of the stream `main`, which every session has (spec SESS-6).
pub const STREAM_MAIN: u64 = 0;
/// Name of the stream that every session has.
pub const STREAM_MAIN_NAME: &str = "main";

/// Control entry numbers (spec CHUNK-7).
pub mod control {
    /// The session was created.
    pub const CREATED: u64 = 0x00;
    /// A writer took the session over under a new writer epoch.
    pub const FENCE: u64 = 0x02;
    /// A producer was granted an epoch.
    pub const PRODUCER: u64 = 0x04;
    /// A stream name was bound to a stream id.
    pub const STREAM: u64 = 0x06;
    /// Records below a seq were released.
    pub const TRIM: u64 = 0x08;
    /// An instance was bound to a client key, or its resume token was used.
    pub const RESUME: u64 = 0x0a;
}

/// HELLO parameter ids (spec CONN-5).
pub mod hello {
    /// 128-bit id of one client installation or tab; required from clients.
    pub const INSTANCE: u64 = 0x00;
    /// Software name and version, for logs.
    pub const AGENT: u64 = 0x01;
    /// Capability token.
    pub const TOKEN: u64 = 0x02;
    /// Bulk window: bytes of one bulk QUIC stream that may be sent and not yet credited.
    pub const BULK_WINDOW: u64 = 0x04;
    /// Bulk QUIC streams that the peer may have open at once.
    pub const BULK_STREAMS: u64 = 0x06;
    /// Longest frame body accepted.
    pub const MAX_FRAME: u64 = 0x08;
    /// Longest record accepted.
    pub const MAX_RECORD: u64 = 0x0a;
    /// Most records of a batch.
    pub const MAX_BATCH_RECORDS: u64 = 0x0c;
    /// Most bytes of a batch.
    pub const MAX_BATCH_BYTES: u64 = 0x0e;
    /// Unacknowledged batches of one producer.
    pub const PRODUCER_WINDOW: u64 = 0x10;
    /// Attachments of one connection.
    pub const MAX_ATTACHMENTS: u64 = 0x12;
}

/// ATTACH parameter ids (spec SESS-8).
pub mod attach {
    /// Incarnation of the cursor that the client holds.
    pub const INCARNATION: u64 = 0x00;
    /// Next seq of the cursor that the client holds.
    pub const NEXT: u64 = 0x02;
    /// Milliseconds without use after which a created session is deleted.
    pub const EXPIRE_AFTER: u64 = 0x04;
}

/// APPEND parameter ids (spec PROD-3).
pub mod append {
    /// Epoch of the run that the batch is part of.
    pub const RUN_EPOCH: u64 = 0x00;
}

/// PING parameter ids (spec CONN-9).
pub mod ping {
    /// Bytes that say nothing (spec ROAM-2).
    pub const PADDING: u64 = 0x01;
}

/// GOAWAY parameter ids (spec CONN-10).
pub mod goaway {
    /// Where the process that takes the server's place listens: 16 bytes of an IPv6 address, of an IPv4 one mapped, and the port.
    pub const ADDRESS: u64 = 0x01;
}

/// SUBSCRIBE parameter ids (spec SUB-3).
pub mod subscribe {
    /// Stream names to deliver; absent means all.
    pub const STREAMS: u64 = 0x00;
    /// Record kinds to deliver; absent means all.
    pub const KINDS: u64 = 0x02;
    /// Milliseconds between deliveries in which the parts of messages are put together; absent means every record.
    pub const WINDOW: u64 = 0x04;
    /// The view takes the place of much that waits; without a value.
    pub const FOLDED: u64 = 0x06;
}

/// True if `id` of a frame, kind or parameter may be skipped by a receiver that does not know it (spec WIRE-7).
pub const fn is_ignorable(id: u64) -> bool {
    id & 1 == 1
}

/// The `n`th reserved number that means nothing and must be skipped: `0x3e * n + 0x21`, always ignorable (spec WIRE-8).
/// `n` is taken modulo 2^32 so that the result is always a varint.
pub const fn grease(n: u32) -> u64 {
    0x3e * n as u64 + 0x21
}

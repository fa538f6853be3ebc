//! The trait and its types.

use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll};
use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::session::{Chunk, Compaction, Incarnation, SessionName};
use tokio::sync::oneshot;

/// A running request. Dropping it does not undo the request.
pub type Pending<T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send>>;

/// One life of a named session.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SessionId {
    /// Its name.
    pub name: SessionName,
    /// Its incarnation.
    pub incarnation: Incarnation,
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.incarnation)
    }
}

/// Why a store did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoreError {
    /// No session has this name and incarnation.
    NotFound,
    /// A newer writer holds the session, under this epoch.
    Fenced {
        /// The epoch in force.
        epoch: u64,
    },
    /// Stored data of the session is damaged; the session is quarantined.
    Damaged {
        /// The first seq that cannot be trusted.
        seq: u64,
        /// What is wrong.
        what: String,
    },
    /// There is not enough free space. Nothing was written; try again when there is.
    NoSpace,
    /// The store has too much to do. Try again later.
    Overloaded,
    /// The store failed and takes nothing more until the process is started again.
    Failed {
        /// What failed.
        what: String,
    },
    /// The request breaks the contract: a chunk that is not the next one, a writer that was closed.
    Invalid {
        /// What is wrong with it.
        what: &'static str,
    },
}

impl StoreError {
    /// True if the same request may succeed later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::NoSpace | Self::Overloaded)
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFound => f.write_str("no such session"),
            Self::Fenced { epoch } => {
                write!(f, "a newer writer holds the session under epoch {epoch}")
            }
            Self::Damaged { seq, what } => write!(f, "stored data is damaged at seq {seq}: {what}"),
            Self::NoSpace => f.write_str("free disk space is below the reserve"),
            Self::Overloaded => f.write_str("the store has too much to do"),
            Self::Failed { what } => write!(f, "the store failed: {what}"),
            Self::Invalid { what } => f.write_str(what),
        }
    }
}

impl std::error::Error for StoreError {}

/// What became of an append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The chunk is durable.
    Committed,
    /// The chunk is not stored and never will be.
    NotCommitted(StoreError),
    /// It is not known; ask [`Store::resolve`].
    Unknown(StoreError),
}

/// An append on its way. If the engine goes away without an answer the outcome is `Unknown`.
#[derive(Debug)]
pub struct Committing(oneshot::Receiver<Outcome>);

impl Committing {
    /// An append and the engine's end of it.
    pub fn channel() -> (oneshot::Sender<Outcome>, Self) {
        let (answer, receiver) = oneshot::channel();
        (answer, Self(receiver))
    }

    /// An append whose outcome is known.
    pub fn ready(outcome: Outcome) -> Self {
        let (answer, this) = Self::channel();
        // The receiver lives in `this`.
        let _ = answer.send(outcome);
        this
    }
}

impl Future for Committing {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        Pin::new(&mut self.0).poll(cx).map(|answer| {
            answer.unwrap_or_else(|_| {
                Outcome::Unknown(StoreError::Failed { what: "the engine went away before it answered".into() })
            })
        })
    }
}

/// The right to append to one session. Exclusive: opening another one fences it.
#[derive(Debug)]
pub struct Writer {
    /// The session.
    pub session: SessionId,
    /// The writer epoch granted, above every earlier one of this session.
    pub epoch: u64,
}

/// The answer to a create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    /// The session exists from now on.
    New,
    /// Somebody else's session has the name.
    Existing(SessionStat),
}

/// What a store knows of a session without reading its records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionStat {
    /// The session.
    pub session: SessionId,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created: u64,
    /// The first seq that the last trim left; the chunk that holds it may begin below.
    pub first: u64,
    /// The seq that the next record will get.
    pub tail: u64,
    /// Milliseconds without use after which it expires; 0 for never.
    pub expire_after: u64,
    /// The time of the last chunk, or of the creation, in milliseconds since the Unix epoch.
    pub written: u64,
    /// Chunks written so far, trimmed ones included: the number of the next chunk.
    pub chunks: u64,
    /// The number of the first chunk that is kept: 0 as long as none was removed, so that the log can be folded from its beginning.
    pub kept: u64,
    /// When it has something to write by itself, in milliseconds since the Unix epoch.
    pub wake: Option<u64>,
    /// How far it is compacted.
    pub compaction: Compaction,
}

/// Where a read starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadFrom {
    /// The chunk that holds this seq.
    Seq(u64),
    /// The chunk with this number, whose first seq is known.
    Chunk {
        /// First seq of the chunk.
        first: u64,
        /// Its number.
        number: u64,
    },
}

/// Consecutive chunks. A page that is shorter than asked for is not the end: `tail` is.
#[derive(Debug, Clone)]
pub struct Page {
    /// The chunks, possibly none.
    pub chunks: Vec<Arc<Chunk>>,
    /// The first seq of the first chunk that is kept.
    pub first: u64,
    /// The durable end: the seq that the next record will get.
    pub tail: u64,
}

/// One page of names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListPage {
    /// Sessions in the order of their names' bytes.
    pub sessions: Vec<SessionStat>,
    /// True if more may follow after the last name looked at, `after`.
    pub more: bool,
    /// Where the next page starts: the last name looked at.
    pub after: Vec<u8>,
}

/// How a store is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It takes appends.
    Serving,
    /// It refuses appends until there is free space, and serves reads.
    NoSpace,
    /// It failed; only a new process can go on.
    Failed {
        /// What failed.
        what: String,
    },
}

/// A storage engine; see the [contract](crate).
///
/// Every method may be called from any task; none blocks the caller.
pub trait Store: Send + Sync + 'static {
    /// Creates a session under a name that is free, by compare-and-set on the name. With `expire_after` other than 0 it is
    /// due so many milliseconds after `created`; the engine only remembers, see [`Store::due`].
    ///
    /// Errors: `NoSpace`, `Overloaded`, `Failed`.
    fn create(&self, session: SessionId, created: u64, expire_after: u64) -> Pending<Created>;

    /// What is known of the session that has this name now. Errors: `Failed`, `Damaged`.
    fn stat(&self, name: SessionName) -> Pending<Option<SessionStat>>;

    /// Takes the session over: grants the next writer epoch durably and fences the writers before.
    ///
    /// Errors: `NotFound`, `Damaged`, `NoSpace`, `Failed`.
    fn open_writer(&self, session: SessionId) -> Pending<Writer>;

    /// Lets a writer go. It costs memory until then, nothing else.
    fn close_writer(&self, writer: Writer);

    /// Appends the next chunk. The engine refuses one that does not follow the last (`NotCommitted(Invalid)`). From it on the session
    /// has something to write by itself at `wake`, in milliseconds since the Unix epoch.
    ///
    /// `NotCommitted` reasons: `Fenced`, `NotFound` after a delete, `NoSpace`, `Overloaded`, `Damaged`, `Failed`, `Invalid`.
    fn append(&self, writer: &Writer, chunk: Arc<Chunk>, wake: Option<u64>) -> Committing;

    /// Finds out whether a chunk whose append was `Unknown` is stored. Errors: `Failed`, `Damaged`, `Fenced`: then it is
    /// still not known.
    fn resolve(&self, writer: &Writer, chunk: Arc<Chunk>) -> Pending<bool>;

    /// Reads consecutive chunks, at most about `budget` bytes of them, at least one if there is one. Those of one page may be put
    /// together ([`Store::compact`]).
    ///
    /// A start below the first kept chunk starts there. Errors: `NotFound`, `Damaged`, `Failed`.
    fn read(&self, session: SessionId, from: ReadFrom, budget: usize) -> Pending<Page>;

    /// Keeps `state` as the session's newest snapshot.
    ///
    /// It comes behind what was asked for before, and before the next snapshot of this writer. Until it is answered, it is in no order with
    /// anything else that is asked for next: a writer that is opened or a session that is deleted meanwhile may leave it not taken, and a trim or
    /// a compaction that needs it must wait for the answer. Errors: `Fenced`, `NotFound`, `NoSpace`, `Failed`.
    fn put_snapshot(&self, writer: &Writer, state: Bytes) -> Pending<()>;

    /// The newest snapshot, if there is one. Errors: `NotFound`, `Failed`.
    fn snapshot(&self, session: SessionId) -> Pending<Option<Bytes>>;

    /// Removes whole chunks whose records are all below `before`. Needs a snapshot that covers them; the space comes back
    /// in the background. Errors: `Fenced`, `NotFound`, `Invalid` without such a snapshot, `NoSpace`, `Failed`.
    fn trim(&self, writer: &Writer, before: u64) -> Pending<()>;

    /// Puts `chunk` in the place of the stored chunks that it covers, which one read returned together, and which are below a snapshot
    /// that this writer has put. The space comes back in the background.
    ///
    /// Errors: `Fenced`, `NotFound`, `Invalid` if the chunks there do not begin and end as it does or are not below such a snapshot,
    /// `Damaged`, `NoSpace`, `Overloaded`, `Failed`.
    fn compact(&self, writer: &Writer, chunk: Arc<Chunk>) -> Pending<()>;

    /// Remembers how far the session is compacted; `before` never goes back. Errors: `Fenced`, `NotFound`, `NoSpace`, `Failed`.
    fn set_compaction(&self, writer: &Writer, compaction: Compaction) -> Pending<()>;

    /// Deletes the session: the name is free at once, the space comes back in the background. Errors: `NotFound`, `NoSpace`,
    /// `Failed`.
    fn delete(&self, session: SessionId) -> Pending<()>;

    /// Sessions whose expiry is due at `now`, in milliseconds since the Unix epoch, at most `limit`, the longest due first.
    /// Errors: `Failed`.
    fn due(&self, now: u64, limit: usize) -> Pending<Vec<SessionStat>>;

    /// Moves the time at which a session is due. Nothing happens to one that never expires. Errors: `NotFound`, `NoSpace`,
    /// `Failed`.
    fn postpone(&self, session: SessionId, until: u64) -> Pending<()>;

    /// Deletes the session if its expiry is due at `now`, and tells whether it was: it may have been postponed since
    /// [`Store::due`] said so. Errors: those of [`Store::delete`].
    fn expire(&self, session: SessionId, now: u64) -> Pending<bool>;

    /// Says when the session has something to write by itself. Errors: `NotFound`, `NoSpace`, `Failed`.
    fn set_wake(&self, session: SessionId, wake: Option<u64>) -> Pending<()>;

    /// Sessions that have something to write by itself at `until` or before, at most `limit`, the longest due first, those of the
    /// same moment by incarnation; behind the moment and incarnation `after`. Errors: `Failed`.
    fn waking(&self, until: u64, after: Option<(u64, Incarnation)>, limit: usize) -> Pending<Vec<SessionStat>>;

    /// Sessions whose name starts with `prefix` and sorts after `after`, at most `limit`. Errors: `Failed`.
    fn list(&self, prefix: Vec<u8>, after: Vec<u8>, limit: usize) -> Pending<ListPage>;

    /// Bytes of the chunks of a session that are stored. Parts that were trimmed or compacted away may still count until their space is back.
    /// Reads all of them: not for a path on which somebody waits. Errors: `NotFound`, `Damaged`, `Failed`.
    fn size(&self, session: SessionId) -> Pending<u64>;

    /// How the store is doing.
    fn health(&self) -> Health;
}

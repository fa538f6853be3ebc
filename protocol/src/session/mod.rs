//! The rules of a session, without I/O: records and their fold, the authority that accepts appends, producers,
//! subscriptions, flow control and grants.
//!
//! A driver owns time, randomness, sockets and the store; it asks this module what to do and does it.

mod authority;
mod backoff;
mod chain;
mod chunk;
mod credit;
mod feed;
mod grants;
mod producer;
mod progress;
mod record;
mod state;
mod view;
mod words;

pub use authority::{Authority, Committed, Outcome, Refusal, Reply, Step};
pub use backoff::Backoff;
pub use chain::Chain;
pub use chunk::{Chunk, ChunkBatch, ChunkBuilder, ChunkHeader, ChunkProducer, Control};
pub use credit::{CreditReceived, CreditSent};
pub use feed::{Feed, Filter, Place};
pub use grants::{Grant, Grants, Operation, Operations};
pub use producer::{Admission, ProducerHandle, ProducerKey, Producers};
pub use progress::Progress;
pub use record::{CheckedBatch, Kind, Record, Records};
pub use state::{Damage, State, Streams};
pub use view::{StreamView, View};
pub use words::{Author, Cursor, Incarnation, Instance, SessionName, Verdict, ViewHash};

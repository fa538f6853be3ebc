//! The rules of a session, without I/O: records and their fold, the authority that accepts appends, producers,
//! subscriptions, flow control and grants.
//!
//! A driver owns time, randomness, sockets and the store; it asks this module what to do and does it.

mod authority;
mod backoff;
mod chain;
mod chunk;
mod compaction;
mod credit;
mod early;
mod feed;
mod grants;
mod kinds;
mod leases;
mod overlay;
mod producer;
mod progress;
mod rebirth;
mod record;
mod refusals;
mod resume;
mod roaming;
mod rollup;
mod state;
mod view;
mod words;

pub use authority::{Authority, Committed, Outcome, Refusal, Reply, Step};
pub use backoff::Backoff;
pub use chain::Chain;
pub use chunk::{
    Chunk, ChunkBatch, ChunkBuilder, ChunkCount, ChunkHeader, ChunkPosition, ChunkProducer, Compacted, Control,
};
pub use compaction::{ChunkStart, Compaction, Plan, PlanStep, Survey};
pub use credit::{CreditReceived, CreditSent};
pub use early::may_be_early;
pub use feed::{Feed, Filter, Place};
pub use grants::{Delegated, Delegator, Grant, Grants, Operation, Operations, Stretch};
pub use kinds::{
    Activity, Change, Departure, Expected, InputPolicy, Intent, JobOutcome, Kind, MessageAppend, MessageEnd,
    MessageReplace, MessageStart, NotifyDone, NotifyEmitted, NotifyRule, Payload, PresenceJoined, PresenceLeft,
    PresenceUpdated, RequestExpired, RequestOpened, RequestWithdrawn, Resolution, RunConsumed, RunEnd, RunLost,
    RunMode, RunStart, SessionConfigured, Signal, SignalExpired, SignalResolved, StateChange, StateDeleted,
    StateExpired, StatePut, Status, Target, Triggers, Writes,
};
pub use leases::Leases;
pub use overlay::Bounds;
pub use producer::{Admission, ProducerHandle, ProducerKey, ProducerPosition, Producers};
pub use progress::Progress;
pub use rebirth::Rebirth;
pub use record::{CheckedBatch, Record, Records};
pub use refusals::Refusals;
pub use resume::{RESUME_EXPORTER, ResumeClaim, ResumeToken, Resumptions, is_held, resume_context, resume_text};
pub use roaming::{Manners, PathFacts, Roaming, RoamingStep, moved_reason, moved_to, sent_on_to};
pub use state::{Damage, State, Streams};
pub use view::{
    AT_ONCE, Entries, Entry, FOR_WORKERS, FinishedRun, IndexedMessage, Input, Job, Member, Members, Message, Messages,
    Notifications, OpenRequest, PendingSignal, RequestOutcome, ResolvedRequest, ResolvedSignal, Run, Runs,
    SignalOutcome, Signals, StreamView, View,
};
pub use words::{
    Author, ClientKey, Cursor, Incarnation, Instance, Key, MessageId, RequestId, RunId, SessionName, SignalId, Verdict,
    ViewHash,
};

//! The Mainstay client.
//!
//! A [`Client`] keeps one connection to a server and makes it again whenever it is lost. A [`Session`] is an attachment:
//! it attaches again by itself. What is done through it goes on exactly where it was: a [`Producer`] sends again what was
//! not acknowledged, under the same sequence, so that nothing is stored twice; a [`Subscription`] goes on at its next seq.
//!
//! ```no_run
//! use mainstay_client::{Client, Config, ConnectFile, Start};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let file = ConnectFile::read("connect.json".as_ref())?;
//! let client = Client::connect_quic(&file, Config::default())?;
//! let session = client.session("agent:session123")?.create().attach().await?;
//!
//! let producer = session.producer("agent").await?;
//! let ticket = producer.append(session.main(), "hello").await?;
//! println!("stored as seq {}", ticket.await?);
//!
//! let mut subscription = session.subscribe(Start::Earliest).open().await?;
//! while let Some(event) = subscription.next().await {
//!     println!("{:?}", event?);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Every error says whether trying again can help, and an append that failed says whether it may have been stored.

mod client;
mod config;
mod continuity;
mod driver;
mod error;
mod files;
mod jobs;
mod link;
mod live;
mod membership;
mod message;
mod outbox;
mod producer;
mod roam;
mod run;
mod session;
mod signal;
mod subscription;
mod tokens;

pub use client::{Client, ConnectionWatch, MintedToken, PathWatch};
pub use config::{Certificate, Config, ConnectFile};
pub use continuity::Continuity;
pub use error::{AppendError, ClientError, Stored};
pub use jobs::{Job, JobEvent, JobKey, Jobs};
pub use live::{Folded, LiveView, Update};
pub use mainstay_protocol::session::{
    Activity, Author, Change, Cursor, Departure, Entry, Expected, Incarnation, Input, InputPolicy, Instance, Intent,
    JobOutcome, Key, Kind, Member, Message, MessageAppend, MessageEnd, MessageId, MessageReplace, MessageStart,
    NotifyDone, NotifyEmitted, NotifyRule, OpenRequest, Payload, PendingSignal, PresenceJoined, PresenceLeft,
    PresenceUpdated, Record, RequestExpired, RequestId, RequestOpened, RequestOutcome, RequestWithdrawn, Resolution,
    RunConsumed, RunEnd, RunId, RunLost, RunMode, RunStart, SessionConfigured, SessionName, Signal, SignalExpired,
    SignalId, SignalOutcome, SignalResolved, StateChange, StateDeleted, StateExpired, StatePut, Status, Target,
    Triggers, Verdict, View,
};
pub use mainstay_protocol::wire::{Detail, Label, ListedSession, Start, Subject};
pub use mainstay_protocol::{Advice, Code};
pub use membership::{Doing, Membership};
pub use message::MessageWriter;
pub use outbox::{EntryState, Item, Kept, MAX_BYTES as MAX_OUTBOX_BYTES, MAX_ENTRIES as MAX_OUTBOX_ENTRIES};
pub use outbox::{Outbox, OutboxEntry, OutboxError, SendError};
pub use producer::{Producer, Ticket};
pub use roam::{PathEvent, Paths};
pub use run::Run;
pub use session::{Attaching, Session, SessionInfo, StreamId};
pub use signal::{Signalling, Signals};
pub use subscription::{Event, ReadRecord, RecordBatch, Subscribing, Subscription};
pub use tokens::Renewal;

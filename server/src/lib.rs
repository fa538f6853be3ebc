//! The Mainstay server: drives the protocol core and a store over any transport.
//!
//! ```text
//! listener ── connection ─┬─ control          HELLO, TOKEN, PING, CREDIT
//!                         ├─ attachment       requests and acks of one session
//!                         ├─ producer         batches ──▶ owner
//!                         └─ subscription     ring or store ──▶ deliveries
//! sessions ── owner (one per hot session) ──▶ store
//! ```
//!
//! The rules live in [`mainstay_protocol::session`]; this crate owns sockets, tasks and time. The owner of a session is
//! the only one that changes it. Memory is bounded by [`Config`]: what does not fit waits in the peer's flow-control
//! window or in the log.

mod apart;
mod attachment;
pub mod auth;
mod config;
mod connection;
mod jobs;
mod load;
mod metrics;
mod namespace;
mod owner;
mod producer;
mod quota;
mod requests;
mod resume;
mod ring;
mod server;
mod sessions;
mod status;
mod subscription;
mod upkeep;

pub use config::{
    Config, ConnectionQuotas, MAX_NAMESPACES, OPERATOR_CONNECTIONS, PrefixQuotas, Quotas, SessionQuotas, SubjectQuotas,
};
pub use mainstay_transport::rate::Rate;
pub use namespace::Namespace;
pub use resume::ResumeKeys;
pub use server::{Server, Stop};
pub use status::{ConnectionStatus, NamespaceStatus, SessionStatus, Status, SubscriptionStatus};

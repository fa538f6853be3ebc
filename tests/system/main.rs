//! Whole-system tests, in one binary.

mod auth;
mod backup;
mod basics;
mod broken;
mod cli;
mod compaction;
mod crash;
mod deploy;
mod disk;
mod early;
mod hostile;
mod lifetime;
mod namespaces;
mod network;
mod notify;
mod outbox;
mod presence;
mod resume;
mod roaming;
mod runs;
mod simulated;
mod slow;
mod storm;
mod tail;
mod view;

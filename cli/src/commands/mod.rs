//! One module per command.

pub(crate) mod append;
pub(crate) mod backup;
pub(crate) mod bench;
pub(crate) mod conversation;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod manual;
pub(crate) mod notify;
pub(crate) mod online;
pub(crate) mod outbox;
pub(crate) mod presence;
pub(crate) mod run;
pub(crate) mod session;
pub(crate) mod signal;
pub(crate) mod state;
pub(crate) mod tail;
pub(crate) mod token;
pub(crate) mod top;
pub(crate) mod verify;
pub(crate) mod watch;

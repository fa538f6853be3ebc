//! Sending signals, and hearing them ahead of the data that they are behind.

use core::time::Duration;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use mainstay_protocol::session::{Intent, MessageId, RequestId, RunId, SignalId, Target};
use mainstay_transport::entropy;
use tokio::sync::mpsc;

use crate::driver::{Ask, SessionCommand};
use crate::error::ClientError;
use crate::live::Folded;
use crate::session::Session;

/// A signal that is about to be sent: see [`Session::signal`](crate::Session::signal).
#[must_use = "a signal is sent by `send`"]
#[derive(Debug)]
pub struct Signalling {
    session: Session,
    signal: mainstay_protocol::wire::Signal,
}

impl Signalling {
    pub(crate) fn new(session: Session, intent: Intent) -> Self {
        let id = SignalId(entropy::random());
        let signal = mainstay_protocol::wire::Signal { id, intent, target: None, lasts: 0, text: Bytes::new() };
        Self { session, signal }
    }

    /// For this run, not the one that is active.
    pub fn run(mut self, run: RunId) -> Self {
        self.signal.target = Some(Target::Run(run));
        self
    }

    /// For the run that this input causes, or caused: it need not be there yet.
    pub fn input(mut self, input: MessageId) -> Self {
        self.signal.target = Some(Target::Input(input));
        self
    }

    /// The request that it answers.
    pub fn request(mut self, request: RequestId) -> Self {
        self.signal.target = Some(Target::Request(request));
        self
    }

    /// What is said with it: at most 2 KiB.
    pub fn text(mut self, text: impl Into<Bytes>) -> Self {
        self.signal.text = text.into();
        self
    }

    /// How long it may wait for somebody to take it; a day unless this is said.
    pub fn lasts(mut self, lasts: Duration) -> Self {
        self.signal.lasts = u64::try_from(lasts.as_millis()).unwrap_or(u64::MAX).max(1);
        self
    }

    /// Its id, chosen at random.
    pub fn id(&self) -> SignalId {
        self.signal.id
    }

    /// Sends it, again where the connection is lost meanwhile, and waits until it is stored. Returns the seq of its record, or of
    /// the cancel that was there before.
    ///
    /// Errors: `Refused` with `RUN_OVER`, `RUN_ACTIVE` where it must be said which run is meant, `ALREADY_RESOLVED` for a request
    /// that somebody answered, `LIMIT_EXCEEDED`, `FORBIDDEN`.
    pub async fn send(self) -> Result<u64, ClientError> {
        let Self { session, signal } = self;
        session.ask_again(|answer| Ask::Signal { signal: signal.clone(), valid_until: None, once: false, answer }).await
    }
}

/// How many records wait for an application that does not take them.
pub(crate) const HEARD: usize = 256;

/// What a listener and the driver share.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    /// There was no room for one: those that still matter are asked for again.
    pub(crate) missed: AtomicBool,
}

/// Signals and what becomes of them, and runs that are lost, as soon as they are durable: ahead of the data that they are behind, and
/// whatever of that is read. Each also comes in its place in the session.
///
/// Over a lost connection, or where the application falls behind by more than 256, it goes on with every signal that nobody took yet;
/// what became of others meanwhile is in the view.
#[derive(Debug)]
pub struct Signals {
    commands: mpsc::Sender<SessionCommand>,
    records: mpsc::Receiver<Folded>,
    heard: Arc<Heard>,
    /// Seqs of the newest that were returned.
    seen: BTreeSet<u64>,
}

impl Signals {
    pub(crate) async fn open(commands: mpsc::Sender<SessionCommand>) -> Result<Self, ClientError> {
        let (sender, records) = mpsc::channel(HEARD);
        let heard = Arc::new(Heard::default());
        let listen = SessionCommand::Listen { records: sender, heard: heard.clone() };
        commands.send(listen).await.map_err(|_| ClientError::Closed)?;
        Ok(Self { commands, records, heard, seen: BTreeSet::new() })
    }

    /// The next one; `None` once the session cannot be used any more. Cancellation-safe.
    pub async fn next(&mut self) -> Option<Folded> {
        loop {
            if self.records.is_empty() && self.heard.missed.load(Ordering::Acquire) {
                self.commands.send(SessionCommand::ListenAgain).await.ok()?;
            }
            let next = self.records.recv().await?;
            // What came again because more was missed.
            if self.seen.insert(next.seq) {
                if self.seen.len() > 2 * HEARD {
                    self.seen.pop_first();
                }
                return Some(next);
            }
        }
    }
}

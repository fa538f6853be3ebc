//! What an application appends and signals while there may be no network, durable until it is answered (spec OUT).
//!
//! ```text
//! queued ──▶ sent ──▶ durable
//!    │         ├────▶ rejected
//!    └─────────┴────▶ expired
//! ```
//!
//! Everything has its number, and a batch its producer's sequence, from the moment it is queued, which is on the disk before the application
//! is told. It is sent in order and stored once, over reconnects and over ends of the process, however it ended: what was sent and not
//! answered is sent again under the same sequence, which the server knows unless it had to forget the producer: then it is given up. What is given up used no sequence; those behind it move up, and nothing of them is sent
//! before that is on the disk.
//!
//! A file of its own, not a database: what waits is read once and written in order, and one file is one lock, one sync and one thing to
//! delete. It has to be on a disk that keeps what was synced.

mod ledger;
mod log;
mod sending;

use core::fmt;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::registry::MAX_SIGNAL_TEXT;
use mainstay_protocol::session::{Intent, Record, SessionName, SignalId, Target};
use mainstay_protocol::wire::{Label, MAX_VARINT, Signal, Writer};
use mainstay_transport::entropy;
use tokio::sync::{mpsc, oneshot, watch};

use self::ledger::{Change, Ledger, Outcome, Queued, What};
use self::log::{Log, LogError};
pub use self::sending::SendError;
use crate::error::ClientError;
use crate::run::Run;

/// Bytes that one outbox keeps at most: days of typing, or minutes of an agent, and what its memory and its file are bounded by.
pub const MAX_BYTES: usize = 64 << 20;
/// Entries that one outbox keeps at most.
pub const MAX_ENTRIES: usize = 100_000;
/// A file is written anew once it is longer than this and most of it is not needed any more.
const SMALL: u64 = 1 << 20;
/// Changes that wait for the disk before whoever makes more has to wait.
const PENDING: usize = 64;

/// Why an outbox cannot be opened or does not take something.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum OutboxError {
    /// Another process has it open, or another handle of this one.
    Locked(PathBuf),
    /// The file is not an outbox, or was damaged after it was written.
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The disk failed. What was queued before stays; this was not.
    Disk {
        /// The file or the directory.
        path: PathBuf,
        /// What the system said.
        detail: String,
    },
    /// It keeps [`MAX_BYTES`] or [`MAX_ENTRIES`]; there is room once something is stored or dismissed.
    Full,
    /// It is no name, no batch and no signal.
    Invalid(String),
}

impl OutboxError {
    /// Its name: `OUTBOX_LOCKED`, `OUTBOX_DAMAGED`, `OUTBOX_FAILED`, `OUTBOX_FULL`, `INVALID`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Locked(_) => "OUTBOX_LOCKED",
            Self::Damaged { .. } => "OUTBOX_DAMAGED",
            Self::Disk { .. } => "OUTBOX_FAILED",
            Self::Full => "OUTBOX_FULL",
            Self::Invalid(_) => "INVALID",
        }
    }

    fn disk(path: &Path, error: &io::Error) -> Self {
        Self::Disk { path: path.to_owned(), detail: error.to_string() }
    }
}

impl fmt::Display for OutboxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Locked(path) => write!(f, "the outbox {} is in use by another process", path.display()),
            Self::Damaged { path, detail } => write!(
                f,
                "the outbox {} is damaged: {detail}; what it holds may not be sent. Keep a copy of the file, and delete it to begin anew",
                path.display()
            ),
            Self::Disk { path, detail } => write!(f, "cannot keep the outbox {}: {detail}", path.display()),
            Self::Full => write!(
                f,
                "the outbox is full: it keeps at most {} MiB or {MAX_ENTRIES} entries; wait until something of it is stored",
                MAX_BYTES >> 20
            ),
            Self::Invalid(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for OutboxError {}

impl From<ClientError> for OutboxError {
    fn from(error: ClientError) -> Self {
        Self::Invalid(error.to_string())
    }
}

/// Something to queue.
#[derive(Debug, Clone)]
pub struct Item {
    what: What,
    valid_until: Option<SystemTime>,
}

impl Item {
    /// Records that are stored together and contiguously, or not at all, in the stream called `stream`, which is defined when they are sent.
    ///
    /// Errors: `Invalid` for what [`Producer::append_batch`](crate::Producer::append_batch) does not take, or if `stream` is no name.
    pub fn records(stream: &str, records: &[Record]) -> Result<Self, OutboxError> {
        let stream = Label::new(stream).map_err(ClientError::from)?;
        Ok(Self { what: What::batch(stream, None, records)?, valid_until: None })
    }

    /// The same, as part of a run: stored while this client holds it, rejected with `RUN_FENCED` afterwards.
    pub fn of_run(stream: &str, records: &[Record], run: &Run) -> Result<Self, OutboxError> {
        let stream = Label::new(stream).map_err(ClientError::from)?;
        let stamped = records.iter().map(|record| Record { run: record.run.or(Some(run.id())), ..record.clone() });
        let stamped: Vec<Record> = stamped.collect();
        Ok(Self { what: What::batch(stream, Some(run.epoch()), &stamped)?, valid_until: None })
    }

    /// A signal to `target`, or to the run that is active when it is sent; `text` is what is said with it.
    ///
    /// Errors: `Invalid` for more than 2 KiB of text, an answer without a request, and another intent with one.
    pub fn signal(intent: Intent, target: Option<Target>, text: impl Into<Bytes>) -> Result<Self, OutboxError> {
        let text = text.into();
        if text.len() > MAX_SIGNAL_TEXT {
            return Err(OutboxError::Invalid("the text of a signal is longer than 2 KiB".into()));
        }
        if intent.is_answer() != matches!(target, Some(Target::Request(_))) {
            return Err(OutboxError::Invalid("an answer is for a request, and nothing else is".into()));
        }
        let id = SignalId(entropy::random());
        Ok(Self { what: What::Signal(Signal { id, intent, target, lasts: 0, text }), valid_until: None })
    }

    /// For a signal: how long it may wait for somebody to take it, once it is stored. Says nothing about when it is sent.
    pub fn lasts(mut self, lasts: Duration) -> Self {
        if let What::Signal(signal) = &mut self.what {
            signal.lasts = u64::try_from(lasts.as_millis()).unwrap_or(u64::MAX).clamp(1, MAX_VARINT);
        }
        self
    }

    /// It must not be sent from then on: a *stop* that is meant for now. By the clock of this machine.
    pub fn valid_until(mut self, time: SystemTime) -> Self {
        // As the file has it, so that a restart does not change it.
        self.valid_until = Some(ledger::from_millis(ledger::millis(time)));
        self
    }
}

/// How far something queued has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryState {
    /// On this disk.
    Queued,
    /// Handed to a connection, without an answer.
    Sent,
    /// In the session.
    Durable {
        /// Seq of its first record.
        seq: u64,
    },
    /// Refused: it is not stored and will not be. With `OUTCOME_UNKNOWN` it is given up because it, or a part of the same message before it, was
    /// sent and may be stored, and nobody can tell.
    Rejected {
        /// Why.
        code: Code,
        /// What the server said, for people.
        detail: String,
    },
    /// It was valid until a time that has passed, and is not stored.
    Expired,
}

impl EntryState {
    /// True for the last three.
    pub fn is_settled(&self) -> bool {
        !matches!(self, Self::Queued | Self::Sent)
    }

    /// Its name in lower case.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Sent => "sent",
            Self::Durable { .. } => "durable",
            Self::Rejected { .. } => "rejected",
            Self::Expired => "expired",
        }
    }
}

impl From<&Outcome> for EntryState {
    fn from(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Durable { seq } => Self::Durable { seq: *seq },
            Outcome::Rejected { code, detail } => Self::Rejected { code: *code, detail: detail.as_str().to_owned() },
            Outcome::Expired => Self::Expired,
        }
    }
}

/// Something that was queued.
#[derive(Debug, Clone)]
pub struct OutboxEntry {
    number: u64,
    sequence: Option<u64>,
    state: watch::Receiver<EntryState>,
}

impl OutboxEntry {
    /// Its number in the outbox: they grow, and are never used twice.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The sequence under which its batch is sent, unless something before it is given up or the server forgets the producer; `None` for a
    /// signal, which has its own id.
    pub fn sequence(&self) -> Option<u64> {
        self.sequence
    }

    /// How far it has come.
    pub fn state(&self) -> EntryState {
        self.state.borrow().clone()
    }

    /// Waits until it is durable, rejected or expired. Nothing is sent unless somebody does: see [`Outbox::send`]. Cancellation-safe.
    pub async fn settled(&self) -> EntryState {
        let mut state = self.state.clone();
        match state.wait_for(EntryState::is_settled).await {
            Ok(state) => state.clone(),
            // The outbox is gone: that is how far it came.
            Err(_) => self.state(),
        }
    }

    /// Waits for the next change of its state; `false` if there will be none. Cancellation-safe.
    pub async fn changed(&mut self) -> bool {
        self.state.changed().await.is_ok()
    }
}

/// One of those that an outbox keeps: it waits, or was given up.
#[derive(Debug, Clone)]
pub struct Kept {
    /// To follow it.
    pub entry: OutboxEntry,
    /// The records that it is, in the stream of this name; or none for a signal.
    pub records: Option<(Label, Vec<Record>)>,
    /// The epoch of the run that they are part of.
    pub run: Option<u64>,
    /// The signal that it is.
    pub signal: Option<(Intent, SignalId)>,
    /// When it must not be sent any more.
    pub valid_until: Option<SystemTime>,
}

/// What one session is to store, kept in a file until it is answered. Clones are the same outbox.
///
/// It is used by one process at a time. Its file must not be copied and used twice: both would use the same sequences.
#[derive(Clone)]
pub struct Outbox(Arc<Inner>);

struct Inner {
    path: PathBuf,
    ledger: Mutex<Ledger>,
    /// Followers of what waits, and of what was given up.
    states: Mutex<HashMap<u64, watch::Sender<EntryState>>>,
    /// Counts changes of the ledger.
    version: watch::Sender<u64>,
    commits: mpsc::Sender<Commit>,
    /// Ends with the file.
    open: watch::Receiver<()>,
    /// Somebody sends through it.
    sending: AtomicBool,
}

impl fmt::Debug for Outbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outbox").field("path", &self.0.path).finish_non_exhaustive()
    }
}

/// What is to be on the disk, together, before whoever asks goes on.
struct Commit {
    asked: Vec<Asked>,
    answer: oneshot::Sender<Result<Vec<OutboxEntry>, OutboxError>>,
}

enum Asked {
    Queue(Queued),
    Change(Change),
}

/// Name of the file of a session: session names are longer than file names may be, and have characters that those have not.
fn file_name(session: &SessionName) -> String {
    let readable: String =
        session.as_str().chars().take(40).map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    format!("{readable}-{:016x}.outbox", xxhash_rust::xxh3::xxh3_64(session.as_str().as_bytes()))
}

impl Outbox {
    /// Opens the outbox of `session` in `dir`, which is made if it is missing. Needs no server.
    ///
    /// Errors: all but `Full`.
    pub async fn open(dir: &Path, session: &str) -> Result<Self, OutboxError> {
        let session = SessionName::new(session).map_err(ClientError::from)?;
        let (dir, path) = (dir.to_owned(), dir.join(file_name(&session)));
        let opened = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || load(&dir, &path, session)).await
        };
        let (log, ledger) = opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        let waiting = ledger.waiting_from(0).map(|(number, _)| (number, watch::channel(EntryState::Queued).0));
        let given_up = ledger.given_up().map(|(number, _, outcome)| (number, watch::channel(outcome.into()).0));
        let states = Mutex::new(waiting.chain(given_up).collect());
        let (commits, asked) = mpsc::channel(PENDING);
        let (closing, open) = watch::channel(());
        let inner = Inner {
            path,
            ledger: Mutex::new(ledger),
            states,
            version: watch::channel(0).0,
            commits,
            open,
            sending: AtomicBool::new(false),
        };
        let this = Self(Arc::new(inner));
        let keeping = keep(Arc::downgrade(&this.0), log, asked);
        tokio::spawn(async move {
            keeping.await;
            drop(closing);
        });
        Ok(this)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The session that it is for.
    pub fn session(&self) -> SessionName {
        self.ledger().session.clone()
    }

    /// Queues something; it is on the disk when this returns. Cancelled before, it may be queued or not.
    ///
    /// Errors: `Full`, `Disk`; then it is not queued.
    pub async fn queue(&self, item: Item) -> Result<OutboxEntry, OutboxError> {
        let mut queued = self.queue_all([item], &[]).await?;
        queued.pop().ok_or_else(|| OutboxError::Invalid("nothing was queued".into()))
    }

    /// Queues several and dismisses others, all or nothing. Errors: as [`Outbox::queue`].
    pub async fn queue_all(
        &self,
        items: impl IntoIterator<Item = Item>,
        dismissed: &[u64],
    ) -> Result<Vec<OutboxEntry>, OutboxError> {
        let queued = |Item { what, valid_until }| Asked::Queue(Queued { what, valid_until, sent: None });
        let mut asked: Vec<Asked> = items.into_iter().map(queued).collect();
        asked.extend(dismissed.iter().map(|number| Asked::Change(Change::Dismissed(*number))));
        self.commit(asked).await
    }

    /// Those that were rejected or have expired are forgotten: the application has seen them. Errors: `Disk`.
    pub async fn dismiss(&self, numbers: &[u64]) -> Result<(), OutboxError> {
        self.queue_all([], numbers).await.map(drop)
    }

    /// Everything that waits or was given up, in order.
    pub fn kept(&self) -> Vec<Kept> {
        let all: Vec<(u64, Queued, Option<u64>)> = {
            let ledger = self.ledger();
            let given_up = ledger.given_up().map(|(number, queued, _)| (number, queued.clone(), None));
            let waiting = ledger.sequences().map(|(number, queued, sequence)| (number, queued.clone(), sequence));
            waiting.chain(given_up).collect()
        };
        let states = self.states();
        let mut kept: Vec<Kept> = all
            .into_iter()
            .filter_map(|(number, queued, sequence)| {
                let entry = OutboxEntry { number, sequence, state: states.get(&number)?.subscribe() };
                let valid_until = queued.valid_until;
                Some(match queued.what {
                    What::Batch { stream, run, records, .. } => {
                        // They were checked when they were queued.
                        let records = What::records(&records, 0).ok()?;
                        Kept { entry, records: Some((stream, records)), run, signal: None, valid_until }
                    }
                    What::Signal(signal) => {
                        let signal = Some((signal.intent, signal.id));
                        Kept { entry, records: None, run: None, signal, valid_until }
                    }
                })
            })
            .collect();
        drop(states);
        kept.sort_by_key(|kept| kept.entry.number);
        kept
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.ledger().waiting_from(0).count()
    }

    /// Waits until nothing waits. Cancellation-safe.
    pub async fn idle(&self) {
        self.until(|ledger| ledger.waiting_from(0).next().is_none()).await;
    }

    /// Waits until there is room for so many batches that are queued at once. Cancellation-safe.
    pub async fn room(&self, batches: usize) {
        self.until(|ledger| ledger.bytes() + log::LONGEST < MAX_BYTES && ledger.len() + batches <= MAX_ENTRIES).await;
    }

    async fn until(&self, holds: impl Fn(&Ledger) -> bool) {
        let mut version = self.0.version.subscribe();
        while !holds(&self.ledger()) {
            // The sender lives in `self`.
            let _ = version.changed().await;
        }
    }

    /// Waits until the file is closed, which nobody else may open before. Other clones keep it open.
    pub async fn close(self) {
        let mut open = self.0.open.clone();
        drop(self);
        // Never told anything but its end.
        let _ = open.changed().await;
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.0.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn states(&self) -> MutexGuard<'_, HashMap<u64, watch::Sender<EntryState>>> {
        self.0.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes changes, all or nothing; returns what is queued. Returns when they are on the disk, and all that were asked for before.
    async fn commit(&self, asked: Vec<Asked>) -> Result<Vec<OutboxEntry>, OutboxError> {
        let (answer, kept) = oneshot::channel();
        let gone = || OutboxError::Disk { path: self.0.path.clone(), detail: "the outbox was closed".into() };
        self.0.commits.send(Commit { asked, answer }).await.map_err(|_| gone())?;
        kept.await.map_err(|_| gone())?
    }
}

/// Opens the file and reads what it says.
fn load(dir: &Path, path: &Path, session: SessionName) -> Result<(Log, Ledger), OutboxError> {
    std::fs::create_dir_all(dir).map_err(|error| OutboxError::disk(dir, &error))?;
    let damaged = |detail: String| OutboxError::Damaged { path: path.to_owned(), detail };
    let (mut log, entries) = Log::open(path).map_err(|error| match error {
        LogError::Locked => OutboxError::Locked(path.to_owned()),
        LogError::Damaged(detail) => damaged(detail.into()),
        LogError::Io(error) => OutboxError::disk(path, &error),
    })?;
    let read = Ledger::replay(&entries).map_err(|ProtocolError { detail, .. }| damaged(detail.into()))?;
    let ledger = match read {
        Some(ledger) if ledger.session == session => ledger,
        Some(ledger) => return Err(damaged(format!("it is that of the session {}", ledger.session))),
        None => {
            let ledger = Ledger::new(session, producer_name()?);
            log.append(&encoded(&ledger.changes())).map_err(|error| OutboxError::disk(path, &error))?;
            ledger
        }
    };
    Ok((log, ledger))
}

/// The name of a producer that nobody else has: its sequence begins at 0, nobody is fenced, and nothing is on its way under it.
fn producer_name() -> Result<Label, ClientError> {
    Ok(Label::new(&format!("outbox-{:032x}", entropy::random::<u128>()))?)
}

fn encoded<'a>(changes: impl IntoIterator<Item = &'a Change>) -> Bytes {
    let mut entry = Writer::new();
    changes.into_iter().for_each(|change| change.put(&mut entry));
    entry.freeze()
}

/// An entry of one change.
fn encoded_one(change: &Change) -> Bytes {
    encoded([change])
}

/// Puts changes on the disk, those that wait together in one write, until the outbox is gone.
async fn keep(outbox: Weak<Inner>, mut log: Log, mut asked: mpsc::Receiver<Commit>) {
    while let Some(first) = asked.recv().await {
        let mut commits = vec![first];
        while let Ok(more) = asked.try_recv() {
            commits.push(more);
        }
        let Some(this) = outbox.upgrade().map(Outbox) else { return };
        let (mut room, mut settled) = (Room::of(&this.ledger()), BTreeSet::new());
        let mut accepted = Vec::new();
        for Commit { asked, answer } in commits {
            let taken = {
                let ledger = this.ledger();
                room.take(asked, &ledger).and_then(|(changes, body)| {
                    // What could not be read again must not be written.
                    let reads = Change::all(&body).is_ok_and(|read| read == changes);
                    match reads && ledger.takes(&changes, &mut settled) {
                        true => Ok((changes, body)),
                        false => Err(OutboxError::Invalid(
                            "it could not be read again; nothing was queued. Please report this".into(),
                        )),
                    }
                })
            };
            match taken {
                Ok((changes, body)) => accepted.push((changes, body, answer)),
                // Whoever asked may be gone.
                Err(error) => drop(answer.send(Err(error))),
            }
        }
        // Each write is one entry: it is on the disk whole, or not.
        let mut writes = accepted.into_iter().peekable();
        // What is behind a write that failed is numbered as if it had not.
        let mut failed = None::<OutboxError>;
        while writes.peek().is_some() {
            let (mut together, mut body) = (Vec::new(), Vec::new());
            while let Some((changes, part, answer)) =
                writes.next_if(|(_, part, _)| body.is_empty() || body.len() + part.len() <= log::LONGEST)
            {
                body.extend_from_slice(&part);
                together.push((changes, answer));
            }
            if failed.is_none() {
                let result;
                (log, result) =
                    blocking(log, move |log| if body.is_empty() { Ok(()) } else { log.append(&body) }).await;
                failed = result.err().map(|error| OutboxError::disk(&this.0.path, &error));
            }
            for (changes, answer) in together {
                // Whoever asked may be gone.
                drop(answer.send(match &failed {
                    None => this.take(changes),
                    Some(error) => Err(error.clone()),
                }));
            }
        }
        this.0.version.send_modify(|version| *version += 1);
        let needed = this.ledger().bytes() as u64;
        if log.length() > SMALL && log.length() > 2 * needed {
            let changes = this.ledger().changes();
            let result;
            (log, result) = blocking(log, move |log| {
                let bodies: Vec<Bytes> = changes.iter().map(encoded_one).collect();
                log.replace(bodies.iter().map(Bytes::as_ref))
            })
            .await;
            if let Err(error) = result {
                // The old one is as good, and longer.
                tracing::warn!(path = %this.0.path.display(), %error, "cannot write the outbox anew");
            }
        }
    }
}

/// Does something with the file that may take its time.
async fn blocking<T: Send + 'static>(mut log: Log, work: impl FnOnce(&mut Log) -> T + Send + 'static) -> (Log, T) {
    let done = tokio::task::spawn_blocking(move || {
        let result = work(&mut log);
        (log, result)
    });
    done.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}

/// What can still be queued.
struct Room {
    next: u64,
    entries: usize,
    bytes: usize,
}

impl Room {
    fn of(ledger: &Ledger) -> Self {
        Self { next: ledger.next(), entries: ledger.len(), bytes: ledger.bytes() }
    }

    /// The changes that were asked for, numbered, and their bytes. Errors: `Full`; then none.
    fn take(&mut self, asked: Vec<Asked>, ledger: &Ledger) -> Result<(Vec<Change>, Bytes), OutboxError> {
        let (next, entries, bytes) = (self.next, self.entries, self.bytes);
        let mut changes = Vec::with_capacity(asked.len());
        for asked in asked {
            changes.push(match asked {
                Asked::Change(change) => {
                    if let Change::Dismissed(number) = change {
                        let freed = ledger.freed_by(number);
                        self.bytes = self.bytes.saturating_sub(freed);
                        self.entries = self.entries.saturating_sub(usize::from(freed > 0));
                    }
                    change
                }
                Asked::Queue(queued) => {
                    self.bytes += ledger::size(&queued);
                    self.entries += 1;
                    self.next += 1;
                    Change::Queued(self.next - 1, queued)
                }
            });
        }
        // An entry is one write, whole or not at all.
        let body = encoded(&changes);
        let fits = body.len() <= log::LONGEST;
        if self.bytes > MAX_BYTES || self.entries > MAX_ENTRIES || !fits {
            (self.next, self.entries, self.bytes) = (next, entries, bytes);
            return Err(if fits {
                OutboxError::Full
            } else {
                OutboxError::Invalid("too much is queued at once".into())
            });
        }
        Ok((changes, body))
    }
}

impl Outbox {
    /// Changes are on the disk. Returns what was queued.
    fn take(&self, changes: Vec<Change>) -> Result<Vec<OutboxEntry>, OutboxError> {
        let mut entries = Vec::new();
        for change in changes {
            let mut queued = None;
            let mut told = Vec::new();
            match &change {
                Change::Queued(number, _) => {
                    let (state, followed) = watch::channel(EntryState::Queued);
                    self.states().insert(*number, state);
                    queued = Some((*number, followed));
                }
                Change::Settled(number, outcome) => told.push((*number, outcome.into())),
                Change::Forgotten { sent, .. } => {
                    let doubtful = self.ledger().doubtful(sent);
                    told.extend(doubtful.iter().map(|(number, outcome)| (*number, outcome.into())));
                }
                Change::Dismissed(number) => {
                    self.states().remove(number);
                }
                // Told when a connection has it.
                Change::Sent { .. } => {}
                Change::Origin { .. } | Change::Attached(_) | Change::Granted(_) => {}
            }
            let applied = self.ledger().apply(change);
            applied.map_err(|ProtocolError { detail, .. }| OutboxError::Invalid(detail.into()))?;
            if let Some((number, state)) = queued {
                entries.push(OutboxEntry { number, sequence: self.ledger().last_sequence(), state });
            }
            told.into_iter().for_each(|(number, state)| self.tell(number, state));
        }
        Ok(entries)
    }

    /// Tells who follows it. What is durable is not kept.
    fn tell(&self, number: u64, state: EntryState) {
        let mut states = self.states();
        let gone = matches!(state, EntryState::Durable { .. });
        if let Some(told) = states.get(&number) {
            told.send_replace(state);
        }
        if gone {
            states.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use mainstay_protocol::session::{Incarnation, Record};

    use super::*;

    /// Spec OUT-2, byte by byte.
    #[test]
    fn changes_are_written_as_the_spec_says() {
        let label = |text| Label::new(text).unwrap();
        let origin =
            Change::Origin { session: SessionName::new("s").unwrap(), producer: label("p"), stored: 1, next: 70 };
        let batch = What::batch(label("main"), Some(4), &[Record::data(0, "hi")]).unwrap();
        let queued = |what, valid_until| Queued { what, valid_until, sent: None };
        let signal = Signal {
            id: SignalId([9; 16]),
            intent: Intent::Custom,
            target: None,
            lasts: 5,
            text: Bytes::from_static(b"x"),
        };
        let detail = mainstay_protocol::wire::Detail::new("no");
        for (change, bytes) in [
            (origin, "00 0173 0170 01 4046"),
            (Change::Attached(Incarnation([1; 16])), "01 01010101010101010101010101010101"),
            (Change::Queued(70, queued(batch, None)), "02 4046 00 00 046d61696e 05 01 06 05 00 00 00 6869"),
            (
                Change::Queued(71, queued(What::Signal(signal), Some(ledger::from_millis(62)))),
                "02 4047 3f 01 16 09090909090909090909090909090909 4060 00 05 0178",
            ),
            (Change::Sent { number: 71, from: 2 }, "03 4047 02"),
            (Change::Settled(70, Outcome::Durable { seq: 3 }), "04 4046 03"),
            (Change::Settled(71, Outcome::Rejected { code: Code(0x31), detail }), "05 4047 31 026e6f"),
            (Change::Settled(71, Outcome::Expired), "06 4047"),
            (Change::Dismissed(71), "07 4047"),
            (Change::Granted(5), "08 05"),
            (Change::Forgotten { producer: label("q"), sent: vec![70, 71] }, "09 0171 02 4046 4047"),
        ] {
            let hex: String = encoded_one(&change).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(hex, bytes.replace(' ', ""), "{change:?}");
            assert_eq!(Change::all(&encoded_one(&change)).unwrap(), [change]);
        }
    }
}

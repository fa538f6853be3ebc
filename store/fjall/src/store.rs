//! The store: requests to the committer, reads on their own threads.

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mainstay_protocol::session::{Chunk, Compaction, Incarnation, SessionName, State};
use mainstay_store::{
    Committing, Created, Health, ListPage, Outcome, Page, Pending, ReadFrom, SessionId, SessionStat, Store, StoreError,
    Writer,
};
use tokio::sync::{Semaphore, oneshot};

use crate::committer::{Answer, Committer, Request};
use crate::keys;
use crate::open::{self, Config, Engine, Format, Layout, OpenError};
use crate::reader::Reader;

/// What the store can do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Condition {
    /// Everything.
    Serving,
    /// Reads, and what frees space.
    NoSpace,
    /// Reads; a commit failed for lack of space and the engine must be opened anew.
    Reopening,
    /// Reads, as long as the process lives.
    Failed(String),
}

/// What the committer and the readers share.
pub(crate) struct Shared {
    pub(crate) layout: Layout,
    pub(crate) config: Config,
    engine: RwLock<Option<Arc<Engine>>>,
    condition: RwLock<Condition>,
    pub(crate) quarantined: RwLock<HashSet<Incarnation>>,
}

impl Shared {
    pub(crate) fn engine(&self) -> Result<Arc<Engine>, StoreError> {
        let engine = self.engine.read().unwrap_or_else(PoisonError::into_inner).clone();
        engine.ok_or_else(|| match self.condition() {
            Condition::Failed(what) => StoreError::Failed { what },
            _ => StoreError::Overloaded,
        })
    }

    /// True while this is the engine in use.
    pub(crate) fn is_current(&self, engine: &Arc<Engine>) -> bool {
        self.engine().is_ok_and(|current| Arc::ptr_eq(&current, engine))
    }

    pub(crate) fn put_engine(&self, engine: Engine) {
        *self.engine.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(engine));
    }

    /// Closes the engine: waits until no reader holds it.
    pub(crate) fn take_engine(&self) {
        let Some(mut engine) = self.engine.write().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match Arc::try_unwrap(engine) {
                Ok(engine) => return drop(engine),
                Err(_) if Instant::now() >= deadline => return,
                Err(shared) => engine = shared,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn condition(&self) -> Condition {
        self.condition.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_condition(&self, condition: Condition) {
        *self.condition.write().unwrap_or_else(PoisonError::into_inner) = condition;
    }

    pub(crate) fn is_quarantined(&self, incarnation: Incarnation) -> bool {
        self.quarantined.read().unwrap_or_else(PoisonError::into_inner).contains(&incarnation)
    }

    fn quarantine(&self, id: &SessionId, seq: u64, what: &str, requests: &Sender<Request>) {
        let new = self.quarantined.write().unwrap_or_else(PoisonError::into_inner).insert(id.incarnation);
        if new {
            tracing::error!(session = %id, seq, what, "stored data is damaged; the session is quarantined");
            // A store that is closing remembers nothing more.
            let _ = requests.send(Request::Quarantine { incarnation: id.incarnation });
        }
    }

    /// Free bytes on the file system; a file system that cannot be asked counts as empty.
    pub(crate) fn free(&self) -> u64 {
        rustix::fs::statvfs(&self.layout.dir).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize))
    }
}

/// Says that the store failed if the thread that writes ends by a panic.
struct Ended(Arc<Shared>);

impl Drop for Ended {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.set_condition(Condition::Failed("the committer panicked".into()));
        }
    }
}

/// Reads that may run at once; the disk gains nothing from more.
const READS: usize = 16;

/// The embedded engine. See the [crate](crate).
pub struct FjallStore {
    shared: Arc<Shared>,
    requests: Sender<Request>,
    reads: Arc<Semaphore>,
    committer: Mutex<Option<JoinHandle<()>>>,
    _lock: File,
}

impl core::fmt::Debug for FjallStore {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "FjallStore({})", self.shared.layout.dir.display())
    }
}

impl FjallStore {
    /// Says whether the store in `dir` is of a version that can be opened, while another process may have it open. A directory without one is.
    ///
    /// Errors: `Damaged`, `Version`, `Io`.
    pub fn check_version(dir: &Path) -> Result<(), OpenError> {
        let layout = Layout::new(dir);
        if layout.format().exists() { Format::read(&layout).map(drop) } else { Ok(()) }
    }

    /// Opens the store in `dir`, creating it if the directory is empty or missing. Blocks: a start replays the journal.
    ///
    /// Errors: `Locked`; `Damaged`, which says what is missing; `Version`; `Io`; `Engine`.
    pub fn open(dir: &Path, config: Config) -> Result<Self, OpenError> {
        let mut dirs = std::fs::DirBuilder::new();
        // For its owner only, whatever is above it.
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut dirs, 0o700);
        dirs.recursive(true).create(dir).map_err(|error| OpenError::Io(dir.to_owned(), error))?;
        let layout = Layout::new(dir);
        let lock = open::lock(&layout, true)?;
        let (engine, file) = open::open(&layout, &config)?;
        let format = Format::read(&layout)?;
        let shared = Arc::new(Shared {
            layout,
            config,
            engine: RwLock::new(None),
            condition: RwLock::new(Condition::Serving),
            quarantined: RwLock::default(),
        });
        // Bounded by what the callers hold: one append per session, and the requests of tasks that wait for the answer.
        let (requests, inbox) = channel();
        let committer = Committer::new(shared.clone(), inbox, file, format, &engine)?;
        shared.put_engine(engine);
        if shared.free() < shared.config.reserve {
            shared.set_condition(Condition::NoSpace);
        }
        let thread = std::thread::Builder::new().name("committer".into()).spawn(move || {
            let ended = Ended(committer.shared());
            committer.run();
            drop(ended);
        });
        let thread = thread.map_err(|error| OpenError::Engine(format!("no thread: {error}")))?;
        let reads = Arc::new(Semaphore::new(READS));
        Ok(Self { shared, requests, reads, committer: Mutex::new(Some(thread)), _lock: lock })
    }

    fn ask<T: Send + 'static>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Pending<T> {
        let (answer, asked) = oneshot::channel();
        let sent = self.requests.send(request(answer));
        Box::pin(async move {
            let stopped = || StoreError::Failed { what: "the store is closed".into() };
            sent.map_err(|_| stopped())?;
            asked.await.map_err(|_| stopped())?
        })
    }

    /// The same for a thread that may block.
    pub(crate) fn ask_blocking<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Result<T, StoreError> {
        let (answer, asked) = oneshot::channel();
        let stopped = || StoreError::Failed { what: "the store is closed".into() };
        self.requests.send(request(answer)).map_err(|_| stopped())?;
        asked.blocking_recv().map_err(|_| stopped())?
    }

    /// Puts a session into quarantine: something of it was found damaged.
    pub(crate) fn quarantine(&self, id: &SessionId, seq: u64, what: &str) {
        self.shared.quarantine(id, seq, what, &self.requests);
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Runs a read on a thread that may block. Damage that it finds puts the session into quarantine.
    fn read<T: Send + 'static>(
        &self,
        session: Option<SessionId>,
        read: impl FnOnce(&Reader<'_>) -> Result<T, StoreError> + Send + 'static,
    ) -> Pending<T> {
        let (shared, reads, requests) = (self.shared.clone(), self.reads.clone(), self.requests.clone());
        Box::pin(async move {
            if let Some(id) = session.as_ref().filter(|id| shared.is_quarantined(id.incarnation)) {
                tracing::debug!(session = %id, "read of a quarantined session");
            }
            let permit = reads.acquire_owned().await;
            let task = tokio::task::spawn_blocking(move || {
                let _permit = permit;
                let engine = shared.engine()?;
                let result = read(&Reader::new(&engine));
                if let (Err(StoreError::Damaged { seq, what }), Some(id)) = (&result, &session) {
                    shared.quarantine(id, *seq, what, &requests);
                }
                result
            });
            task.await.unwrap_or_else(|error| Err(StoreError::Failed { what: error.to_string() }))
        })
    }
}

impl Store for FjallStore {
    fn create(&self, session: SessionId, created: u64, expire_after: u64) -> Pending<Created> {
        self.ask(|answer| Request::Create { session, created, expire_after, answer })
    }

    fn stat(&self, name: SessionName) -> Pending<Option<SessionStat>> {
        self.read(None, move |reader| match reader.row(&name)? {
            Some(row) => reader.stat(name, &row).map(Some),
            None => Ok(None),
        })
    }

    fn open_writer(&self, session: SessionId) -> Pending<Writer> {
        self.ask(|answer| Request::OpenWriter { session, answer })
    }

    fn close_writer(&self, writer: Writer) {
        let Writer { session, epoch } = writer;
        // A store that is closing has forgotten it.
        let _ = self.requests.send(Request::CloseWriter { session, epoch });
    }

    fn append(&self, writer: &Writer, chunk: Arc<Chunk>, wake: Option<u64>) -> Committing {
        let (answer, committing) = Committing::channel();
        let request = Request::Append { session: writer.session.clone(), epoch: writer.epoch, chunk, wake, answer };
        match self.requests.send(request) {
            Ok(()) => committing,
            Err(_) => {
                let what = "the store is closed".into();
                Committing::ready(Outcome::NotCommitted(StoreError::Failed { what }))
            }
        }
    }

    fn resolve(&self, writer: &Writer, chunk: Arc<Chunk>) -> Pending<bool> {
        let (session, epoch) = (writer.session.clone(), writer.epoch);
        self.ask(|answer| Request::Resolve { session, epoch, chunk, answer })
    }

    fn read(&self, session: SessionId, from: ReadFrom, budget: usize) -> Pending<Page> {
        Self::read(self, Some(session.clone()), move |reader| {
            let row = reader.row_of(&session)?;
            reader.page(&row, from, budget)
        })
    }

    fn put_snapshot(&self, writer: &Writer, state: Bytes) -> Pending<()> {
        let (session, epoch) = (writer.session.clone(), writer.epoch);
        // Made here: while the committer copies megabytes, everybody waits.
        let (number, row) = (State::number_of(&state).unwrap_or(0), keys::encode_snapshot(&state));
        self.ask(|answer| Request::PutSnapshot { session, epoch, number, row, answer })
    }

    fn snapshot(&self, session: SessionId) -> Pending<Option<Bytes>> {
        self.read(Some(session.clone()), move |reader| {
            reader.row_of(&session)?;
            reader.snapshot_of(&session)
        })
    }

    fn trim(&self, writer: &Writer, before: u64) -> Pending<()> {
        let (session, epoch) = (writer.session.clone(), writer.epoch);
        self.ask(|answer| Request::Trim { session, epoch, before, answer })
    }

    fn compact(&self, writer: &Writer, chunk: Arc<Chunk>) -> Pending<()> {
        let (session, epoch) = (writer.session.clone(), writer.epoch);
        self.ask(|answer| Request::Compact { session, epoch, chunk, answer })
    }

    fn set_compaction(&self, writer: &Writer, compaction: Compaction) -> Pending<()> {
        let (session, epoch) = (writer.session.clone(), writer.epoch);
        self.ask(|answer| Request::SetCompaction { session, epoch, compaction, answer })
    }

    fn delete(&self, session: SessionId) -> Pending<()> {
        self.ask(|answer| Request::Delete { session, answer })
    }

    fn due(&self, now: u64, limit: usize) -> Pending<Vec<SessionStat>> {
        self.read(None, move |reader| reader.due(now, limit))
    }

    fn postpone(&self, session: SessionId, until: u64) -> Pending<()> {
        self.ask(|answer| Request::Postpone { session, until, answer })
    }

    fn set_wake(&self, session: SessionId, wake: Option<u64>) -> Pending<()> {
        self.ask(|answer| Request::SetWake { session, wake, answer })
    }

    fn waking(&self, until: u64, after: Option<(u64, Incarnation)>, limit: usize) -> Pending<Vec<SessionStat>> {
        let shared = self.shared.clone();
        self.read(None, move |reader| reader.waking(until, after, limit, |id| shared.is_quarantined(id)))
    }

    fn expire(&self, session: SessionId, now: u64) -> Pending<bool> {
        self.ask(|answer| Request::Expire { session, now, answer })
    }

    fn list(&self, prefix: Vec<u8>, after: Vec<u8>, limit: usize) -> Pending<ListPage> {
        self.read(None, move |reader| reader.list(&prefix, &after, limit))
    }

    fn size(&self, session: SessionId) -> Pending<u64> {
        self.read(Some(session.clone()), move |reader| reader.size(&reader.row_of(&session)?))
    }

    fn health(&self) -> Health {
        match self.shared.condition() {
            Condition::Serving => Health::Serving,
            Condition::NoSpace | Condition::Reopening => Health::NoSpace,
            Condition::Failed(what) => Health::Failed { what },
        }
    }
}

impl Drop for FjallStore {
    /// Waits until what was asked before is committed and the witness is synced.
    fn drop(&mut self) {
        // The thread may have ended by a failure.
        let _ = self.requests.send(Request::Stop);
        let thread = self.committer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the committer panicked");
        }
        self.shared.take_engine();
    }
}

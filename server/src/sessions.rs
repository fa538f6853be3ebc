//! The sessions that are in memory: found by name, loaded on demand, let go when idle.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use mainstay_protocol::error::Code;
use mainstay_protocol::registry::MAX_LISTED;
use mainstay_protocol::session::{Compaction, FOR_WORKERS, Incarnation, Refusal, SessionName, State, Streams};
use mainstay_store::{Created, ReadFrom, SessionId, SessionStat, Store, StoreError};
use mainstay_transport::entropy;
use tokio::sync::{Notify, OnceCell, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use crate::apart::Apart;
use crate::config::Config;
use crate::jobs::Offers;
use crate::metrics::Metrics;
use crate::owner::{Command, Owner};
use crate::quota::{self, PrefixUsage};
use crate::resume::ResumeKeys;
use crate::ring::Ring;

/// How far a session reaches, as far as readers may know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// The first seq that may be read.
    pub(crate) first: u64,
    /// Records below it may have been put together.
    pub(crate) compacted: u64,
    /// The durable tail.
    pub(crate) tail: u64,
    /// True once `session.closed` is durable.
    pub(crate) closed: bool,
    /// Why the session is no longer served from here.
    pub(crate) gone: Option<Code>,
}

/// One session in memory.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) id: SessionId,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) extent: watch::Sender<Extent>,
    pub(crate) ring: Mutex<Ring>,
    pub(crate) streams: RwLock<Arc<Streams>>,
    /// What is appended to it and who follows it.
    pub(crate) used: quota::SessionUsage,
    /// The prefixes with quotas that it is under.
    pub(crate) prefixes: Vec<Arc<PrefixUsage>>,
    users: AtomicUsize,
    /// Told when the last user is gone.
    unused: Notify,
}

impl Session {
    /// True if nobody uses it now.
    pub(crate) fn is_unused(&self) -> bool {
        self.users.load(Ordering::Relaxed) == 0
    }

    /// How many use it now.
    pub(crate) fn users(&self) -> usize {
        self.users.load(Ordering::Relaxed)
    }

    /// Waits until the last user is gone, or returns at once if that was so since it was asked last. For its owner only.
    pub(crate) async fn unused(&self) {
        self.unused.notified().await;
    }

    pub(crate) fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn streams(&self) -> Arc<Streams> {
        self.streams.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_streams(&self, streams: &Streams) {
        *self.streams.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(streams.clone());
    }
}

/// Keeps a session in memory while it is used.
#[derive(Debug)]
pub(crate) struct SessionUse(Arc<Session>);

impl std::ops::Deref for SessionUse {
    type Target = Arc<Session>;
    fn deref(&self) -> &Arc<Session> {
        &self.0
    }
}

impl Clone for SessionUse {
    fn clone(&self) -> Self {
        self.0.users.fetch_add(1, Ordering::Relaxed);
        Self(self.0.clone())
    }
}

impl Drop for SessionUse {
    fn drop(&mut self) {
        if self.0.users.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.unused.notify_one();
        }
    }
}

/// A session as the store has it.
pub(crate) struct Loaded {
    pub(crate) state: State,
    /// Bytes of chunks behind its snapshot: the last one may not have been taken.
    pub(crate) unsnapshotted: usize,
    pub(crate) stat: SessionStat,
}

/// What a store error means to a client.
pub(crate) fn refusal(error: &StoreError) -> Refusal {
    let (code, detail) = match error {
        StoreError::NotFound => (Code::SESSION_GONE, "the session was deleted"),
        StoreError::Fenced { .. } => (Code::WRITER_FENCED, "another server took the session over"),
        StoreError::Damaged { .. } => (Code::SESSION_DAMAGED, "stored data of the session is damaged"),
        StoreError::NoSpace => (Code::UNAVAILABLE, "the server's free disk space is below its reserve"),
        StoreError::Overloaded => (Code::OVERLOADED, "the server's store has too much to do"),
        StoreError::Failed { .. } => (Code::UNAVAILABLE, "the server's store failed"),
        _ => (Code::INTERNAL, "the server's store refused"),
    };
    // From where on nothing can be trusted (spec DUR-7).
    let value = if let StoreError::Damaged { seq, .. } = error { *seq } else { 0 };
    Refusal { value, ..Refusal::new(code, detail) }
}

/// Sessions that expire, or are woken, in one step.
const EXPIRY_STEP: usize = 64;
/// How soon sessions that could not be woken are tried again.
const WAKE_AGAIN: tokio::time::Duration = tokio::time::Duration::from_secs(1);

/// Passes of compaction at once: each may hold the texts of its range.
const PASSES: usize = 2;
/// How soon the size of a session is read again that could not be.
const MEASURE_AGAIN: tokio::time::Duration = tokio::time::Duration::from_secs(1);

type Cell = Arc<OnceCell<Arc<Session>>>;

/// See the [module](self).
pub(crate) struct Sessions {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) config: Config,
    /// Seal and open resume tokens.
    pub(crate) resume_keys: ResumeKeys,
    pub(crate) clock: fn() -> u64,
    ring_total: Arc<AtomicUsize>,
    /// By name, so that whatever is done to all of them comes in one order.
    hot: Mutex<BTreeMap<SessionName, Cell>>,
    /// The tasks of owners, also of those that have let their session go and still write a snapshot.
    owners: Mutex<JoinSet<()>>,
    /// Nothing is loaded any more. Set under the lock of `hot`.
    stopping: AtomicBool,
    /// A session that must always be served is served by nobody, for a reason that may pass.
    pub(crate) forsaken: AtomicBool,
    /// Which of them have jobs for workers.
    pub(crate) offers: Offers,
    /// Passes of compaction that may run at once: it is nobody's hurry.
    pub(crate) compactions: Arc<Semaphore>,
    /// Where large views are encoded.
    pub(crate) apart: Arc<Apart>,
    /// Woken when a session left memory.
    pub(crate) left: Notify,
    pub(crate) metrics: Arc<Metrics>,
    /// The prefixes that have quotas.
    prefixes: Vec<Arc<PrefixUsage>>,
}

impl Sessions {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        resume_keys: ResumeKeys,
        config: Config,
        clock: fn() -> u64,
        apart: Arc<Apart>,
    ) -> Self {
        let hot = Mutex::default();
        let prefixes = config.quotas.prefixes.iter().map(|quotas| Arc::new(PrefixUsage::new(quotas.clone()))).collect();
        let (stopping, forsaken, left) = (AtomicBool::new(false), AtomicBool::new(false), Notify::new());
        Self {
            store,
            config,
            resume_keys,
            clock,
            ring_total: Arc::default(),
            hot,
            owners: Mutex::default(),
            stopping,
            forsaken,
            offers: Offers::default(),
            compactions: Arc::new(Semaphore::new(PASSES)),
            apart,
            left,
            metrics: Arc::default(),
            prefixes,
        }
    }

    /// The prefixes with quotas that a session is under.
    fn prefixes_of(&self, name: &SessionName) -> Vec<Arc<PrefixUsage>> {
        self.prefixes.iter().filter(|prefix| prefix.covers(name)).cloned().collect()
    }

    /// Creates a session, within the quotas of the prefixes that it is under.
    async fn create(&self, id: &SessionId, created: u64, expire_after: u64) -> Result<Created, Refusal> {
        let prefixes = self.prefixes_of(&id.name);
        for (at, prefix) in prefixes.iter().enumerate() {
            if let Err(refusal) = prefix.create(&self.metrics) {
                prefixes[..at].iter().for_each(|prefix| prefix.delete());
                return Err(refusal);
            }
        }
        let result = self.store.create(id.clone(), created, expire_after).await;
        if !matches!(result, Ok(Created::New)) {
            prefixes.iter().for_each(|prefix| prefix.delete());
        }
        result.map_err(|error| self.refused(&id.name, &error))
    }

    /// A session was deleted.
    pub(crate) fn deleted(&self, name: &SessionName) {
        self.prefixes_of(name).iter().for_each(|prefix| prefix.delete());
    }

    /// What a store error that keeps a session from being loaded means to a client.
    fn refused(&self, name: &SessionName, error: &StoreError) -> Refusal {
        // What passes is told to those who ask, again and again; the operator sees it once, in the store's own words.
        match error.is_retryable() {
            true => tracing::debug!(session = %name, %error, "cannot load or create the session now"),
            false => tracing::warn!(session = %name, %error, "cannot load or create the session"),
        }
        refusal(error)
    }

    /// True if it must be known how many bytes of a session are stored.
    fn counts_bytes(&self, prefixes: &[Arc<PrefixUsage>]) -> bool {
        self.config.quotas.session.stored_bytes.is_some() || prefixes.iter().any(|prefix| prefix.counts_bytes())
    }

    /// Finds out how many bytes of a session are stored, in the background.
    fn measure(self: &Arc<Self>, session: &Arc<Session>) {
        if !session.used.begin_measuring() {
            return;
        }
        let (this, id, session) = (self.clone(), session.id.clone(), Arc::downgrade(session));
        tokio::spawn(async move {
            while let Some(session) = session.upgrade() {
                let before = session.used.bytes();
                let found = match this.store.size(id.clone()).await {
                    Ok(size) => Some(size),
                    // One that is damaged is as large as nobody knows: it is refused for that.
                    Err(error) if !error.is_retryable() => Some(0),
                    Err(error) => {
                        tracing::debug!(session = %id.name, %error, "cannot read the size of the session now");
                        None
                    }
                };
                if found.is_some_and(|found| !session.used.measured(before, found)) {
                    return;
                }
                drop(session);
                tokio::time::sleep(MEASURE_AGAIN).await;
            }
        });
    }

    /// Something of a session was removed: one that has reached its quota may have room again.
    pub(crate) fn removed(self: &Arc<Self>, session: &Arc<Session>) {
        if self.config.quotas.session.stored_bytes.is_some_and(|limit| session.used.bytes() >= limit) {
            self.measure(session);
        }
    }

    /// Counts anew what is under each prefix that has quotas, and what is stored of the sessions in memory that have reached theirs.
    pub(crate) async fn count_prefixes(self: &Arc<Self>) {
        let (hot, _) = self.all();
        hot.iter().for_each(|session| self.removed(session));
        for prefix in &self.prefixes {
            let before = prefix.counted();
            match self.count_one(prefix).await {
                Ok(found) => prefix.found(before, found),
                Err(error) => {
                    tracing::warn!(prefix = prefix.prefix(), %error, "cannot count what is stored under a prefix");
                }
            }
        }
    }

    async fn count_one(&self, prefix: &PrefixUsage) -> Result<(u64, u64), StoreError> {
        let (mut sessions, mut bytes, mut after) = (0, 0, Vec::new());
        loop {
            let page = self.store.list(prefix.prefix().into(), after, MAX_LISTED).await?;
            for stat in page.sessions {
                if !prefix.covers(&stat.session.name) {
                    continue;
                }
                sessions += 1;
                if prefix.counts_bytes() {
                    // One that was deleted meanwhile has none; one that is damaged has as many as nobody knows.
                    bytes += self.store.size(stat.session).await.unwrap_or(0);
                }
            }
            if !page.more {
                return Ok((sessions, bytes));
            }
            after = page.after;
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SessionName, Cell>> {
        self.hot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Finds or loads the session called `name`; creates it if `create` says after how many milliseconds without use it
    /// expires (0 for never). Returns it and whether it is new.
    ///
    /// Errors: `SESSION_NOT_FOUND`, `GOING_AWAY`, and those of the store.
    pub(crate) async fn get(
        self: &Arc<Self>,
        name: &SessionName,
        create: Option<u64>,
    ) -> Result<(SessionUse, bool), Refusal> {
        let mut new = false;
        loop {
            let cell = {
                let mut hot = self.lock();
                if self.stopping.load(Ordering::Relaxed) {
                    return Err(Refusal::new(Code::GOING_AWAY, "the server stops"));
                }
                hot.entry(name.clone()).or_default().clone()
            };
            let result = cell.get_or_try_init(|| self.load(name, create, &mut new)).await.cloned();
            match result {
                Ok(session) => {
                    // Counted under the lock that the owner takes to leave.
                    let hot = self.lock();
                    if hot.get(name).is_some_and(|current| Arc::ptr_eq(current, &cell)) {
                        session.users.fetch_add(1, Ordering::Relaxed);
                        return Ok((SessionUse(session), new));
                    }
                }
                Err(error) => {
                    self.remove_empty(name, cell);
                    return Err(error);
                }
            }
        }
    }

    async fn load(
        self: &Arc<Self>,
        name: &SessionName,
        create: Option<u64>,
        new: &mut bool,
    ) -> Result<Arc<Session>, Refusal> {
        let refused = |error: StoreError| self.refused(name, &error);
        let stat = match (self.store.stat(name.clone()).await.map_err(refused)?, create) {
            (Some(stat), _) => stat,
            (None, Some(expire_after)) => {
                let id = SessionId { name: name.clone(), incarnation: Incarnation(entropy::random()) };
                let created = (self.clock)();
                match self.create(&id, created, expire_after).await? {
                    Created::New => {
                        *new = true;
                        SessionStat {
                            session: id,
                            created,
                            first: 0,
                            tail: 0,
                            expire_after,
                            written: created,
                            chunks: 0,
                            kept: 0,
                            wake: None,
                            compaction: Compaction::default(),
                        }
                    }
                    Created::Existing(stat) => stat,
                }
            }
            (None, None) => {
                return Err(Refusal::new(Code::SESSION_NOT_FOUND, "no session has this name"));
            }
        };
        let loaded = self.rebuild(stat).await.map_err(refused)?;
        let Loaded { state, stat, .. } = &loaded;
        let limit = self.config.ring_bytes;
        let ring = Ring::new(state.tail(), limit, self.ring_total.clone(), self.config.ring_budget);
        let closed = state.view().closed().is_some();
        let (first, compacted, tail) = (state.first(), stat.compaction.before, state.tail());
        let (extent, _) = watch::channel(Extent { first, compacted, tail, closed, gone: None });
        let (commands, mailbox) = mpsc::channel(32);
        let session = Arc::new(Session {
            id: stat.session.clone(),
            commands,
            extent,
            ring: Mutex::new(ring),
            streams: RwLock::new(Arc::new(state.streams().clone())),
            used: quota::SessionUsage::new(&self.config.quotas),
            prefixes: self.prefixes_of(name),
            users: AtomicUsize::new(0),
            unused: Notify::new(),
        });
        if self.counts_bytes(&session.prefixes) {
            self.measure(&session);
        }
        self.metrics.sessions.inc();
        let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        while owners.try_join_next().is_some() {}
        owners.spawn(Owner::new(self.clone(), session.clone(), mailbox, loaded).run());
        drop(owners);
        Ok(session)
    }

    /// Rebuilds the state from the newest snapshot and the chunks behind it.
    async fn rebuild(&self, stat: SessionStat) -> Result<Loaded, StoreError> {
        let id = &stat.session;
        let snapshot = self.store.snapshot(id.clone()).await?;
        let restored = snapshot
            .as_ref()
            .and_then(|bytes| self.apart.run(bytes.len(), || State::restore_kept(bytes, stat.kept)).ok());
        let mut state = match restored {
            Some(state) if state.incarnation() == id.incarnation => state,
            _ => State::new(id.incarnation),
        };
        if state.number() > stat.chunks {
            return Err(StoreError::Damaged { seq: stat.tail, what: "the snapshot is ahead of the log".into() });
        }
        let mut unsnapshotted = 0;
        while state.number() < stat.chunks {
            let from = ReadFrom::Chunk { first: state.tail(), number: state.number() };
            let page = self.store.read(id.clone(), from, 4 << 20).await?;
            if page.chunks.is_empty() {
                return Err(StoreError::Damaged { seq: state.tail(), what: "chunks are missing at the end".into() });
            }
            let bytes = page.chunks.iter().map(|chunk| chunk.bytes().len()).sum();
            let folded = self.apart.run(bytes, || page.chunks.iter().try_for_each(|chunk| state.verify(chunk)));
            folded.map_err(|damage| StoreError::Damaged { seq: damage.seq, what: damage.what.into() })?;
            unsnapshotted += bytes;
        }
        Ok(Loaded { state, unsnapshotted, stat })
    }

    /// True if the session is in memory, or being loaded.
    pub(crate) fn is_hot(&self, name: &SessionName) -> bool {
        self.lock().contains_key(name)
    }

    /// Lets a session go if nobody uses it. Called by its owner, which then ends.
    pub(crate) fn leave_if_unused(&self, session: &Arc<Session>) -> bool {
        let mut hot = self.lock();
        let unused = session.is_unused();
        if unused {
            self.remove(&mut hot, session);
        }
        unused
    }

    /// Lets a session go whoever uses it. Called by its owner, which then ends.
    pub(crate) fn leave(&self, session: &Arc<Session>) {
        self.remove(&mut self.lock(), session);
    }

    fn remove(&self, hot: &mut BTreeMap<SessionName, Cell>, session: &Arc<Session>) {
        let name = &session.id.name;
        if hot.get(name).and_then(|cell| cell.get()).is_some_and(|current| Arc::ptr_eq(current, session)) {
            hot.remove(name);
            self.metrics.sessions.dec();
            // While nobody else can have loaded it again.
            self.offers.remove(name);
        }
        self.left.notify_waiters();
    }

    /// Loads the sessions that have something to write by themselves, so that they do: those that must always be served when the server
    /// starts, and each when its next deadline comes (spec STATE-6, PRES-4, RUN-4, NOTE-4). Never returns.
    pub(crate) async fn wake(self: &Arc<Self>) {
        // What is held by a lease is served from then on for as long as it is, and need not be looked for again.
        let mut leased = true;
        loop {
            leased |= self.forsaken.swap(false, Ordering::Relaxed);
            let again = self.wake_some(leased).await;
            leased &= again;
            tokio::time::sleep(if again { WAKE_AGAIN } else { self.config.due_pause }).await;
        }
    }

    /// True if it must be tried again before long.
    async fn wake_some(self: &Arc<Self>, leased: bool) -> bool {
        let now = (self.clock)();
        // What only workers want is loaded for them. At first everything is: what is written with a commit may be too early.
        let mut after = (!leased).then_some((FOR_WORKERS, Incarnation([0xff; 16])));
        let mut again = false;
        loop {
            let waking = match self.store.waking(now, after, EXPIRY_STEP).await {
                Ok(waking) => waking,
                Err(error) => {
                    tracing::warn!(%error, "cannot look for sessions that have something to do");
                    return true;
                }
            };
            let Some(last) = waking.last() else { return again };
            after = last.wake.map(|at| (at, last.session.incarnation));
            for stat in waking {
                // One that is in memory does by itself what it must. To be loaded is enough.
                match self.get(&stat.session.name, None).await {
                    Ok(_) => {}
                    Err(refusal) if refusal.code == Code::SESSION_NOT_FOUND => {}
                    Err(refusal) => {
                        tracing::debug!(session = %stat.session, code = %refusal.code, "cannot be loaded now");
                        again |= refusal.code.is_retryable();
                    }
                }
            }
        }
    }

    /// Deletes sessions that were not used for as long as they asked for, a few at a time (spec SESS-21). Never returns.
    pub(crate) async fn expire(&self) {
        loop {
            tokio::time::sleep(self.config.due_pause).await;
            // Without a pause while there are many, and they go.
            while self.expire_some().await == EXPIRY_STEP {}
        }
    }

    /// Returns how many were deleted.
    async fn expire_some(&self) -> usize {
        let now = (self.clock)();
        let due = match self.store.due(now, EXPIRY_STEP).await {
            Ok(due) => due,
            Err(error) => {
                tracing::warn!(%error, "cannot look for sessions to expire");
                return 0;
            }
        };
        let mut expired = 0;
        for stat in due {
            match self.expire_one(&stat, now).await {
                Ok(gone) => expired += usize::from(gone),
                Err(error) => tracing::warn!(session = %stat.session, %error, "cannot expire a session now"),
            }
        }
        expired
    }

    async fn expire_one(&self, stat: &SessionStat, now: u64) -> Result<bool, StoreError> {
        let id = &stat.session;
        let until = stat.written.saturating_add(stat.expire_after);
        if until > now {
            return self.store.postpone(id.clone(), until).await.map(|()| false);
        }
        let Some(cell) = self.occupy(&id.name) else {
            // In use: its owner says until when, before it lets it go.
            let until = now.saturating_add(stat.expire_after);
            return self.store.postpone(id.clone(), until).await.map(|()| false);
        };
        // In the session's place, so that whoever wants to load it waits until it is decided.
        let result = cell.get_or_try_init(|| async { Err(self.store.expire(id.clone(), now).await) }).await;
        let result = match result {
            // Somebody was faster and uses it.
            Ok(_) => Ok(false),
            Err(result) => result,
        };
        self.remove_empty(&id.name, cell);
        if result == Ok(true) {
            self.deleted(&id.name);
            tracing::info!(session = %id, "expired");
        }
        result
    }

    /// Puts an empty cell in the place of a session that is not in memory.
    fn occupy(&self, name: &SessionName) -> Option<Cell> {
        match self.lock().entry(name.clone()) {
            Entry::Vacant(free) => Some(free.insert(Cell::default()).clone()),
            Entry::Occupied(_) => None,
        }
    }

    /// Removes a cell that holds no session. The last one that looks into it does so; who still waits for it may fill it.
    fn remove_empty(&self, name: &SessionName, cell: Cell) {
        let mut hot = self.lock();
        let unused = |current: &Cell| Arc::ptr_eq(current, &cell) && Arc::strong_count(current) == 2;
        if hot.get(name).is_some_and(|current| unused(current) && !current.initialized()) {
            hot.remove(name);
        }
        // Under the lock, so that another one that looks counts right.
        drop(cell);
    }

    /// No session is loaded or attached to any more.
    pub(crate) fn stop(&self) {
        let _hot = self.lock();
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Waits until every owner has ended, and nothing of it is left. Those that have not when this is dropped are ended.
    pub(crate) async fn ended(&self) {
        let mut owners = core::mem::take(&mut *self.owners.lock().unwrap_or_else(PoisonError::into_inner));
        while owners.join_next().await.is_some() {}
    }

    /// Every session in memory, and how many are being loaded.
    pub(crate) fn all(&self) -> (Vec<Arc<Session>>, usize) {
        let hot = self.lock();
        let loaded: Vec<_> = hot.values().filter_map(|cell| cell.get().cloned()).collect();
        let loading = hot.len() - loaded.len();
        (loaded, loading)
    }
}

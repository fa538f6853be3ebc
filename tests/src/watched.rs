//! A store in memory that can be watched, slowed down and made to refuse.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use mainstay_protocol::session::{Chunk, Compaction, Incarnation, SessionName};
use mainstay_store::{
    Committing, Created, Health, ListPage, MemoryStore, Page, Pending, ReadFrom, SessionId, SessionStat, Store,
    StoreError, Writer,
};

/// See the [module](self).
#[derive(Debug, Default)]
pub struct Watched {
    inner: MemoryStore,
    /// How often it was asked what a session is: once for each time that one is loaded.
    pub loads: AtomicUsize,
    /// Writers that were opened.
    pub writers: AtomicUsize,
    /// Steps of compaction that were asked for.
    pub steps: AtomicUsize,
    /// It has no room for snapshots.
    pub is_full: AtomicBool,
    /// While this is so no commit is answered.
    pub holds: tokio::sync::watch::Sender<bool>,
    /// Milliseconds that each commit takes longer.
    pub slow_commits: AtomicU64,
    /// Snapshots that were to be kept.
    pub snapshots: AtomicUsize,
    refused: usize,
    slow: Option<(&'static str, Duration)>,
    told: Mutex<Vec<Compaction>>,
}

impl Watched {
    /// Refuses the step `refused` of compaction; 0 for none.
    pub fn refusing(refused: usize) -> Self {
        Self { refused, ..Self::default() }
    }

    /// Takes so long for each step of compaction of the session of this name.
    pub fn slow(slow: Option<(&'static str, Duration)>) -> Self {
        Self { slow, ..Self::default() }
    }

    /// How far compaction was said to have come, in order.
    pub fn told(&self) -> Vec<Compaction> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Store for Watched {
    fn create(&self, session: SessionId, created: u64, expire_after: u64) -> Pending<Created> {
        self.inner.create(session, created, expire_after)
    }

    fn stat(&self, name: SessionName) -> Pending<Option<SessionStat>> {
        self.loads.fetch_add(1, Ordering::Relaxed);
        self.inner.stat(name)
    }

    fn open_writer(&self, session: SessionId) -> Pending<Writer> {
        self.writers.fetch_add(1, Ordering::Relaxed);
        self.inner.open_writer(session)
    }

    fn close_writer(&self, writer: Writer) {
        self.inner.close_writer(writer);
    }

    fn append(&self, writer: &Writer, chunk: Arc<Chunk>, wake: Option<u64>) -> Committing {
        let committing = self.inner.append(writer, chunk, wake);
        let mut holds = self.holds.subscribe();
        let is_held = *holds.borrow();
        match self.slow_commits.load(Ordering::Relaxed) {
            0 if !is_held => committing,
            slow => {
                let (answer, slowly) = Committing::channel();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(slow)).await;
                    // A store that is gone holds nothing.
                    let _ = holds.wait_for(|holds| !holds).await;
                    // Whoever waits may be gone.
                    let _ = answer.send(committing.await);
                });
                slowly
            }
        }
    }

    fn resolve(&self, writer: &Writer, chunk: Arc<Chunk>) -> Pending<bool> {
        self.inner.resolve(writer, chunk)
    }

    fn read(&self, session: SessionId, from: ReadFrom, budget: usize) -> Pending<Page> {
        self.inner.read(session, from, budget)
    }

    fn put_snapshot(&self, writer: &Writer, state: Bytes) -> Pending<()> {
        self.snapshots.fetch_add(1, Ordering::Relaxed);
        match self.is_full.load(Ordering::Relaxed) {
            true => Box::pin(core::future::ready(Err(StoreError::NoSpace))),
            false => self.inner.put_snapshot(writer, state),
        }
    }

    fn snapshot(&self, session: SessionId) -> Pending<Option<Bytes>> {
        self.inner.snapshot(session)
    }

    fn trim(&self, writer: &Writer, before: u64) -> Pending<()> {
        self.inner.trim(writer, before)
    }

    fn compact(&self, writer: &Writer, chunk: Arc<Chunk>) -> Pending<()> {
        let step = self.steps.fetch_add(1, Ordering::Relaxed) + 1;
        if step == self.refused {
            return Box::pin(core::future::ready(Err(StoreError::Overloaded)));
        }
        let done = self.inner.compact(writer, chunk);
        match self.slow.filter(|(name, _)| *name == writer.session.name.as_str()) {
            Some((_, time)) => Box::pin(async move {
                tokio::time::sleep(time).await;
                done.await
            }),
            None => done,
        }
    }

    fn set_compaction(&self, writer: &Writer, compaction: Compaction) -> Pending<()> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).push(compaction);
        self.inner.set_compaction(writer, compaction)
    }

    fn delete(&self, session: SessionId) -> Pending<()> {
        self.inner.delete(session)
    }

    fn due(&self, now: u64, limit: usize) -> Pending<Vec<SessionStat>> {
        self.inner.due(now, limit)
    }

    fn postpone(&self, session: SessionId, until: u64) -> Pending<()> {
        self.inner.postpone(session, until)
    }

    fn expire(&self, session: SessionId, now: u64) -> Pending<bool> {
        self.inner.expire(session, now)
    }

    fn set_wake(&self, session: SessionId, wake: Option<u64>) -> Pending<()> {
        self.inner.set_wake(session, wake)
    }

    fn waking(&self, until: u64, after: Option<(u64, Incarnation)>, limit: usize) -> Pending<Vec<SessionStat>> {
        self.inner.waking(until, after, limit)
    }

    fn list(&self, prefix: Vec<u8>, after: Vec<u8>, limit: usize) -> Pending<ListPage> {
        self.inner.list(prefix, after, limit)
    }

    fn size(&self, session: SessionId) -> Pending<u64> {
        self.inner.size(session)
    }

    fn health(&self) -> Health {
        self.inner.health()
    }
}

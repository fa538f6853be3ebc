//! A store that fails on purpose, from a seed.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use mainstay_protocol::session::{Chunk, Compaction, Incarnation, SessionName};

use super::random::SplitMix;
use crate::contract::{
    Committing, Created, Health, ListPage, Outcome, Page, Pending, ReadFrom, SessionId, SessionStat, Store, StoreError,
    Writer,
};

/// How often what goes wrong, in thousandths.
#[derive(Debug, Clone, Copy, Default)]
pub struct Faults {
    /// An append is refused and not stored.
    pub not_committed: u32,
    /// An append is stored and its outcome is unknown.
    pub unknown_stored: u32,
    /// An append is not stored and its outcome is unknown.
    pub unknown_lost: u32,
    /// A read returns fewer chunks than it could.
    pub short_read: u32,
    /// Any other request is refused with `Overloaded`.
    pub overloaded: u32,
    /// A trim is refused with `Overloaded`.
    pub trim_refused: u32,
}

/// Wraps a store and makes it fail as [`Faults`] says. The same seed and the same calls fail in the same places.
#[derive(Debug)]
pub struct FaultyStore<S> {
    inner: S,
    faults: Mutex<Faults>,
    random: Mutex<SplitMix>,
}

impl<S> FaultyStore<S> {
    /// Wraps `inner`.
    pub fn new(inner: S, faults: Faults, seed: u64) -> Self {
        Self { inner, faults: Mutex::new(faults), random: Mutex::new(SplitMix(seed)) }
    }

    /// Changes what goes wrong from now on.
    pub fn set_faults(&self, faults: Faults) {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = faults;
    }

    fn faults(&self) -> Faults {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number of thousandths.
    fn roll(&self) -> u32 {
        self.random.lock().unwrap_or_else(PoisonError::into_inner).below(1000) as u32
    }

    fn refuse<T: Send + 'static>(&self) -> Option<Pending<T>> {
        (self.roll() < self.faults().overloaded)
            .then(|| -> Pending<T> { Box::pin(core::future::ready(Err(StoreError::Overloaded))) })
    }
}

impl<S: Store> Store for FaultyStore<S> {
    fn create(&self, session: SessionId, created: u64, expire_after: u64) -> Pending<Created> {
        self.refuse().unwrap_or_else(|| self.inner.create(session, created, expire_after))
    }

    fn stat(&self, name: SessionName) -> Pending<Option<SessionStat>> {
        self.inner.stat(name)
    }

    fn open_writer(&self, session: SessionId) -> Pending<Writer> {
        self.refuse().unwrap_or_else(|| self.inner.open_writer(session))
    }

    fn close_writer(&self, writer: Writer) {
        self.inner.close_writer(writer);
    }

    fn append(&self, writer: &Writer, chunk: Arc<Chunk>, wake: Option<u64>) -> Committing {
        let Faults { not_committed, unknown_stored, unknown_lost, .. } = self.faults();
        let roll = self.roll();
        let unknown = || Committing::ready(Outcome::Unknown(StoreError::Overloaded));
        if roll < not_committed {
            Committing::ready(Outcome::NotCommitted(StoreError::Overloaded))
        } else if roll < not_committed + unknown_stored {
            // The engine keeps what it was given, whether or not anyone waits.
            drop(self.inner.append(writer, chunk, wake));
            unknown()
        } else if roll < not_committed + unknown_stored + unknown_lost {
            unknown()
        } else {
            self.inner.append(writer, chunk, wake)
        }
    }

    fn resolve(&self, writer: &Writer, chunk: Arc<Chunk>) -> Pending<bool> {
        self.refuse().unwrap_or_else(|| self.inner.resolve(writer, chunk))
    }

    fn read(&self, session: SessionId, from: ReadFrom, budget: usize) -> Pending<Page> {
        let budget = if self.roll() < self.faults().short_read { 1 } else { budget };
        self.inner.read(session, from, budget)
    }

    fn put_snapshot(&self, writer: &Writer, state: Bytes) -> Pending<()> {
        self.refuse().unwrap_or_else(|| self.inner.put_snapshot(writer, state))
    }

    fn snapshot(&self, session: SessionId) -> Pending<Option<Bytes>> {
        self.inner.snapshot(session)
    }

    fn trim(&self, writer: &Writer, before: u64) -> Pending<()> {
        if self.roll() < self.faults().trim_refused {
            return Box::pin(core::future::ready(Err(StoreError::Overloaded)));
        }
        self.refuse().unwrap_or_else(|| self.inner.trim(writer, before))
    }

    fn compact(&self, writer: &Writer, chunk: Arc<Chunk>) -> Pending<()> {
        self.refuse().unwrap_or_else(|| self.inner.compact(writer, chunk))
    }

    fn set_compaction(&self, writer: &Writer, compaction: Compaction) -> Pending<()> {
        self.refuse().unwrap_or_else(|| self.inner.set_compaction(writer, compaction))
    }

    fn delete(&self, session: SessionId) -> Pending<()> {
        self.refuse().unwrap_or_else(|| self.inner.delete(session))
    }

    fn due(&self, now: u64, limit: usize) -> Pending<Vec<SessionStat>> {
        self.inner.due(now, limit)
    }

    fn postpone(&self, session: SessionId, until: u64) -> Pending<()> {
        self.refuse().unwrap_or_else(|| self.inner.postpone(session, until))
    }

    fn set_wake(&self, session: SessionId, wake: Option<u64>) -> Pending<()> {
        self.refuse().unwrap_or_else(|| self.inner.set_wake(session, wake))
    }

    fn waking(&self, until: u64, after: Option<(u64, Incarnation)>, limit: usize) -> Pending<Vec<SessionStat>> {
        self.inner.waking(until, after, limit)
    }

    fn expire(&self, session: SessionId, now: u64) -> Pending<bool> {
        self.refuse().unwrap_or_else(|| self.inner.expire(session, now))
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

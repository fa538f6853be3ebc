//! The executable model of the contract: correct, simple, and gone when the process ends.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mainstay_protocol::session::{Chunk, Compaction, Incarnation, SessionName, State};

use crate::contract::{
    Committing, Created, Health, ListPage, Outcome, Page, Pending, ReadFrom, SessionId, SessionStat, Store, StoreError,
    Writer,
};

/// Keeps everything in memory. Clones share the same sessions, so that a server can be restarted over them.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    sessions: Arc<Mutex<BTreeMap<SessionName, Session>>>,
}

#[derive(Debug)]
struct Session {
    id: SessionId,
    created: u64,
    expire_after: u64,
    /// When its expiry is due.
    due: u64,
    epoch: u64,
    /// Number of the next chunk.
    next_number: u64,
    /// What the last trim asked for.
    first: u64,
    chunks: Vec<Arc<Chunk>>,
    tail: u64,
    snapshot: Option<Bytes>,
    wake: Option<u64>,
    compaction: Compaction,
}

impl Session {
    /// Index of the first kept chunk with this number or a higher one.
    fn at(&self, number: u64) -> usize {
        self.chunks.partition_point(|chunk| chunk.header().number < number)
    }

    fn stat(&self) -> SessionStat {
        SessionStat {
            session: self.id.clone(),
            created: self.created,
            expire_after: self.expire_after,
            written: self.chunks.last().map_or(self.created, |chunk| chunk.time()),
            first: self.first,
            tail: self.tail,
            chunks: self.next_number,
            kept: self.chunks.first().map_or(self.next_number, |chunk| chunk.header().number),
            wake: self.wake,
            compaction: self.compaction,
        }
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<SessionName, Session>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, id: &SessionId, f: impl FnOnce(&mut Session) -> Result<T, StoreError>) -> Result<T, StoreError> {
        match self.lock().get_mut(&id.name) {
            Some(session) if session.id == *id => f(session),
            _ => Err(StoreError::NotFound),
        }
    }

    fn written<T>(&self, w: &Writer, f: impl FnOnce(&mut Session) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.with(&w.session, |session| {
            if session.epoch != w.epoch {
                return Err(StoreError::Fenced { epoch: session.epoch });
            }
            f(session)
        })
    }
}

fn ready<T: Send + 'static>(result: Result<T, StoreError>) -> Pending<T> {
    Box::pin(core::future::ready(result))
}

impl Store for MemoryStore {
    fn create(&self, id: SessionId, created: u64, expire_after: u64) -> Pending<Created> {
        let mut sessions = self.lock();
        if let Some(session) = sessions.get(&id.name) {
            return ready(Ok(Created::Existing(session.stat())));
        }
        let name = id.name.clone();
        let session = Session {
            id,
            created,
            expire_after,
            due: created.saturating_add(expire_after),
            epoch: 0,
            next_number: 0,
            first: 0,
            chunks: Vec::new(),
            tail: 0,
            snapshot: None,
            wake: None,
            compaction: Compaction::default(),
        };
        sessions.insert(name, session);
        ready(Ok(Created::New))
    }

    fn stat(&self, name: SessionName) -> Pending<Option<SessionStat>> {
        ready(Ok(self.lock().get(&name).map(Session::stat)))
    }

    fn open_writer(&self, id: SessionId) -> Pending<Writer> {
        ready(self.with(&id, |session| {
            session.epoch += 1;
            Ok(Writer { session: id.clone(), epoch: session.epoch })
        }))
    }

    fn close_writer(&self, _writer: Writer) {}

    fn append(&self, writer: &Writer, chunk: Arc<Chunk>, wake: Option<u64>) -> Committing {
        let result = self.written(writer, |session| {
            let header = chunk.header();
            if header.number != session.next_number
                || header.first != session.tail
                || header.incarnation != session.id.incarnation
            {
                return Err(StoreError::Invalid { what: "the chunk does not follow the last one" });
            }
            // What is kept is what a disk would give back.
            let stored = Chunk::decode(chunk.bytes().clone())
                .map_err(|_| StoreError::Invalid { what: "the chunk does not decode" })?;
            (session.tail, session.next_number) = (stored.end(), header.number + 1);
            session.chunks.push(Arc::new(stored));
            session.wake = wake;
            Ok(())
        });
        Committing::ready(match result {
            Ok(()) => Outcome::Committed,
            Err(error) => Outcome::NotCommitted(error),
        })
    }

    fn resolve(&self, writer: &Writer, chunk: Arc<Chunk>) -> Pending<bool> {
        ready(self.written(writer, |session| {
            let stored = session.chunks.get(session.at(chunk.header().number));
            Ok(stored.is_some_and(|stored| stored.bytes() == chunk.bytes()))
        }))
    }

    fn read(&self, id: SessionId, from: ReadFrom, budget: usize) -> Pending<Page> {
        ready(self.with(&id, |session| {
            let start = match from {
                ReadFrom::Seq(seq) => session.chunks.partition_point(|chunk| chunk.end() <= seq),
                ReadFrom::Chunk { number, .. } => session.at(number),
            };
            let mut left = budget;
            let mut chunks = Vec::new();
            for chunk in session.chunks.iter().skip(start) {
                let len = chunk.bytes().len();
                if !chunks.is_empty() && len > left {
                    break;
                }
                left = left.saturating_sub(len);
                chunks.push(chunk.clone());
            }
            let first = session.chunks.first().map_or(session.tail, |chunk| chunk.first());
            Ok(Page { chunks, first, tail: session.tail })
        }))
    }

    fn put_snapshot(&self, writer: &Writer, state: Bytes) -> Pending<()> {
        ready(self.written(writer, |session| {
            session.snapshot = Some(state);
            Ok(())
        }))
    }

    fn snapshot(&self, id: SessionId) -> Pending<Option<Bytes>> {
        ready(self.with(&id, |session| Ok(session.snapshot.clone())))
    }

    fn trim(&self, writer: &Writer, before: u64) -> Pending<()> {
        ready(self.written(writer, |session| {
            let count = session.chunks.partition_point(|chunk| chunk.end() <= before);
            let kept = session.chunks[..count].last().map(|last| last.header().next_number());
            let covered =
                session.snapshot.as_ref().and_then(|bytes| State::restore_kept(bytes, kept.unwrap_or(0)).ok());
            if kept.is_some_and(|kept| covered.is_none_or(|state| state.number() < kept)) {
                return Err(StoreError::Invalid { what: "a trim needs a snapshot that covers it" });
            }
            session.chunks.drain(..count);
            session.first = session.first.max(before.min(session.tail));
            Ok(())
        }))
    }

    fn compact(&self, writer: &Writer, chunk: Arc<Chunk>) -> Pending<()> {
        ready(self.written(writer, |session| {
            let snapshot = session.snapshot.as_ref().and_then(|bytes| State::number_of(bytes).ok());
            if snapshot.is_none_or(|number| number < chunk.header().next_number()) {
                return Err(StoreError::Invalid { what: "compaction needs a snapshot that covers it" });
            }
            let (from, to) = (session.at(chunk.header().number), session.at(chunk.header().next_number()));
            if !chunk.covers(session.chunks.get(from..to).unwrap_or_default()) {
                return Err(StoreError::Invalid { what: "the chunk does not cover what is stored" });
            }
            let stored = Chunk::decode(chunk.bytes().clone())
                .map_err(|_| StoreError::Invalid { what: "the chunk does not decode" })?;
            session.chunks.splice(from..to, [Arc::new(stored)]);
            Ok(())
        }))
    }

    fn set_compaction(&self, writer: &Writer, compaction: Compaction) -> Pending<()> {
        ready(self.written(writer, |session| {
            let before = compaction.before.max(session.compaction.before);
            session.compaction = Compaction { before, ..compaction };
            Ok(())
        }))
    }

    fn delete(&self, id: SessionId) -> Pending<()> {
        let mut sessions = self.lock();
        ready(match sessions.get(&id.name) {
            Some(session) if session.id == id => {
                sessions.remove(&id.name);
                Ok(())
            }
            _ => Err(StoreError::NotFound),
        })
    }

    fn due(&self, now: u64, limit: usize) -> Pending<Vec<SessionStat>> {
        let sessions = self.lock();
        let mut due: Vec<&Session> =
            sessions.values().filter(|session| session.expire_after > 0 && session.due <= now).collect();
        due.sort_by_key(|session| session.due);
        ready(Ok(due.into_iter().take(limit).map(Session::stat).collect()))
    }

    fn postpone(&self, id: SessionId, until: u64) -> Pending<()> {
        ready(self.with(&id, |session| {
            session.due = until;
            Ok(())
        }))
    }

    fn expire(&self, id: SessionId, now: u64) -> Pending<bool> {
        let due = self.with(&id, |session| Ok(session.expire_after > 0 && session.due <= now));
        if due == Ok(true) {
            self.lock().remove(&id.name);
        }
        ready(due)
    }

    fn set_wake(&self, id: SessionId, wake: Option<u64>) -> Pending<()> {
        ready(self.with(&id, |session| {
            session.wake = wake;
            Ok(())
        }))
    }

    fn waking(&self, until: u64, after: Option<(u64, Incarnation)>, limit: usize) -> Pending<Vec<SessionStat>> {
        let sessions = self.lock();
        let waking = sessions.values().filter_map(|session| Some(((session.wake?, session.id.incarnation), session)));
        let mut due: Vec<_> = waking.filter(|(at, _)| at.0 <= until && after.is_none_or(|after| *at > after)).collect();
        due.sort_by_key(|(at, _)| *at);
        ready(Ok(due.into_iter().take(limit).map(|(_, session)| session.stat()).collect()))
    }

    fn list(&self, prefix: Vec<u8>, after: Vec<u8>, limit: usize) -> Pending<ListPage> {
        let sessions = self.lock();
        let text = |bytes: &[u8]| core::str::from_utf8(bytes).ok().and_then(|text| SessionName::new(text).ok());
        let start = match text(&after) {
            Some(name) if after >= prefix => Bound::Excluded(name),
            _ => Bound::Unbounded,
        };
        let mut matching = sessions
            .range((start, Bound::Unbounded))
            .map(|(_, session)| session)
            .filter(|session| session.id.name.as_str().as_bytes().starts_with(&prefix));
        let page: Vec<SessionStat> = matching.by_ref().take(limit).map(Session::stat).collect();
        let after = page.last().map_or(after, |stat| stat.session.name.as_str().as_bytes().to_vec());
        ready(Ok(ListPage { sessions: page, more: matching.next().is_some(), after }))
    }

    fn size(&self, id: SessionId) -> Pending<u64> {
        ready(self.with(&id, |session| Ok(session.chunks.iter().map(|chunk| chunk.bytes().len() as u64).sum())))
    }

    fn health(&self) -> Health {
        Health::Serving
    }
}

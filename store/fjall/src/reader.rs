//! Reads: chunks of a session in order, checked.

use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use fjall::{Readable, Snapshot};
use mainstay_protocol::session::{Chunk, Incarnation, SessionName};
use mainstay_store::{ListPage, Page, ReadFrom, SessionId, SessionStat, StoreError};

use crate::keys::{self, SessionRow};
use crate::open::Engine;

/// A consistent picture of the engine.
pub(crate) struct Reader<'a> {
    engine: &'a Engine,
    snapshot: Snapshot,
}

/// What went wrong in the engine while reading. Damage, unless the process has run out of something: then the same read may
/// succeed later, and nothing is said about the data.
pub(crate) fn read_error(seq: u64, error: &fjall::Error) -> StoreError {
    use rustix::io::Errno;
    let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::INTR].map(Errno::raw_os_error);
    let io = match error {
        fjall::Error::Io(io) | fjall::Error::Storage(fjall::LsmError::Io(io)) => io.raw_os_error(),
        _ => None,
    };
    match io {
        Some(code) if exhausted.contains(&code) => {
            tracing::warn!(%error, "a read of the store failed; it may succeed later");
            StoreError::Overloaded
        }
        _ => damaged(seq, error),
    }
}

/// The session's data cannot be trusted from `seq` on.
fn damaged(seq: u64, error: impl core::fmt::Display) -> StoreError {
    StoreError::Damaged { seq, what: error.to_string() }
}

impl<'a> Reader<'a> {
    pub(crate) fn new(engine: &'a Engine) -> Self {
        Self { engine, snapshot: engine.db.snapshot() }
    }

    /// The row of the session called `name`.
    pub(crate) fn row(&self, name: &SessionName) -> Result<Option<SessionRow>, StoreError> {
        let row = self.snapshot.get(self.engine.sessions(), name.as_str()).map_err(|error| read_error(0, &error))?;
        row.map(|row| SessionRow::decode(&Bytes::from(row)).map_err(|error| damaged(0, error))).transpose()
    }

    /// Every session's name and row, by name; or why the row cannot be read.
    pub(crate) fn rows(
        &self,
    ) -> impl Iterator<Item = Result<(SessionName, Result<SessionRow, StoreError>), StoreError>> {
        self.snapshot.iter(self.engine.sessions()).map(|guard| {
            let (key, value) = guard.into_inner().map_err(|error| read_error(0, &error))?;
            let name = core::str::from_utf8(&key).ok().and_then(|name| SessionName::new(name).ok());
            let name = name.ok_or_else(|| damaged(0, "a session has a name that no session has"))?;
            Ok((name, SessionRow::decode(&value.into()).map_err(|error| damaged(0, error))))
        })
    }

    /// The row of this very session. Errors: `NotFound`, `Damaged`, also if it is quarantined.
    pub(crate) fn row_of(&self, id: &SessionId) -> Result<SessionRow, StoreError> {
        match self.row(&id.name)? {
            Some(row) if row.incarnation == id.incarnation => Ok(row),
            _ => Err(StoreError::NotFound),
        }
    }

    /// The last chunk of a session; `None` if it has none that is kept.
    pub(crate) fn last(&self, row: &SessionRow) -> Result<Option<Chunk>, StoreError> {
        let Some(segment) = row.segments.last() else { return Ok(None) };
        let range = keys::chunk(segment.id, 0, 0)..keys::chunk(segment.id + 1, 0, 0);
        match self.snapshot.range(self.engine.log(), range).next_back() {
            Some(guard) => {
                let (key, value) = guard.into_inner().map_err(|error| read_error(segment.first, &error))?;
                decode(row, &key, value.into()).map(Some)
            }
            // A segment is begun by its first chunk.
            None if row.base.number > segment.number
                || row.segments.len() == 1 && row.base.number >= segment.number =>
            {
                Ok(None)
            }
            None => Err(damaged(segment.first, "the newest segment has no chunk")),
        }
    }

    /// Bytes of the chunks that are kept, as they are stored.
    pub(crate) fn size(&self, row: &SessionRow) -> Result<u64, StoreError> {
        let mut bytes = 0;
        for segment in &row.segments {
            let range = keys::chunk(segment.id, 0, row.base.number)..keys::chunk(segment.id + 1, 0, 0);
            for guard in self.snapshot.range(self.engine.log(), range) {
                bytes += u64::from(guard.size().map_err(|error| read_error(segment.first, &error))?);
            }
        }
        Ok(bytes)
    }

    /// Sessions whose expiry is due at `now`, at most `limit`, the longest due first.
    pub(crate) fn due(&self, now: u64, limit: usize) -> Result<Vec<SessionStat>, StoreError> {
        let rows = self.snapshot.prefix(self.engine.meta(), [keys::DUE]);
        self.timed(rows, now, limit, |row| Some(keys::due(row.due, row.incarnation)), |_| false)
    }

    /// Sessions that have something to write by themselves at `until`, as [`Reader::due`], behind `after`. One that is quarantined cannot.
    pub(crate) fn waking(
        &self,
        until: u64,
        after: Option<(u64, Incarnation)>,
        limit: usize,
        is_quarantined: impl Fn(Incarnation) -> bool,
    ) -> Result<Vec<SessionStat>, StoreError> {
        let first = after.map_or_else(|| vec![keys::WAKE], |(at, incarnation)| keys::wake(at, incarnation).to_vec());
        let end = vec![keys::WAKE + 1];
        let start = if after.is_some() { Bound::Excluded(first) } else { Bound::Included(first) };
        let rows = self.snapshot.range(self.engine.meta(), (start, Bound::Excluded(end)));
        self.timed(rows, until, limit, |row| Some(keys::wake(row.wake?, row.incarnation)), is_quarantined)
    }

    /// The sessions of these rows up to a moment, each checked against the key that its own row makes.
    fn timed(
        &self,
        rows: impl Iterator<Item = fjall::Guard>,
        until: u64,
        limit: usize,
        key_of: impl Fn(&SessionRow) -> Option<[u8; 25]>,
        skips: impl Fn(Incarnation) -> bool,
    ) -> Result<Vec<SessionStat>, StoreError> {
        let mut due = Vec::new();
        for guard in rows {
            let (key, name) = guard.into_inner().map_err(|error| read_error(0, &error))?;
            if due.len() == limit || keys::due_at(&key).is_none_or(|at| at > until) {
                break;
            }
            // What does not fit must not keep the others back; `verify` reports it.
            let name = core::str::from_utf8(&name).ok().and_then(|name| SessionName::new(name).ok());
            let Some(name) = name else { continue };
            match self.row(&name) {
                Ok(Some(row)) if skips(row.incarnation) => {}
                Ok(Some(row)) if key_of(&row).is_some_and(|own| key.as_ref() == own) => {
                    due.extend(self.stat(name, &row).ok());
                }
                _ => tracing::warn!(session = %name, "is due, and is another one or cannot be read"),
            }
        }
        Ok(due)
    }

    /// Where a session ends: the next seq and the next number.
    pub(crate) fn end(&self, row: &SessionRow) -> Result<(u64, u64), StoreError> {
        self.last(row).map(|last| end(row, last.as_ref()))
    }

    pub(crate) fn stat(&self, name: SessionName, row: &SessionRow) -> Result<SessionStat, StoreError> {
        let last = self.last(row)?;
        let written = last.as_ref().map_or(row.created, Chunk::time);
        let (tail, chunks) = end(row, last.as_ref());
        let session = SessionId { name, incarnation: row.incarnation };
        let first = row.base.first.max(row.released);
        Ok(SessionStat {
            session,
            created: row.created,
            first,
            tail,
            expire_after: row.expire_after,
            written,
            chunks,
            kept: row.base.number,
            wake: row.wake,
            compaction: row.compaction,
        })
    }

    /// Consecutive chunks from `from` on, about `budget` bytes of them.
    pub(crate) fn page(&self, row: &SessionRow, from: ReadFrom, budget: usize) -> Result<Page, StoreError> {
        let (tail, end) = self.end(row)?;
        let mut page = Page { chunks: Vec::new(), first: row.base.first, tail };
        let start = match from {
            ReadFrom::Seq(seq) => {
                if seq >= tail {
                    return Ok(page);
                }
                self.start_of(row, seq.max(row.base.first))?
            }
            ReadFrom::Chunk { first, number } if number >= row.base.number => (first, number),
            ReadFrom::Chunk { .. } => (row.base.first, row.base.number),
        };
        let at = row.segments.partition_point(|segment| segment.number <= start.1).saturating_sub(1);
        let mut left = budget;
        let mut expected: Option<(u64, u64, [u8; 8])> = None;
        for segment in row.segments.iter().skip(at) {
            let range = keys::chunk(segment.id, start.0, start.1)..keys::chunk(segment.id + 1, 0, 0);
            for guard in self.snapshot.range(self.engine.log(), range) {
                let seq = expected.map_or(start.0, |(seq, _, _)| seq);
                let (key, value) = guard.into_inner().map_err(|error| read_error(seq, &error))?;
                let len = value.len();
                if !page.chunks.is_empty() && len > left {
                    return Ok(page);
                }
                left = left.saturating_sub(len);
                let chunk = decode(row, &key, value.into())?;
                let header = chunk.header();
                let follows = match expected {
                    Some((seq, number, link)) => (header.first, header.number, header.link) == (seq, number, link),
                    None => (header.first, header.number) == start,
                };
                if !follows {
                    return Err(damaged(seq, "a chunk is missing or does not follow the one before"));
                }
                expected = Some((chunk.end(), header.next_number(), header.chain.link()));
                page.chunks.push(Arc::new(chunk));
                if left == 0 {
                    return Ok(page);
                }
            }
            // What is put together stays in one segment.
            if expected.is_some_and(|(_, number, _)| number < end) {
                return Ok(page);
            }
        }
        let (seq, number) = expected.map_or(start, |(seq, number, _)| (seq, number));
        if number < end {
            return Err(damaged(seq, "chunks are missing at the end"));
        }
        Ok(page)
    }

    /// Keys of the stored chunks that `chunk` covers, all of one segment. Errors: `Invalid` if they do not begin and end as it does.
    pub(crate) fn covered(&self, row: &SessionRow, chunk: &Chunk) -> Result<Vec<Bytes>, StoreError> {
        let header = chunk.header();
        let at = row.segments.partition_point(|segment| segment.number <= header.number);
        let segment = at.checked_sub(1).and_then(|at| row.segments.get(at));
        let (mut keys, mut chunks) = (Vec::new(), Vec::new());
        if let Some(segment) = segment.filter(|_| header.number >= row.base.number) {
            let range =
                keys::chunk(segment.id, header.first, header.number)..keys::chunk(segment.id, chunk.end(), u64::MAX);
            for guard in self.snapshot.range(self.engine.log(), range) {
                let (key, value) = guard.into_inner().map_err(|error| read_error(header.first, &error))?;
                if keys::chunk_parts(&key).is_none_or(|(_, _, number)| number >= header.next_number()) {
                    break;
                }
                chunks.push(Arc::new(decode(row, &key, value.into())?));
                keys.push(Bytes::copy_from_slice(&key));
            }
        }
        match chunk.covers(&chunks) {
            true => Ok(keys),
            false => Err(StoreError::Invalid { what: "the chunk does not cover what is stored" }),
        }
    }

    /// First seq and number of the chunk that holds `seq`.
    fn start_of(&self, row: &SessionRow, seq: u64) -> Result<(u64, u64), StoreError> {
        let at = row.segments.partition_point(|segment| segment.first <= seq).saturating_sub(1);
        let missing = || damaged(seq, "the chunk that holds it is missing");
        // A segment may begin with control entries alone, at a seq that the one before still has no record for.
        for segment in row.segments.iter().take(at + 1).rev() {
            let range = keys::chunk(segment.id, 0, 0)..=keys::chunk(segment.id, seq, u64::MAX);
            if let Some(guard) = self.snapshot.range(self.engine.log(), range).next_back() {
                let key = guard.key().map_err(|error| read_error(seq, &error))?;
                let (_, first, number) = keys::chunk_parts(&key).ok_or_else(missing)?;
                if number < row.base.number {
                    break;
                }
                return Ok((first, number));
            }
        }
        Ok((row.base.first, row.base.number))
    }

    pub(crate) fn snapshot_of(&self, id: &SessionId) -> Result<Option<Bytes>, StoreError> {
        let row =
            self.snapshot.get(self.engine.snapshots(), id.incarnation.0).map_err(|error| read_error(0, &error))?;
        row.map(|row| keys::decode_snapshot(&Bytes::from(row)).map_err(|error| damaged(0, error))).transpose()
    }

    pub(crate) fn list(&self, prefix: &[u8], after: &[u8], limit: usize) -> Result<ListPage, StoreError> {
        let mut page = ListPage { sessions: Vec::new(), more: false, after: after.to_vec() };
        let start = if after < prefix { prefix } else { after };
        for guard in self.snapshot.range(self.engine.sessions(), start..) {
            let (key, value) = guard.into_inner().map_err(|error| read_error(0, &error))?;
            if key.as_ref() == after {
                continue;
            }
            if !key.starts_with(prefix) {
                break;
            }
            if page.sessions.len() == limit {
                page.more = true;
                break;
            }
            page.after = key.to_vec();
            let name = core::str::from_utf8(&key).ok().and_then(|name| SessionName::new(name).ok());
            let row = SessionRow::decode(&value.into());
            // A damaged session is listed by `verify`; it must not hide the others.
            if let (Some(name), Ok(row)) = (name, row) {
                match self.stat(name.clone(), &row) {
                    Ok(stat) => page.sessions.push(stat),
                    Err(error) => tracing::warn!(session = %name, %error, "left out of a list"),
                }
            }
        }
        Ok(page)
    }
}

/// The next seq and the next number behind the last chunk that is stored.
fn end(row: &SessionRow, last: Option<&Chunk>) -> (u64, u64) {
    match last {
        Some(chunk) if chunk.header().number >= row.base.number => (chunk.end(), chunk.header().next_number()),
        _ => (row.base.first, row.base.number),
    }
}

/// Decodes a chunk and checks that it is what its key says.
pub(crate) fn decode(row: &SessionRow, key: &[u8], value: Bytes) -> Result<Chunk, StoreError> {
    let parts = keys::chunk_parts(key);
    let seq = parts.map_or(0, |(_, first, _)| first);
    let chunk = Chunk::decode(value).map_err(|error| damaged(seq, error.detail))?;
    let header = chunk.header();
    if header.incarnation != row.incarnation || parts.is_none_or(|(_, f, n)| (f, n) != (header.first, header.number)) {
        return Err(damaged(seq, "a chunk is not where it belongs"));
    }
    Ok(chunk)
}

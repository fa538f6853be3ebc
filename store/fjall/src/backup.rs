//! Backups, while the store serves: everything as it was at one moment, and sessions brought back as other lives (spec section 9.6).

use core::fmt;
use core::ops::ControlFlow;
use std::io::{self, Read, Write};
use std::sync::Arc;

use mainstay_protocol::session::{Chain, Chunk, Damage, Incarnation, Rebirth, SessionName, State};
use mainstay_protocol::wire::MAX_VARINT;
use mainstay_store::backup::{BackupError, BackupReader, BackupWriter, Item, SavedSession, Totals};
use mainstay_store::{ReadFrom, SessionId, StoreError};
use rand::RngCore;

use crate::committer::Request;
use crate::keys::{Base, SessionRow};
use crate::reader::Reader;
use crate::store::FjallStore;

/// Bytes of chunks that are read, or brought back, at once: an append waits for one such step at most.
const STEP: usize = 1 << 20;
/// Sessions that are named of those that were not saved or not brought back.
const MAX_NAMED: usize = 100;

/// Told after each step how far it is; `Break` ends it early.
pub type Tell<'a> = dyn FnMut(Totals) -> ControlFlow<()> + 'a;

/// Why nothing came of it, or not everything.
#[derive(Debug)]
#[non_exhaustive]
pub enum TransferError {
    /// The backup cannot be written.
    Write(io::Error),
    /// The backup cannot be read.
    Backup(BackupError),
    /// The store does not do it.
    Store(StoreError),
    /// It was ended early.
    Interrupted,
}

impl fmt::Display for TransferError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Write(error) => write!(f, "the backup cannot be written: {error}"),
            Self::Backup(error) => write!(f, "the backup is of no use: {error}"),
            Self::Store(error) => error.fmt(f),
            Self::Interrupted => f.write_str("it was ended early"),
        }
    }
}

impl std::error::Error for TransferError {}

impl From<io::Error> for TransferError {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}

impl From<BackupError> for TransferError {
    fn from(error: BackupError) -> Self {
        Self::Backup(error)
    }
}

impl From<StoreError> for TransferError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// A session that was left out, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// Its name.
    pub session: String,
    /// What kept it out.
    pub why: String,
}

/// What was saved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Saved {
    /// What the backup holds.
    pub totals: Totals,
    /// Sessions that could not be read to their end; at most 100 of them.
    pub left_out: Vec<LeftOut>,
}

/// What was brought back.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Restored {
    /// Sessions that are there again.
    pub sessions: u64,
    /// Records of theirs that can be read.
    pub records: u64,
    /// Sessions of the backup whose names are taken, which were left as they are.
    pub taken: u64,
    /// Sessions that were left out; at most 100 of them, and of those whose names are taken the same.
    pub left_out: Vec<LeftOut>,
    /// How many sessions were left out because they are not whole.
    pub broken: u64,
}

fn name_left_out(list: &mut Vec<LeftOut>, session: &SessionName, why: impl fmt::Display) {
    if list.len() < MAX_NAMED {
        list.push(LeftOut { session: session.as_str().to_owned(), why: why.to_string() });
    }
}

impl FjallStore {
    /// Writes everything that is stored at this moment to `out`, while the store serves. Sessions that are damaged are left out, and
    /// named. Blocks.
    ///
    /// Errors: `Write`; `Store` if the store failed or is opened anew meanwhile; `Interrupted`.
    pub fn backup(&self, out: &mut dyn Write, tell: &mut Tell<'_>) -> Result<Saved, TransferError> {
        let engine = self.shared().engine()?;
        let reader = Reader::new(&engine);
        let mut out = BackupWriter::new(out)?;
        let mut left_out = Vec::new();
        for found in reader.rows() {
            let (name, row) = found?;
            let row = match row {
                Ok(row) => row,
                // There is nothing to say of it but its name.
                Err(error) => {
                    let row = SessionRow::new(Incarnation([0; 16]), 0, 0);
                    out.session(&saved(&name, &row))?;
                    out.broken(0, &error.to_string())?;
                    name_left_out(&mut left_out, &name, error);
                    continue;
                }
            };
            out.session(&saved(&name, &row))?;
            let mut step = |out: &mut BackupWriter<_>| match tell(out.totals()) {
                // Whoever opens the engine anew waits until nobody holds this one.
                ControlFlow::Continue(()) if self.shared().is_current(&engine) => Ok(()),
                ControlFlow::Continue(()) => Err(StoreError::Overloaded.into()),
                ControlFlow::Break(()) => Err(TransferError::Interrupted),
            };
            match self.save(&reader, &name, &row, &mut out, &mut step) {
                Ok((seq, number)) => out.whole(seq, number)?,
                Err(TransferError::Store(StoreError::Damaged { seq, what })) => {
                    let id = SessionId { name: name.clone(), incarnation: row.incarnation };
                    self.quarantine(&id, seq, &what);
                    name_left_out(&mut left_out, &name, &what);
                    out.broken(seq, &what)?;
                }
                Err(error) => return Err(error),
            }
        }
        let (_, totals) = out.finish()?;
        Ok(Saved { totals, left_out })
    }

    /// Writes the snapshot and the chunks of a session, and returns where it ends.
    fn save<W: Write>(
        &self,
        reader: &Reader<'_>,
        name: &SessionName,
        row: &SessionRow,
        out: &mut BackupWriter<W>,
        step: &mut dyn FnMut(&mut BackupWriter<W>) -> Result<(), TransferError>,
    ) -> Result<(u64, u64), TransferError> {
        let id = SessionId { name: name.clone(), incarnation: row.incarnation };
        if self.shared().is_quarantined(id.incarnation) {
            return Err(StoreError::Damaged { seq: 0, what: "the session is quarantined".into() }.into());
        }
        let end = reader.end(row)?;
        if let Some(snapshot) = reader.snapshot_of(&id)? {
            out.snapshot(&snapshot)?;
        }
        let mut next = (row.base.first, row.base.number);
        while next.1 < end.1 {
            step(out)?;
            let page = reader.page(row, ReadFrom::Chunk { first: next.0, number: next.1 }, STEP)?;
            for chunk in &page.chunks {
                out.chunk(chunk.bytes())?;
                next = (chunk.end(), chunk.header().next_number());
            }
        }
        step(out)?;
        Ok(next)
    }

    /// Brings back the sessions of a backup that `wants` names and whose names are free, each whole or not at all, as other lives. What
    /// expires is due as if it had been used `now`, in milliseconds since the Unix epoch. Blocks.
    ///
    /// Look at a backup with [`check`] first: sessions that came before a damage are there again.
    ///
    /// Errors: `Backup`; `Store` if the store has no space or failed; `Interrupted`.
    pub fn restore<R: Read>(
        &self,
        mut from: BackupReader<R>,
        wants: &dyn Fn(&SessionName) -> bool,
        now: u64,
        tell: &mut Tell<'_>,
    ) -> Result<Restored, TransferError> {
        let mut restored = Restored::default();
        let mut returning: Option<Returning> = None;
        let result = self.bring_back(&mut from, wants, now, tell, &mut restored, &mut returning);
        if let Some(returning) = returning {
            self.abandon(returning.to);
        }
        result.map(|()| restored)
    }

    fn bring_back<R: Read>(
        &self,
        from: &mut BackupReader<R>,
        wants: &dyn Fn(&SessionName) -> bool,
        now: u64,
        tell: &mut Tell<'_>,
        restored: &mut Restored,
        returning: &mut Option<Returning>,
    ) -> Result<(), TransferError> {
        while let Some(item) = from.next()? {
            if tell(from.totals()).is_break() {
                return Err(TransferError::Interrupted);
            }
            match item {
                Item::Session(saved) if wants(&saved.name) => match self.reads(|reader| reader.row(&saved.name)) {
                    Ok(None) => *returning = Some(Returning::new(saved)),
                    // Also by one whose row cannot be read.
                    Ok(Some(_)) | Err(StoreError::Damaged { .. }) => {
                        restored.taken += 1;
                        name_left_out(&mut restored.left_out, &saved.name, TAKEN);
                    }
                    Err(error) => return Err(error.into()),
                },
                Item::Session(_) | Item::End(..) => {}
                item => {
                    let Some(current) = returning else { continue };
                    match current.take(item) {
                        Ok(None) if current.bytes < STEP => {}
                        Ok(None) => self.stage(current)?,
                        Ok(Some(state)) => {
                            self.stage(current)?;
                            if self.install(current, &state, now)? {
                                restored.sessions += 1;
                                restored.records +=
                                    state.tail().saturating_sub(state.first().max(current.saved.first.0));
                            } else {
                                restored.taken += 1;
                                name_left_out(&mut restored.left_out, &current.saved.name, TAKEN);
                            }
                            *returning = None;
                        }
                        Err(damage) => {
                            restored.broken += 1;
                            name_left_out(&mut restored.left_out, &current.saved.name, damage);
                            self.abandon(current.to);
                            *returning = None;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn reads<T>(&self, read: impl FnOnce(&Reader<'_>) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let engine = self.shared().engine()?;
        read(&Reader::new(&engine))
    }

    fn stage(&self, returning: &mut Returning) -> Result<(), StoreError> {
        let chunks = core::mem::take(&mut returning.chunks);
        returning.bytes = 0;
        let incarnation = returning.to;
        self.ask_blocking(|answer| Request::Stage { incarnation, chunks, answer })
    }

    /// False if somebody took the name meanwhile.
    fn install(&self, returning: &Returning, state: &State, now: u64) -> Result<bool, StoreError> {
        let session = SessionId { name: returning.saved.name.clone(), incarnation: returning.to };
        let row = Box::new(returning.row(state, now));
        let snapshot = state.snapshot();
        self.ask_blocking(|answer| Request::Install { session, row, snapshot, answer })
    }

    fn abandon(&self, incarnation: Incarnation) {
        // A store that is closing finds it at its next start.
        let _ = self.ask_blocking(|answer| Request::Abandon { incarnation, answer });
    }
}

const TAKEN: &str = "a session of this name is there";

/// Looks whether a backup is whole, and what it holds. Errors: those of [`BackupReader`]; `Interrupted`.
pub fn check<R: Read>(mut from: BackupReader<R>, tell: &mut Tell<'_>) -> Result<Totals, TransferError> {
    while from.next()?.is_some() {
        if tell(from.totals()).is_break() {
            return Err(TransferError::Interrupted);
        }
    }
    Ok(from.totals())
}

fn saved(name: &SessionName, row: &SessionRow) -> SavedSession {
    SavedSession {
        name: name.clone(),
        incarnation: row.incarnation,
        created: row.created,
        expire_after: row.expire_after,
        writer_epoch: row.writer_epoch,
        released: row.released,
        compaction: row.compaction,
        first: (row.base.first, row.base.number),
        chain: row.base.chain,
    }
}

/// A session on its way back.
struct Returning {
    saved: SavedSession,
    to: Incarnation,
    snapshot: Option<State>,
    rebirth: Option<Rebirth>,
    chunks: Vec<Arc<Chunk>>,
    /// Of those chunks.
    bytes: usize,
}

impl Returning {
    fn new(saved: SavedSession) -> Self {
        let mut to = [0; 16];
        rand::rng().fill_bytes(&mut to);
        Self { saved, to: Incarnation(to), snapshot: None, rebirth: None, chunks: Vec::new(), bytes: 0 }
    }

    /// The next item. Its state, once it is whole. Errors: it is not.
    fn take(&mut self, item: Item) -> Result<Option<State>, Damage> {
        let (from, to, first, chain) = (self.saved.incarnation, self.to, self.saved.first, self.saved.chain);
        if let Item::Snapshot(bytes) = &item {
            // One of another version is as good as none.
            let state = State::restore_kept(bytes, first.1);
            self.snapshot = state.ok().filter(|state| state.incarnation() == from);
            return Ok(None);
        }
        let snapshot = &mut self.snapshot;
        let rebirth = self.rebirth.get_or_insert_with(|| Rebirth::new(from, to, first, chain, snapshot.take()));
        match item {
            Item::Chunk(bytes) => {
                let damaged = |what| Damage { seq: first.0, what };
                let chunk = Chunk::decode(bytes).map_err(|error| damaged(error.detail))?;
                let chunk = rebirth.chunk(&chunk)?;
                self.bytes += chunk.bytes().len();
                self.chunks.push(Arc::new(chunk));
                Ok(None)
            }
            Item::Whole(seq, number) => {
                let ends = |state: &State| (state.tail(), state.number()) == (seq, number);
                let state = self.rebirth.take().map(Rebirth::finish).transpose()?.filter(ends);
                let state = state.ok_or(Damage { seq, what: "chunks are missing at the end" })?;
                let SavedSession { released, compaction, writer_epoch, .. } = self.saved;
                let within = [released, compaction.before, compaction.next, state.first()].iter().all(|at| *at <= seq);
                if !within || writer_epoch >= MAX_VARINT {
                    return Err(Damage { seq, what: "what is said of it is not of a session of this length" });
                }
                Ok(Some(state))
            }
            _ => Err(Damage { seq: first.0, what: "the backup does not have it whole" }),
        }
    }

    fn row(&self, state: &State, now: u64) -> SessionRow {
        let SavedSession { created, expire_after, writer_epoch, released, compaction, first, .. } = self.saved;
        let due = if expire_after == 0 { 0 } else { now.saturating_add(expire_after).min(MAX_VARINT) };
        let base = Base { first: first.0, number: first.1, chain: Chain::start(self.to) };
        SessionRow {
            incarnation: self.to,
            created,
            expire_after,
            due,
            // Whatever it has to do by itself: a server that looks for what is due finds it, and knows better then.
            wake: state.wake().map(|at| at.max(now)),
            writer_epoch: writer_epoch.max(state.writer_epoch()),
            released,
            compaction,
            base,
            segments: Vec::new(),
        }
    }
}

//! The committer: the one thread that writes.
//!
//! It takes what is ready, builds one fjall batch, commits it with one `fdatasync`, notes the commit in the witness file, and
//! only then answers. What arrives meanwhile is the next turn. Each session has at most one append in a turn, and large ones wait behind small
//! ones ([`Backlog`]), so that turns are fair by construction.

use std::collections::{HashMap, HashSet};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fjall::PersistMode;
use mainstay_protocol::planted::{Bug, planted};
use mainstay_protocol::session::{Chunk, Compaction, Incarnation, SessionName, State};
use mainstay_protocol::wire::MAX_VARINT;
use mainstay_store::{Created, Outcome, SessionId, StoreError, Writer};
use tokio::sync::oneshot;

use crate::backlog::{About, Backlog};
use crate::keys::{self, Base, Segment, SessionRow};
use crate::open::{self, Engine, Format};
use crate::reader::{self, Reader};
use crate::reclaim::{self, Reclaim};
use crate::store::{Condition, Shared};
use crate::witness::{Witness, WitnessFile};

/// The caller's end of a request.
pub(crate) type Answer<T> = oneshot::Sender<Result<T, StoreError>>;

/// What the committer can be asked to do. A snapshot comes as the row that is stored, with the number of the next chunk in it.
pub(crate) enum Request {
    Append { session: SessionId, epoch: u64, chunk: Arc<Chunk>, wake: Option<u64>, answer: oneshot::Sender<Outcome> },
    Resolve { session: SessionId, epoch: u64, chunk: Arc<Chunk>, answer: Answer<bool> },
    Create { session: SessionId, created: u64, expire_after: u64, answer: Answer<Created> },
    Postpone { session: SessionId, until: u64, answer: Answer<()> },
    SetWake { session: SessionId, wake: Option<u64>, answer: Answer<()> },
    Expire { session: SessionId, now: u64, answer: Answer<bool> },
    OpenWriter { session: SessionId, answer: Answer<Writer> },
    CloseWriter { session: SessionId, epoch: u64 },
    PutSnapshot { session: SessionId, epoch: u64, number: u64, row: Bytes, answer: Answer<()> },
    Trim { session: SessionId, epoch: u64, before: u64, answer: Answer<()> },
    Compact { session: SessionId, epoch: u64, chunk: Arc<Chunk>, answer: Answer<()> },
    SetCompaction { session: SessionId, epoch: u64, compaction: Compaction, answer: Answer<()> },
    Delete { session: SessionId, answer: Answer<()> },
    Quarantine { incarnation: Incarnation },
    Stage { incarnation: Incarnation, chunks: Vec<Arc<Chunk>>, answer: Answer<()> },
    Install { session: SessionId, row: Box<SessionRow>, snapshot: Bytes, answer: Answer<bool> },
    Abandon { incarnation: Incarnation, answer: Answer<()> },
    Stop,
}

impl Request {
    /// What it is about, and how it may wait. Compaction counts for no bytes: what the session appends meanwhile must not wait with it.
    fn about(&self) -> About {
        let (session, bytes) = match self {
            Self::Append { session, chunk, .. } => (Some(session.incarnation), chunk.bytes().len()),
            Self::Stage { incarnation, chunks, .. } => {
                (Some(*incarnation), chunks.iter().map(|chunk| chunk.bytes().len()).sum())
            }
            Self::PutSnapshot { session, row, .. } => (Some(session.incarnation), row.len()),
            Self::Install { session, snapshot, .. } => (Some(session.incarnation), snapshot.len()),
            Self::Resolve { session, .. }
            | Self::Create { session, .. }
            | Self::Postpone { session, .. }
            | Self::SetWake { session, .. }
            | Self::Expire { session, .. }
            | Self::OpenWriter { session, .. }
            | Self::CloseWriter { session, .. }
            | Self::Trim { session, .. }
            | Self::Compact { session, .. }
            | Self::SetCompaction { session, .. }
            | Self::Delete { session, .. } => (Some(session.incarnation), 0),
            Self::Quarantine { incarnation } | Self::Abandon { incarnation, .. } => (Some(*incarnation), 0),
            Self::Stop => (None, 0),
        };
        About { session, bytes, may_follow: matches!(self, Self::PutSnapshot { .. }) }
    }
}

/// Bytes of chunks in one commit: enough to be bandwidth-bound, small enough that a turn stays short.
const TURN_BYTES: usize = 4 << 20;
/// Requests in one commit.
const TURN_REQUESTS: usize = 4096;
/// The witness file is synced at least this often while commits go on.
const WITNESS_SYNC: Duration = Duration::from_millis(100);
/// Chunks of dead segments removed in one step, and bytes of them: a turn of appends waits for one step at most.
const SWEEP_CHUNKS: usize = 256;
const SWEEP_BYTES: usize = 1 << 20;
/// The time from one step to the next while there are requests: space comes back under load too, at up to 20 MiB/s, and no
/// append waits for it (spec SESS-19).
const SWEEP_PAUSE: Duration = Duration::from_millis(50);
/// How long the committer waits at most for fjall to flush before it commits all the same.
const MAX_WAIT: Duration = Duration::from_secs(10);
/// How often a full disk is looked at again.
const SPACE_PAUSE: Duration = Duration::from_millis(200);
/// A store that nobody asked for anything for so long is quiet.
const QUIET: Duration = Duration::from_secs(1);
/// Free bytes below which a write, a flush or a compaction may have failed for lack of space, whatever the reserve is.
const ROOM: u64 = 48 << 20;
/// How often the engine is opened anew because its background work failed on a disk that has room, before that counts as broken;
/// and the service after which the count starts again.
const REOPENINGS: u32 = 3;
const REOPENED_WELL: Duration = Duration::from_secs(60);

/// Where an open writer stands.
struct Open {
    epoch: u64,
    name: SessionName,
    row: SessionRow,
    next: (u64, u64),
    link: [u8; 8],
    segment_bytes: u64,
    /// Number of the next chunk in the snapshot that this writer put last.
    snapshot: u64,
    /// The position must be read back: a commit failed.
    stale: bool,
}

/// Chunks of a session that is brought back. Until it is installed their segments are dead: a start removes what is left of them.
#[derive(Default)]
struct Staged {
    segments: Vec<Segment>,
    /// In the last of them.
    bytes: u64,
}

/// One change of one row.
struct Edit {
    keyspace: usize,
    key: Bytes,
    value: Option<Bytes>,
    /// There is no such row yet.
    is_new: bool,
}

/// What is told when the turn is durable, or is not.
type Told = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// A commit in the making.
#[derive(Default)]
struct Turn {
    edits: Vec<Edit>,
    /// Rows changed in this turn, which later requests of the turn must see.
    rows: HashMap<SessionName, Option<SessionRow>>,
    /// Sessions that do not exist any more once the turn is durable.
    deleted: Vec<Incarnation>,
    /// Sessions that were brought back once it is.
    installed: Vec<Incarnation>,
    told: Vec<Told>,
    bytes: usize,
}

pub(crate) struct Committer {
    shared: Arc<Shared>,
    requests: Receiver<Request>,
    backlog: Backlog<Request>,
    file: WitnessFile,
    format: Format,
    witness: Witness,
    writers: HashMap<Incarnation, Open>,
    next_segment: u64,
    dead: Vec<u64>,
    staged: HashMap<Incarnation, Staged>,
    last_sync: Instant,
    last_sweep: Instant,
    reclaim: Reclaim,
    unsynced: bool,
    /// The engine's background work failed, and not for lack of space.
    broken: bool,
    /// When the disk had little room last.
    tight: Option<Instant>,
    reopenings: u32,
    reopened: Instant,
}

impl Committer {
    /// Prepares the thread's state from an open engine.
    pub(crate) fn new(
        shared: Arc<Shared>,
        requests: Receiver<Request>,
        file: WitnessFile,
        format: Format,
        engine: &Engine,
    ) -> Result<Self, open::OpenError> {
        let damaged = |error: fjall::Error| open::OpenError::Damaged(error.to_string());
        let mut next_segment = 1;
        if let Some(guard) = engine.log().last_key_value() {
            let key = guard.key().map_err(damaged)?;
            next_segment = keys::chunk_parts(&key).map_or(1, |(segment, _, _)| segment + 1);
        }
        let dead = dead_segments(engine).map_err(damaged)?;
        next_segment = dead.iter().fold(next_segment, |next, segment| next.max(segment + 1));
        let mut quarantined = HashSet::new();
        for guard in engine.meta().prefix([keys::QUARANTINED]) {
            let key = guard.key().map_err(damaged)?;
            if let Some(id) = key.get(1..).and_then(|id| id.try_into().ok()) {
                quarantined.insert(Incarnation(id));
            }
        }
        *shared.quarantined.write().unwrap_or_else(PoisonError::into_inner) = quarantined;
        Ok(Self {
            witness: engine.witness,
            shared,
            requests,
            backlog: Backlog::new(),
            file,
            format,
            writers: HashMap::new(),
            next_segment,
            dead,
            staged: HashMap::new(),
            last_sync: Instant::now(),
            last_sweep: Instant::now(),
            reclaim: Reclaim::default(),
            unsynced: true,
            broken: false,
            tight: None,
            reopenings: 0,
            reopened: Instant::now(),
        })
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Serves until told to stop.
    pub(crate) fn run(mut self) {
        loop {
            let wait = match self.shared.condition() {
                Condition::NoSpace | Condition::Reopening => {
                    self.recover();
                    SPACE_PAUSE
                }
                _ if self.unsynced || !self.dead.is_empty() => WITNESS_SYNC / 4,
                _ if self.reclaim.is_due() => QUIET,
                _ => Duration::from_secs(3600),
            };
            let wait = if self.backlog.is_empty() { wait } else { Duration::ZERO };
            let first = match self.requests.recv_timeout(wait) {
                Ok(request) => Some(request),
                Err(RecvTimeoutError::Disconnected) if self.backlog.is_empty() => break,
                Err(_) => None,
            };
            self.look_at_space();
            let idle = first.is_none() && self.backlog.is_empty();
            let mut turn = Turn::default();
            // First, while what it reads of the dead segments is what the turn begins with.
            if !self.dead.is_empty() && (idle || self.last_sweep.elapsed() >= SWEEP_PAUSE) {
                self.sweep(&mut turn);
                self.last_sweep = Instant::now();
            }
            let stop = self.fill(first, &mut turn);
            self.commit(turn);
            self.reclaim(idle && wait == QUIET);
            if self.unsynced && (idle || self.last_sync.elapsed() >= WITNESS_SYNC) {
                self.sync_witness();
            }
            if stop {
                break;
            }
        }
        self.reclaim.stop();
        self.sync_witness();
    }

    /// Takes what is ready into a turn. True if that is the last one.
    fn fill(&mut self, first: Option<Request>, turn: &mut Turn) -> bool {
        let (mut next, mut count, mut beside) = (first, 0, false);
        while let Some(request) = next {
            let last = matches!(request, Request::Stop);
            if let Some(request) = self.backlog.pass(request.about(), request) {
                let before = (turn.edits.len(), turn.told.len());
                self.take(request, turn);
                // Who only asks, or lets go, waits for no disk.
                beside |= (turn.edits.len(), turn.told.len()) != before;
                if last {
                    return true;
                }
            }
            count += 1;
            if turn.bytes >= TURN_BYTES || count >= TURN_REQUESTS {
                break;
            }
            next = self.requests.try_recv().ok();
        }
        let small = turn.bytes;
        while let Some(request) = self.backlog.next(turn.bytes - small, beside, TURN_BYTES) {
            let last = matches!(request, Request::Stop);
            self.take(request, turn);
            if last {
                return true;
            }
        }
        false
    }

    /// Lets space be given back while the store is quiet.
    fn reclaim(&mut self, quiet: bool) {
        let Ok(engine) = self.engine() else { return };
        // Behind a commit of its own: what was written anew is the past for fjall only once something follows.
        if self.reclaim.finish() && self.need_engine().is_ok() && self.write(&[]).is_ok() {
            reclaim::forget(&engine);
        }
        if quiet && self.shared.condition() == Condition::Serving {
            let free = self.shared.free().saturating_sub(self.shared.config.reserve);
            self.reclaim.start(&engine, self.witness.log, free);
        }
    }

    fn engine(&self) -> Result<Arc<Engine>, StoreError> {
        self.shared.engine()
    }

    fn take(&mut self, request: Request, turn: &mut Turn) {
        match request {
            Request::Append { session, epoch, chunk, wake, answer } => {
                // Whoever waits may have gone; the outcome stands.
                match self.append(&session, epoch, &chunk, wake, turn) {
                    Ok(()) => turn.tell(move |result| {
                        drop(answer.send(match result {
                            Ok(()) => Outcome::Committed,
                            Err(error) => Outcome::Unknown(error),
                        }));
                    }),
                    Err(error) => drop(answer.send(Outcome::NotCommitted(error))),
                }
            }
            Request::Resolve { session, epoch, chunk, answer } => {
                drop(answer.send(self.resolve(&session, epoch, &chunk, turn)));
            }
            Request::Create { session, created, expire_after, answer } => {
                match self.create(&session, created, expire_after, turn) {
                    Ok(Created::New) => turn.tell(move |result| drop(answer.send(result.map(|()| Created::New)))),
                    other => drop(answer.send(other)),
                }
            }
            Request::Postpone { session, until, answer } => {
                let result = self.postpone(&session, until, turn);
                turn.answer(result, answer);
            }
            Request::SetWake { session, wake, answer } => {
                let result = self.set_wake(&session, wake, turn);
                turn.answer(result, answer);
            }
            Request::OpenWriter { session, answer } => match self.open_writer(&session, turn) {
                Ok(epoch) => turn.tell(move |result| drop(answer.send(result.map(|()| Writer { session, epoch })))),
                Err(error) => drop(answer.send(Err(error))),
            },
            Request::Expire { session, now, answer } => match self.expire(&session, now, turn) {
                Ok(true) => turn.tell(move |result| drop(answer.send(result.map(|()| true)))),
                other => drop(answer.send(other)),
            },
            Request::CloseWriter { session, epoch } => {
                if self.writers.get(&session.incarnation).is_some_and(|open| open.epoch == epoch) {
                    self.writers.remove(&session.incarnation);
                }
            }
            Request::PutSnapshot { session, epoch, number, row, answer } => {
                let result = self.put_snapshot(&session, epoch, number, row, turn);
                turn.answer(result, answer);
            }
            Request::Trim { session, epoch, before, answer } => {
                let result = self.trim(&session, epoch, before, turn);
                turn.answer(result, answer);
            }
            Request::Compact { session, epoch, chunk, answer } => {
                let result = self.compact(&session, epoch, &chunk, turn);
                turn.answer(result, answer);
            }
            Request::SetCompaction { session, epoch, compaction, answer } => {
                let result = self.set_compaction(&session, epoch, compaction, turn);
                turn.answer(result, answer);
            }
            Request::Delete { session, answer } => {
                let result = self.delete(&session, turn);
                turn.answer(result, answer);
            }
            Request::Quarantine { incarnation } => {
                // The readers' mark holds at once. While the engine is away it is not stored; who reads on finds the damage
                // again after a restart.
                if self.need_engine().is_ok() {
                    turn.put(3, keys::quarantined(incarnation).to_vec(), Bytes::new());
                }
            }
            Request::Stage { incarnation, chunks, answer } => {
                let result = self.stage(incarnation, &chunks, turn);
                turn.answer(result, answer);
            }
            Request::Install { session, row, snapshot, answer } => {
                match self.install(&session, *row, &snapshot, turn) {
                    Ok(true) => turn.tell(move |result| drop(answer.send(result.map(|()| true)))),
                    other => drop(answer.send(other)),
                }
            }
            Request::Abandon { incarnation, answer } => {
                self.abandon(incarnation);
                drop(answer.send(Ok(())));
            }
            Request::Stop => {}
        }
    }

    /// Refuses what needs space while there is too little.
    fn need_space(&self) -> Result<(), StoreError> {
        match self.shared.condition() {
            Condition::Serving => Ok(()),
            Condition::NoSpace | Condition::Reopening => Err(StoreError::NoSpace),
            Condition::Failed(what) => Err(StoreError::Failed { what }),
        }
    }

    /// Refuses what writes while the engine takes nothing.
    fn need_engine(&self) -> Result<(), StoreError> {
        match self.shared.condition() {
            Condition::Serving | Condition::NoSpace => Ok(()),
            Condition::Reopening => Err(StoreError::NoSpace),
            Condition::Failed(what) => Err(StoreError::Failed { what }),
        }
    }

    fn row(&self, engine: &Engine, id: &SessionId, turn: &Turn) -> Result<SessionRow, StoreError> {
        if self.shared.is_quarantined(id.incarnation) {
            return Err(quarantined());
        }
        match turn.rows.get(&id.name) {
            Some(Some(row)) if row.incarnation == id.incarnation => Ok(row.clone()),
            Some(_) => Err(StoreError::NotFound),
            None => Reader::new(engine).row_of(id),
        }
    }

    fn writer(&mut self, id: &SessionId, epoch: u64) -> Result<&mut Open, StoreError> {
        if self.shared.is_quarantined(id.incarnation) {
            return Err(quarantined());
        }
        match self.writers.get_mut(&id.incarnation) {
            Some(open) if open.epoch == epoch => Ok(open),
            Some(open) => Err(StoreError::Fenced { epoch: open.epoch }),
            None => Err(StoreError::NotFound),
        }
    }

    /// Reads an open writer's position back if a commit failed since it was known.
    fn refresh(&mut self, id: &SessionId, epoch: u64, turn: &Turn) -> Result<(), StoreError> {
        if !self.writer(id, epoch)?.stale {
            return Ok(());
        }
        let engine = self.engine()?;
        let reader = Reader::new(&engine);
        let row = self.row(&engine, id, turn)?;
        let (next, link) = position(&reader, &row)?;
        let open = self.writer(id, epoch)?;
        (open.row, open.next, open.link, open.stale) = (row, next, link, false);
        Ok(())
    }

    fn append(
        &mut self,
        id: &SessionId,
        epoch: u64,
        chunk: &Chunk,
        wake: Option<u64>,
        turn: &mut Turn,
    ) -> Result<(), StoreError> {
        self.need_space()?;
        if turn.deleted.contains(&id.incarnation) {
            return Err(StoreError::NotFound);
        }
        self.refresh(id, epoch, turn)?;
        let segment_limit = self.shared.config.segment_bytes;
        let next_segment = self.next_segment;
        let open = self.writer(id, epoch)?;
        let header = chunk.header();
        if (header.first, header.number, header.link) != (open.next.0, open.next.1, open.link)
            || header.incarnation != id.incarnation
        {
            return Err(StoreError::Invalid { what: "the chunk does not follow the last one" });
        }
        let rolls = open.row.segments.is_empty() || open.segment_bytes >= segment_limit;
        if rolls {
            let segment = Segment { id: next_segment, first: header.first, number: header.number };
            open.row.segments.push(segment);
            open.segment_bytes = 0;
        }
        let woke = core::mem::replace(&mut open.row.wake, wake);
        let row = (rolls || woke != wake).then(|| (open.name.clone(), open.row.clone()));
        let segment = open.row.segments.last().map_or(0, |segment| segment.id);
        open.segment_bytes += chunk.bytes().len() as u64;
        open.next = (chunk.end(), header.number + 1);
        open.link = header.chain.link();
        turn.bytes += chunk.bytes().len();
        turn.put_new(keys::chunk(segment, header.first, header.number).to_vec(), chunk.bytes().clone());
        if let Some((name, row)) = row {
            turn.put_wake(&name, woke, &row);
            turn.put_row(name, row);
        }
        if rolls {
            self.next_segment += 1;
        }
        Ok(())
    }

    fn resolve(&mut self, id: &SessionId, epoch: u64, chunk: &Chunk, turn: &Turn) -> Result<bool, StoreError> {
        // After a failed sync the memory of the engine and the disk may differ: nothing that is read says what is stored.
        self.need_engine()?;
        self.refresh(id, epoch, turn)?;
        let engine = self.engine()?;
        let reader = Reader::new(&engine);
        let row = reader.row_of(id)?;
        let last = reader.last(&row)?;
        if last.is_some_and(|last| last.bytes() == chunk.bytes()) {
            return Ok(true);
        }
        let header = chunk.header();
        for segment in row.segments.iter().rev() {
            let key = keys::chunk(segment.id, header.first, header.number);
            let stored = engine.log().get(key).map_err(|error| reader::read_error(header.first, &error))?;
            if let Some(stored) = stored {
                return Ok(stored.as_ref() == chunk.bytes().as_ref());
            }
        }
        Ok(false)
    }

    fn create(
        &mut self,
        id: &SessionId,
        created: u64,
        expire_after: u64,
        turn: &mut Turn,
    ) -> Result<Created, StoreError> {
        let engine = self.engine()?;
        let reader = Reader::new(&engine);
        let existing = match turn.rows.get(&id.name) {
            Some(row) => row.clone(),
            None => reader.row(&id.name)?,
        };
        if let Some(row) = existing {
            return reader.stat(id.name.clone(), &row).map(Created::Existing);
        }
        self.need_space()?;
        let row = SessionRow::new(id.incarnation, created, expire_after);
        if row.due > 0 {
            turn.put_due(&id.name, &row);
        }
        turn.put_row(id.name.clone(), row);
        Ok(Created::New)
    }

    /// The row as this turn leaves it so far.
    fn current_row(&self, id: &SessionId, turn: &Turn) -> Result<SessionRow, StoreError> {
        match self.writers.get(&id.incarnation) {
            Some(open) if !open.stale && !turn.deleted.contains(&id.incarnation) => Ok(open.row.clone()),
            _ => self.row(&*self.engine()?, id, turn),
        }
    }

    fn expire(&mut self, id: &SessionId, now: u64, turn: &mut Turn) -> Result<bool, StoreError> {
        self.need_engine()?;
        let row = self.current_row(id, turn)?;
        let due = row.due > 0 && row.due <= now;
        if due {
            self.delete(id, turn)?;
        }
        Ok(due)
    }

    fn postpone(&mut self, id: &SessionId, until: u64, turn: &mut Turn) -> Result<(), StoreError> {
        // Below the reserve too: a session that is used must not expire for lack of space.
        self.need_engine()?;
        let mut row = self.current_row(id, turn)?;
        if row.due == 0 {
            return Ok(());
        }
        turn.remove(3, keys::due(row.due, row.incarnation).to_vec());
        row.due = until.clamp(1, MAX_VARINT);
        turn.put_due(&id.name, &row);
        if let Some(open) = self.writers.get_mut(&id.incarnation) {
            open.row.due = row.due;
        }
        turn.put_row(id.name.clone(), row);
        Ok(())
    }

    fn set_wake(&mut self, id: &SessionId, wake: Option<u64>, turn: &mut Turn) -> Result<(), StoreError> {
        // Below the reserve too, as a postponement.
        self.need_engine()?;
        let mut row = self.current_row(id, turn)?;
        let woke = core::mem::replace(&mut row.wake, wake);
        turn.put_wake(&id.name, woke, &row);
        if let Some(open) = self.writers.get_mut(&id.incarnation) {
            open.row.wake = wake;
        }
        turn.put_row(id.name.clone(), row);
        Ok(())
    }

    fn open_writer(&mut self, id: &SessionId, turn: &mut Turn) -> Result<u64, StoreError> {
        self.need_space()?;
        let engine = self.engine()?;
        let mut row = self.row(&engine, id, turn)?;
        row.writer_epoch += 1;
        let epoch = row.writer_epoch;
        let (next, link) = match self.writers.get(&id.incarnation) {
            // What the old writer has in this turn is not readable yet.
            Some(open) if !open.stale => (open.next, open.link),
            _ => position(&Reader::new(&engine), &row)?,
        };
        let name = id.name.clone();
        let open = Open {
            epoch,
            name: name.clone(),
            row: row.clone(),
            next,
            link,
            segment_bytes: 0,
            snapshot: 0,
            stale: false,
        };
        self.writers.insert(id.incarnation, open);
        turn.put_row(name, row);
        Ok(epoch)
    }

    fn put_snapshot(
        &mut self,
        id: &SessionId,
        epoch: u64,
        number: u64,
        row: Bytes,
        turn: &mut Turn,
    ) -> Result<(), StoreError> {
        self.need_space()?;
        if turn.deleted.contains(&id.incarnation) {
            return Err(StoreError::NotFound);
        }
        let open = self.writer(id, epoch)?;
        open.snapshot = open.snapshot.max(number);
        // What is replaced must be readable, for the witness.
        let engine = self.engine()?;
        engine.snapshots().get(id.incarnation.0).map_err(|error| reader::read_error(0, &error))?;
        turn.bytes += row.len();
        turn.put(2, id.incarnation.0.to_vec(), row);
        Ok(())
    }

    fn trim(&mut self, id: &SessionId, epoch: u64, before: u64, turn: &mut Turn) -> Result<(), StoreError> {
        self.need_engine()?;
        self.refresh(id, epoch, turn)?;
        if turn.rows.contains_key(&id.name) {
            // A segment that begins in this turn cannot be read yet.
            return Err(StoreError::Overloaded);
        }
        let engine = self.engine()?;
        let reader = Reader::new(&engine);
        let row = self.row(&engine, id, turn)?;
        let (tail, end) = reader.end(&row)?;
        let base = self.base_after(&engine, &row, before.min(tail))?;
        let released = row.released.max(before.min(tail));
        if base.number <= row.base.number {
            let open = self.writer(id, epoch)?;
            open.row.released = released;
            let (name, row) = (open.name.clone(), open.row.clone());
            turn.put_row(name, row);
            return Ok(());
        }
        let snapshot = reader.snapshot_of(id)?.and_then(|bytes| State::restore_kept(&bytes, base.number).ok());
        if snapshot.is_none_or(|state| state.number() < base.number) {
            return Err(StoreError::Invalid { what: "a trim needs a snapshot that covers it" });
        }
        let open = self.writer(id, epoch)?;
        // Positions of the writer may be ahead of what is readable; only the front changes.
        (open.row.base, open.row.released) = (base, released);
        let everything = base.number >= end && open.next.1 == end;
        let mut dead = Vec::new();
        while let [first, rest @ ..] = open.row.segments.as_slice() {
            let whole = rest.first().map_or(everything, |next| next.number <= base.number);
            let last = rest.is_empty();
            dead.push((first.id, if whole { u64::MAX } else { base.number }));
            if !whole || last {
                break;
            }
            open.row.segments.remove(0);
        }
        if everything && open.row.segments.len() == 1 && dead.last().is_some_and(|(_, before)| *before == u64::MAX) {
            open.row.segments.clear();
            open.segment_bytes = u64::MAX;
        }
        let (name, row) = (open.name.clone(), open.row.clone());
        for (segment, before) in dead {
            turn.put(3, keys::dead(segment).to_vec(), keys::encode_dead(before));
            self.dead.push(segment);
        }
        turn.put_row(name, row);
        Ok(())
    }

    /// The base after whole chunks below `before` are gone.
    fn base_after(&self, engine: &Engine, row: &SessionRow, before: u64) -> Result<Base, StoreError> {
        let mut base = row.base;
        for segment in &row.segments {
            if segment.first > before {
                break;
            }
            let start = keys::chunk(segment.id, 0, 0);
            let end = keys::chunk(segment.id, before, u64::MAX);
            // Chunks that begin below `before`; the last of them may reach beyond it.
            for guard in engine.log().range(start..=end).rev() {
                let (key, value) = guard.into_inner().map_err(|error| reader::read_error(segment.first, &error))?;
                let chunk = reader::decode(row, &key, value.into())?;
                if chunk.end() <= before {
                    let header = chunk.header();
                    if header.number >= base.number {
                        base = Base { first: chunk.end(), number: header.next_number(), chain: header.chain };
                    }
                    break;
                }
            }
        }
        Ok(base)
    }

    fn compact(&mut self, id: &SessionId, epoch: u64, chunk: &Chunk, turn: &mut Turn) -> Result<(), StoreError> {
        self.need_space()?;
        if turn.deleted.contains(&id.incarnation) {
            return Err(StoreError::NotFound);
        }
        self.refresh(id, epoch, turn)?;
        let engine = self.engine()?;
        let Open { row, snapshot, .. } = self.writer(id, epoch)?;
        if *snapshot < chunk.header().next_number() {
            return Err(StoreError::Invalid { what: "compaction needs a snapshot that covers it" });
        }
        let covered = Reader::new(&engine).covered(row, chunk)?;
        turn.bytes += chunk.bytes().len();
        for (at, key) in covered.into_iter().enumerate() {
            // The first one's key is the chunk's.
            let value = (at == 0).then(|| chunk.bytes().clone());
            turn.edits.push(Edit { keyspace: 0, key, value, is_new: false });
        }
        Ok(())
    }

    fn set_compaction(
        &mut self,
        id: &SessionId,
        epoch: u64,
        compaction: Compaction,
        turn: &mut Turn,
    ) -> Result<(), StoreError> {
        self.need_space()?;
        if turn.deleted.contains(&id.incarnation) {
            return Err(StoreError::NotFound);
        }
        self.refresh(id, epoch, turn)?;
        let open = self.writer(id, epoch)?;
        let before = compaction.before.max(open.row.compaction.before);
        open.row.compaction = Compaction { before, ..compaction };
        let (name, row) = (open.name.clone(), open.row.clone());
        turn.put_row(name, row);
        Ok(())
    }

    fn delete(&mut self, id: &SessionId, turn: &mut Turn) -> Result<(), StoreError> {
        self.need_engine()?;
        let engine = self.engine()?;
        let reader = Reader::new(&engine);
        let row = match turn.rows.get(&id.name) {
            Some(Some(row)) if row.incarnation == id.incarnation => row.clone(),
            Some(_) => return Err(StoreError::NotFound),
            None => reader.row_of(id)?,
        };
        // What is removed must be readable, for the witness.
        engine.snapshots().get(id.incarnation.0).map_err(|error| reader::read_error(0, &error))?;
        let segments = match self.writers.get(&id.incarnation) {
            Some(open) if !open.stale => open.row.segments.clone(),
            _ => row.segments.clone(),
        };
        for segment in segments {
            turn.put(3, keys::dead(segment.id).to_vec(), keys::encode_dead(u64::MAX));
            self.dead.push(segment.id);
        }
        turn.remove(2, id.incarnation.0.to_vec());
        turn.remove(3, keys::quarantined(id.incarnation).to_vec());
        if row.due > 0 {
            turn.remove(3, keys::due(row.due, row.incarnation).to_vec());
        }
        let wake = match self.writers.get(&id.incarnation) {
            Some(open) if !open.stale => open.row.wake,
            _ => row.wake,
        };
        if let Some(at) = wake {
            turn.remove(3, keys::wake(at, row.incarnation).to_vec());
        }
        turn.remove(1, id.name.as_str().as_bytes().to_vec());
        turn.rows.insert(id.name.clone(), None);
        turn.deleted.push(id.incarnation);
        Ok(())
    }

    /// Adds chunks to a session that is brought back, which nobody sees yet.
    fn stage(&mut self, incarnation: Incarnation, chunks: &[Arc<Chunk>], turn: &mut Turn) -> Result<(), StoreError> {
        self.need_space()?;
        let limit = self.shared.config.segment_bytes;
        let staged = self.staged.entry(incarnation).or_default();
        for chunk in chunks {
            let header = chunk.header();
            if staged.segments.is_empty() || staged.bytes >= limit {
                let id = self.next_segment;
                self.next_segment += 1;
                staged.segments.push(Segment { id, first: header.first, number: header.number });
                staged.bytes = 0;
                turn.put(3, keys::dead(id).to_vec(), keys::encode_dead(u64::MAX));
            }
            let segment = staged.segments.last().map_or(0, |segment| segment.id);
            staged.bytes += chunk.bytes().len() as u64;
            turn.bytes += chunk.bytes().len();
            turn.put_new(keys::chunk(segment, header.first, header.number).to_vec(), chunk.bytes().clone());
        }
        Ok(())
    }

    /// Lets everybody see a session that is brought back. False if its name is taken.
    fn install(
        &mut self,
        id: &SessionId,
        row: SessionRow,
        snapshot: &Bytes,
        turn: &mut Turn,
    ) -> Result<bool, StoreError> {
        self.need_space()?;
        let engine = self.engine()?;
        let is_taken = match turn.rows.get(&id.name) {
            Some(row) => row.is_some(),
            None => Reader::new(&engine).row(&id.name)?.is_some(),
        };
        if is_taken {
            self.abandon(id.incarnation);
            return Ok(false);
        }
        let segments = self.staged.get(&id.incarnation).map_or_else(Vec::new, |staged| staged.segments.clone());
        turn.installed.push(id.incarnation);
        segments.iter().for_each(|segment| turn.remove(3, keys::dead(segment.id).to_vec()));
        let row = SessionRow { segments, ..row };
        turn.bytes += snapshot.len();
        turn.put(2, id.incarnation.0.to_vec(), keys::encode_snapshot(snapshot));
        if row.due > 0 {
            turn.put_due(&id.name, &row);
        }
        turn.put_wake(&id.name, None, &row);
        turn.put_row(id.name.clone(), row);
        Ok(true)
    }

    /// Gives up a session that was to be brought back.
    fn abandon(&mut self, incarnation: Incarnation) {
        let staged = self.staged.remove(&incarnation).unwrap_or_default();
        self.dead.extend(staged.segments.iter().map(|segment| segment.id));
    }

    /// Removes some chunks of dead segments. Small steps: appends that arrive wait for one of them at most.
    fn sweep(&mut self, turn: &mut Turn) {
        let (Ok(engine), Some(&segment)) = (self.engine(), self.dead.last()) else { return };
        if matches!(self.shared.condition(), Condition::Failed(_) | Condition::Reopening) {
            return;
        }
        let row = engine.meta().get(keys::dead(segment)).ok().flatten();
        let Some(before) = row.and_then(|row| keys::decode_dead(&row.into()).ok()) else {
            // Damaged rows are reported by `verify`; the chunks stay.
            self.dead.pop();
            return;
        };
        let range = keys::chunk(segment, 0, 0)..keys::chunk(segment + 1, 0, 0);
        let (mut more, mut bytes) = (false, 0);
        for (removed, guard) in engine.log().range(range).enumerate() {
            // What is removed must be readable, for the witness.
            let (key, value) = match guard.into_inner() {
                Ok(row) => row,
                Err(error) => {
                    tracing::error!(segment, %error, "a removed chunk cannot be read; its segment keeps its space");
                    self.dead.pop();
                    return;
                }
            };
            if keys::chunk_parts(&key).is_none_or(|(_, _, number)| number >= before) {
                break;
            }
            if removed == SWEEP_CHUNKS || bytes >= SWEEP_BYTES {
                more = true;
                break;
            }
            bytes += value.len();
            turn.remove(0, key.to_vec());
        }
        if !more {
            turn.remove(3, keys::dead(segment).to_vec());
            self.dead.pop();
        }
    }

    /// Commits a turn and answers. Nobody is answered before the batch is synced and noted.
    fn commit(&mut self, turn: Turn) {
        let Turn { edits, told, deleted, installed, .. } = turn;
        if edits.is_empty() {
            return told.into_iter().for_each(|tell| tell(Ok(())));
        }
        let result = self.write(&edits);
        match result {
            Ok(()) => {
                let mut quarantined = self.shared.quarantined.write().unwrap_or_else(PoisonError::into_inner);
                for incarnation in deleted {
                    self.writers.remove(&incarnation);
                    quarantined.remove(&incarnation);
                }
                drop(quarantined);
                installed.iter().for_each(|incarnation| drop(self.staged.remove(incarnation)));
            }
            Err(_) => self.writers.values_mut().for_each(|open| open.stale = true),
        }
        told.into_iter().for_each(|tell| tell(result.clone()));
    }

    fn write(&mut self, edits: &[Edit]) -> Result<(), StoreError> {
        let engine = self.engine()?;
        self.wait_for_flushes(&engine);
        let mut witness = self.witness;
        witness.commits += 1;
        let durability = (!planted(Bug::AckBeforeSync)).then_some(PersistMode::SyncData);
        let mut batch = engine.db.batch().durability(durability);
        let mut removed = 0;
        // Several edits of one row in a turn count against what the one before left.
        let mut pending: HashMap<(usize, Bytes), Option<Bytes>> = HashMap::new();
        for Edit { keyspace, key, value, is_new } in edits {
            let ks = &engine.keyspaces[*keyspace];
            let slot = (*keyspace, key.clone());
            let old = if *is_new {
                None
            } else if let Some(old) = pending.get(&slot) {
                old.clone()
            } else {
                let old = match ks.get(key) {
                    Ok(old) => old,
                    // Nothing is written yet: what has run out may be there again.
                    Err(error) => match reader::read_error(0, &error) {
                        error @ StoreError::Overloaded => return Err(error),
                        _ => return Err(self.failed(&error)),
                    },
                };
                old.map(Bytes::from)
            };
            if let Some(old) = &old {
                witness.rows -= 1;
                witness.sum = witness.sum.wrapping_sub(keys::digest(*keyspace, key, old));
                if *keyspace == 0 {
                    witness.log -= old.len() as u64;
                    removed += old.len() as u64;
                }
            }
            match value {
                Some(value) => {
                    witness.rows += 1;
                    witness.sum = witness.sum.wrapping_add(keys::digest(*keyspace, key, value));
                    witness.log += if *keyspace == 0 { value.len() as u64 } else { 0 };
                    batch.insert(ks, key.clone(), value.clone());
                }
                None if old.is_some() => batch.remove(ks, key.clone()),
                None => {}
            }
            if !is_new {
                pending.insert(slot, value.clone());
            }
        }
        batch.insert(engine.meta(), WITNESS_KEY.clone(), witness.encode(&engine.id));
        if planted(Bug::WitnessBeforeSync) {
            // What goes wrong here shows later.
            let _ = self.file.note(witness.commits).and_then(|()| self.file.sync());
        }
        match batch.commit() {
            Err(_) if planted(Bug::SyncErrorIgnored) => {}
            committed => committed.map_err(|error| self.failed(&error))?,
        }
        self.witness = witness;
        self.reclaim.removed(removed);
        if let Err(error) = self.file.note(witness.commits) {
            // The commit is durable; without the note the store could not prove it.
            return Err(self.fail(format!("the witness file cannot be written: {error}")));
        }
        self.unsynced = true;
        Ok(())
    }

    /// Waits for fjall's flushes before it would stall: its own stalls sleep in long steps under its locks.
    fn wait_for_flushes(&self, engine: &Engine) {
        let deadline = Instant::now() + MAX_WAIT;
        let behind = || engine.log().sealed_memtable_count() >= 3 || engine.log().l0_table_count() >= 16;
        while behind() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// A write failed: for lack of space, because of what the engine does in the background, or for good.
    fn failed(&mut self, error: &fjall::Error) -> StoreError {
        let full = self.shared.free() < self.shared.config.reserve.max(ROOM);
        let reopen = match error {
            // `write` says so before anything is in the page cache. A sync that says so on a disk that has space has lost
            // pages, like any other failed sync.
            fjall::Error::Io(error) => {
                full && matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
            }
            // Nothing of this batch was written: a flush or compaction had failed before, and what failed is not told.
            fjall::Error::Poisoned => {
                // A flush that found no space may show only once there is space again.
                self.broken = !full && self.tight.is_none_or(|tight| tight.elapsed() >= REOPENED_WELL);
                true
            }
            _ => false,
        };
        if reopen {
            tracing::warn!(%error, "the engine takes no writes; it is opened anew as soon as there is space");
            self.shared.set_condition(Condition::Reopening);
            return StoreError::NoSpace;
        }
        self.fail(error.to_string())
    }

    /// fsync failed, or something like it: what the disk holds is not known any more (fail-stop).
    fn fail(&self, what: String) -> StoreError {
        tracing::error!(what, "the store failed and takes nothing more");
        self.shared.set_condition(Condition::Failed(what.clone()));
        StoreError::Failed { what }
    }

    /// Refuses appends below the reserve, before the engine sees them; takes them again above it.
    fn look_at_space(&mut self) {
        let (free, reserve) = (self.shared.free(), self.shared.config.reserve);
        if free < reserve.max(ROOM) {
            self.tight = Some(Instant::now());
        }
        match self.shared.condition() {
            Condition::Serving if free < reserve => {
                tracing::warn!("free disk space is below the reserve; appends are refused");
                self.shared.set_condition(Condition::NoSpace);
            }
            Condition::NoSpace if free >= reserve => {
                tracing::info!("there is disk space again; appends are taken");
                self.shared.set_condition(Condition::Serving);
            }
            _ => {}
        }
    }

    /// Takes appends again once there is space; after a failed commit the engine is opened anew first.
    fn recover(&mut self) {
        if self.shared.condition() != Condition::Reopening {
            return self.look_at_space();
        }
        let early = self.reopened.elapsed() < SPACE_PAUSE;
        if early || self.shared.free() < self.shared.config.reserve.max(ROOM / 4) {
            return;
        }
        if self.reopened.elapsed() >= REOPENED_WELL {
            self.reopenings = 0;
        }
        if core::mem::take(&mut self.broken) {
            if self.reopenings >= REOPENINGS {
                let what = "the engine's background work fails again and again; `mainstay verify` says what is damaged";
                return drop(self.fail(what.into()));
            }
            self.reopenings += 1;
        }
        if self.reclaim.is_running() {
            // It holds the engine, and soon ends.
            return self.reclaim.stop();
        }
        self.reopened = Instant::now();
        // Readers hold the old engine for a moment; fjall's lock is free when the last one is done.
        self.shared.take_engine();
        match open::open_checked(&self.shared.layout, &self.shared.config, &self.format, self.witness.commits) {
            Ok(engine) => {
                self.witness = engine.witness;
                match dead_segments(&engine) {
                    Ok(mut dead) => {
                        let staged = |id: &u64| self.staged.values().any(|of| of.segments.iter().any(|s| s.id == *id));
                        dead.retain(|segment| !staged(segment));
                        self.dead = dead;
                    }
                    Err(error) => tracing::warn!(%error, "what was removed keeps its space until the next start"),
                }
                self.shared.put_engine(engine);
                self.shared.set_condition(Condition::Serving);
                tracing::info!("the store is open again");
            }
            Err(error @ open::OpenError::Damaged(_)) => drop(self.fail(error.to_string())),
            Err(error) => tracing::warn!(%error, "the store does not open yet"),
        }
    }

    fn sync_witness(&mut self) {
        if let Err(error) = self.file.sync() {
            self.fail(format!("the witness file cannot be synced: {error}"));
        }
        self.last_sync = Instant::now();
        self.unsynced = false;
    }
}

/// Segments with chunks to be removed.
fn dead_segments(engine: &Engine) -> Result<Vec<u64>, fjall::Error> {
    let mut dead = Vec::new();
    for guard in engine.meta().prefix([keys::DEAD]) {
        dead.extend(keys::dead_segment(&guard.key()?));
    }
    Ok(dead)
}

fn quarantined() -> StoreError {
    StoreError::Damaged { seq: 0, what: "the session is quarantined".into() }
}

static WITNESS_KEY: Bytes = Bytes::from_static(keys::WITNESS);

/// Next seq and number of a session, and the link that its next chunk must carry.
fn position(reader: &Reader<'_>, row: &SessionRow) -> Result<((u64, u64), [u8; 8]), StoreError> {
    Ok(match reader.last(row)? {
        Some(chunk) if chunk.header().number >= row.base.number => {
            ((chunk.end(), chunk.header().next_number()), chunk.header().chain.link())
        }
        _ => ((row.base.first, row.base.number), row.base.chain.link()),
    })
}

impl Turn {
    fn put(&mut self, keyspace: usize, key: Vec<u8>, value: Bytes) {
        self.edits.push(Edit { keyspace, key: key.into(), value: Some(value), is_new: false });
    }

    /// Puts a chunk behind the last one.
    fn put_new(&mut self, key: Vec<u8>, value: Bytes) {
        self.edits.push(Edit { keyspace: 0, key: key.into(), value: Some(value), is_new: true });
    }

    fn remove(&mut self, keyspace: usize, key: Vec<u8>) {
        self.edits.push(Edit { keyspace, key: key.into(), value: None, is_new: false });
    }

    fn put_row(&mut self, name: SessionName, row: SessionRow) {
        self.put(1, name.as_str().as_bytes().to_vec(), row.encode());
        self.rows.insert(name, Some(row));
    }

    /// The session wakes as its row says, and not any more as it was to before.
    fn put_wake(&mut self, name: &SessionName, before: Option<u64>, row: &SessionRow) {
        if before == row.wake {
            return;
        }
        if let Some(at) = before {
            self.remove(3, keys::wake(at, row.incarnation).to_vec());
        }
        if let Some(at) = row.wake {
            self.put(3, keys::wake(at, row.incarnation).to_vec(), Bytes::copy_from_slice(name.as_str().as_bytes()));
        }
    }

    fn put_due(&mut self, name: &SessionName, row: &SessionRow) {
        self.put(3, keys::due(row.due, row.incarnation).to_vec(), Bytes::copy_from_slice(name.as_str().as_bytes()));
    }

    fn tell(&mut self, tell: impl FnOnce(Result<(), StoreError>) + Send + 'static) {
        self.told.push(Box::new(tell));
    }

    fn answer(&mut self, result: Result<(), StoreError>, answer: Answer<()>) {
        match result {
            Ok(()) => self.tell(move |result| drop(answer.send(result))),
            Err(error) => drop(answer.send(Err(error))),
        }
    }
}

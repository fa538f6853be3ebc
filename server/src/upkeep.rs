//! Work on the store beside commits, one thing at a time: snapshots, trims, compaction.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mainstay_protocol::session::{Chunk, Compaction, State, Survey};
use mainstay_store::{Pending, ReadFrom, Store, StoreError, Writer};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant};

use crate::sessions::{Extent, Loaded, Session, Sessions};

/// Bytes of chunks that one pass of compaction looks at, and so of texts that it holds.
const PASS_BYTES: usize = 16 << 20;
/// Bytes of one read of a pass.
const PAGE_BYTES: usize = 1 << 20;
/// How often a pass looks at its range: what came of a few hundred chunks is put together once more.
const ROUNDS: usize = 4;
/// Between two steps of a pass: appends never wait for more than one (spec SESS-19). A step that took long, because the store or the
/// processor is busy, is followed by a pause of a multiple of that.
const STEP_PAUSE: Duration = Duration::from_millis(10);
const STEP_REST: u32 = 4;
const LONGEST_REST: Duration = Duration::from_secs(1);
/// How long a store that refused is left alone, and a session at least whose turn it is not.
const AGAIN: u64 = 1000;
/// A view with more bytes is not written for the sake of compaction before a quarter as much was appended.
const LARGE_VIEW: usize = 256 << 10;

/// See the [module](self).
pub(crate) struct Upkeep {
    sessions: Arc<Sessions>,
    session: Arc<Session>,
    work: Work,
    /// Chunk bytes since the last snapshot.
    unsnapshotted: usize,
    /// Bytes of the last snapshot, and where it ends.
    snapshot_len: usize,
    snapshot: Option<End>,
    /// Records below it were released by the store, as far as is known.
    released: u64,
    compaction: Compaction,
    /// When finished messages are put together, in milliseconds since the Unix epoch.
    compact_at: Option<u64>,
    /// Nothing is tried before that.
    not_before: u64,
    /// What is stored cannot be put together. Whoever loads the session next tries again.
    gave_up: bool,
}

/// The end of a range: the seq, and the number of the next chunk.
#[derive(Debug, Clone, Copy)]
struct End {
    seq: u64,
    number: u64,
}

enum Work {
    None,
    /// `first` is the state's in the snapshot. Behind it, with the permit, what is below is put together.
    Snapshot {
        running: Pending<()>,
        first: u64,
        end: End,
        permit: Option<OwnedSemaphorePermit>,
    },
    Trim {
        running: Pending<()>,
        first: u64,
    },
    Compaction {
        running: JoinHandle<Result<Passed, StoreError>>,
        /// Tells it to leave the rest for later.
        yields: Arc<AtomicBool>,
    },
}

/// What came of a piece of work.
pub(crate) enum Done {
    Stored,
    Compacted(Passed),
}

/// How far a pass came.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Passed {
    compaction: Compaction,
    /// There is more to do.
    more: bool,
}

impl Upkeep {
    /// Of a session that was just loaded.
    pub(crate) fn new(
        sessions: &Arc<Sessions>,
        session: &Arc<Session>,
        Loaded { state, unsnapshotted, stat }: &Loaded,
    ) -> Self {
        let mut this = Self {
            sessions: sessions.clone(),
            session: session.clone(),
            work: Work::None,
            unsnapshotted: *unsnapshotted,
            snapshot_len: 0,
            snapshot: None,
            released: stat.first,
            compaction: stat.compaction,
            compact_at: None,
            not_before: 0,
            gave_up: false,
        };
        this.expect_compaction(state, 0, stat.written);
        this
    }

    /// When finished messages are to be put together, in milliseconds since the Unix epoch.
    pub(crate) fn compact_at(&self) -> Option<u64> {
        self.compact_at
    }

    /// When a server that is not serving the session must, for the sake of what `wake` says or of compaction.
    pub(crate) fn wake(&self, wake: Option<u64>) -> Option<u64> {
        wake.into_iter().chain(self.compact_at).min()
    }

    /// True if the session must stay in memory: it is compacted.
    pub(crate) fn needs_session(&self) -> bool {
        matches!(self.work, Work::Compaction { .. } | Work::Snapshot { permit: Some(_), .. })
    }

    /// True if compaction is due and may begin. Where others are compacted it is due later: whoever waits need not be in memory.
    pub(crate) fn may_compact(&mut self, now: u64) -> bool {
        let due = self.compact_at.is_some_and(|at| at <= now) && self.not_before <= now;
        let may = due && matches!(self.work, Work::None);
        if may && self.sessions.compactions.available_permits() == 0 {
            self.postpone(now);
            return false;
        }
        may
    }

    /// Lets compaction be due later.
    pub(crate) fn postpone(&mut self, now: u64) {
        let later = now.saturating_add(self.delay().unwrap_or(0).max(AGAIN));
        self.compact_at = self.compact_at.map(|at| at.max(later));
    }

    /// Gives compaction up until the session is loaded again.
    pub(crate) fn give_up(&mut self) {
        (self.gave_up, self.compact_at) = (true, None);
    }

    /// How long after its end a message is put together, in milliseconds; `None` for never.
    fn delay(&self) -> Option<u64> {
        let after = self.sessions.config.compact_after.filter(|_| !self.gave_up)?;
        Some(u64::try_from(after.as_millis()).unwrap_or(u64::MAX))
    }

    /// Bytes of chunks behind the last snapshot.
    pub(crate) fn unsnapshotted(&self) -> usize {
        self.unsnapshotted
    }

    /// A chunk was committed at `now`. True if the session must be compacted from now on, and did not have to before.
    pub(crate) fn committed(&mut self, chunk: &Chunk, state: &State, now: u64) -> bool {
        self.unsnapshotted += chunk.bytes().len();
        let before = self.compact_at;
        self.expect_compaction(state, chunk.first(), now);
        self.compact_at != before
    }

    /// Compacts some time after `at`, if messages of several parts were finished at `seq` or later that nobody looked at.
    fn expect_compaction(&mut self, state: &State, seq: u64, at: u64) {
        let Some(delay) = self.delay() else { return };
        if self.compact_at.is_none() && self.compaction.wanted(state.view(), seq).next().is_some() {
            self.compact_at = Some(at.saturating_add(delay));
        }
    }

    /// Starts what is due and not running.
    pub(crate) fn keep_up(&mut self, state: &State, writer: &Arc<Writer>, now: u64) {
        match &self.work {
            Work::None => {}
            // Nobody waits for compaction.
            Work::Compaction { yields, .. } if state.first() > self.released => {
                return yields.store(true, Ordering::Relaxed);
            }
            _ => return,
        }
        if now < self.not_before {
            return;
        }
        // A large view is not written for less than a multiple of what it is itself.
        let enough = self.sessions.config.snapshot_bytes.max(4 * self.snapshot_len);
        if self.unsnapshotted >= enough || state.first() > self.released {
            self.put_snapshot(state, writer, None);
        } else if self.may_compact(now) {
            self.compact(state, writer, now);
        }
    }

    fn put_snapshot(&mut self, state: &State, writer: &Arc<Writer>, permit: Option<OwnedSemaphorePermit>) {
        let end = End { seq: state.tail(), number: state.number() };
        let Sessions { store, apart, .. } = &*self.sessions;
        let (len, running) = apart.run(state.weight(), || {
            let snapshot = state.snapshot();
            // The store takes a copy of it, and a checksum.
            (snapshot.len(), store.put_snapshot(writer, snapshot))
        });
        (self.unsnapshotted, self.snapshot_len) = (0, len);
        self.work = Work::Snapshot { running, first: state.first(), end, permit };
    }

    /// Begins a pass, or with what must come before it.
    fn compact(&mut self, state: &State, writer: &Arc<Writer>, now: u64) {
        let Some((_, last)) = self.compaction.wanted(state.view(), 0).next() else {
            self.compact_at = None;
            return;
        };
        let covered = self.snapshot.filter(|end| last < end.seq);
        if covered.is_none() && self.snapshot_len > LARGE_VIEW && self.unsnapshotted < self.snapshot_len / 4 {
            // The next message that is finished asks for it again.
            self.compact_at = None;
            return;
        }
        let Ok(permit) = self.sessions.compactions.clone().try_acquire_owned() else { return self.postpone(now) };
        self.compact_at = None;
        match covered {
            Some(end) => self.begin_pass(state, writer, end, permit),
            None => self.put_snapshot(state, writer, Some(permit)),
        }
    }

    fn begin_pass(&mut self, state: &State, writer: &Arc<Writer>, end: End, permit: OwnedSemaphorePermit) {
        let yields = Arc::new(AtomicBool::new(false));
        let pass = Pass {
            sessions: self.sessions.clone(),
            session: self.session.clone(),
            survey: Survey::new(state),
            compaction: self.compaction,
            begin: self.compaction.begin(state.view()),
            end,
            yields: yields.clone(),
            _permit: permit,
        };
        self.work = Work::Compaction { running: tokio::spawn(pass.run(writer.clone())), yields };
    }

    /// Waits for the work that runs, for ever if there is none. Cancellation-safe.
    pub(crate) async fn done(&mut self) -> Result<Done, StoreError> {
        match &mut self.work {
            Work::Snapshot { running, .. } | Work::Trim { running, .. } => running.await.map(|()| Done::Stored),
            Work::Compaction { running, .. } => match running.await {
                Ok(passed) => passed.map(Done::Compacted),
                Err(error) => Err(StoreError::Failed { what: error.to_string() }),
            },
            Work::None => core::future::pending().await,
        }
    }

    /// Goes on with what follows from what came of the work that ran.
    pub(crate) fn go_on(&mut self, result: Result<Done, StoreError>, state: &State, writer: &Arc<Writer>, now: u64) {
        let work = core::mem::replace(&mut self.work, Work::None);
        let done = match result {
            Ok(done) => done,
            Err(error) => {
                // Tried again later, not at once: the store has too much to do or no space.
                tracing::warn!(session = %self.session.id, %error, "snapshot, trim or compaction not done; it will be repeated");
                self.not_before = now.saturating_add(AGAIN);
                match error.is_retryable() {
                    true => {
                        self.expect_compaction(state, 0, now);
                        self.postpone(now);
                    }
                    false => self.give_up(),
                }
                return;
            }
        };
        if let Work::Snapshot { end, .. } = &work {
            self.snapshot = Some(*end);
        }
        match (work, done) {
            (Work::Snapshot { end, permit: Some(permit), .. }, _) if state.first() <= self.released => {
                return self.begin_pass(state, writer, end, permit);
            }
            (Work::Snapshot { first, permit, .. }, _) if first > self.released || permit.is_some() => {
                // Who waits for space goes first.
                self.compact_at = permit.map(|_| now).or(self.compact_at);
                if first <= self.released {
                    return self.keep_up(state, writer, now);
                }
                let running = self.sessions.store.trim(writer, first);
                self.work = Work::Trim { running, first };
                return;
            }
            (Work::Trim { first, .. }, _) => {
                self.released = first;
                self.sessions.removed(&self.session);
            }
            (Work::Compaction { .. }, Done::Compacted(Passed { compaction, more })) => {
                self.compaction = compaction;
                self.sessions.removed(&self.session);
                match more {
                    // So that others come in between.
                    true => self.compact_at = Some(now.saturating_add(AGAIN)),
                    false => self.expect_compaction(state, 0, now),
                }
            }
            _ => {}
        }
        self.keep_up(state, writer, now);
    }

    /// Waits for what cannot be ended, and ends the rest.
    pub(crate) async fn end(self) {
        match self.work {
            Work::Snapshot { running, .. } | Work::Trim { running, .. } => drop(running.await),
            Work::Compaction { running, .. } => {
                // Whatever was done of it is whole; who serves the session next begins the pass anew.
                running.abort();
                drop(running.await);
            }
            Work::None => {}
        }
    }
}

/// One pass of compaction over the chunks below a snapshot (spec COMPACT).
struct Pass {
    sessions: Arc<Sessions>,
    session: Arc<Session>,
    survey: Survey,
    compaction: Compaction,
    /// The seq where it begins.
    begin: u64,
    end: End,
    yields: Arc<AtomicBool>,
    /// A few at a time in the whole server.
    _permit: OwnedSemaphorePermit,
}

impl Pass {
    async fn run(mut self, writer: Arc<Writer>) -> Result<Passed, StoreError> {
        let sessions = self.sessions.clone();
        let store = &*sessions.store;
        let mut more = false;
        for round in 1.. {
            let Some((survey, cut)) = self.survey(store).await? else { return Ok(self.yielded()) };
            more |= cut;
            let plan = survey.plan(self.end.seq);
            // What was told is never taken back, also if an earlier pass was not finished.
            self.compaction.before = plan.before().max(self.session.extent.borrow().compacted);
            if !plan.is_empty() {
                // Readers are told before they can notice. Nobody gets some parts from the store, where they are put together, and the
                // others from memory, where they are not.
                let before = self.compaction.before;
                let told = |extent: &mut Extent| core::mem::replace(&mut extent.compacted, before) != before;
                self.session.extent.send_if_modified(told);
                self.session.ring().forget(before);
                store.set_compaction(&writer, self.compaction).await?;
            }
            for step in plan.steps() {
                if self.yields.load(Ordering::Relaxed) {
                    return Ok(self.yielded());
                }
                let begun = Instant::now();
                let mut chunks: Vec<Arc<Chunk>> = Vec::new();
                let mut next = (step.start.first, step.start.number);
                while next.1 < step.next_number {
                    let page = self.page(store, ReadFrom::Chunk { first: next.0, number: next.1 }).await?;
                    let covered = |chunk: &Arc<Chunk>| chunk.header().number < step.next_number;
                    chunks.extend(page.into_iter().filter(covered));
                    next = chunks.last().map_or(next, |last| (last.end(), last.header().next_number()));
                }
                let chunk = plan
                    .put_together(step, &chunks)
                    .map_err(|error| StoreError::Damaged { seq: step.start.first, what: error.detail.into() })?;
                store.compact(&writer, Arc::new(chunk)).await?;
                tokio::time::sleep((begun.elapsed() * STEP_REST).clamp(STEP_PAUSE, LONGEST_REST)).await;
            }
            if plan.is_final() || round == ROUNDS {
                self.compaction.passed((self.begin, self.end.seq), &plan, more);
                store.set_compaction(&writer, self.compaction).await?;
                break;
            }
        }
        Ok(Passed { compaction: self.compaction, more })
    }

    /// What is left is for later.
    fn yielded(&self) -> Passed {
        Passed { compaction: self.compaction, more: true }
    }

    /// Reads the range, or as much of it as one pass looks at: then it ends there, and that is said. `None` if it has to yield.
    async fn survey(&mut self, store: &dyn Store) -> Result<Option<(Survey, bool)>, StoreError> {
        let mut survey = self.survey.clone();
        let mut from = ReadFrom::Seq(self.begin);
        let mut bytes = 0;
        loop {
            if self.yields.load(Ordering::Relaxed) {
                return Ok(None);
            }
            let page = self.page(store, from).await?;
            let within = page.iter().filter(|chunk| chunk.header().number < self.end.number);
            for (at, chunk) in within.enumerate() {
                survey
                    .read(chunk, at > 0)
                    .map_err(|error| StoreError::Damaged { seq: chunk.first(), what: error.detail.into() })?;
                bytes += chunk.bytes().len();
            }
            let Some(last) = page.last() else { return Ok(Some((survey, false))) };
            let next = (last.end(), last.header().next_number());
            if next.1 >= self.end.number {
                return Ok(Some((survey, false)));
            }
            if bytes >= PASS_BYTES {
                self.end = End { seq: next.0, number: next.1 };
                return Ok(Some((survey, true)));
            }
            from = ReadFrom::Chunk { first: next.0, number: next.1 };
        }
    }

    /// Some chunks. Errors: there are none where there must be.
    async fn page(&self, store: &dyn Store, from: ReadFrom) -> Result<Vec<Arc<Chunk>>, StoreError> {
        let page = store.read(self.session.id.clone(), from, PAGE_BYTES).await?;
        match page.chunks.is_empty() && !matches!(from, ReadFrom::Seq(_)) {
            true => Err(StoreError::Damaged { seq: page.first, what: "chunks below the tail are missing".into() }),
            false => Ok(page.chunks),
        }
    }
}

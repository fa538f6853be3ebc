//! Work on the store beside commits, one thing at a time: snapshots, trims, compaction.

use std::sync::Arc;

use mainstay_protocol::session::{Chunk, State, Survey};
use mainstay_store::{Compaction, Pending, ReadFrom, SessionStat, Store, StoreError, Writer};
use tokio::task::JoinHandle;
use tokio::time::Duration;

use crate::sessions::{Session, Sessions};

/// Bytes of chunks that one pass of compaction looks at, and so of texts that it holds.
const PASS_BYTES: usize = 16 << 20;
/// Bytes of one read of a pass.
const PAGE_BYTES: usize = 1 << 20;
/// How often a pass looks at its range: what came of a few hundred chunks is put together once more.
const ROUNDS: usize = 4;
/// Between two steps of a pass: appends never wait for more than one (spec SESS-19).
const STEP_PAUSE: Duration = Duration::from_millis(20);
/// A message that is finished so many records behind its start or sooner has one part: there is nothing to be put together.
const ONE_PART: u64 = 2;

/// See the [module](self).
pub(crate) struct Upkeep {
    sessions: Arc<Sessions>,
    session: Arc<Session>,
    work: Work,
    /// Chunk bytes since the last snapshot.
    unsnapshotted: usize,
    /// Bytes of the last snapshot.
    snapshot_len: usize,
    /// Records below it were released by the store, as far as is known.
    released: u64,
    compaction: Compaction,
    /// When finished messages are put together, in milliseconds since the Unix epoch.
    compact_at: Option<u64>,
}

enum Work {
    None,
    /// `first` is the state's in the snapshot. Behind it what is below is put together, if that is due.
    Snapshot {
        running: Pending<()>,
        first: u64,
        pass: Option<Box<Pass>>,
    },
    Trim {
        running: Pending<()>,
        first: u64,
    },
    Compaction {
        running: JoinHandle<Result<Passed, StoreError>>,
        end: u64,
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
    /// The range was longer than a pass.
    more: bool,
}

impl Upkeep {
    /// Of a session that was just loaded.
    pub(crate) fn new(sessions: &Arc<Sessions>, session: &Arc<Session>, state: &State, stat: &SessionStat) -> Self {
        let mut this = Self {
            sessions: sessions.clone(),
            session: session.clone(),
            work: Work::None,
            unsnapshotted: 0,
            snapshot_len: 0,
            released: stat.first,
            compaction: stat.compaction,
            compact_at: None,
        };
        this.expect_compaction(state, stat.compaction.next, stat.written);
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

    /// True if it must be let go on.
    pub(crate) fn is_compacting(&self) -> bool {
        matches!(self.work, Work::Compaction { .. })
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

    /// Compacts some time after `at`, if messages of several parts were finished at `seq` or later.
    fn expect_compaction(&mut self, state: &State, seq: u64, at: u64) {
        let Some(delay) = self.sessions.config.compact_after else { return };
        if self.compact_at.is_none() && finished_from(state, seq).next().is_some() {
            self.compact_at = Some(at.saturating_add(u64::try_from(delay.as_millis()).unwrap_or(u64::MAX)));
        }
    }

    /// Starts what is due and not running.
    pub(crate) fn keep_up(&mut self, state: &State, writer: &Arc<Writer>, now: u64) {
        // A large view is not written for less than a multiple of what it is itself.
        let enough = self.sessions.config.snapshot_bytes.max(4 * self.snapshot_len);
        let compacts = self.compact_at.is_some_and(|at| at <= now);
        let due = self.unsnapshotted >= enough || state.first() > self.released || compacts;
        if due && matches!(self.work, Work::None) {
            let snapshot = state.snapshot();
            (self.unsnapshotted, self.snapshot_len) = (0, snapshot.len());
            let pass = compacts.then(|| {
                self.compact_at = None;
                Box::new(Pass::new(self, state))
            });
            let running = self.sessions.store.put_snapshot(writer, snapshot);
            self.work = Work::Snapshot { running, first: state.first(), pass };
        }
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
                // Tried again after the next commit, or later, not at once: the store has too much to do or no space.
                tracing::warn!(session = %self.session.id, %error, "snapshot, trim or compaction not done; it will be repeated");
                if matches!(work, Work::Compaction { .. } | Work::Snapshot { pass: Some(_), .. }) {
                    self.expect_compaction(state, self.compaction.next, now);
                }
                return;
            }
        };
        match (work, done) {
            (Work::Snapshot { pass: Some(pass), .. }, _) => {
                let end = pass.end;
                let running = tokio::spawn(pass.run(writer.clone()));
                self.work = Work::Compaction { running, end };
            }
            (Work::Snapshot { first, .. }, _) if first > self.released => {
                let running = self.sessions.store.trim(writer, first);
                self.work = Work::Trim { running, first };
            }
            (Work::Trim { first, .. }, _) => {
                self.released = first;
                self.keep_up(state, writer, now);
            }
            (Work::Compaction { end, .. }, Done::Compacted(Passed { compaction, more })) => {
                self.compaction = compaction;
                match more {
                    true => self.compact_at = Some(now),
                    false => self.expect_compaction(state, end, now),
                }
                self.keep_up(state, writer, now);
            }
            _ => self.keep_up(state, writer, now),
        }
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

/// The starts of messages with several parts that were finished at `seq` or later, as far as the view knows them.
fn finished_from(state: &State, seq: u64) -> impl Iterator<Item = u64> {
    let messages = state.view().messages();
    let kept = messages.finished().rev().map(|message| (message.start, message.through));
    let known = kept.chain(messages.index().rev().map(|message| (message.start, message.through)));
    let late = known.take_while(move |(_, through)| *through >= seq);
    late.filter(|(start, through)| through - start > ONE_PART).map(|(start, _)| start)
}

/// One pass of compaction over the chunks below a snapshot (spec COMPACT).
struct Pass {
    sessions: Arc<Sessions>,
    session: Arc<Session>,
    survey: Survey,
    compaction: Compaction,
    /// The seq where it begins.
    begin: u64,
    /// The seq and the number where it ends.
    end: u64,
    number: u64,
}

impl Pass {
    /// Of a session at the state of which a snapshot is kept.
    fn new(upkeep: &Upkeep, state: &State) -> Self {
        let next = upkeep.compaction.next;
        // Where the view knows all messages that were finished since the last pass, it begins with the first one: what was written
        // before is not read in vain.
        let messages = state.view().messages();
        let knows_all = messages.index().count() < mainstay_protocol::registry::INDEXED_MESSAGES;
        let first = finished_from(state, next).min().filter(|_| knows_all);
        Self {
            sessions: upkeep.sessions.clone(),
            session: upkeep.session.clone(),
            survey: Survey::new(state),
            compaction: upkeep.compaction,
            begin: first.map_or(next, |first| first.max(next)),
            end: state.tail(),
            number: state.number(),
        }
    }

    async fn run(mut self: Box<Self>, writer: Arc<Writer>) -> Result<Passed, StoreError> {
        let sessions = self.sessions.clone();
        // One at a time in the whole server. It is never closed.
        let _turn = sessions.compactions.acquire().await;
        let store = &*sessions.store;
        let mut more = false;
        for round in 1.. {
            let (survey, cut) = self.survey(store).await?;
            more |= cut;
            let plan = survey.plan(self.end);
            if plan.is_empty() || round == ROUNDS {
                self.session.ring().forget(self.compaction.before);
                self.compaction.next = if more { self.end } else { plan.next() };
                store.set_compaction(&writer, self.compaction).await?;
                break;
            }
            if plan.before() > self.compaction.before {
                // Readers are told before they can notice.
                self.compaction.before = plan.before();
                self.session.extent.send_modify(|extent| extent.compacted = plan.before());
                store.set_compaction(&writer, self.compaction).await?;
            }
            for step in plan.steps() {
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
                tokio::time::sleep(STEP_PAUSE).await;
            }
        }
        Ok(Passed { compaction: self.compaction, more })
    }

    /// Reads the range, or as much of it as one pass looks at: then it ends there, and that is said.
    async fn survey(&mut self, store: &dyn Store) -> Result<(Survey, bool), StoreError> {
        let mut survey = self.survey.clone();
        let mut from = ReadFrom::Seq(self.begin);
        let mut bytes = 0;
        loop {
            let page = self.page(store, from).await?;
            let within = page.iter().filter(|chunk| chunk.header().number < self.number);
            for (at, chunk) in within.enumerate() {
                survey
                    .read(chunk, at > 0)
                    .map_err(|error| StoreError::Damaged { seq: chunk.first(), what: error.detail.into() })?;
                bytes += chunk.bytes().len();
            }
            let Some(last) = page.last() else { return Ok((survey, false)) };
            let next = (last.end(), last.header().next_number());
            if next.1 >= self.number {
                return Ok((survey, false));
            }
            if bytes >= PASS_BYTES {
                (self.end, self.number) = next;
                return Ok((survey, true));
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

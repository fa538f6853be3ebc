//! The suite that every engine passes: one case per promise of the contract.

use core::future::Future;
use core::pin::Pin;
use std::sync::Arc;

use mainstay_protocol::session::{
    Author, CheckedBatch, Chunk, ChunkBuilder, ChunkStart, Compaction, Incarnation, Instance, Kind, MessageEnd,
    MessageId, MessageStart, Payload, PlanStep, Record, SessionName, State, Status, Survey,
};
use mainstay_protocol::wire::{Detail, Label, Subject, Writer as Bytewriter};

use crate::contract::{Created, Outcome, ReadFrom, SessionId, SessionStat, Store, StoreError, Writer};

/// A promise and the test of it. The store is fresh, or at least holds none of the sessions that the case makes.
pub type Case = (&'static str, fn(Arc<dyn Store>) -> Pin<Box<dyn Future<Output = ()> + Send>>);

macro_rules! cases {
    ($($name:ident),+ $(,)?) => {
        /// Every case, by name.
        pub const CASES: &[Case] = &[$( (stringify!($name), |store| Box::pin($name(store))) ),+];
    };
}

cases! {
    one_of_several_creates_wins,
    a_deleted_name_is_free_and_the_old_incarnation_stays_gone,
    what_is_committed_is_read_back_in_order,
    a_read_starts_at_the_chunk_that_holds_the_seq,
    a_page_respects_its_budget_and_returns_at_least_one_chunk,
    a_chunk_that_does_not_follow_is_refused,
    a_newer_writer_fences_the_older_one,
    resolve_tells_a_stored_chunk_from_a_lost_one,
    control_chunks_have_a_place_but_no_seq,
    a_snapshot_is_kept_and_replaced,
    a_trim_needs_a_snapshot_and_keeps_the_rest_readable,
    one_chunk_takes_the_place_of_several,
    sessions_do_not_touch_each_other,
    the_size_of_a_session_is_that_of_its_chunks,
    a_list_is_ordered_filtered_and_paged,
    a_session_that_expires_is_due_until_it_is_postponed_or_deleted,
    a_session_wakes_when_its_last_chunk_said_so,
    a_missing_session_is_not_found,
}

/// A session id for tests: the name, and an incarnation made of `life`.
pub fn session_id(name: &str, life: u8) -> SessionId {
    let name = SessionName::new(name).expect("a valid test name");
    SessionId { name, incarnation: Incarnation([life; 16]) }
}

/// A session being written in a test: makes the chunks and repeats what a faulty store refuses.
pub struct Log {
    store: Arc<dyn Store>,
    /// The writer in use.
    pub writer: Writer,
    /// The state after every chunk that is committed.
    pub state: State,
    /// What each chunk says of when the session wakes.
    pub wake: Option<u64>,
    author: Arc<Author>,
    sequence: u64,
}

impl Log {
    /// Creates the session and opens its writer.
    pub async fn create(store: &Arc<dyn Store>, id: SessionId) -> Self {
        let created = retry(|| store.create(id.clone(), 1, 0)).await.expect("create");
        assert_eq!(created, Created::New);
        Self::open(store, id).await
    }

    /// Opens a writer on a session and reads its state back.
    pub async fn open(store: &Arc<dyn Store>, id: SessionId) -> Self {
        let writer = retry(|| store.open_writer(id.clone())).await.expect("open writer");
        let mut state = match store.snapshot(id.clone()).await.expect("snapshot") {
            Some(bytes) => State::restore(&bytes).expect("a snapshot restores"),
            None => State::new(id.incarnation),
        };
        loop {
            let from = ReadFrom::Chunk { first: state.tail(), number: state.number() };
            let page = store.read(id.clone(), from, 1 << 16).await.expect("read");
            for chunk in &page.chunks {
                state.verify(chunk).expect("chunks follow each other");
            }
            if state.tail() == page.tail && page.chunks.is_empty() {
                break;
            }
        }
        let author = Author { subject: Subject::new("tester").expect("a valid subject"), instance: Instance([9; 16]) };
        Self {
            store: store.clone(),
            writer,
            sequence: state.producers().positions().first().map_or(0, |of| of.2),
            state,
            wake: None,
            author: Arc::new(author),
        }
    }

    fn id(&self) -> SessionId {
        self.writer.session.clone()
    }

    fn builder(&self) -> ChunkBuilder {
        let state = &self.state;
        let number = state.number();
        ChunkBuilder::new(state.incarnation(), state.tail(), number, self.writer.epoch, 1000 + number, state.chain())
    }

    /// The next chunk with these payloads, not committed.
    pub fn chunk(&mut self, payloads: &[&str]) -> Arc<Chunk> {
        let records: Vec<Record> =
            payloads.iter().map(|payload| Record::data(0, payload.as_bytes().to_vec())).collect();
        self.batch(&records)
    }

    fn batch(&mut self, records: &[Record]) -> Arc<Chunk> {
        let mut region = Bytewriter::new();
        records.iter().for_each(|record| record.put(&mut region));
        let batch = CheckedBatch::new(records.len() as u64, region.freeze()).expect("a valid batch");
        let mut builder = self.builder();
        let name = Label::new("p").expect("a valid name");
        builder.batch(&self.author, &name, 1, self.sequence, 1000, &batch);
        self.sequence += 1;
        Arc::new(builder.finish().expect("a valid chunk"))
    }

    /// Makes and commits a chunk with one part of a message.
    pub async fn say(&mut self, kind: Kind, text: &str) {
        let payload = text.as_bytes().to_vec();
        let message = Some(MessageId([5; 16]));
        self.write(&[Record { kind, message, ..Record::data(0, payload) }]).await;
    }

    /// Makes and commits a chunk with these records.
    async fn write(&mut self, records: &[Record]) {
        let chunk = self.batch(records);
        self.commit(&chunk).await.expect("append");
    }

    /// Puts together all that can be of what is stored below the snapshot, in at most so many steps. Returns the seq below which a reader
    /// is told so.
    pub async fn compact(&self, steps: usize) -> u64 {
        let snapshot = self.store.snapshot(self.id()).await.expect("snapshot").expect("there is one");
        let state = State::restore(&snapshot).expect("a snapshot restores");
        let mut survey = Survey::new(&state);
        let from = |number, first| ReadFrom::Chunk { first, number };
        let mut next = (0, 0);
        while next.0 < state.number() {
            let page = self.store.read(self.id(), from(next.0, next.1), 4000).await.expect("read");
            let below = page.chunks.iter().filter(|chunk| chunk.header().number < state.number());
            for (at, chunk) in below.enumerate() {
                survey.read(chunk, at > 0).expect("a chunk decodes");
                next = (chunk.header().next_number(), chunk.end());
            }
        }
        let plan = survey.plan(next.1);
        for step in plan.steps().take(steps) {
            let PlanStep { start, next_number } = step;
            let (mut chunks, mut next): (Vec<Arc<Chunk>>, _) = (Vec::new(), (start.number, start.first));
            while next.0 < next_number {
                let page = self.store.read(self.id(), from(next.0, next.1), 64 << 10).await.expect("read");
                chunks.extend(page.chunks.into_iter().filter(|chunk| chunk.header().number < next_number));
                next = chunks.last().map_or(next, |last| (last.header().next_number(), last.end()));
            }
            let chunk = Arc::new(plan.put_together(step, &chunks).expect("a chunk"));
            retry(|| self.store.compact(&self.writer, chunk.clone())).await.expect("compact");
        }
        plan.before()
    }

    /// Commits `chunk`, repeating and resolving as the contract asks.
    pub async fn commit(&mut self, chunk: &Arc<Chunk>) -> Result<(), StoreError> {
        loop {
            match self.store.append(&self.writer, chunk.clone(), self.wake).await {
                Outcome::Committed => break,
                Outcome::NotCommitted(error) if error.is_retryable() => {}
                Outcome::NotCommitted(error) => return Err(error),
                Outcome::Unknown(_) => {
                    if retry(|| self.store.resolve(&self.writer, chunk.clone())).await? {
                        break;
                    }
                }
            }
        }
        self.state.verify(chunk).expect("the chunk follows");
        Ok(())
    }

    /// Makes and commits a chunk with these payloads.
    pub async fn append(&mut self, payloads: &[&str]) {
        let chunk = self.chunk(payloads);
        self.commit(&chunk).await.expect("append");
    }

    /// Every payload from the chunk that holds `seq` on.
    pub async fn payloads(&self, seq: u64) -> Vec<String> {
        let mut payloads = Vec::new();
        let mut next = seq;
        loop {
            let page = self.store.read(self.id(), ReadFrom::Seq(next), 256).await.expect("read");
            for chunk in &page.chunks {
                for record in chunk.records() {
                    let (_, _, _, record) = record.expect("a record");
                    payloads.push(String::from_utf8(record.payload.to_vec()).expect("text"));
                }
                next = next.max(chunk.end());
            }
            if next >= page.tail {
                return payloads;
            }
        }
    }
}

/// Repeats a request while the store says that it may succeed later.
async fn retry<T>(request: impl Fn() -> crate::Pending<T>) -> Result<T, StoreError> {
    loop {
        match request().await {
            Err(error) if error.is_retryable() => {}
            result => return result,
        }
    }
}

async fn one_of_several_creates_wins(store: Arc<dyn Store>) {
    let ids = [session_id("cas", 1), session_id("cas", 2), session_id("cas", 3)];
    let mut new = 0;
    let mut winners = Vec::new();
    for id in &ids {
        match retry(|| store.create(id.clone(), 5, 0)).await.expect("create") {
            Created::New => {
                new += 1;
                winners.push(id.clone());
            }
            Created::Existing(stat) => winners.push(stat.session),
        }
    }
    assert_eq!(new, 1);
    assert!(winners.iter().all(|winner| *winner == winners[0]));
    let stat = store.stat(ids[0].name.clone()).await.expect("stat").expect("exists");
    assert_eq!((stat.created, stat.first, stat.tail, stat.chunks, stat.kept), (5, 0, 0, 0, 0));
}

/// Spec SESS-17.
async fn a_deleted_name_is_free_and_the_old_incarnation_stays_gone(store: Arc<dyn Store>) {
    let old = session_id("again", 1);
    let mut log = Log::create(&store, old.clone()).await;
    log.append(&["a", "b"]).await;
    retry(|| store.delete(old.clone())).await.expect("delete");
    assert_eq!(store.stat(old.name.clone()).await, Ok(None));
    let chunk = log.chunk(&["c"]);
    assert!(log.commit(&chunk).await.is_err());
    let new = session_id("again", 2);
    let mut log = Log::create(&store, new).await;
    log.append(&["x"]).await;
    assert_eq!(log.payloads(0).await, ["x"]);
    let read = store.read(old.clone(), ReadFrom::Seq(0), 1000).await;
    assert_eq!(read.err(), Some(StoreError::NotFound));
    assert_eq!(retry(|| store.delete(old.clone())).await, Err(StoreError::NotFound));
}

async fn what_is_committed_is_read_back_in_order(store: Arc<dyn Store>) {
    let id = session_id("order", 1);
    let mut log = Log::create(&store, id.clone()).await;
    let mut expected = Vec::new();
    for n in 0..40 {
        let payloads = [format!("{n}-a"), format!("{n}-b")];
        log.append(&[&payloads[0], &payloads[1]]).await;
        expected.extend(payloads);
    }
    assert_eq!(log.payloads(0).await, expected);
    let reopened = Log::open(&store, id).await;
    assert_eq!(reopened.state.tail(), 80);
    assert_eq!(reopened.state.view().hash(), log.state.view().hash());
    assert_eq!(reopened.state.chain(), log.state.chain());
}

async fn a_read_starts_at_the_chunk_that_holds_the_seq(store: Arc<dyn Store>) {
    let mut log = Log::create(&store, session_id("start", 1)).await;
    for n in 0..5 {
        log.append(&[&format!("{n}0"), &format!("{n}1"), &format!("{n}2")]).await;
    }
    assert_eq!(log.payloads(7).await.first().map(String::as_str), Some("20"));
    assert_eq!(log.payloads(6).await.first().map(String::as_str), Some("20"));
    assert_eq!(log.payloads(5).await.first().map(String::as_str), Some("10"));
    assert!(log.payloads(15).await.is_empty());
    let page = store.read(log.id(), ReadFrom::Seq(99), 1000).await.expect("read");
    assert!(page.chunks.is_empty());
    assert_eq!(page.tail, 15);
}

async fn a_page_respects_its_budget_and_returns_at_least_one_chunk(store: Arc<dyn Store>) {
    let mut log = Log::create(&store, session_id("budget", 1)).await;
    let big = "x".repeat(5000);
    for _ in 0..6 {
        log.append(&[&big]).await;
    }
    let page = store.read(log.id(), ReadFrom::Seq(0), 1).await.expect("read");
    assert_eq!(page.chunks.len(), 1);
    let page = store.read(log.id(), ReadFrom::Seq(0), 11_000).await.expect("read");
    assert!(page.chunks.len() <= 2 && !page.chunks.is_empty());
}

/// Appends a chunk that must never be stored by this until the store says so.
async fn refused_for_good(store: &Arc<dyn Store>, writer: &Writer, chunk: &Arc<Chunk>) {
    loop {
        match store.append(writer, chunk.clone(), None).await {
            Outcome::Committed => panic!("a chunk that does not follow was committed"),
            Outcome::NotCommitted(StoreError::Invalid { .. }) => return,
            Outcome::NotCommitted(error) => assert!(error.is_retryable(), "{error}"),
            Outcome::Unknown(_) => {}
        }
    }
}

/// Spec CHUNK-2.
async fn a_chunk_that_does_not_follow_is_refused(store: Arc<dyn Store>) {
    let mut log = Log::create(&store, session_id("follow", 1)).await;
    log.append(&["a"]).await;
    let first = log.chunk(&["b"]);
    log.commit(&first).await.expect("append");
    refused_for_good(&store, &log.writer, &first).await;
    let foreign = Log::create(&store, session_id("follow-other", 2)).await.chunk(&["z"]);
    refused_for_good(&store, &log.writer, &foreign).await;
    assert_eq!(log.payloads(0).await, ["a", "b"]);
}

/// Spec CHUNK-5.
async fn a_newer_writer_fences_the_older_one(store: Arc<dyn Store>) {
    let id = session_id("fence", 1);
    let mut old = Log::create(&store, id.clone()).await;
    old.append(&["a"]).await;
    let mut new = Log::open(&store, id).await;
    assert!(new.writer.epoch > old.writer.epoch);
    let chunk = old.chunk(&["stale"]);
    assert_eq!(old.commit(&chunk).await, Err(StoreError::Fenced { epoch: new.writer.epoch }));
    new.append(&["b"]).await;
    assert_eq!(new.payloads(0).await, ["a", "b"]);
}

async fn resolve_tells_a_stored_chunk_from_a_lost_one(store: Arc<dyn Store>) {
    let mut log = Log::create(&store, session_id("resolve", 1)).await;
    let stored = log.chunk(&["a"]);
    log.commit(&stored).await.expect("append");
    let lost = log.chunk(&["b"]);
    assert_eq!(retry(|| store.resolve(&log.writer, stored.clone())).await, Ok(true));
    assert_eq!(retry(|| store.resolve(&log.writer, lost.clone())).await, Ok(false));
}

/// Spec CHUNK-4.
async fn control_chunks_have_a_place_but_no_seq(store: Arc<dyn Store>) {
    use mainstay_protocol::session::Control;
    let id = session_id("control", 1);
    let mut log = Log::create(&store, id.clone()).await;
    for n in 0..4 {
        let mut builder = log.builder();
        builder.control(Control::Fence { epoch: n });
        let chunk = Arc::new(builder.finish().expect("a valid chunk"));
        log.commit(&chunk).await.expect("append");
        log.append(&[&n.to_string()]).await;
    }
    assert_eq!(log.payloads(0).await, ["0", "1", "2", "3"]);
    assert_eq!(log.payloads(2).await, ["2", "3"]);
    let stat = store.stat(id.name.clone()).await.expect("stat").expect("exists");
    assert_eq!((stat.tail, stat.chunks), (4, 8));
    let reopened = Log::open(&store, id).await;
    assert_eq!(reopened.state.chain(), log.state.chain());
}

async fn a_snapshot_is_kept_and_replaced(store: Arc<dyn Store>) {
    let id = session_id("snapshot", 1);
    let mut log = Log::create(&store, id.clone()).await;
    assert_eq!(store.snapshot(id.clone()).await, Ok(None));
    for n in 0..3 {
        log.append(&[&n.to_string()]).await;
        retry(|| store.put_snapshot(&log.writer, log.state.snapshot())).await.expect("put snapshot");
        assert_eq!(store.snapshot(id.clone()).await, Ok(Some(log.state.snapshot())));
    }
    log.append(&["last"]).await;
    let reopened = Log::open(&store, id).await;
    assert_eq!(reopened.state.snapshot(), {
        let mut state = State::restore(&log.state.snapshot()).expect("restores");
        // Opening took the next writer epoch; that shows in no chunk yet.
        state = State::restore(&state.snapshot()).expect("restores");
        state.snapshot()
    });
}

async fn a_trim_needs_a_snapshot_and_keeps_the_rest_readable(store: Arc<dyn Store>) {
    let id = session_id("trim", 1);
    let mut log = Log::create(&store, id.clone()).await;
    for n in 0..10 {
        log.append(&[&format!("{n}a"), &format!("{n}b")]).await;
    }
    let refused = retry(|| store.trim(&log.writer, 10)).await;
    assert!(matches!(refused, Err(StoreError::Invalid { .. })), "{refused:?}");
    retry(|| store.put_snapshot(&log.writer, log.state.snapshot())).await.expect("put snapshot");
    retry(|| store.trim(&log.writer, 11)).await.expect("trim");
    let stat = store.stat(id.name.clone()).await.expect("stat").expect("exists");
    assert_eq!((stat.first, stat.tail, stat.chunks, stat.kept), (11, 20, 10, 5));
    assert_eq!(log.payloads(0).await.first().map(String::as_str), Some("5a"));
    log.append(&["z"]).await;
    let reopened = Log::open(&store, id).await;
    assert_eq!(reopened.state.chain(), log.state.chain());
    assert_eq!(reopened.payloads(18).await, ["9a", "9b", "z"]);
    // Everything may go.
    retry(|| store.put_snapshot(&reopened.writer, reopened.state.snapshot())).await.expect("put snapshot");
    retry(|| store.trim(&reopened.writer, 21)).await.expect("trim");
    let page = store.read(reopened.id(), ReadFrom::Seq(0), 1000).await.expect("read");
    assert_eq!((page.chunks.len(), page.first, page.tail), (0, 21, 21));
    let stat = store.stat(reopened.id().name).await.expect("stat").expect("exists");
    assert_eq!((stat.kept, stat.chunks), (11, 11));
}

/// Spec COMPACT-3, COMPACT-5.
async fn one_chunk_takes_the_place_of_several(store: Arc<dyn Store>) {
    let id = session_id("compact", 1);
    let mut log = Log::create(&store, id.clone()).await;
    let start = MessageStart { role: Label::new("a").expect("a role"), content_type: Label::new("b").expect("a type") };
    log.append(&["before"]).await;
    log.write(&[Record { message: Some(MessageId([5; 16])), ..start.record(0) }]).await;
    let text: String = (0..30).map(|n| format!("{n:03}")).collect();
    for n in 0..30 {
        log.say(Kind::MESSAGE_APPEND, &format!("{n:03}")).await;
    }
    let end = MessageEnd { status: Status::Complete, detail: Detail::default() };
    log.write(&[Record { message: Some(MessageId([5; 16])), ..end.record(0) }]).await;
    retry(|| store.put_snapshot(&log.writer, log.state.snapshot())).await.expect("put snapshot");
    log.append(&["behind"]).await;
    let stat = store.stat(id.name.clone()).await.expect("stat").expect("exists");
    assert_eq!(stat.compaction, Compaction::default());
    // What is not what is stored there takes no place.
    let read = store.read(log.id(), ReadFrom::Seq(2), 1000).await.expect("read");
    let mut survey = Survey::new(&log.state);
    read.chunks.iter().for_each(|chunk| survey.read(chunk, true).expect("a chunk decodes"));
    let plan = survey.plan(4);
    let foreign = Log::create(&store, session_id("compact-other", 2)).await;
    let covered = &read.chunks[..read.chunks.len().min(2)];
    let step = PlanStep { start: ChunkStart { first: 2, number: 2 }, next_number: 2 + covered.len() as u64 };
    let chunk = Arc::new(plan.put_together(step, covered).expect("a chunk"));
    let refused = retry(|| store.compact(&foreign.writer, chunk.clone())).await;
    assert!(matches!(refused, Err(StoreError::Invalid { .. })), "{refused:?}");
    let refused = retry(|| store.compact(&log.writer, read.chunks[0].clone())).await;
    assert!(matches!(refused, Err(StoreError::Invalid { .. })), "one that was not put together: {refused:?}");
    // Whatever has been done of it, all of the text is there, and the log folds to the same.
    let before = log.compact(1).await;
    assert_eq!(before, 32);
    let compaction = Compaction { before, next: 33, looked: 33 };
    retry(|| store.set_compaction(&log.writer, compaction)).await.expect("set");
    let refused = Compaction { before: 1, ..compaction };
    retry(|| store.set_compaction(&log.writer, refused)).await.expect("set");
    for steps in 1..10 {
        log.compact(steps).await;
        log = Log::open(&store, id.clone()).await;
        assert_eq!(log.state.tail(), 34);
        // A writer that put no snapshot does not know what is below one.
        retry(|| store.put_snapshot(&log.writer, log.state.snapshot())).await.expect("put snapshot");
    }
    log.compact(usize::MAX).await;
    assert_eq!(log.payloads(0).await[2..], [text, "\u{1}\0".into(), "behind".into()]);
    let stat = store.stat(id.name.clone()).await.expect("stat").expect("exists");
    assert_eq!((stat.tail, stat.chunks, stat.compaction), (34, 34, compaction));
    let page = store.read(log.id(), ReadFrom::Seq(15), usize::MAX).await.expect("read");
    assert!(page.chunks[0].first() <= 15 && page.chunks[0].end() > 15);
    let mut folded = State::new(id.incarnation);
    while folded.tail() < 34 {
        let from = ReadFrom::Chunk { first: folded.tail(), number: folded.number() };
        let page = store.read(log.id(), from, usize::MAX).await.expect("read");
        page.chunks.iter().for_each(|chunk| folded.verify(chunk).expect("chunks follow each other"));
    }
    assert_eq!(folded.snapshot(), log.state.snapshot());
    // It goes on: appends, trims into what was put together, and all of it.
    log.append(&["more"]).await;
    retry(|| store.put_snapshot(&log.writer, log.state.snapshot())).await.expect("put snapshot");
    for before in [20, 32, 35] {
        retry(|| store.trim(&log.writer, before)).await.expect("trim");
        let reopened = Log::open(&store, id.clone()).await;
        assert_eq!(reopened.state.snapshot(), log.state.snapshot());
        log = reopened;
    }
    log.append(&["last"]).await;
    assert_eq!(log.payloads(0).await, ["last"]);
    let refused = store.compact(&foreign.writer, chunk).await;
    assert!(refused.is_err());
}

async fn sessions_do_not_touch_each_other(store: Arc<dyn Store>) {
    let mut logs = Vec::new();
    for n in 0..8 {
        logs.push(Log::create(&store, session_id(&format!("many:{n}"), n + 1)).await);
    }
    for round in 0..5 {
        for (n, log) in logs.iter_mut().enumerate() {
            log.append(&[&format!("{n}/{round}")]).await;
        }
    }
    for (n, log) in logs.iter().enumerate() {
        let expected: Vec<String> = (0..5).map(|round| format!("{n}/{round}")).collect();
        assert_eq!(log.payloads(0).await, expected);
    }
}

async fn the_size_of_a_session_is_that_of_its_chunks(store: Arc<dyn Store>) {
    let mut log = Log::create(&store, session_id("size:1", 1)).await;
    let mut other = Log::create(&store, session_id("size:2", 2)).await;
    assert_eq!(retry(|| store.size(log.id())).await, Ok(0));
    let mut expected = 0;
    for round in 0..3 {
        let chunk = log.chunk(&[&"x".repeat(1000 * (round + 1))]);
        expected += chunk.bytes().len() as u64;
        log.commit(&chunk).await.expect("committed");
        other.append(&["something else"]).await;
    }
    assert_eq!(store.size(log.id()).await, Ok(expected));
    store.close_writer(log.writer);
    retry(|| store.delete(session_id("size:1", 1))).await.expect("deleted");
    assert_eq!(store.size(session_id("size:1", 1)).await, Err(StoreError::NotFound));
}

async fn a_list_is_ordered_filtered_and_paged(store: Arc<dyn Store>) {
    for name in ["list/b", "list/a", "list/c", "list-other", "list/é"] {
        retry(|| store.create(session_id(name, 7), 3, 0)).await.expect("create");
    }
    let names = |page: &crate::ListPage| -> Vec<String> {
        page.sessions.iter().map(|stat| stat.session.name.as_str().to_owned()).collect()
    };
    let page = store.list(b"list/".to_vec(), Vec::new(), 10).await.expect("list");
    assert_eq!(names(&page), ["list/a", "list/b", "list/c", "list/é"]);
    assert!(!page.more);
    let page = store.list(b"list/".to_vec(), Vec::new(), 2).await.expect("list");
    assert_eq!(names(&page), ["list/a", "list/b"]);
    assert!(page.more);
    let page = store.list(b"list/".to_vec(), page.after, 2).await.expect("list");
    assert_eq!(names(&page), ["list/c", "list/é"]);
    assert!(!page.more);
    let page = store.list(b"nothing".to_vec(), Vec::new(), 2).await.expect("list");
    assert!(page.sessions.is_empty() && !page.more);
}

async fn a_session_that_expires_is_due_until_it_is_postponed_or_deleted(store: Arc<dyn Store>) {
    let (early, late, never) = (session_id("due/early", 1), session_id("due/late", 2), session_id("due/never", 3));
    for (id, after) in [(&late, 500), (&early, 100), (&never, 0)] {
        retry(|| store.create(id.clone(), 1000, after)).await.expect("create");
    }
    let due = async |now: u64, limit: usize| -> Vec<String> {
        let due = store.due(now, limit).await.expect("due");
        due.into_iter().map(|stat| stat.session.name.as_str().to_owned()).collect()
    };
    assert_eq!(due(1099, 10).await, [""; 0]);
    assert_eq!(due(1100, 10).await, ["due/early"]);
    assert_eq!(due(9000, 10).await, ["due/early", "due/late"], "the longest due first");
    assert_eq!(due(9000, 1).await, ["due/early"]);
    let stat = store.stat(early.name.clone()).await.expect("stat").expect("exists");
    assert_eq!((stat.expire_after, stat.written), (100, 1000));
    // What is written later does not lose it.
    let mut log = Log::open(&store, early.clone()).await;
    log.append(&["a"]).await;
    retry(|| store.postpone(early.clone(), 2000)).await.expect("postpone");
    retry(|| store.postpone(never.clone(), 1)).await.expect("postpone");
    log.append(&["b"]).await;
    assert_eq!(due(1999, 10).await, ["due/late"]);
    assert_eq!(due(9000, 10).await, ["due/late", "due/early"]);
    let stat = store.stat(early.name.clone()).await.expect("stat").expect("exists");
    assert_eq!(stat.expire_after, 100);
    assert_eq!(retry(|| store.expire(early.clone(), 1999)).await, Ok(false), "it was postponed");
    assert_eq!(retry(|| store.expire(never.clone(), 9000)).await, Ok(false));
    assert_eq!(retry(|| store.expire(late.clone(), 9000)).await, Ok(true));
    assert_eq!(due(9000, 10).await, ["due/early"]);
    assert_eq!(retry(|| store.postpone(late.clone(), 1)).await, Err(StoreError::NotFound));
}

async fn a_session_wakes_when_its_last_chunk_said_so(store: Arc<dyn Store>) {
    let ids = [("wake/a", 1), ("wake/b", 2), ("wake/c", 3)].map(|(name, n)| session_id(name, n));
    let waking = async |until: u64, after: Option<&SessionStat>, limit: usize| -> Vec<SessionStat> {
        let after = after.and_then(|stat| Some((stat.wake?, stat.session.incarnation)));
        store.waking(until, after, limit).await.expect("waking")
    };
    let names = |stats: &[SessionStat]| -> Vec<String> {
        stats.iter().map(|stat| stat.session.name.as_str().to_owned()).collect()
    };
    let mut logs = Vec::new();
    for id in &ids {
        retry(|| store.create(id.clone(), 1000, 0)).await.expect("create");
        logs.push(Log::open(&store, id.clone()).await);
    }
    for (log, wake) in logs.iter_mut().zip([Some(2000), Some(1), Some(1)]) {
        log.append(&["never"]).await;
        log.wake = wake;
        log.append(&["some time"]).await;
    }
    assert_eq!(names(&waking(0, None, 10).await), [""; 0]);
    assert_eq!(names(&waking(1999, None, 10).await), ["wake/b", "wake/c"]);
    let first = waking(9000, None, 2).await;
    assert_eq!(names(&first), ["wake/b", "wake/c"], "the longest due first, then by incarnation");
    assert_eq!(names(&waking(9000, first.last(), 2).await), ["wake/a"]);
    assert_eq!(names(&waking(9000, first.first(), 1).await), ["wake/c"], "of the same moment, too");
    let stat = store.stat(ids[0].name.clone()).await.expect("stat").expect("exists");
    assert_eq!(stat.wake, Some(2000));
    // A chunk that says nothing takes it back; so does whoever knows better; a delete takes all with it.
    logs[1].wake = None;
    logs[1].append(&["nothing to do"]).await;
    retry(|| store.set_wake(ids[2].clone(), Some(3000))).await.expect("set");
    assert_eq!(names(&waking(9000, None, 10).await), ["wake/a", "wake/c"]);
    logs[2].wake = Some(500);
    logs[2].append(&["earlier"]).await;
    assert_eq!(names(&waking(9000, None, 10).await), ["wake/c", "wake/a"]);
    retry(|| store.set_wake(ids[2].clone(), None)).await.expect("set");
    retry(|| store.delete(ids[0].clone())).await.expect("delete");
    assert_eq!(names(&waking(9000, None, 10).await), [""; 0]);
    assert_eq!(retry(|| store.set_wake(ids[0].clone(), Some(1))).await, Err(StoreError::NotFound));
}

async fn a_missing_session_is_not_found(store: Arc<dyn Store>) {
    let id = session_id("missing", 1);
    assert_eq!(store.stat(id.name.clone()).await, Ok(None));
    assert_eq!(retry(|| store.open_writer(id.clone())).await.err(), Some(StoreError::NotFound));
    assert_eq!(store.read(id.clone(), ReadFrom::Seq(0), 10).await.err(), Some(StoreError::NotFound));
    assert_eq!(store.snapshot(id.clone()).await, Err(StoreError::NotFound));
    assert_eq!(retry(|| store.delete(id.clone())).await, Err(StoreError::NotFound));
}

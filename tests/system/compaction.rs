//! Compaction: finished messages take little more than their text, and nobody who reads notices more than a verdict.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mainstay_client::{
    Config as ClientConfig, Cursor, Event, Kind, MessageId, MessageWriter, Producer, Record, Session, Status, Verdict,
    View,
};
use mainstay_protocol::registry::{ALPN, MAX_FRAME};
use mainstay_protocol::session::{Author, Compaction, Instance, Operation};
use mainstay_protocol::wire::{Attach, AttachMode, Deframer, Frame, Hello, Start, Subject, Subscribe};
use mainstay_server::Config;
use mainstay_store::{ReadFrom, SessionStat, Store};
use mainstay_store_fjall::FjallStore;
use mainstay_store_fjall::verify::{Found, Report, verify};
use mainstay_tests::harness::{MemoryServer, QuicServer, claims};
use mainstay_tests::live::{attach, current, follow};
use mainstay_tests::process::{PATIENCE, Server};
use mainstay_tests::watched::Watched;
use mainstay_tests::{random, until};
use mainstay_transport::quic::QuicConnector;
use mainstay_transport::{Connection, Connector, RecvStream, SendStream};
use tokio::time::timeout;

/// A server that compacts soon.
fn config() -> Config {
    let mut config = Config::default();
    config.compact_after = Some(Duration::from_millis(200));
    config.due_pause = Duration::from_millis(50);
    config
}

fn open(dir: &Path) -> Arc<FjallStore> {
    Arc::new(FjallStore::open(dir, mainstay_store_fjall::Config::default()).expect("open"))
}

/// Waits until everything below `tail` that can be put together is.
async fn compacted(store: &dyn Store, name: &str, tail: u64) -> Compaction {
    until("it is compacted", async || stat_of(store, name).await.compaction.next >= tail).await;
    stat_of(store, name).await.compaction
}

/// What is stored in `dir`, which is whole, and how many chunks were put together.
fn whole(dir: &Path) -> (Report, u64) {
    let mut compacted = 0;
    let report = verify(dir, &mut |_, found| {
        if let Found::Chunk { chunk, .. } = found {
            compacted += u64::from(chunk.header().compacted.is_some());
        }
        ControlFlow::Continue(())
    });
    let report = report.expect("verify");
    assert_eq!(report.problems, []);
    (report, compacted)
}

/// What a reader from `start` up to `tail` is told, and the records.
async fn read(session: &Session, start: Start, tail: u64) -> (Verdict, Vec<(u64, Record)>) {
    let mut subscription = session.subscribe(start).open().await.expect("a subscription");
    let (mut told, mut records, mut next) = (Verdict::Exact, Vec::new(), 0);
    while next < tail {
        let event = timeout(PATIENCE, subscription.next()).await.expect("in time").expect("an event");
        match event.expect("no error") {
            Event::Started { verdict, .. } => told = verdict,
            Event::Records(batch) => {
                next = batch.next();
                records.extend(batch.iter().map(|read| read.expect("a record")).map(|read| (read.seq, read.record)));
            }
            _ => {}
        }
    }
    (told, records)
}

/// The text of a message after these records.
fn text(records: &[(u64, Record)], id: MessageId) -> Vec<u8> {
    let author = Arc::new(Author { subject: Subject::new("any").expect("a subject"), instance: Instance([0; 16]) });
    let mut view = View::default();
    for (seq, record) in records {
        view.pass_over(*seq);
        view.fold_record(&author, 0, record).expect("a record folds");
    }
    view.messages().get(id).expect("the message").text.clone()
}

/// Bytes on the QUIC stream of a subscription that starts with the view, up to the view's end.
async fn bytes_of_view(server: &QuicServer, name: &str) -> usize {
    let limits = ClientConfig::default().transport_limits();
    let connector = QuicConnector::new(server.addr, server.trust(), &limits, ALPN).expect("a connector");
    let connection = connector.connect(true).await.expect("a connection");
    let token = server.key.mint(&claims("late", "", Operation::ALL)).expect("a token");
    let hello = Hello { instance: Some(Instance([3; 16])), token: Some(token.into()), ..Hello::default() };
    let (mut control, _answers) = connection.open_bi().await.expect("control");
    control.write(&mut [Frame::from(hello).to_bytes()]).await.expect("write");
    let (mut send, _answers) = connection.open_bi().await.expect("an attachment");
    let (mode, session) = (AttachMode::Attach, name.parse().expect("a name"));
    let attach = Attach { mode, session, incarnation: None, next: None, expire_after: None };
    let subscribe =
        Subscribe { id: 1, start: Start::Snapshot, streams: vec![], kinds: vec![], window: None, folded: false };
    send.write(&mut [Frame::from(attach).to_bytes(), Frame::from(subscribe).to_bytes()]).await.expect("write");
    let mut stream = timeout(PATIENCE, connection.accept_uni()).await.expect("in time").expect("a stream");
    let (mut frames, mut bytes, mut view) = (Deframer::new(MAX_FRAME), 0, 0);
    loop {
        while let Some(raw) = frames.next_frame().expect("a frame") {
            if let Some(Frame::Snapshot(snapshot)) = Frame::decode(&raw).expect("a known frame") {
                view += snapshot.part.len() as u64;
                if view == snapshot.length {
                    return bytes;
                }
            }
        }
        let piece = timeout(PATIENCE, stream.read()).await.expect("in time").expect("bytes").expect("more");
        bytes += piece.len();
        frames.push(piece);
    }
}

/// Scenario A9: ten thousand tokens come as one message, during and after; in the end they are stored as one; and who comes back with
/// a cursor among them is told so, and ends with the same bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_tokens_become_one_text_and_old_cursors_stay_valid() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = open(dir.path());
    let server = QuicServer::start(store.clone(), config());
    let client = server.client();
    let session = attach(&client, "s").await;
    let producer = session.producer("agent").await.expect("a producer");
    let writer = MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await.expect("begin");
    let id = writer.id();
    let mut live = current(session.live().await).await;
    let mut told = Vec::new();
    let mut last = None;
    for n in 0..10_000u32 {
        let ticket = writer.append(format!("{n:05}")).await.expect("append");
        // The first come one by one, each in a chunk of its own.
        match n < 500 {
            true => drop(ticket.await.expect("stored")),
            false => last = Some(ticket),
        }
        if n == 4999 {
            last.take().expect("a ticket").await.expect("stored");
            told.push((25_000, bytes_of_view(&server, "s").await));
        }
    }
    last.expect("a ticket").await.expect("stored");
    told.push((50_000, bytes_of_view(&server, "s").await));
    let expected: Vec<u8> = (0..10_000).flat_map(|n| format!("{n:05}").into_bytes()).collect();
    // Nothing is put together before its end.
    let (verdict, before) = read(&session, Start::Earliest, 10_001).await;
    assert_eq!((verdict, before.len()), (Verdict::Exact, 10_001));
    let end = writer.end(Status::Complete, "").await.expect("end").await.expect("stored");
    let tail = producer.append(session.main(), "behind").await.expect("append").await.expect("stored") + 1;
    assert_eq!(tail, end + 2);
    let Compaction { before: seen, .. } = compacted(&*store, "s", tail - 1).await;
    assert_eq!(seen, end, "who was behind the last token misses nothing");
    told.push((50_000, bytes_of_view(&server, "s").await));
    assert!(told.iter().all(|(text, wire)| wire - text <= 1024), "{told:?}");

    let incarnation = session.info().incarnation;
    for cursor in [1, 300, 1234, 5000, end - 1] {
        let returning = server.client();
        let back = returning.session("s").expect("a name").at(Cursor { incarnation, next: cursor });
        let back = back.attach().await.expect("attach");
        let (verdict, records) = read(&back, Start::Seq(cursor), tail).await;
        assert_eq!((back.info().verdict, verdict), (Verdict::Snapshot, Verdict::Snapshot));
        // The text in the place of all that is left of it, the end, and what is behind.
        assert_eq!(records.len(), 3, "from {cursor}");
        let kinds: Vec<Kind> = records.iter().map(|(_, record)| record.kind).collect();
        assert_eq!(kinds, [Kind::MESSAGE_REPLACE, Kind::MESSAGE_END, Kind::DATA]);
        let held = before.iter().take_while(|(seq, _)| *seq < cursor).cloned();
        assert_eq!(text(&held.chain(records).collect::<Vec<_>>(), id), expected, "from {cursor}");
        returning.finish().await;
    }
    let (verdict, records) = read(&session, Start::Seq(end), tail).await;
    assert_eq!((verdict, records.len()), (Verdict::Exact, 2));
    // Who was there all the time had every token, and has the view that everybody has.
    follow(&mut live, "everything", |live| live.view().next() == tail).await;
    assert_eq!(live.view().messages().get(id).expect("the message").text, expected);
    let late = attach(&client, "s").await;
    assert_eq!(live.view().hash(), late.info().view_hash);
    drop((live, late, session, producer));
    client.finish().await;
    server.stop().await;
    let hash = store.snapshot(stat_of(&*store, "s").await.session).await.expect("snapshot").is_some();
    assert!(hash, "what is put together is below a snapshot");
    drop(Arc::into_inner(store));

    let (report, _) = whole(dir.path());
    let bytes = report.bytes;
    println!(
        "text and bytes to a late joiner {told:?}; 10,004 records are {} in {} chunks of {bytes} bytes",
        report.records, report.chunks
    );
    assert!(bytes * 10 <= 50_000 * 12, "{bytes} bytes for a text of 50,000");
}

async fn stat_of(store: &dyn Store, name: &str) -> SessionStat {
    store.stat(name.parse().expect("a name")).await.expect("stat").expect("exists")
}

/// A session that nobody uses is compacted too, also if the server was away when that was due.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_due_while_the_server_was_away_is_put_together_without_being_asked_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = open(dir.path());
    let mut later = config();
    later.compact_after = Some(Duration::from_secs(5));
    let server = QuicServer::start(store.clone(), later);
    let client = server.client();
    let session = attach(&client, "s").await;
    let producer = session.producer("agent").await.expect("a producer");
    let writer = MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await.expect("begin");
    for _ in 0..100 {
        writer.append("token ").await.expect("append");
    }
    let end = writer.end(Status::Complete, "").await.expect("end").await.expect("stored");
    client.finish().await;
    server.stop().await;
    let stat = stat_of(&*store, "s").await;
    assert_eq!(stat.compaction, Compaction::default(), "the server went before it was due");
    let server = QuicServer::start(store.clone(), config());
    assert_eq!(compacted(&*store, "s", end + 1).await.before, end);
    server.stop().await;
}

/// Appends a message of so many parts, each in a chunk of its own. Returns its id and the seq of its end.
async fn say(session: &Session, producer: &Producer, parts: usize) -> (MessageId, u64) {
    let writer = MessageWriter::begin(producer, session.main(), "assistant", "text/plain").await.expect("begin");
    let id = writer.id();
    for _ in 0..parts {
        writer.append("token ").await.expect("append").await.expect("stored");
    }
    (id, writer.end(Status::Complete, "").await.expect("end").await.expect("stored"))
}

/// A reader that comes from what is stored into what is in memory has whole texts, during a pass and after it: the last parts may
/// be in one chunk with what is behind them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_comes_from_the_store_into_memory_has_whole_texts() {
    for slow in [None, Some(("s", Duration::from_secs(1)))] {
        let store = Arc::new(Watched::slow(slow));
        let server = MemoryServer::start(store.clone(), config());
        let client = server.client();
        let session = attach(&client, "s").await;
        let producer = session.producer("agent").await.expect("a producer");
        // So that a page ends where memory begins.
        for _ in 0..20 {
            producer.append(session.main(), vec![b'd'; 5000]).await.expect("append").await.expect("stored");
        }
        let writer = MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await.expect("begin");
        let (id, mut expected) = (writer.id(), Vec::new());
        for n in 0..60u8 {
            expected.extend([n; 3000]);
            writer.append(vec![n; 3000]).await.expect("append").await.expect("stored");
        }
        // Not waited for, so that they share a chunk with the end.
        for n in 60..62u8 {
            expected.extend([n; 3000]);
            writer.append(vec![n; 3000]).await.expect("append");
        }
        let tail = writer.end(Status::Complete, "").await.expect("end").await.expect("stored") + 1;
        let looked = async || match slow {
            Some(_) => store.steps.load(Ordering::Relaxed) > 1,
            None => stat_of(&*store, "s").await.compaction.looked >= tail,
        };
        until("something is put together", looked).await;
        let (_, records) = read(&attach(&server.client(), "s").await, Start::Earliest, tail).await;
        assert!(text(&records, id) == expected, "{} records, slow: {slow:?}", records.len());
        server.stop().await;
    }
}

/// Spec COMPACT-5: a pass that is refused in the middle and begins anew takes nothing back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_told_is_not_taken_back_by_a_pass_that_begins_anew() {
    let store = Arc::new(Watched::refusing(3));
    let mut config = config();
    (config.compact_after, config.ring_bytes) = (Some(Duration::from_secs(1)), 0);
    let server = MemoryServer::start(store.clone(), config);
    let session = attach(&server.client(), "s").await;
    let producer = session.producer("agent").await.expect("a producer");
    let mut end = 0;
    for _ in 0..4 {
        end = say(&session, &producer, 290).await.1;
    }
    compacted(&*store, "s", end + 1).await;
    let told = store.told();
    assert!(told.is_sorted_by_key(|told| told.before) && store.steps.load(Ordering::Relaxed) > 3, "{told:?}");
    let cursor = end - 100;
    let (verdict, records) = read(&session, Start::Seq(cursor), end + 1).await;
    assert_eq!((verdict, records.len()), (Verdict::Snapshot, 2));
    server.stop().await;
}

/// How long a session that nobody uses stays in memory.
const IDLE: Duration = Duration::from_millis(100);

/// A message that is written over a long time is put together in the end, whatever was finished and put together meanwhile; and what
/// was looked at is not looked at again whenever the session is loaded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_message_is_put_together_in_the_end_and_a_quick_one_once() {
    let store = Arc::new(Watched::default());
    let mut config = config();
    config.idle = IDLE;
    let server = MemoryServer::start(store.clone(), config);
    let client = server.client();
    let session = attach(&client, "s").await;
    let producer = session.producer("agent").await.expect("a producer");
    let slow = MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await.expect("begin");
    let id = slow.id();
    for _ in 0..50 {
        slow.append("slow ").await.expect("append").await.expect("stored");
    }
    let (_, end) = say(&session, &producer, 20).await;
    until("the quick one is looked at", async || stat_of(&*store, "s").await.compaction.looked > end).await;
    assert_eq!(stat_of(&*store, "s").await.compaction.next, 0, "the slow one is to be looked at");
    drop((session, producer));
    client.finish().await;
    let (steps, writers) = (store.steps.load(Ordering::Relaxed), store.writers.load(Ordering::Relaxed));
    for _ in 0..3 {
        // What is due when it is loaded is begun before anybody is answered.
        let loads = store.loads.load(Ordering::Relaxed);
        let loaded = async || {
            // It leaves memory once nobody uses it for so long.
            tokio::time::sleep(2 * IDLE).await;
            let client = server.client();
            client.session("s").expect("a name").attach().await.expect("attach");
            client.finish().await;
            store.loads.load(Ordering::Relaxed) > loads
        };
        until("it has left memory and is loaded again", loaded).await;
    }
    assert_eq!((store.steps.load(Ordering::Relaxed), store.writers.load(Ordering::Relaxed)), (steps, writers));
    let client = server.client();
    let session = attach(&client, "s").await;
    let producer = session.producer("agent").await.expect("a producer");
    let slow = MessageWriter::resume(&producer, session.main(), id);
    for _ in 0..50 {
        slow.append("slow ").await.expect("append").await.expect("stored");
    }
    let tail = slow.end(Status::Complete, "").await.expect("end").await.expect("stored") + 1;
    compacted(&*store, "s", tail).await;
    let page = store.read(stat_of(&*store, "s").await.session, ReadFrom::Seq(0), usize::MAX).await.expect("read");
    let records = page.chunks.iter().flat_map(|chunk| chunk.records()).map(|record| record.expect("a record").3);
    // Its start, what each of two instances wrote, and its end.
    assert_eq!(records.filter(|record| record.message == Some(id)).count(), 4);
    server.stop().await;
}

/// Spec SESS-19: nobody waits for the compaction of another session, nor for what is left of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trim_does_not_wait_for_compaction() {
    let store = Arc::new(Watched::slow(Some(("slow", Duration::from_secs(20)))));
    let server = MemoryServer::start(store.clone(), config());
    let client = server.client();
    let begun = Instant::now();
    for name in ["slow", "other"] {
        let session = attach(&client, name).await;
        let producer = session.producer("agent").await.expect("a producer");
        let (_, end) = say(&session, &producer, 20).await;
        until("a step", async || store.steps.load(Ordering::Relaxed) > 0).await;
        if name == "other" {
            session.trim(end).await.expect("trim");
            until("it is released", async || stat_of(&*store, name).await.first == end).await;
        }
    }
    assert!(begun.elapsed() < Duration::from_secs(15), "the step of the slow one is still on its way");
}

/// A store that has no room is asked again now and then, whatever waits for it, and once there is room everything is done.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_without_room_is_not_asked_again_and_again() {
    let store = Arc::new(Watched::default());
    store.is_full.store(true, Ordering::Relaxed);
    let server = MemoryServer::start(store.clone(), config());
    let session = attach(&server.client(), "s").await;
    let producer = session.producer("agent").await.expect("a producer");
    let (_, end) = say(&session, &producer, 20).await;
    session.trim(5).await.expect("trim");
    let asked = async |times: usize| {
        until("it is asked", async || store.snapshots.load(Ordering::Relaxed) >= times).await;
    };
    asked(1).await;
    let begun = Instant::now();
    asked(4).await;
    assert!(begun.elapsed() > Duration::from_millis(2500), "three times in {:?}", begun.elapsed());
    store.is_full.store(false, Ordering::Relaxed);
    compacted(&*store, "s", end + 1).await;
    assert_eq!(stat_of(&*store, "s").await.first, 5);
    server.stop().await;
}

/// Spec SUB-15: who reads what was put together is told so, once, before it comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_what_was_put_together_are_told_before_it_comes() {
    let store = Arc::new(Watched::default());
    let server = MemoryServer::start(store.clone(), config());
    let session = attach(&server.client(), "s").await;
    let producer = session.producer("agent").await.expect("a producer");
    let mut end = 0;
    for _ in 0..3 {
        end = say(&session, &producer, 300).await.1;
        compacted(&*store, "s", end + 1).await;
    }
    let mut subscription = session.subscribe(Start::Earliest).open().await.expect("a subscription");
    let (mut told, mut next) = (0, 0);
    while next <= end {
        let event = timeout(PATIENCE, subscription.next()).await.expect("in time").expect("an event");
        match event.expect("no error") {
            Event::Compacted => told += 1,
            Event::Records(batch) => {
                assert!(told == 1 || batch.len() == batch.next() - batch.from());
                next = batch.next();
            }
            _ => {}
        }
    }
    assert_eq!(told, 1);
    server.stop().await;
}

/// Readers that follow with the view, by their position, and from the beginning, and a server that is killed again and again while it
/// compacts: at every moment all have the same texts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn texts_stay_whole_while_the_server_is_killed_in_the_middle_of_compaction() {
    const ROUNDS: u64 = 6;
    const MESSAGES: usize = 12;
    let mut random = random::for_test("texts_stay_whole_while");
    let dir = tempfile::tempdir().expect("a directory");
    let mut server = Server::start_in(dir.path(), &["--compact-after", "0.2"]).await;
    let client = server.client(ClientConfig::default());
    let session = attach(&client, "s").await;
    let producer = session.producer("agent").await.expect("a producer");
    let mut live = current(session.live().await).await;
    let mut every = session.subscribe(Start::Earliest).open().await.expect("a subscription");
    let (mut expected, mut written, mut tail): (Vec<_>, Vec<(u64, Record)>, _) = (Vec::new(), Vec::new(), 0);
    for round in 0..ROUNDS {
        for n in 0..MESSAGES {
            let writer =
                MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await.expect("begin");
            let mut text = Vec::new();
            for part in 0..30 + random.below(100) {
                let part = format!("{round}.{n}.{part} ");
                text.extend_from_slice(part.as_bytes());
                writer.append(part).await.expect("append").await.expect("stored");
            }
            expected.push((writer.id(), text));
            tail = writer.end(Status::Complete, "").await.expect("end").await.expect("stored") + 1;
        }
        follow(&mut live, "everything", |live| live.view().next() >= tail).await;
        while written.last().is_none_or(|(seq, _)| *seq < tail - 1) {
            let event = timeout(PATIENCE, every.next()).await.expect("in time").expect("an event");
            if let Event::Records(batch) = event.expect("no error") {
                written.extend(batch.iter().map(|read| read.expect("a record")).map(|read| (read.seq, read.record)));
            }
        }
        assert_eq!(written.len() as u64, tail, "who is there has every part");
        // Somewhere before, in or behind the pass.
        tokio::time::sleep(Duration::from_millis(random.below(400))).await;
        server.kill().await;
        server.restart().await;
        let cursor = random.below(tail);
        let other = server.client(ClientConfig::default());
        let reader = attach(&other, "s").await;
        let all = read(&reader, Start::Earliest, tail).await.1;
        let rest = read(&reader, Start::Seq(cursor), tail).await.1;
        let joined: Vec<_> = written.iter().filter(|(seq, _)| *seq < cursor).cloned().chain(rest).collect();
        for (id, expected) in &expected {
            assert_eq!(text(&all, *id), *expected, "round {round}, from the beginning");
            assert_eq!(text(&joined, *id), *expected, "round {round}, from {cursor}");
        }
        let late = current(reader.live().await).await;
        assert_eq!((late.view().next(), late.view().hash()), (tail, live.view().hash()));
        other.finish().await;
    }
    let parts = expected.len();
    drop((live, every, session, producer));
    client.finish().await;
    server.terminate().await;
    let (report, chunks) = whole(&dir.path().join("store"));
    let bytes = report.bytes;
    println!(
        "{parts} messages, {tail} records, {ROUNDS} kills: {} records in {} chunks left, {chunks} put together, {bytes} bytes",
        report.records, report.chunks
    );
    assert!(chunks > 0, "something was put together");
}

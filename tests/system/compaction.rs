//! Compaction: finished messages take little more than their text, and nobody who reads notices more than a verdict.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mainstay_client::{
    Config as ClientConfig, Cursor, Event, Kind, MessageId, MessageWriter, Record, Session, Status, Verdict, View,
};
use mainstay_protocol::registry::{ALPN, MAX_FRAME};
use mainstay_protocol::session::{Author, Instance, Operation, SessionName};
use mainstay_protocol::wire::{Attach, AttachMode, Deframer, Frame, Hello, Start, Subject, Subscribe};
use mainstay_server::Config;
use mainstay_store::{Compaction, Store};
use mainstay_store_fjall::FjallStore;
use mainstay_store_fjall::verify::{Found, verify};
use mainstay_tests::harness::{QuicServer, claims};
use mainstay_tests::live::{attach, current, follow};
use mainstay_tests::process::{PATIENCE, Server};
use mainstay_tests::random;
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
async fn compacted(store: &FjallStore, name: &str, tail: u64) -> Compaction {
    let name: SessionName = name.parse().expect("a name");
    let wait = async {
        loop {
            let stat = store.stat(name.clone()).await.expect("stat").expect("exists");
            if stat.compaction.next >= tail {
                return stat.compaction;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, wait).await.expect("it is compacted in time")
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
    let connection = connector.connect().await.expect("a connection");
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
    let Compaction { before: seen, .. } = compacted(&store, "s", tail - 1).await;
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
    let hash = store.snapshot(stat_of(&store, "s").await).await.expect("snapshot").is_some();
    assert!(hash, "what is put together is below a snapshot");
    drop(Arc::into_inner(store));

    let mut bytes = 0;
    let report = verify(dir.path(), &mut |_, found| {
        if let Found::Session { bytes: of, .. } = found {
            bytes = of;
        }
        ControlFlow::Continue(())
    });
    let report = report.expect("verify");
    assert_eq!(report.problems, []);
    println!(
        "text and bytes to a late joiner {told:?}; 10,004 records are {} in {} chunks of {bytes} bytes",
        report.records, report.chunks
    );
    assert!(bytes * 10 <= 50_000 * 12, "{bytes} bytes for a text of 50,000");
}

async fn stat_of(store: &FjallStore, name: &str) -> mainstay_store::SessionId {
    store.stat(name.parse().expect("a name")).await.expect("stat").expect("exists").session
}

/// A session that nobody uses is compacted too, also if the server was away when that was due.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_due_while_the_server_was_away_is_put_together_without_being_asked_for() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = open(dir.path());
    let mut never = config();
    never.compact_after = Some(Duration::from_secs(1));
    let server = QuicServer::start(store.clone(), never);
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
    let stat = store.stat("s".parse().expect("a name")).await.expect("stat").expect("exists");
    assert_eq!(stat.compaction, Compaction::default(), "the server went before it was due");
    let server = QuicServer::start(store.clone(), config());
    assert_eq!(compacted(&store, "s", end + 1).await.before, end);
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
    let (mut bytes, mut chunks) = (0, 0);
    let report = verify(&dir.path().join("store"), &mut |_, found| {
        match found {
            Found::Session { bytes: of, .. } => bytes = of,
            Found::Chunk { chunk, .. } => chunks += u64::from(chunk.header().compacted.is_some()),
        }
        ControlFlow::Continue(())
    });
    let report = report.expect("verify");
    assert_eq!(report.problems, []);
    println!(
        "{parts} messages, {tail} records, {ROUNDS} kills: {} records in {} chunks left, {chunks} put together, {bytes} bytes",
        report.records, report.chunks
    );
    assert!(chunks > 0, "something was put together");
}

//! Sessions that expire, and what ends with a token.

use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mainstay_client::{ClientError, Config as ClientConfig, Cursor, Event, MessageWriter, Start, Status, Verdict};
use mainstay_protocol::Code;
use mainstay_protocol::session::Operation;
use mainstay_server::Config;
use mainstay_store::{MemoryStore, Store};
use mainstay_store_fjall::FjallStore;
use mainstay_tests::harness::{MemoryServer, claims, now};
use mainstay_tests::process::{PATIENCE, Server};
use mainstay_tests::{random, until};
use tokio::time::timeout;

async fn unused_sessions_expire(store: Arc<dyn Store>) {
    let mut config = Config::default();
    (config.idle, config.due_pause) = (Duration::from_millis(50), Duration::from_millis(20));
    let server = MemoryServer::start(store.clone(), config);
    let client = server.client();
    let create = async |name: &str, after: Option<Duration>| {
        let mut attaching = client.session(name).expect("a name").create_new();
        if let Some(after) = after {
            attaching = attaching.expire_after(after);
        }
        attaching.attach().await.expect("attach")
    };
    let after = Duration::from_millis(300);
    let kept = create("kept", None).await;
    let held = create("held", Some(after)).await;
    let unused = create("unused", Some(after)).await;
    let producer = unused.producer("p").await.expect("a producer");
    producer.append(unused.main(), "x").await.expect("append").await.expect("stored");
    drop((kept, unused, producer));
    let gone = async |name: &str| {
        until("it expires", async || store.stat(name.parse().expect("a name")).await.expect("stat").is_none()).await;
    };
    gone("unused").await;
    let again = client.session("unused").expect("a name").attach().await;
    assert!(matches!(again, Err(ClientError::Refused { code: Code::SESSION_NOT_FOUND, .. })), "{again:?}");
    // One that is attached does not expire, however long ago it was created: time itself is what passes here.
    tokio::time::sleep(2 * after).await;
    let producer = held.producer("p").await.expect("a producer");
    producer.append(held.main(), "still here").await.expect("append").await.expect("stored");
    drop((held, producer));
    let unused = Instant::now();
    gone("held").await;
    assert!(unused.elapsed() >= after, "expired too early");
    assert!(client.session("kept").expect("a name").attach().await.is_ok(), "what never expires stays");
    server.stop().await;
}

#[tokio::test]
async fn a_session_expires_once_nobody_uses_it_in_memory() {
    unused_sessions_expire(Arc::new(MemoryStore::new())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_expires_once_nobody_uses_it_on_disk() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = FjallStore::open(dir.path(), mainstay_store_fjall::Config::default()).expect("open");
    let store: Arc<dyn Store> = Arc::new(store);
    unused_sessions_expire(store.clone()).await;
    until("the server's tasks end", async || Arc::strong_count(&store) == 1).await;
    drop(store);
    let report =
        mainstay_store_fjall::verify::verify(dir.path(), &mut |_, _| ControlFlow::Continue(())).expect("verify");
    assert_eq!(report.problems, []);
    assert_eq!(report.sessions, 1);
}

/// Bytes that a directory takes on the disk.
fn disk_usage(dir: &Path) -> u64 {
    // What goes meanwhile takes nothing.
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let of = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => disk_usage(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    };
    entries.map(of).sum()
}

/// Scenario A20: of 50,000 records the last 1,000 are kept, and the disk shrinks, whenever the server is killed meanwhile; who comes back with
/// a cursor of old is told what is missing, before anything else; and what nobody uses is gone, and says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_retention_released_is_told_as_a_gap() {
    const RECORDS: u64 = 50_000;
    const KEPT: u64 = 1_000;
    let mut server = Server::start().await;
    let client = server.client(ClientConfig::default());
    let session = client.session("s1").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let writer = MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await.expect("begin");
    let kept = writer.id();
    writer.append("kept by the view").await.expect("append");
    writer.end(Status::Complete, "").await.expect("end");
    let mut last = None;
    let payload = [b'r'; 4096];
    for _ in 3..RECORDS {
        last = Some(producer.append(session.main(), payload.to_vec()).await.expect("append"));
    }
    let tail = last.expect("a ticket").await.expect("stored") + 1;
    let incarnation = session.info().incarnation;
    let first = session.trim(tail - KEPT).await.expect("trim");
    assert_eq!(first, tail - KEPT);
    let before = disk_usage(server.dir());
    let mut random = random::for_test("what_retention_released");
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(random.below(2000))).await;
        server.kill().await;
        server.restart().await;
    }
    // Journals stay, of up to 64 MiB.
    until("the disk shrinks", async || disk_usage(server.dir()) < 100 << 20).await;
    let after = disk_usage(server.dir());
    assert!(before > 200 << 20, "{before} bytes before");

    // With a cursor of old: a gap, in the verdict and in its place.
    let returning = server.client(ClientConfig::default());
    let cursor = Cursor { incarnation, next: 10 };
    let back = returning.session("s1").expect("a name").at(cursor).attach().await.expect("attach");
    assert_eq!((back.info().verdict, back.info().first), (Verdict::Gap, first));
    let mut from_ten = back.subscribe(Start::Seq(10)).open().await.expect("a subscription");
    let mut told = Vec::new();
    for _ in 0..2 {
        told.push(timeout(PATIENCE, from_ten.next()).await.expect("in time").expect("an event").expect("no error"));
    }
    assert!(matches!(told[0], Event::Started { verdict: Verdict::Gap, next: 10, .. }), "{told:?}");
    assert!(matches!(told[1], Event::Gap { from: 10, to, .. } if to == first), "{told:?}");
    // From the earliest: it begins with the first that is left, and ends with the last.
    let mut earliest = back.subscribe(Start::Earliest).open().await.expect("a subscription");
    let mut seqs = Vec::new();
    while seqs.last() != Some(&(tail - 1)) {
        let event = timeout(PATIENCE, earliest.next()).await.expect("in time").expect("an event").expect("no error");
        if let Event::Records(batch) = event {
            seqs.extend(batch.iter().map(|record| record.expect("a record").seq));
        }
    }
    assert!(seqs.iter().copied().eq(first..tail), "{:?}", (seqs.first(), seqs.len()));
    // What the view keeps is not lost with its records.
    let mut live = back.live().await.expect("live");
    while live.view().next() < tail {
        timeout(PATIENCE, live.next()).await.expect("in time").expect("an update").expect("no error");
    }
    assert_eq!(live.view().messages().get(kept).expect("the message").text, b"kept by the view");
    drop((live, from_ten, earliest, back, session, producer));
    returning.finish().await;
    let attaching = client.session("s2").expect("a name").create().expire_after(Duration::from_secs(2));
    let cursor = Cursor { incarnation: attaching.attach().await.expect("attach").info().incarnation, next: 0 };
    client.finish().await;

    // Nobody uses it: it is gone, and another one of the name is another one.
    let late = server.client(ClientConfig::default());
    // A list is no use.
    until("it expires", async || late.list("s2").await.expect("a list").is_empty()).await;
    let gone = late.session("s2").expect("a name").at(cursor).attach().await;
    assert!(matches!(gone, Err(ClientError::Refused { code: Code::SESSION_NOT_FOUND, .. })), "{gone:?}");
    let other = late.session("s2").expect("a name").create().at(cursor).attach().await;
    assert!(matches!(other, Err(ClientError::Gone)), "{other:?}");
    println!("{RECORDS} records, {KEPT} kept: earliest is {first}, a cursor at 10 gets a gap up to it");
    println!("{before} bytes on disk before, {after} after");
}

#[tokio::test]
async fn an_idle_subscription_ends_with_its_token() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let owner = server.client();
    owner.session("s").expect("a name").create().attach().await.expect("attach");
    let mut short = claims("guest", "s", [Operation::Read]);
    short.expires = now() + 1;
    let guest = server.client_as(&short, ClientConfig::default());
    let session = guest.session("s").expect("a name").attach().await.expect("attach");
    let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    let error = loop {
        match timeout(PATIENCE, subscription.next()).await.expect("it ends").expect("an event") {
            Ok(Event::Records(_)) => panic!("nothing was appended"),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ClientError::Refused { code: Code::TOKEN_EXPIRED, .. }), "{error:?}");
}

//! Messages and shared state, whole: what writers write is what every reader and the server fold, and `verify` too.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use mainstay_client::{
    AppendError, Change, ClientError, Code, Config as ClientConfig, Doing, Expected, InputPolicy, Intent, Key, Kind,
    LiveView, MessageAppend, MessageEnd, MessageId, MessageStart, MessageWriter, NotifyRule, Producer, Record, Run,
    RunMode, Session, StateChange, StateDeleted, StatePut, Status, Stored, Triggers, Update, View,
};
use mainstay_protocol::registry::{FOLD_VERSION, MAX_MESSAGE, MAX_RECORD};
use mainstay_server::Config;
use mainstay_store::MemoryStore;
use mainstay_store_fjall::FjallStore;
use mainstay_store_fjall::verify::{Found, verify};
use mainstay_tests::harness::{MemoryServer, QuicServer};
use mainstay_tests::live::attach;
use mainstay_tests::process::{self, Server, run};
use mainstay_tests::proxy::{Faults, Proxy};
use mainstay_tests::random;
use serde_json::Value;
use tokio::time::{Instant, timeout};

const PATIENCE: Duration = Duration::from_secs(30);

/// The view as it is when it is asked for.
async fn current(live: Result<LiveView, ClientError>) -> LiveView {
    let mut live = live.expect("live");
    timeout(PATIENCE, live.current()).await.expect("in time").expect("the view");
    live
}

/// Folds until `enough`.
async fn until(live: &mut LiveView, enough: impl Fn(&LiveView) -> bool) {
    while !enough(live) {
        timeout(PATIENCE, live.next()).await.expect("in time").expect("an update").expect("no error");
    }
}

/// Folds until everything below `tail` is.
async fn reach(live: &mut LiveView, tail: u64) {
    while live.view().next() < tail {
        timeout(PATIENCE, live.next()).await.expect("in time").expect("an update").expect("no error");
    }
}

fn now_millis() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as u64
}

fn key(text: &str) -> Key {
    Key::new(text).expect("a key")
}

fn code(result: Result<u64, AppendError>) -> Code {
    match result.expect_err("refused") {
        AppendError { stored: Stored::NotCommitted, error: ClientError::Refused { code, .. } } => code,
        other => panic!("not a refusal: {other}"),
    }
}

/// Spec MSG-2, SUB-6: late joiners at any time have the text whole, and all have the same view.
#[tokio::test]
async fn late_joiners_get_a_message_whole_and_then_its_parts() {
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    let client = server.client();
    let session = attach(&client, "s").await;
    let producer = session.producer("agent").await.expect("a producer");
    let mut readers = vec![session.live().await.expect("live")];
    let writer = MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await.expect("begin");
    let id = writer.id();
    let mut text = Vec::new();
    for n in 0..3000u32 {
        let part = format!("{n} ");
        text.extend_from_slice(part.as_bytes());
        let ticket = writer.append(part).await.expect("append");
        if n % 1000 == 500 {
            let through = timeout(PATIENCE, ticket).await.expect("in time").expect("stored");
            let late = current(server.client().session("s").expect("a name").live().await).await;
            let message = late.view().messages().get(id).expect("the message");
            assert_eq!((message.status, message.through), (Status::Open, through));
            assert_eq!(message.text, text, "late at {n}");
            readers.push(late);
        }
    }
    let end = writer.end(Status::Complete, "").await.expect("end");
    let tail = timeout(PATIENCE, end).await.expect("in time").expect("stored") + 1;
    let expected = attach(&server.client(), "s").await.info();
    assert_eq!((expected.tail, expected.fold_version), (tail, FOLD_VERSION));
    for reader in &mut readers {
        reach(reader, tail).await;
        let message = reader.view().messages().get(id).expect("the message");
        assert_eq!((message.status, &message.text), (Status::Complete, &text));
        assert_eq!(reader.view().hash(), expected.view_hash);
    }
    server.stop().await;
}

/// Scenario A10, shortened: a phone on 64 kbit/s, 300 ms and 5 % loss that has its messages rolled up is never far behind three
/// agents of 150 tokens a second each, and has the same in the end; whoever is near does not notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_phone_keeps_up_with_messages_that_are_rolled_up() {
    const TOKENS: usize = 1500;
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    let client = server.client();
    let session = attach(&client, "s").await;
    let delay = Duration::from_millis(150);
    let faults = Faults { delay, loss: 0.05, rate: 8000, queue: 32 * 1024, ..Faults::default() };
    let proxy = Proxy::start(([127, 0, 0, 1], 0).into(), server.addr, faults, random::seed()).expect("a proxy");
    let phone = server.client_at(proxy.addr(), ClientConfig::default());
    let window = Duration::from_millis(250);
    let phone = current(phone.session("s").expect("a name").live_rolled_up(window).await).await;
    let laptop = current(session.live().await).await;
    // How far behind each reader is when it learns of something, until everything is finished.
    let follow = |mut live: LiveView| async move {
        let mut lags = Vec::new();
        let done = |live: &LiveView| live.view().messages().finished().count() == 3;
        while !done(&live) {
            let update = timeout(PATIENCE, live.next()).await.expect("in time").expect("an update");
            if let Update::Record(folded) = update.expect("no error") {
                lags.push((now_millis().saturating_sub(folded.time), live.view().next()));
            }
        }
        lags.sort_unstable();
        (live, lags)
    };
    let (phone, laptop) = (tokio::spawn(follow(phone)), tokio::spawn(follow(laptop)));
    let producers = [session.producer("a").await, session.producer("b").await, session.producer("c").await];
    let producers = producers.map(|producer| producer.expect("a producer"));
    let mut writers = Vec::new();
    for producer in &producers {
        writers.push(MessageWriter::begin(producer, session.main(), "assistant", "text/plain").await.expect("begin"));
    }
    let mut ticks = tokio::time::interval(Duration::from_micros(6667));
    for n in 0..TOKENS {
        ticks.tick().await;
        for writer in &writers {
            writer.append(format!("{n} ")).await.expect("append");
        }
    }
    for writer in writers {
        writer.end(Status::Complete, "").await.expect("end").await.expect("stored");
    }
    let (phone, far) = phone.await.expect("no panic");
    let (laptop, near) = laptop.await.expect("no panic");
    let worst = |lags: &[(u64, u64)], of: usize| lags[lags.len() * of / 100 - 1].0;
    println!(
        "phone: {} records, behind p50 {} ms, most {} ms; laptop: {} records, p99 {} ms",
        far.len(),
        worst(&far, 50),
        worst(&far, 100),
        near.len(),
        worst(&near, 99),
    );
    assert!(worst(&far, 100) <= 2000, "{} ms behind", worst(&far, 100));
    assert!(far.len() * 4 < near.len(), "{} of {} records came", far.len(), near.len());
    let texts = |live: &LiveView| live.view().messages().finished().map(|m| m.text.clone()).collect::<Vec<_>>();
    assert_eq!(texts(&phone), texts(&laptop));
    let expected: String = (0..TOKENS).map(|n| format!("{n} ")).collect();
    assert!(texts(&phone).iter().all(|text| text == expected.as_bytes()));
    server.stop().await;
}

/// Spec SUB-14: a phone that wants what is, not all that was, and was away while much was said, is current again after one view.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_phone_that_was_away_gets_the_view_in_the_place_of_what_it_missed() {
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    let client = server.client();
    let session = attach(&client, "s").await;
    let delay = Duration::from_millis(30);
    let faults = Faults { delay, rate: 32_000, queue: 32 * 1024, ..Faults::default() };
    let proxy = Proxy::start(([127, 0, 0, 1], 0).into(), server.addr, faults, random::seed()).expect("a proxy");
    let phone = attach(&server.client_at(proxy.addr(), ClientConfig::default()), "s").await;
    let mut phone = current(phone.live_folded(Duration::from_millis(100)).await).await;
    let producer = session.producer("p").await.expect("a producer");
    let writer = MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await.expect("begin");
    writer.append("before ").await.expect("append").await.expect("stored");
    let says = |live: &LiveView, end: &[u8]| live.view().messages().open().iter().any(|m| m.text.ends_with(end));
    until(&mut phone, |live| says(live, b"before ")).await;
    proxy.blackhole(true);
    // A megabyte of records that add up to a message of a few bytes.
    for n in 0..4000u32 {
        writer.replace(format!("{n:0250}")).await.expect("append");
    }
    writer.replace("at last ").await.expect("append").await.expect("stored");
    proxy.blackhole(false);
    let back = Instant::now();
    let (mut views, mut records) = (0, 0);
    while !says(&phone, b"at last ") {
        match timeout(PATIENCE, phone.next()).await.expect("in time").expect("an update").expect("no error") {
            Update::Started => views += 1,
            Update::Record(_) => records += 1,
            _ => {}
        }
    }
    let took = back.elapsed();
    println!("current {took:?} after it was back, with {views} views and {records} records of 4001");
    assert!(views >= 1 && records < 4001, "{views} views, {records} records");
    // All of it would have taken half a minute at this rate.
    assert!(took < Duration::from_secs(10), "{took:?}");
    writer.append("and on").await.expect("append");
    until(&mut phone, |live| says(live, b"at last and on")).await;
    server.stop().await;
}

/// A view that needs many frames, and a message longer than a record.
#[tokio::test]
async fn a_view_larger_than_any_frame_arrives_whole() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let client = server.client();
    let session = attach(&client, "s").await;
    let producer = session.producer("p").await.expect("a producer");
    let writer = MessageWriter::begin(&producer, session.main(), "user", "application/octet-stream").await;
    let writer = writer.expect("begin");
    let text: Vec<u8> = (0..1_000_000u32).map(|n| n as u8).collect();
    writer.append(text.clone()).await.expect("append");
    for n in 0..15 {
        let put = StatePut { key: key(&format!("large/{n}")), value: vec![n; MAX_RECORD - 100].into(), lasts: 0 };
        producer.append_record(session.main().record(&put)).await.expect("append");
    }
    producer.flush().await.expect("stored");
    let live = current(client.session("s").expect("a name").live().await).await;
    assert_eq!(live.view().messages().open()[0].text, text);
    assert_eq!(live.view().state().len(), 15);
    assert_eq!(live.view().hash(), attach(&client, "s").await.info().view_hash);
    server.stop().await;
}

/// Spec STATE-3, STATE-4: whatever races, nothing is lost, and one wins.
#[tokio::test]
async fn increments_add_up_and_one_put_if_absent_wins() {
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    let mut racing = Vec::new();
    for writer in 0..8u8 {
        let client = server.client();
        racing.push(tokio::spawn(async move {
            let session = attach(&client, "s").await;
            let producer = session.producer(&format!("w{writer}")).await.expect("a producer");
            let change = |key: &str, expected, change| {
                session.main().record(&StateChange { key: Key::new(key).expect("a key"), expected, change })
            };
            let put = Change::Put { value: vec![writer].into(), lasts: 0 };
            let won = producer.append_record(change("leader", Expected::Absent, put)).await.expect("append");
            let mut tickets = Vec::new();
            for _ in 0..100 {
                let record = change("sum", Expected::Any, Change::Increment(i64::from(writer) + 1));
                tickets.push(producer.append_record(record).await.expect("append"));
            }
            for ticket in tickets {
                ticket.await.expect("stored");
            }
            // Compare and set by hand: read, try, read again.
            for _ in 0..20 {
                loop {
                    let live = current(session.live().await).await;
                    let held = live.view().state().get("turns");
                    let (expected, turns) = match held {
                        Some(entry) => (Expected::Revision(entry.revision), entry.value[0] + 1),
                        None => (Expected::Absent, 1),
                    };
                    let put = Change::Put { value: vec![turns].into(), lasts: 0 };
                    let ticket = producer.append_record(change("turns", expected, put)).await.expect("append");
                    match ticket.await {
                        Ok(_) => break,
                        refused => assert_eq!(code(refused), Code::CONFLICT),
                    }
                }
            }
            match won.await {
                Ok(_) => Some(writer),
                refused => {
                    assert_eq!(code(refused), Code::CONFLICT);
                    None
                }
            }
        }));
    }
    let mut winners = Vec::new();
    for racer in racing {
        winners.extend(timeout(2 * PATIENCE, racer).await.expect("in time").expect("no panic"));
    }
    assert_eq!(winners.len(), 1, "one wins: {winners:?}");
    let session = attach(&server.client(), "s").await;
    let mut live = session.live().await.expect("live");
    reach(&mut live, session.info().tail).await;
    let value = |key: &str| live.view().state().get(key).expect("a value").value.to_vec();
    assert_eq!(value("leader"), [winners[0]]);
    assert_eq!(value("sum"), ((1..=8).sum::<i64>() * 100).to_string().into_bytes());
    assert_eq!(value("turns"), [160]);
    server.stop().await;
}

/// A refusal is of a whole batch: what the application did not put together must not share it.
#[tokio::test]
async fn a_refused_change_takes_nothing_else_with_it() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let session = attach(&server.client(), "s").await;
    let producer = session.producer("p").await.expect("a producer");
    let main = session.main();
    let wrong = StateChange { key: key("k"), expected: Expected::Revision(7), change: Change::Delete };
    let mut tickets = Vec::new();
    for n in 0..50 {
        tickets.push((true, producer.append(main, format!("{n}")).await.expect("append")));
        tickets.push((false, producer.append_record(main.record(&wrong)).await.expect("append")));
    }
    let mut stored = 0;
    for (good, ticket) in tickets {
        match ticket.await {
            Ok(seq) if good => {
                assert_eq!(seq, stored);
                stored += 1;
            }
            other => assert_eq!((good, code(other)), (false, Code::CONFLICT)),
        }
    }
    assert_eq!(stored, 50);
    // What it did put together is one: all or nothing.
    let batch = [main.data("x"), main.record(&wrong)];
    let refused = producer.append_batch(&batch).await.expect("append").await;
    assert_eq!(code(refused), Code::CONFLICT);
    let put = StatePut { key: key("k"), value: "v".into(), lasts: 0 };
    assert_eq!(producer.append_batch(&[main.data("x"), main.record(&put)]).await.expect("append").await, Ok(50));
    server.stop().await;
}

/// A message that has too many bytes has no hole: what is appended behind a refused part is refused too.
#[tokio::test]
async fn a_message_that_is_full_ends_at_a_part_and_has_no_hole() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let client = server.client();
    let session = attach(&client, "s").await;
    let producer = session.producer("p").await.expect("a producer");
    let writer = MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await.expect("begin");
    writer.append(vec![b'.'; MAX_MESSAGE - 10]).await.expect("append").await.expect("stored");
    let mut tickets = Vec::new();
    for part in ["aaaa", "bbbb", "cccccccc", "d", "e"] {
        tickets.push((part, writer.append(part).await.expect("append")));
    }
    let mut stored = String::new();
    for (part, ticket) in tickets {
        match ticket.await {
            Ok(_) => stored.push_str(part),
            refused => assert_eq!(code(refused), Code::LIMIT_EXCEEDED, "{part}"),
        }
    }
    let live = current(session.live().await).await;
    let text = &live.view().messages().open()[0].text;
    assert_eq!(text[MAX_MESSAGE - 10..], *stored.as_bytes());
    assert!("aaaabbbb".starts_with(&stored), "{stored}");
    // Other records are not about it.
    producer.append(session.main(), "data").await.expect("append").await.expect("stored");
    server.stop().await;
}

/// Spec STATE-6: while the session is used, and when it is loaded after its time.
#[tokio::test]
async fn values_expire_in_memory_and_when_a_session_is_loaded_after_their_time() {
    let dir = tempfile::tempdir().expect("a directory");
    let store = |dir| Arc::new(FjallStore::open(dir, mainstay_store_fjall::Config::default()).expect("a store"));
    let server = MemoryServer::start(store(dir.path()), Config::default());
    let client = server.client();
    let session = attach(&client, "s").await;
    let producer = session.producer("p").await.expect("a producer");
    let put = |name: &str, lasts| session.main().record(&StatePut { key: key(name), value: "v".into(), lasts });
    let mut live = session.live().await.expect("live");
    for record in [put("soon", 100), put("kept", 3_600_000), put("for ever", 0)] {
        producer.append_record(record).await.expect("append").await.expect("stored");
    }
    let expired = loop {
        match timeout(PATIENCE, live.next()).await.expect("in time").expect("an update").expect("no error") {
            Update::Record(folded) if folded.record.kind == Kind::STATE_EXPIRED => break folded,
            _ => {}
        }
    };
    let soon = expired.time - live.view().time().min(expired.time);
    assert_eq!((soon, expired.author.subject.as_str()), (0, "server"));
    let keys: Vec<&str> = live.view().state().iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["for ever", "kept"]);
    // Many at once: more than one turn.
    let many: Vec<Record> = (0..150).map(|n| put(&format!("many/{n}"), 300)).collect();
    producer.append_batch(&many).await.expect("append").await.expect("stored");
    drop((live, producer, session));
    client.finish().await;
    server.stop().await;
    // The session is not in memory when their time comes.
    tokio::time::sleep(Duration::from_millis(400)).await;
    let server = MemoryServer::start(store(dir.path()), Config::default());
    let session = attach(&server.client(), "s").await;
    let live = current(session.live().await).await;
    let keys: Vec<&str> = live.view().state().iter().map(|(key, _)| key.as_str()).collect();
    assert_eq!(keys, ["for ever", "kept"], "whoever attaches does not see a value that is over");
    server.stop().await;
}

/// One random step of a history.
fn random_record(random: &mut random::Random, open: &mut Vec<MessageId>, session: &Session) -> Record {
    let main = session.main();
    let label = |text: &str| text.parse().expect("a label");
    let of = |id, record: Record| Record { message: Some(id), ..record };
    let name = key(&format!("k/{}", random.below(200)));
    match random.below(20) {
        0 if open.len() < 60 => {
            let id =
                MessageId([random.bits(), random.bits()].map(u64::to_be_bytes).concat().try_into().expect("16 bytes"));
            open.push(id);
            let role = if random.below(4) == 0 { "user" } else { "assistant" };
            of(id, main.record(&MessageStart { role: label(role), content_type: label("t") }))
        }
        1 if !open.is_empty() => {
            let id = open.swap_remove(random.below(open.len() as u64) as usize);
            of(id, main.record(&MessageEnd { status: Status::Complete, detail: Default::default() }))
        }
        2..=9 if !open.is_empty() => {
            let id = open[random.below(open.len() as u64) as usize];
            let text = "token ".repeat(1 + random.below(3) as usize);
            of(id, main.record(&MessageAppend(text.into())))
        }
        10 => main.record(&StateDeleted { key: name }),
        11..=13 => main.record(&StateChange { key: name, expected: Expected::Any, change: Change::Increment(3) }),
        14 | 15 => {
            let value = random.below(1000).to_string();
            main.record(&StatePut { key: name, value: value.into(), lasts: random.below(3) * 50 })
        }
        _ => main.data("data"),
    }
}

/// One random step of what the server writes for others: runs, signals, requests, members and rules.
async fn stir(random: &mut random::Random, session: &Session, producer: &Producer, runs: &mut Vec<Run>) {
    let name = |text: &str| text.parse().expect("a name");
    let any = random.below(runs.len().max(1) as u64) as usize;
    match random.below(8) {
        0 | 1 if runs.len() < 8 => {
            runs.push(session.start_run(Duration::from_secs(600), None).await.expect("a run"));
        }
        2 if !runs.is_empty() => {
            let end = runs.swap_remove(any).end(producer, Status::Complete, "").await.expect("append");
            end.await.expect("stored");
        }
        3 | 4 if !runs.is_empty() => {
            let lasts = Duration::from_millis(1 + random.below(2000));
            // One too many is refused.
            drop(runs[any].request(producer, "approval", lasts, "may I").await.expect("append"));
        }
        5 if !runs.is_empty() => {
            let steer = session.signal(Intent::Steer).run(runs[any].id()).text("so").lasts(Duration::from_millis(500));
            match steer.send().await {
                Ok(_) | Err(ClientError::Refused { code: Code::LIMIT_EXCEEDED, .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        6 => {
            let doing = Doing::new("idle").expect("a word");
            let member = session.join("somebody", Duration::from_secs(60), doing).await.expect("join");
            member.leave().await.expect("leave");
        }
        _ => {
            let triggers = [Kind::REQUEST_OPENED, Kind::RUN_END, Kind::MESSAGE_END];
            let triggers: Vec<Kind> = triggers.into_iter().filter(|_| random.below(2) == 0).collect();
            let rule = NotifyRule {
                name: name(&format!("rule {}", random.below(5))),
                principal: ["boss", "tester"][random.below(2) as usize].parse().expect("a subject"),
                triggers: Triggers::new(triggers).expect("triggers"),
                delay: random.below(3) * 100,
                collapse: (random.below(2) == 0).then(|| name("one")),
            };
            session.set_rule(rule).await.expect("a rule");
        }
    }
}

/// Spec FOLD-4: at every thousandth seq of a long history with restarts the views of two readers, the server's after each
/// restart, and that of the records as `verify` reads them are the same.
#[tokio::test]
async fn view_hashes_agree_all_along_a_random_history_with_restarts() {
    const OPERATIONS: usize = 100_000;
    const ROUNDS: usize = 4;
    let mut random = random::for_test("view_hashes_agree");
    let dir = tempfile::tempdir().expect("a directory");
    let store = |dir| Arc::new(FjallStore::open(dir, mainstay_store_fjall::Config::default()).expect("a store"));
    let mut hashes: BTreeMap<u64, [String; 2]> = BTreeMap::new();
    let mut note = |reader: usize, live: &LiveView| {
        let view = live.view();
        if view.next().is_multiple_of(1000) {
            hashes.entry(view.next()).or_default()[reader] = view.hash().to_string();
        }
    };
    let mut open = Vec::new();
    let (mut tail, mut restarts) = (0, 0);
    for _ in 0..ROUNDS {
        let mut config = Config::default();
        // Every record is to be there in the end, however long this takes.
        config.compact_after = None;
        let server = MemoryServer::start(store(dir.path()), config);
        let session = attach(&server.client(), "s").await;
        assert!(session.info().tail >= tail, "nothing that was acknowledged is lost");
        let producer = session.producer("p").await.expect("a producer");
        let other = attach(&server.client(), "s").await;
        let mut readers = [current(session.live().await).await, current(other.live().await).await];
        for reader in &readers {
            if reader.view().next() == session.info().tail {
                assert_eq!(reader.view().hash(), session.info().view_hash, "the server's after a restart");
                restarts += usize::from(tail > 0);
            }
        }
        session.configure(RunMode::Parallel, InputPolicy::Enqueue).await.expect("configure");
        let (mut last, mut runs) = (None, Vec::new());
        for operation in 0..OPERATIONS / ROUNDS {
            if operation % 200 == 0 {
                stir(&mut random, &session, &producer, &mut runs).await;
            }
            let record = random_record(&mut random, &mut open, &session);
            last = Some(producer.append_record(record).await.expect("append"));
        }
        tail = timeout(2 * PATIENCE, last.expect("a record")).await.expect("in time").expect("stored") + 1;
        for (at, reader) in readers.iter_mut().enumerate() {
            note(at, reader);
            while reader.view().next() < tail {
                timeout(PATIENCE, reader.next()).await.expect("in time").expect("an update").expect("no error");
                note(at, reader);
            }
        }
        drop((readers, producer, session, runs));
        server.stop().await;
    }
    // As `verify` reads them: chunk by chunk, folded record by record.
    let mut view = View::default();
    let mut compared = 0;
    let report = verify(dir.path(), &mut |_, found| {
        match found {
            Found::Chunk { chunk, .. } => {
                for record in chunk.records() {
                    let (_, time, author, record) = record.expect("a verified record");
                    view.fold_record(author, time, &record).expect("a stored record folds");
                    if let Some(hashes) = hashes.get(&view.next()) {
                        let hash = view.hash().to_string();
                        assert!(hashes.iter().all(|told| *told == hash), "at {}: {hash}, {hashes:?}", view.next());
                        compared += 1;
                    }
                }
            }
            Found::Session { state, .. } => assert_eq!(state.view().hash(), view.hash()),
        }
        ControlFlow::Continue(())
    });
    assert_eq!(report.expect("verify").problems, []);
    println!(
        "compared {compared} hashes; {} open messages, {} keys, {} runs, {} rules, {} jobs; {restarts} restarts",
        open.len(),
        view.state().len(),
        view.runs().current().len(),
        view.notifications().rules().len(),
        view.notifications().jobs().len(),
    );
    assert!(!view.notifications().jobs().is_empty() && !view.runs().current().is_empty(), "it was stirred");
    assert!(compared >= 95, "only {compared} of 100 thousandths were compared");
}

/// The commands: `state`, `tail --fold`, and the rows of `tail`.
#[tokio::test]
async fn the_command_line_reads_writes_and_watches_state_and_follows_a_conversation() {
    let server = Server::start().await;
    let mainstay = async |args: &[&str]| run(server.command(args)).await;
    let json = |output: &std::process::Output| process::events(&output.stdout);
    let put = mainstay(&["state", "put", "s1", "tool/42", "{\"ok\":true}", "--json"]).await;
    assert_eq!((&json(&put)[0]["event"], &json(&put)[0]["revision"]), (&"ack".into(), &0.into()));
    let mut watch = server.command(&["state", "watch", "s1", "tool/", "--json"]);
    let mut watching = watch.stdout(Stdio::piped()).spawn().expect("watch");
    assert_eq!(mainstay(&["state", "get", "s1", "tool/42"]).await.stdout, b"{\"ok\":true}");
    let nothing = mainstay(&["state", "get", "s1", "nothing", "--json"]).await;
    assert_eq!((nothing.status.code(), &json(&nothing)[0]["code"]), (Some(1), &"NO_VALUE".into()));
    let conflict = mainstay(&["state", "cas", "s1", "tool/42", "x", "--expect", "absent", "--json"]).await;
    assert_eq!((conflict.status.code(), &json(&conflict)[0]["code"]), (Some(3), &"CONFLICT".into()));
    for args in [
        &["state", "cas", "s1", "tool/42", "{}", "--expect", "0"][..],
        &["state", "merge", "s1", "tool/42", "{\"n\":1}"],
        &["state", "incr", "s1", "count", "-3"],
        &["state", "delete", "s1", "tool/42", "--expect", "2"],
    ] {
        let done = mainstay(args).await;
        assert!(done.status.success(), "{args:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
    // Commands that run at once do not get into each other's way.
    let mut counting: Vec<_> = (0..8).map(|_| server.command(&["state", "incr", "s1", "hits"]).spawn()).collect();
    for child in &mut counting {
        let child = child.as_mut().expect("state");
        assert!(timeout(PATIENCE, child.wait()).await.expect("in time").expect("a status").success());
    }
    assert_eq!(mainstay(&["state", "get", "s1", "hits"]).await.stdout, b"8");
    let done = mainstay(&["state", "delete", "s1", "hits"]).await;
    assert!(done.status.success());
    let listed = json(&mainstay(&["state", "ls", "s1", "--json"]).await);
    assert_eq!((listed.len(), &listed[0]["key"], &listed[0]["value"]), (1, &"count".into(), &"-3".into()));

    // A conversation, with one who follows it from its middle.
    let client = server.client(ClientConfig::default());
    let session = attach(&client, "s1").await;
    let producer = session.producer("agent").await.expect("a producer");
    let main = session.main();
    let question = MessageWriter::begin(&producer, main, "user", "text/plain").await.expect("begin");
    question.append("why?").await.expect("append");
    question.end(Status::Complete, "").await.expect("end");
    let answer = MessageWriter::begin(&producer, main, "assistant", "text/plain").await.expect("begin");
    answer.append("because ").await.expect("append").await.expect("stored");
    let mut fold = server.command(&["tail", "s1", "--fold", "--json"]);
    let mut folding = fold.stdout(Stdio::piped()).spawn().expect("tail");
    let mut rows = process::Rows::of(folding.stdout.take().expect("output"));
    let view = rows.until("caught_up").await;
    let messages: Vec<(&Value, &Value, &Value)> =
        process::named(&view, "message").into_iter().map(|row| (&row["role"], &row["status"], &row["text"])).collect();
    let expected = [("user", "complete", "why?"), ("assistant", "open", "because ")];
    let expected: Vec<_> = expected.map(|(a, b, c)| (Value::from(a), Value::from(b), Value::from(c))).into();
    assert_eq!(messages, expected.iter().map(|(a, b, c)| (a, b, c)).collect::<Vec<_>>());
    answer.append("of that").await.expect("append");
    answer.end(Status::Interrupted, "enough").await.expect("end").await.expect("stored");
    let live = rows.until("end").await;
    assert_eq!(process::named(&live, "append")[0]["text"], "of that");
    assert_eq!(process::named(&live, "end")[0]["status"], "interrupted");
    folding.kill().await.expect("kill");

    let seen = process::Rows::of(watching.stdout.take().expect("output")).until("removed").await;
    let values: Vec<&str> = process::named(&seen, "state").iter().filter_map(|row| row["value"].as_str()).collect();
    assert_eq!(values, ["{\"ok\":true}", "{}", "{\"n\":1}"]);
    watching.kill().await.expect("kill");

    let told = run(server.command(&["tail", "s1", "--fold", "--until-idle", "100"])).await;
    assert_eq!(String::from_utf8_lossy(&told.stdout), "user: why?\nassistant: because of that [interrupted]\n");
    let rows = json(&run(server.command(&["tail", "s1", "--until-idle", "100", "--json"])).await);
    let kinds: Vec<&str> = process::named(&rows, "record").iter().filter_map(|row| row["kind"].as_str()).collect();
    assert_eq!(kinds.len(), 21, "{kinds:?}");
    let ended = process::named(&rows, "record").into_iter().rfind(|row| row["kind"] == "message.end").expect("an end");
    assert_eq!((&ended["status"], &ended["detail"]), (&"interrupted".into(), &"enough".into()));
}

/// `tail --fold` shows what waits for an answer, and what people say to agents.
#[tokio::test]
async fn a_conversation_shows_what_is_asked_and_what_comes_of_it() {
    let server = Server::start().await;
    let session = attach(&server.client(ClientConfig::default()), "s1").await;
    let producer = session.producer("agent").await.expect("a producer");
    let agent = session.start_run(Duration::from_secs(30), None).await.expect("a run");
    let (asked, ticket) =
        agent.request(&producer, "approval", Duration::from_secs(30), "deploy?").await.expect("a request");
    ticket.await.expect("stored");
    let mut fold = server.command(&["tail", "s1", "--fold", "--json"]);
    let mut folding = fold.stdout(Stdio::piped()).spawn().expect("tail");
    let mut rows = process::Rows::of(folding.stdout.take().expect("output"));
    let now = rows.until("caught_up").await;
    let waits = process::named(&now, "request");
    assert_eq!((waits.len(), &waits[0]["needs"], &waits[0]["body"]), (1, &"approval".into(), &"deploy?".into()));
    let told = run(server.command(&["tail", "s1", "--fold", "--until-idle", "100"])).await;
    assert_eq!(told.stdout, format!("[request.opened] request={asked} needs=approval body=deploy?\n").as_bytes());
    session.signal(Intent::Approve).request(asked).text("go on").send().await.expect("an answer");
    let live = rows.until("signal").await;
    let answer = process::named(&live, "signal")[0];
    assert_eq!((&answer["kind"], &answer["text"]), (&"signal.approve".into(), &"go on".into()));
    folding.kill().await.expect("kill");
    let told = run(server.command(&["tail", "s1", "--fold", "--until-idle", "100"])).await;
    assert_eq!(told.stdout, b"", "nothing waits for anybody");
}

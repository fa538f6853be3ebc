//! The outbox: what is queued is stored once and in order, whatever is killed, cut off or refused meanwhile.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, SystemTime};

use mainstay_client::{
    Client, ClientError, Code, Config, ConnectFile, EntryState, Intent, Item, LiveView, MessageWriter, Outbox,
    OutboxEntry, Record, Resolution, SendError, Session,
};
use mainstay_protocol::session::{Kind, MessageId, MessageStart, Operation, Payload, Signal as SignalRecord};
use mainstay_protocol::wire::Label;
use mainstay_tests::live::{attach, current, follow, records};
use mainstay_tests::process::{Rows, Server, command, events, named, run};
use mainstay_tests::proxy::{Faults, Proxy};
use mainstay_tests::world::World;
use mainstay_tests::{random, until};
use mainstay_transport::sim::Random;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

const RTT: Duration = Duration::from_millis(60);

fn world(seed: u64) -> World {
    World::new(Faults { delay: RTT / 2, ..Faults::default() }, seed)
}

fn line(text: impl Into<String>) -> Item {
    Item::records("main", &[Record::data(0, text.into())]).expect("an item")
}

/// A part of a message that nobody began: refused for good.
fn refused() -> Item {
    let record = Record { message: Some(MessageId([3; 16])), kind: Kind::MESSAGE_APPEND, ..Record::data(0, "part") };
    Item::records("main", &[record]).expect("an item")
}

/// The payloads of a session's data records.
async fn stored(client: &Client) -> Vec<String> {
    let records = records(&attach(client, "s").await).await;
    let data = records.into_iter().filter(|record| record.kind == Kind::DATA);
    data.map(|record| String::from_utf8_lossy(&record.payload).into_owned()).collect()
}

/// Sends until nothing waits.
async fn deliver(outbox: &Outbox, client: &Client) {
    tokio::select! {
        () = outbox.idle() => {}
        error = outbox.send(client.session("s").expect("a name").create()) => panic!("{error}"),
    }
}

/// Sends what is queued, until it is stopped.
fn keep_sending(outbox: &Outbox, client: &Client) -> JoinHandle<SendError> {
    let (outbox, client) = (outbox.clone(), client.clone());
    tokio::spawn(async move { outbox.send(client.session("s").expect("a name").create()).await })
}

async fn settled(entries: &[OutboxEntry]) -> Vec<EntryState> {
    let mut states = Vec::new();
    for entry in entries {
        states.push(entry.settled().await);
    }
    states
}

fn is_refused(state: &EntryState) -> bool {
    matches!(state, EntryState::Rejected { code: Code::MESSAGE_NOT_OPEN, .. })
}

/// Spec OUT-1.
#[tokio::test(start_paused = true)]
async fn entries_are_stored_in_order_and_what_is_refused_makes_room_for_those_behind_it() {
    let (dir, mut world) = (tempfile::tempdir().expect("a directory"), world(1));
    let (client, _host) = world.client();
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    assert!(Outbox::open(dir.path(), "s").await.is_err_and(|error| error.name() == "OUTBOX_LOCKED"));
    let mut entries = Vec::new();
    for n in 0..40 {
        entries.push(outbox.queue(if n % 4 == 1 { refused() } else { line(n.to_string()) }).await.expect("queued"));
    }
    assert!(entries.iter().zip(0..).all(|(entry, n)| (entry.number(), entry.sequence()) == (n, Some(n))));
    assert!(entries.iter().all(|entry| entry.state() == EntryState::Queued));
    deliver(&outbox, &client).await;
    let states = settled(&entries).await;
    for (n, state) in states.iter().enumerate() {
        assert!(
            if n % 4 == 1 { is_refused(state) } else { matches!(state, EntryState::Durable { .. }) },
            "{n}: {state:?}"
        );
    }
    let expected: Vec<String> = (0..40).filter(|n| n % 4 != 1).map(|n| n.to_string()).collect();
    assert_eq!(stored(&client).await, expected);
    // What was refused is kept over restarts, until it is dismissed.
    outbox.close().await;
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    let kept = outbox.kept();
    assert!(kept.len() == 10 && kept.iter().all(|kept| is_refused(&kept.entry.state())));
    outbox.dismiss(&kept.iter().map(|kept| kept.entry.number()).collect::<Vec<_>>()).await.expect("dismissed");
    // The sequence goes on where it was.
    let entry = outbox.queue(line("last")).await.expect("queued");
    assert_eq!((entry.number(), entry.sequence()), (40, Some(30)));
    deliver(&outbox, &client).await;
    assert_eq!(stored(&client).await.len(), 31);
    assert!(outbox.kept().is_empty());
}

/// A refusal is written down although more waits behind it than a producer keeps.
#[tokio::test(start_paused = true)]
async fn a_refusal_with_much_behind_it_stops_nothing() {
    let (dir, mut world) = (tempfile::tempdir().expect("a directory"), world(5));
    let mut config = Config::default();
    (config.producer_bytes, config.give_up_after) = (32 * 1024, None);
    let (client, _host) = world.client_with(config);
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    let mut items: Vec<Item> = vec![line("first"), refused()];
    items.extend((0..40).map(|_| line("x".repeat(8 * 1024))));
    outbox.queue_all(items, &[]).await.expect("queued");
    timeout(Duration::from_secs(600), deliver(&outbox, &client)).await.expect("in time");
    assert_eq!(stored(&client).await.len(), 41);
}

/// Spec OUT-4: whoever sends may be stopped at any moment, and started again in the same process.
#[tokio::test(start_paused = true)]
async fn a_sender_that_is_stopped_and_started_again_loses_and_doubles_nothing() {
    let mut random = random::for_test("a_sender_that_is_stopped_and_started_again");
    let (dir, mut world) = (tempfile::tempdir().expect("a directory"), world(random.bits()));
    let (client, _host) = world.client();
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    let mut expected = Vec::new();
    for n in 0..300 {
        let wrong = random.below(6) == 0;
        outbox.queue(if wrong { refused() } else { line(n.to_string()) }).await.expect("queued");
        expected.extend((!wrong).then(|| n.to_string()));
        if n % 10 == 9 {
            let pause = Duration::from_millis(random.below(400));
            let session = client.session("s").expect("a name").create();
            // Dropped where it is.
            let _ = timeout(pause, outbox.send(session)).await;
        }
    }
    deliver(&outbox, &client).await;
    assert_eq!(stored(&client).await, expected);
}

/// What could not be read again, or never be sent, is not queued.
#[tokio::test]
async fn what_cannot_be_sent_is_not_queued_and_harms_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    assert!(Item::signal(Intent::Steer, None, "x".repeat(2049)).is_err());
    assert!(Item::signal(Intent::Approve, None, "").is_err());
    outbox.queue(Item::signal(Intent::Steer, None, "x".repeat(2048)).expect("a signal")).await.expect("queued");
    // In the stream with the number 0 it would just fit.
    let mut payload = mainstay_protocol::registry::MAX_RECORD;
    while Record::data(0, vec![0; payload]).encoded_len() > mainstay_protocol::registry::MAX_RECORD {
        payload -= 1;
    }
    assert!(Item::records("main", &[Record::data(0, vec![0; payload])]).is_err());
    outbox.queue(line("x".repeat(payload - 1))).await.expect("queued");
    outbox.close().await;
    assert_eq!(Outbox::open(dir.path(), "s").await.expect("an outbox").kept().len(), 2);
}

/// Lets no file of this process grow beyond so many bytes.
fn limit_files(bytes: Option<u64>) {
    let limit = Rlimit { current: bytes, ..getrlimit(Resource::Fsize) };
    setrlimit(Resource::Fsize, limit).expect("a limit that may be taken back");
}

/// Three are queued at once, which is two writes: the first finds no room, and the second, behind it, would.
#[tokio::test(start_paused = true)]
async fn what_is_behind_a_write_that_failed_fails_with_it() {
    // Else the signal would end the process.
    let _caught = signal(SignalKind::from_raw(Signal::XFSZ.as_raw())).expect("a handler");
    let dir = tempfile::tempdir().expect("a directory");
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    let item = || line("x".repeat(250_000));
    limit_files(Some(300_000));
    let (first, second, third) = tokio::join!(biased; outbox.queue(item()), outbox.queue(item()), outbox.queue(item()));
    limit_files(None);
    for failed in [first, second, third] {
        assert_eq!(failed.expect_err("no room").name(), "OUTBOX_FAILED");
    }
    assert!(outbox.kept().is_empty());
    let entry = outbox.queue(item()).await.expect("queued");
    assert_eq!((entry.number(), entry.sequence()), (0, Some(0)));
    outbox.close().await;
    assert_eq!(Outbox::open(dir.path(), "s").await.expect("an outbox").kept().len(), 1);
}

/// Waits for the clock on the wall, which paused time does not move.
fn wait_for(time: SystemTime) {
    while let Ok(left) = time.duration_since(SystemTime::now()) {
        std::thread::sleep(left + Duration::from_millis(1));
    }
}

/// Spec OUT-5: a batch that was sent into a network that lost it, and is too late by then, is not stored and the next one takes its place.
#[tokio::test(start_paused = true)]
async fn what_was_sent_into_nothing_and_is_too_late_expires() {
    let (dir, mut world) = (tempfile::tempdir().expect("a directory"), world(2));
    let (client, host) = world.client();
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    let sending = keep_sending(&outbox, &client);
    let first = outbox.queue(line("first")).await.expect("queued");
    first.settled().await;
    host.move_to(None);
    let until = SystemTime::now() + Duration::from_millis(150);
    let mut late = outbox.queue(line("late").valid_until(until)).await.expect("queued");
    let signal = outbox
        .queue(Item::signal(Intent::Custom, None, "late").expect("a signal").valid_until(until))
        .await
        .expect("queued");
    let last = outbox.queue(line("last")).await.expect("queued");
    while late.state() == EntryState::Queued {
        assert!(late.changed().await);
    }
    assert_eq!(late.state(), EntryState::Sent);
    wait_for(until);
    // Until nobody knows the connection any more.
    sleep(Duration::from_secs(100)).await;
    host.move_to(Some([10, 0, 9, 9].into()));
    client.network_changed();
    assert_eq!(late.settled().await, EntryState::Expired);
    assert_eq!(signal.settled().await, EntryState::Expired);
    assert!(matches!(last.settled().await, EntryState::Durable { .. }));
    assert_eq!(stored(&client).await, ["first", "last"]);
    sending.abort();
}

/// Spec OUT-5: what is stored is not expired, however late its answer comes.
#[tokio::test(start_paused = true)]
async fn what_is_stored_and_answered_too_late_is_durable() {
    let (dir, mut world) = (tempfile::tempdir().expect("a directory"), world(3));
    let (client, host) = world.client();
    let (other, _other) = world.client();
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    let until = SystemTime::now() + Duration::from_millis(150);
    let entry = outbox.queue(line("in time").valid_until(until)).await.expect("queued");
    {
        let sending = outbox.send(client.session("s").expect("a name").create());
        tokio::pin!(sending);
        // The answer is lost, and the application ends.
        tokio::select! {
            error = &mut sending => panic!("{error}"),
            () = async { while stored(&other).await.is_empty() {} } => host.move_to(None),
        }
    }
    wait_for(until);
    if entry.state().is_settled() {
        // The answer was faster than the one who looked.
        return;
    }
    outbox.close().await;
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    let entry = outbox.kept().remove(0).entry;
    deliver(&outbox, &other).await;
    assert!(matches!(entry.settled().await, EntryState::Durable { .. }));
    assert_eq!(stored(&other).await, ["in time"]);
}

/// What waits for a session that is gone or closed is refused, and says why.
#[tokio::test(start_paused = true)]
async fn what_waits_for_a_session_that_is_over_is_rejected() {
    let mut world = world(4);
    let (client, _host) = world.client();
    for close in [true, false] {
        let dir = tempfile::tempdir().expect("a directory");
        let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
        outbox.queue(line("before")).await.expect("queued");
        deliver(&outbox, &client).await;
        let session: Session = client.session("s").expect("a name").attach().await.expect("attach");
        let entries = [outbox.queue(line("a")).await.expect("queued"), outbox.queue(line("b")).await.expect("queued")];
        let wanted = if close {
            session.close().await.expect("closed");
            Code::SESSION_CLOSED
        } else {
            session.delete().await.expect("deleted");
            drop(session);
            // One of the same name is another one.
            client.session("s").expect("a name").create().attach().await.expect("attach");
            Code::SESSION_GONE
        };
        let error = outbox.send(client.session("s").expect("a name").create()).await;
        assert!(matches!(error, SendError::Client(ClientError::Refused { .. } | ClientError::Gone)), "{error:?}");
        for state in settled(&entries).await {
            assert!(matches!(state, EntryState::Rejected { code, .. } if code == wanted), "{state:?}");
        }
        if close {
            let session = client.session("s").expect("a name").attach().await.expect("attach");
            session.delete().await.expect("deleted");
        }
    }
}

/// So many producers of others that the server forgets those that were there.
async fn forget_producers(other: &Client) {
    let session = attach(other, "s").await;
    for n in 0..mainstay_protocol::registry::MAX_PRODUCERS {
        session.producer(&format!("p{n}")).await.expect("a producer");
    }
}

fn is_unknown(state: &EntryState) -> bool {
    matches!(state, EntryState::Rejected { code: Code::OUTCOME_UNKNOWN, .. })
}

/// Queues `items` on a phone that is killed once the first of them was sent: before the answer came, or where the network took nothing any more.
async fn killed_midway(world: &mut World, outbox: &Outbox, items: Vec<Item>, arrives: bool) {
    let (phone, host) = world.client();
    let sending = outbox.send(phone.session("s").expect("a name"));
    tokio::pin!(sending);
    let midway = async {
        // Its producer is there, and has stored nothing.
        let opening = outbox.queue(refused()).await.expect("queued");
        opening.settled().await;
        outbox.dismiss(&[opening.number()]).await.expect("dismissed");
        if !arrives {
            host.move_to(None);
        }
        let mut first = outbox.queue_all(items, &[]).await.expect("queued").remove(0);
        while first.state() == EntryState::Queued {
            assert!(first.changed().await);
        }
        // It has arrived, and the answer has not.
        sleep(RTT * 3 / 4).await;
        host.move_to(None);
        assert_eq!(first.state(), EntryState::Sent);
    };
    tokio::select! {
        error = &mut sending => panic!("{error}"),
        () = midway => {}
    }
}

/// Spec OUT-7: where the server has forgotten the producer, what was sent is not sent again, whether it was stored or not; what was not goes on.
#[tokio::test(start_paused = true)]
async fn a_producer_that_the_server_has_forgotten_costs_no_more_than_what_was_on_its_way() {
    let mut world = world(6);
    let (other, _other) = world.client();
    other.session("s").expect("a name").create().attach().await.expect("attach");
    for (round, (first, arrives)) in
        [(true, true), (true, false), (false, true), (false, false)].into_iter().enumerate()
    {
        let dir = tempfile::tempdir().expect("a directory");
        let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
        let mut expected = stored(&other).await;
        if first {
            outbox.queue(line(format!("{round} first"))).await.expect("queued");
            deliver(&outbox, &other).await;
            expected.push(format!("{round} first"));
        }
        let message = |record: Record| {
            let record = Record { message: Some(MessageId([round as u8; 16])), ..record };
            Item::records("main", &[record]).expect("an item")
        };
        let part = |text: &str| message(Record { kind: Kind::MESSAGE_APPEND, ..Record::data(0, text.to_owned()) });
        let label = |text| Label::new(text).expect("a label");
        let start = MessageStart { role: label("agent"), content_type: label("text/plain") };
        let on_its_way = vec![line(format!("{round} on its way")), message(start.record(0)), part("hel")];
        killed_midway(&mut world, &outbox, on_its_way, arrives).await;
        outbox.close().await;
        expected.extend(arrives.then(|| format!("{round} on its way")));
        assert_eq!(stored(&other).await, expected);
        forget_producers(&other).await;
        let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
        outbox.queue(part("lo")).await.expect("queued");
        let kept = outbox.kept();
        let mut later = vec![outbox.queue(line(format!("{round} later"))).await.expect("queued")];
        deliver(&outbox, &other).await;
        later.push(outbox.queue(line(format!("{round} last"))).await.expect("queued"));
        deliver(&outbox, &other).await;
        for (kept, what) in kept.iter().zip(["on its way", "the message", "its first part", "the rest of it"]) {
            assert!(is_unknown(&kept.entry.state()), "{round}, {what}: {:?}", kept.entry.state());
        }
        assert!(settled(&later).await.iter().all(|state| matches!(state, EntryState::Durable { .. })));
        expected.extend([format!("{round} later"), format!("{round} last")]);
        assert_eq!(stored(&other).await, expected);
        // Nothing of it is forgotten over another restart.
        outbox.close().await;
        let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
        assert_eq!(outbox.kept().iter().filter(|kept| is_unknown(&kept.entry.state())).count(), 4);
        assert_eq!(outbox.queue(line("x")).await.expect("queued").sequence(), Some(2));
    }
}

/// The same where the application goes on through the outage.
#[tokio::test(start_paused = true)]
async fn a_producer_that_is_forgotten_during_an_outage_is_followed_by_another() {
    let mut world = world(7);
    let (client, host) = world.client();
    let (other, _other) = world.client();
    let dir = tempfile::tempdir().expect("a directory");
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    let sending = keep_sending(&outbox, &client);
    outbox.queue(line("first")).await.expect("queued").settled().await;
    host.move_to(None);
    let mut on_its_way = outbox.queue(line("on its way")).await.expect("queued");
    while on_its_way.state() == EntryState::Queued {
        assert!(on_its_way.changed().await);
    }
    forget_producers(&other).await;
    sleep(Duration::from_secs(100)).await;
    // Nobody sent it.
    let later = outbox.queue(line("later")).await.expect("queued");
    host.move_to(Some([10, 0, 6, 1].into()));
    client.network_changed();
    assert!(is_unknown(&on_its_way.settled().await));
    let settled = later.settled().await;
    assert!(matches!(settled, EntryState::Durable { .. }), "{settled:?}");
    // Nor this one, whose first sending is refused.
    forget_producers(&other).await;
    let last = outbox.queue(line("last")).await.expect("queued").settled().await;
    assert!(matches!(last, EntryState::Durable { .. }), "{last:?}");
    assert_eq!(stored(&other).await, ["first", "later", "last"]);
    sending.abort();
}

/// What waited while the server forgot the producer, and was never sent, is stored: after a restart, whenever that is cut short, and after an outage.
#[tokio::test(start_paused = true)]
async fn what_was_not_on_its_way_when_the_producer_was_forgotten_is_stored() {
    let mut world = world(9);
    let (other, _other) = world.client();
    let dir = tempfile::tempdir().expect("a directory");
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    let path = outbox.path().to_owned();
    outbox.queue(line("first")).await.expect("queued");
    deliver(&outbox, &other).await;
    outbox.close().await;
    forget_producers(&other).await;
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    outbox.queue_all((0..200).map(|n| line(n.to_string())), &[]).await.expect("queued");
    let before = std::fs::metadata(&path).expect("a file").len() as usize;
    deliver(&outbox, &other).await;
    assert!(outbox.kept().is_empty(), "{:?}", outbox.kept().len());
    outbox.close().await;
    let mut expected: Vec<String> = ["first".to_owned()].into_iter().chain((0..200).map(|n| n.to_string())).collect();
    assert_eq!(stored(&other).await, expected);
    // Killed behind each of the writes. What those before it led to is in the session.
    let (bytes, mut at, mut kills) = (std::fs::read(&path).expect("a file"), 32, 0);
    while at < bytes.len() {
        at += 12 + u32::from_le_bytes(bytes[at..at + 4].try_into().expect("a length")) as usize;
        if at < before {
            continue;
        }
        kills += 1;
        let copy = tempfile::tempdir().expect("a directory");
        std::fs::write(copy.path().join(path.file_name().expect("a name")), &bytes[..at]).expect("written");
        let outbox = Outbox::open(copy.path(), "s").await.expect("an outbox");
        deliver(&outbox, &other).await;
        let unknown = outbox.kept().iter().filter(|kept| is_unknown(&kept.entry.state())).count();
        assert_eq!(outbox.kept().len(), unknown);
    }
    assert!(kills >= 4, "{kills}");
    expected.dedup();
    let mut seen = stored(&other).await;
    assert!(seen.len() >= expected.len());
    seen.truncate(expected.len());
    assert_eq!(seen, expected);
}

/// Spec OUT-7: nothing that waits of a message is stored without what comes before it, however its parts are batched.
#[tokio::test(start_paused = true)]
async fn a_message_of_which_a_part_is_unknown_is_given_up() {
    let mut world = world(10);
    let (other, _other) = world.client();
    other.session("s").expect("a name").create().attach().await.expect("attach");
    let dir = tempfile::tempdir().expect("a directory");
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    let of = |record: Record| Record { message: Some(MessageId([9; 16])), ..record };
    let part = |text: &str| of(Record { kind: Kind::MESSAGE_APPEND, ..Record::data(0, text.to_owned()) });
    let label = |text| Label::new(text).expect("a label");
    let start = MessageStart { role: label("agent"), content_type: label("text/plain") };
    outbox.queue(Item::records("main", &[of(start.record(0))]).expect("an item")).await.expect("queued");
    deliver(&outbox, &other).await;
    let parts = vec![Item::records("main", &[part("a"), part("b")]).expect("an item")];
    killed_midway(&mut world, &outbox, parts, false).await;
    outbox.close().await;
    forget_producers(&other).await;
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    let rest = outbox.queue(Item::records("main", &[part("c")]).expect("an item")).await.expect("queued");
    deliver(&outbox, &other).await;
    assert!(is_unknown(&rest.settled().await));
}

/// Spec OUT-6: a signal that nobody sent is sent once that can be, whatever the session stored and trimmed meanwhile.
#[tokio::test(start_paused = true)]
async fn a_signal_that_waited_for_the_network_is_sent() {
    let mut world = world(11);
    let (agent, _agent) = world.client();
    let (client, host) = world.client();
    let session = agent.session("s").expect("a name").create().attach().await.expect("attach");
    let run = session.start_run(Duration::from_secs(600), None).await.expect("a run");
    let producer = session.producer("agent").await.expect("a producer").of_run(&run);
    let dir = tempfile::tempdir().expect("a directory");
    let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
    let sending = keep_sending(&outbox, &client);
    outbox.queue(line("first")).await.expect("queued").settled().await;
    host.move_to(None);
    // Nobody has the connection any more.
    sleep(Duration::from_secs(200)).await;
    let signal = Item::signal(Intent::Steer, None, "left").expect("a signal");
    let signal = outbox.queue(signal).await.expect("queued");
    let until = SystemTime::now() + Duration::from_millis(50);
    let late = Item::signal(Intent::Steer, None, "too late").expect("a signal").valid_until(until);
    let late = outbox.queue(late).await.expect("queued");
    let mut last = 0;
    for n in 0..300 {
        last = producer.append(session.main(), n.to_string()).await.expect("appended").await.expect("stored");
    }
    session.trim(last - 100).await.expect("trimmed");
    wait_for(until);
    assert_eq!(signal.state(), EntryState::Queued);
    host.move_to(Some([10, 0, 6, 1].into()));
    client.network_changed();
    assert!(matches!(signal.settled().await, EntryState::Durable { .. }), "{:?}", signal.state());
    assert_eq!(late.settled().await, EntryState::Expired);
    sending.abort();
}

/// What a token does not allow says nothing of what was sent before.
#[tokio::test(start_paused = true)]
async fn a_signal_that_was_sent_is_not_told_as_refused() {
    let mut world = world(12);
    let (agent, _agent) = world.client();
    let session = agent.session("s").expect("a name").create().attach().await.expect("attach");
    let _run = session.start_run(Duration::from_secs(600), None).await.expect("a run");
    let looks = [Operation::Append, Operation::Create, Operation::Read];
    let signals = [Operation::Append, Operation::Create, Operation::Signal];
    for (operations, late) in [(looks, true), (looks, false), (signals, true), (signals, false)] {
        let dir = tempfile::tempdir().expect("a directory");
        let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
        let until = SystemTime::now() + Duration::from_millis(300);
        let item = Item::signal(Intent::Steer, None, "left").expect("a signal");
        let item = if late { item.valid_until(until) } else { item };
        killed_midway(&mut world, &outbox, vec![item], true).await;
        outbox.close().await;
        wait_for(until);
        let mut config = Config::default();
        config.give_up_after = None;
        config.token = Some(world.token_for(operations));
        let (phone, _host) = world.client_with(config);
        let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
        let entry = outbox.kept().remove(0).entry;
        tokio::select! {
            () = outbox.idle() => {}
            error = outbox.send(phone.session("s").expect("a name")) => panic!("{error}"),
        }
        let (state, case) = (entry.settled().await, (operations, late));
        // It can be found, or be sent again under its id; or neither.
        match case {
            (operations, true) if operations == signals => assert!(is_unknown(&state), "{case:?}: {state:?}"),
            _ => assert!(matches!(state, EntryState::Durable { .. }), "{case:?}: {state:?}"),
        }
    }
}

/// Spec OUT-8: a signal that was sent and not answered is looked for in the session, however much followed it.
#[tokio::test(start_paused = true)]
async fn a_signal_that_was_sent_is_found_behind_all_that_followed_it() {
    let mut world = world(8);
    let (agent, _agent) = world.client();
    let session = agent.session("s").expect("a name").create().attach().await.expect("attach");
    let run = session.start_run(Duration::from_secs(600), None).await.expect("a run");
    let producer = session.producer("agent").await.expect("a producer").of_run(&run);
    let kept_signals = mainstay_protocol::registry::KEPT_SIGNALS;
    for (arrives, late, trimmed) in
        [(true, false, false), (true, true, false), (false, false, false), (false, true, false), (true, false, true)]
    {
        let dir = tempfile::tempdir().expect("a directory");
        let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
        let until = SystemTime::now() + Duration::from_millis(300);
        let item = Item::signal(Intent::Steer, None, "left").expect("a signal");
        let item = if late { item.valid_until(until) } else { item };
        killed_midway(&mut world, &outbox, vec![item], arrives).await;
        let id = outbox.kept()[0].signal.expect("a signal").1;
        let mut live = current(session.live().await).await;
        let mut stored = None;
        if arrives {
            follow(&mut live, "the signal", |live| !live.view().signals().pending().is_empty()).await;
            let pending = live.view().signals().pending()[0].clone();
            assert_eq!(pending.signal.id, id);
            run.resolve(&producer, id, Resolution::Consumed, "").await.expect("appended").await.expect("stored");
            stored = Some(pending.seq);
        }
        outbox.close().await;
        for _ in 0..kept_signals {
            let other = session.signal(Intent::Steer).run(run.id());
            let id = other.id();
            other.send().await.expect("stored");
            run.resolve(&producer, id, Resolution::Consumed, "").await.expect("appended").await.expect("stored");
        }
        if trimmed {
            session.trim(stored.expect("stored") + 1).await.expect("trimmed");
        }
        if late {
            wait_for(until);
        }
        let (phone, _host) = world.client();
        let outbox = Outbox::open(dir.path(), "s").await.expect("an outbox");
        let entry = outbox.kept().remove(0).entry;
        deliver(&outbox, &phone).await;
        let (state, case) = (entry.settled().await, (arrives, late, trimmed));
        let count =
            records(&session).await.iter().filter(|record| SignalRecord::of(record).is_ok_and(|s| s.id == id)).count();
        match case {
            (_, _, true) => assert!(is_unknown(&state) && count == 0, "{case:?}: {state:?}, {count}"),
            (true, ..) => {
                assert_eq!((Some(state), count), (stored.map(|seq| EntryState::Durable { seq }), 1), "{case:?}")
            }
            // It may come yet.
            (false, true, _) => assert!(is_unknown(&state) && count == 0, "{case:?}: {state:?}, {count}"),
            (false, false, _) => {
                assert!(matches!(state, EntryState::Durable { .. }) && count == 1, "{case:?}: {state:?}, {count}");
                run.resolve(&producer, id, Resolution::Consumed, "").await.expect("appended").await.expect("stored");
            }
        }
    }
}

/// What is on the disk at some moment, as a process that is killed then leaves it.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a directory");
    for file in std::fs::read_dir(from).expect("a directory") {
        let file = file.expect("a file");
        std::fs::copy(file.path(), to.join(file.file_name())).expect("a copy");
    }
}

/// Random histories of an application that queues, is killed and starts again, over a network that comes and goes and a server that is
/// restarted, with entries that are refused among the others. What was told to be queued is stored once, in order, or was refused.
#[tokio::test(start_paused = true)]
async fn histories_of_an_outbox() {
    let mut random = random::for_test("histories_of_an_outbox");
    for history in 0..mainstay_tests::scaled(30) {
        one_history(history, random.bits()).await;
    }
}

async fn one_history(history: u64, seed: u64) {
    let mut random = Random::new(seed);
    let faults = Faults { delay: RTT / 2, loss: 0.02, ..Faults::default() };
    let mut world = World::new(faults, seed);
    let dir = tempfile::tempdir().expect("a directory");
    let (mut queued, mut kills) = (Vec::new(), 0);
    for life in 0..6 {
        let path = dir.path().join(format!("life-{life}"));
        if life > 0 {
            // Killed: what it did after this copy never was.
            kills += 1;
        }
        let outbox = Outbox::open(&path, "s").await.expect("an outbox");
        let (client, host) = world.client();
        let sending = keep_sending(&outbox, &client);
        for _ in 0..random.below(40) {
            match random.below(20) {
                0 => host.move_to(None),
                1 | 2 => host.move_to(Some([10, 0, 8, random.below(200) as u8 + 1].into())),
                3 => world.restart(),
                4 => sleep(Duration::from_millis(random.below(3000))).await,
                5..8 => drop(outbox.queue(refused()).await.expect("queued")),
                _ => {
                    let text = queued.len().to_string();
                    outbox.queue(line(text.clone())).await.expect("queued");
                    queued.push(text);
                }
            }
            sleep(Duration::from_millis(random.below(120))).await;
        }
        if life == 5 {
            host.move_to(Some([10, 0, 7, 1].into()));
            client.network_changed();
            outbox.idle().await;
            assert!(outbox.kept().iter().all(|kept| is_refused(&kept.entry.state())));
            assert_eq!(stored(&client).await, queued, "history {history}, {kills} kills");
        }
        copy(&path, &dir.path().join(format!("life-{}", life + 1)));
        sending.abort();
        client.finish().await;
    }
}

fn append(server: &Server, dir: &Path, more: &[&str]) -> Command {
    let dir = dir.to_str().expect("text");
    let mut command = command(&server.connect_file(), &[&["append", "s", "--json", "--outbox", dir], more].concat());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

fn payloads(rows: &[Value]) -> Vec<String> {
    let records = named(rows, "record").into_iter().filter(|row| row["kind"] == "data");
    records.map(|row| row["data"].as_str().expect("text").to_owned()).collect()
}

async fn read(server: &Server) -> Vec<Value> {
    events(&run(server.command(&["tail", "s", "--json", "--until-idle", "300"])).await.stdout)
}

async fn kill(mut child: Child) {
    child.kill().await.expect("kill");
}

/// Applications and servers that are killed at random moments: what was told to be queued is stored once and in order.
#[tokio::test]
async fn commands_and_servers_that_are_killed_lose_and_double_nothing() {
    let mut random = random::for_test("commands_and_servers_that_are_killed");
    let (dir, mut server) = (tempfile::tempdir().expect("a directory"), Server::start().await);
    let mut told = Vec::new();
    let lives = mainstay_tests::scaled(12);
    for life in 0..lives {
        let mut child = append(&server, dir.path(), &[]).spawn().expect("append");
        let mut input = child.stdin.take().expect("input");
        let mut rows = Rows::of(child.stdout.take().expect("output"));
        let writing = tokio::spawn(async move {
            for n in 0..400 {
                // It may be killed meanwhile.
                if input.write_all(format!("{life}-{n}\n").as_bytes()).await.is_err() {
                    return;
                }
                sleep(Duration::from_millis(1)).await;
            }
        });
        let wanted = random.below(250);
        let mut queued = 0;
        while queued < wanted {
            let rows = rows.until("queued").await;
            queued += rows.iter().filter(|row| row["event"] == "queued" && row["line"].is_u64()).count() as u64;
        }
        if random.below(3) == 0 {
            server.kill().await;
        }
        kill(child).await;
        writing.abort();
        server.restart().await;
        told.push(queued);
    }
    let mut child = append(&server, dir.path(), &[]).spawn().expect("append");
    drop(child.stdin.take());
    let output = child.wait_with_output().await.expect("the last one");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    let stored = payloads(&read(&server).await);
    // Of each life a beginning of what it was given, at least as much as was told.
    let mut rest = stored.as_slice();
    for (life, told) in told.iter().enumerate() {
        let of_life = rest.iter().zip(0..).take_while(|(text, n)| **text == format!("{life}-{n}")).count();
        assert!(of_life as u64 >= *told, "life {life}: {of_life} of {told} that were told are stored");
        rest = &rest[of_life..];
    }
    assert!(rest.is_empty(), "doubled, or out of order: {:?}", &rest[..rest.len().min(5)]);
    println!(
        "{lives} lives of an application, {} lines told to be queued, {} stored",
        told.iter().sum::<u64>(),
        stored.len()
    );
}

/// A8: a phone that is offline writes messages and a cancel, and its application is killed; meanwhile the session goes on.
#[tokio::test]
async fn a_phone_that_was_offline_for_long() {
    let (dir, mut server) = (tempfile::tempdir().expect("a directory"), Server::start().await);
    let agent = server.client(Config::default());
    let session = attach(&agent, "s").await;
    // Nothing is where the phone looks for its server.
    let nowhere = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let offline = server.connect_file_at(nowhere.local_addr().expect("an address"), "offline.json");
    let path = dir.path().to_str().expect("text");
    let mut writing = command(&offline, &["append", "s", "--role", "user", "--json", "--outbox", path]);
    let mut writing = writing.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("append");
    let mut input = writing.stdin.take().expect("input");
    for n in 0..50 {
        input.write_all(format!("message {n}\n").as_bytes()).await.expect("write");
    }
    let mut rows = Rows::of(writing.stdout.take().expect("output"));
    for _ in 0..50 {
        rows.until("queued").await;
    }
    kill(writing).await;
    let valid = Duration::from_secs(1);
    let until = SystemTime::now() + valid;
    let mut cancel = command(&offline, &["signal", "s", "cancel", "--json", "--outbox", path, "--valid-for", "1"]);
    let mut cancel = cancel.stdout(Stdio::piped()).spawn().expect("signal");
    let mut rows = Rows::of(cancel.stdout.take().expect("output"));
    // What waited before it is told first.
    while rows.until("queued").await.last().is_none_or(|row| row["entry"] != 50) {}
    kill(cancel).await;
    // Meanwhile the agent writes one long message.
    let producer = session.producer("agent").await.expect("a producer");
    let run = session.start_run(Duration::from_secs(30), None).await.expect("a run");
    let of_run = producer.of_run(&run);
    let message = MessageWriter::begin(&of_run, session.main(), "assistant", "text/plain").await.expect("a message");
    for n in 0..20_000 {
        message.append(format!("token {n} ")).await.expect("append");
    }
    producer.flush().await.expect("stored");
    tokio::task::spawn_blocking(move || wait_for(until)).await.expect("the wall clock");
    // Others go on: an agent says something every 20 ms, and a laptop hears it.
    let (stop, mut stopped) = tokio::sync::watch::channel(false);
    let talking = tokio::spawn({
        let (session, mut stopped) = (session.clone(), stopped.clone());
        async move {
            let producer = session.producer("talker").await.expect("a producer");
            while !*stopped.borrow_and_update() {
                drop(producer.append(session.main(), "x").await.expect("append"));
                sleep(Duration::from_millis(20)).await;
            }
        }
    });
    let laptop = attach(&server.client(Config::default()), "s").await;
    let mut hearing = laptop.live().await.expect("the view");
    hearing.current().await.expect("the view");
    let listening = tokio::spawn(async move {
        let (mut longest, mut last) = (Duration::ZERO, None::<std::time::Instant>);
        loop {
            let update = tokio::select! {
                update = hearing.next() => update.expect("an update").expect("no error"),
                _ = stopped.changed() => return longest,
            };
            if let mainstay_client::Update::Record(folded) = update
                && folded.record.kind == Kind::DATA
            {
                longest = longest.max(last.map_or(Duration::ZERO, |last| last.elapsed()));
                last = Some(std::time::Instant::now());
            }
        }
    });
    // The phone is back, at 5 Mbit/s, and wants to know what it missed.
    let slow = Faults { rate: 5_000_000 / 8, queue: 256 * 1024, ..Faults::default() };
    let proxy = Proxy::start(([127, 0, 0, 1], 0).into(), server.addr(), slow, 1).expect("a proxy");
    let connect = server.connect_file_at(proxy.addr(), "slow.json");
    let file = ConnectFile::read(&connect).expect("a connection file");
    let phone = Client::connect_quic(&file, Config::default()).expect("a client");
    let begun = std::time::Instant::now();
    let mut missed = phone.session("s").expect("a name").live().await.expect("the view");
    while !matches!(missed.next().await, Some(Ok(mainstay_client::Update::CaughtUp { .. }))) {}
    let caught_up = begun.elapsed();
    let bytes = proxy.counts().bytes.load(std::sync::atomic::Ordering::Relaxed);
    let folded: usize = missed.view().messages().open().iter().map(|message| message.text.len()).sum();
    // It had seen nothing of the session: one message is new to it.
    let unread = missed.view().messages().open().len() + missed.view().messages().finished().count();
    println!(
        "caught up with 20,000 records in {caught_up:?} at 5 Mbit/s: {bytes} bytes for {folded} of text, {unread} message unread"
    );
    assert_eq!(unread, 1);
    assert!(caught_up <= Duration::from_secs(3), "{caught_up:?}");
    assert!(bytes as usize * 10 <= folded * 13, "{bytes} bytes for {folded}");
    drop((missed, phone));
    // Back online.
    let begun = std::time::Instant::now();
    let mut back = append(&server, dir.path(), &[]).spawn().expect("append");
    drop(back.stdin.take());
    let output = back.wait_with_output().await.expect("the phone");
    let took = begun.elapsed();
    let rows = events(&output.stdout);
    assert_eq!(named(&rows, "ack").len(), 50, "{rows:?}");
    let expired = named(&rows, "expired");
    assert_eq!(expired.len(), 1, "{rows:?}");
    assert_eq!(expired[0]["entry"], 50);
    let mut live = session.live().await.expect("the view");
    let view = live.current().await.expect("the view");
    let said: Vec<String> = view
        .messages()
        .finished()
        .filter(|message| message.role.as_str() == "user")
        .map(|message| String::from_utf8_lossy(&message.text).into_owned())
        .collect();
    assert_eq!(said, (0..50).map(|n| format!("message {n}")).collect::<Vec<_>>());
    assert_eq!(view.signals().pending().len() + view.signals().resolved().count(), 0, "the stale cancel is not there");
    println!("50 messages stored once and in order and 1 cancel expired, {took:?} after it was back");
    stop.send_replace(true);
    talking.await.expect("the agent");
    let longest = listening.await.expect("the laptop");
    println!("meanwhile an agent spoke every 20 ms: a laptop's longest time between two was {longest:?}");
    assert!(longest <= Duration::from_millis(500), "{longest:?}");
    assert_eq!(server.terminate().await, Some(0));
}

/// What an agent said while nobody could be reached is stored although its command was killed there: before the next run begins.
#[tokio::test]
async fn what_an_agent_said_offline_is_stored_by_the_next_run() {
    let (dir, server) = (tempfile::tempdir().expect("a directory"), Server::start().await);
    let proxy = Proxy::start(([127, 0, 0, 1], 0).into(), server.addr(), Faults::default(), 1).expect("a proxy");
    let connect = server.connect_file_at(proxy.addr(), "through-proxy.json");
    let path = dir.path().to_str().expect("text");
    let agent = "i=0; while true; do echo line $i; i=$((i+1)); sleep 0.02; done";
    let args = ["run", "s", "--json", "--lease", "2", "--outbox", path, "--", "sh", "-c", agent];
    let mut running = command(&connect, &args).stdout(Stdio::piped()).spawn().expect("run");
    let begun = Rows::of(running.stdout.take().expect("output")).until("run").await;
    let run_id = begun.last().expect("an event")["run"].as_str().expect("an id").to_owned();
    let client = server.client(Config::default());
    let session = attach(&client, "s").await;
    let mut live = current(session.live().await).await;
    let said = |live: &LiveView| -> Vec<String> {
        let messages = live.view().messages();
        let all = messages.finished().chain(messages.open());
        all.map(|message| String::from_utf8_lossy(&message.text).into_owned()).collect()
    };
    follow(&mut live, "some lines", |live| said(live).iter().any(|text| text.lines().count() >= 10)).await;
    proxy.blackhole(true);
    // It goes on, into the outbox.
    let file = std::fs::read_dir(dir.path()).expect("a directory").next().expect("a file").expect("a file").path();
    let at = std::fs::metadata(&file).expect("the outbox").len();
    until("more is said", async || std::fs::metadata(&file).expect("the outbox").len() > at + 4000).await;
    running.kill().await.expect("kill");
    let offline = said(&live)[0].lines().count();
    proxy.blackhole(false);
    // Who does not know of runs leaves what was said there alone.
    let appended = run(command(&connect, &["append", "s", "--json", "--outbox", path])).await;
    assert!(appended.status.success(), "{}", String::from_utf8_lossy(&appended.stdout));
    let again = ["run", "s", "--json", "--lease", "2", "--outbox", path, "--", "echo", "next"];
    let output = run(command(&connect, &again)).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    follow(&mut live, "the next run", |live| said(live).iter().any(|text| text == "next\n")).await;
    let texts = said(&live);
    assert_eq!(texts.len(), 2, "{texts:?}");
    let lines: Vec<&str> = texts[0].lines().collect();
    for (n, line) in lines.iter().enumerate().take(lines.len() - 1) {
        assert_eq!(*line, format!("line {n}"), "once and in order");
    }
    assert!(lines.len() > offline + 10, "{} lines, {offline} before", lines.len());
    let first = live.view().messages().finished().find(|message| message.text.starts_with(b"line")).expect("finished");
    assert_eq!(first.run.map(|run| run.to_string()), Some(run_id));
    println!("{offline} lines while it could be reached, {} after all", lines.len());
}

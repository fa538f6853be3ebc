//! The same server and client over real quinn on a simulated network, in paused time.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstay_client::{
    Client, Doing, Event, Kind, Label, MessageAppend, MessageId, MessageStart, Paths, Record, Start, View,
};
use mainstay_tests::live::{attach, current, follow, records};
use mainstay_tests::proxy::Faults;
use mainstay_tests::random::{self, Random};
use mainstay_tests::world::World;
use mainstay_transport::sim::SimHost;
use tokio::task::JoinSet;

fn label(text: &str) -> Label {
    Label::new(text).expect("a label")
}

/// What a history provoked.
#[derive(Debug, Default)]
struct Provoked {
    restarts: u64,
    outages: u64,
    walks: u64,
    losses: u64,
    changes: u64,
    moves: u64,
    early: u64,
}

impl Provoked {
    fn add(&mut self, paths: Paths) {
        self.losses += paths.losses;
        self.changes += paths.changes;
        self.moves += paths.moves;
        self.early += paths.early;
    }
}

/// A machine goes off the network for a while, and comes back where it was or elsewhere; its system says so, or nobody does.
async fn walk(client: Client, host: Arc<SimHost>, mut random: Random) {
    if random.chance(0.7) {
        host.move_to(None);
        let most = if random.chance(0.2) { 20_000 } else { 1500 };
        tokio::time::sleep(Duration::from_millis(random.below(most))).await;
    }
    host.move_to(Some([10, 0, 2 + random.below(2) as u8, random.below(250) as u8].into()));
    if random.chance(0.7) {
        client.network_changed();
    }
}

/// A reader: every record in order, each once. Returns their payloads by kind, with the seqs.
async fn reading(client: Client, wanted: u64) -> Vec<(u64, Kind, Bytes)> {
    let session = client.session("s").expect("a name").wait().attach().await.expect("attach");
    let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    let (mut records, mut next, mut parts) = (Vec::new(), 0, 0);
    while parts < wanted {
        match subscription.next().await.expect("an event").expect("no error") {
            Event::Records(batch) => {
                for read in batch.iter() {
                    let read = read.expect("a record");
                    assert_eq!(read.seq, next, "a hole, or twice");
                    next += 1;
                    parts += u64::from(read.record.kind == Kind::MESSAGE_APPEND);
                    records.push((read.seq, read.record.kind, read.record.payload));
                }
            }
            event @ (Event::Gap { .. } | Event::Ended) => panic!("the history has a hole at {next}: {event:?}"),
            _ => {}
        }
    }
    records
}

/// One history: an agent writes a message, a phone reads it and is in the session, a tab follows the view. The network is bad; servers die;
/// machines walk from one network to another.
async fn history(random: &mut Random, provoked: &mut Provoked) {
    const PARTS: u64 = 100;
    // Of `0 ` to `99 `.
    const LEN: u64 = 290;
    let faults = Faults {
        delay: Duration::from_millis(random.below(80)),
        jitter: Duration::from_millis(random.below(20)),
        loss: random.below(8) as f64 / 100.0,
        reorder: random.below(5) as f64 / 100.0,
        duplicate: random.below(5) as f64 / 100.0,
        ..Faults::default()
    };
    let mut world = World::new(faults, random.bits());
    let [agent, phone, tab] = [world.client(), world.client(), world.client()];
    let session = agent.0.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let reading = tokio::spawn(reading(phone.0.clone(), PARTS));
    let at_phone = phone.0.session("s").expect("a name").attach().await.expect("attach");
    let grace = Duration::from_secs(120);
    let member = at_phone.join("phone", grace, Doing::new("idle").expect("a word")).await.expect("join");
    let mut live = tab.0.session("s").expect("a name").live().await.expect("live");
    let following = tokio::spawn(async move {
        let id = MessageId([7; 16]);
        let whole = |view: &View| view.messages().get(id).is_some_and(|message| message.text.len() as u64 == LEN);
        while !whole(live.view()) {
            live.next().await.expect("an update").expect("no error");
        }
        live
    });
    let message = |payload: Record| Record { message: Some(MessageId([7; 16])), ..payload };
    let start = MessageStart { role: label("assistant"), content_type: label("text/plain") };
    producer.append_record(message(session.main().record(&start))).await.expect("append");
    let (mut tickets, mut text, mut walking) = (Vec::new(), Vec::new(), JoinSet::new());
    for n in 0..PARTS {
        let part = format!("{n} ");
        text.extend_from_slice(part.as_bytes());
        let record = message(session.main().record(&MessageAppend(part.into())));
        tickets.push(producer.append_record(record).await.expect("append"));
        tokio::time::sleep(Duration::from_millis(random.below(60))).await;
        match random.below(80) {
            0 => {
                world.restart();
                provoked.restarts += 1;
            }
            1 => {
                world.conditions().blackhole(true);
                tokio::time::sleep(Duration::from_millis(random.below(20_000))).await;
                world.conditions().blackhole(false);
                provoked.outages += 1;
            }
            2..8 => {
                let (client, host) = [&agent, &phone, &tab][random.below(3) as usize];
                walking.spawn(walk(client.clone(), host.clone(), random.fork()));
                provoked.walks += 1;
            }
            _ => {}
        }
    }
    while walking.join_next().await.is_some() {}
    let mut acked = Vec::new();
    for ticket in tickets {
        acked.push(ticket.await.expect("stored"));
    }
    let records = reading.await.expect("reading");
    let live = following.await.expect("following");
    // Each acknowledged part is there once, where it was said to be; all together are the text, for whoever reads it how.
    let parts: Vec<_> = records.iter().filter(|(_, kind, _)| *kind == Kind::MESSAGE_APPEND).collect();
    assert!(parts.iter().map(|(seq, ..)| *seq).eq(acked), "acknowledged as something else than stored");
    assert_eq!(parts.iter().flat_map(|(.., payload)| payload.to_vec()).collect::<Vec<_>>(), text);
    let id = MessageId([7; 16]);
    assert_eq!(live.view().messages().get(id).map(|message| message.text.to_vec()), Some(text));
    // Nobody joined or left by walking.
    let presence = |kind: &Kind| kind.name().is_some_and(|name| name.starts_with("presence."));
    assert_eq!(records.iter().filter(|(_, kind, _)| presence(kind)).count(), 1, "one who joined");
    drop(member);
    // The server, and who read it over all that, have the same picture.
    let now = tab.0.session("s").expect("a name").attach().await.expect("attach").info();
    if now.tail == live.view().next() {
        assert_eq!(now.view_hash, live.view().hash());
    }
    for (client, _) in [&agent, &phone, &tab] {
        provoked.add(client.paths());
    }
}

/// Says which history failed.
struct Number(u64);

impl Drop for Number {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("it was history {}: with MAINSTAY_HISTORY={} and the seed it runs alone", self.0, self.0);
        }
    }
}

/// A RESUME over a connection that was given up came behind that of the next connection: the client was told that it is another's, and ended
/// (spec RES-5).
#[tokio::test(start_paused = true)]
async fn a_resume_that_comes_late_ends_nothing() {
    let mut random = Random::new(1_778_465_266_093_292_261);
    let mut of_it = random.fork();
    for _ in 0..116 {
        of_it = random.fork();
    }
    history(&mut of_it, &mut Provoked::default()).await;
}

/// Hundreds of histories in paused time; a seed and a number replay one.
#[tokio::test(start_paused = true)]
async fn random_histories_over_simulated_quinn_lose_and_double_nothing() {
    const HISTORIES: u64 = 200;
    let mut random = random::for_test("random_histories_over_simulated_quinn");
    let mut provoked = Provoked::default();
    let only: Option<u64> = std::env::var("MAINSTAY_HISTORY").ok().map(|only| only.parse().expect("a number"));
    for number in 0..HISTORIES {
        let mut random = random.fork();
        if only.is_none_or(|only| only == number) {
            let _number = Number(number);
            let whole = history(&mut random, &mut provoked);
            tokio::time::timeout(Duration::from_secs(3600), whole).await.expect("a history comes to its end");
        }
    }
    if only.is_some() {
        return println!("history {only:?} alone: {provoked:?}");
    }
    println!("{HISTORIES} histories: {provoked:?}");
    let Provoked { restarts, outages, walks, losses, changes, moves, early } = provoked;
    for (what, count) in [
        ("restarts", restarts),
        ("outages", outages),
        ("walks", walks),
        ("losses", losses),
        ("changes of path", changes),
        ("moves", moves),
        ("early data", early),
    ] {
        assert!(count >= HISTORIES / 4, "{what}: {count}, nothing was provoked");
    }
}

/// Spec CONN-8.
#[tokio::test(start_paused = true)]
async fn a_follower_learns_of_a_restarted_server_within_its_keep_alive() {
    let faults = Faults { delay: Duration::from_millis(30), ..Faults::default() };
    let mut world = World::new(faults, 1);
    let (client, _host) = world.client();
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let mut subscription = session.subscribe(Start::Latest).open().await.expect("subscribe");
    while !matches!(subscription.next().await, Some(Ok(Event::CaughtUp { .. }))) {}
    world.restart();
    let begun = tokio::time::Instant::now();
    while !matches!(subscription.next().await, Some(Ok(Event::Resumed { .. }))) {}
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(6), "the follower noticed after {took:?}");
}

/// Spec PRES-3. Nobody answers, and its next sign of life is due meanwhile: it waits, and says once that it leaves.
#[tokio::test(start_paused = true)]
async fn a_member_that_is_let_go_while_nobody_answers_leaves_once() {
    let faults = Faults { delay: Duration::from_millis(30), ..Faults::default() };
    let mut world = World::new(faults, 2);
    let ((client, host), (other, _other)) = (world.client(), world.client());
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let member =
        session.join("phone", Duration::from_secs(4), Doing::new("idle").expect("a word")).await.expect("joined");
    let mut live = current(attach(&other, "s").await.live().await).await;
    assert_eq!(live.view().members().len(), 1);
    host.move_to(None);
    drop(member);
    tokio::time::sleep(Duration::from_millis(2500)).await;
    host.move_to(Some([10, 0, 3, 1].into()));
    client.network_changed();
    follow(&mut live, "that it left", |live| live.view().members().is_empty()).await;
    let left = records(live.session()).await.into_iter().filter(|record| record.kind == Kind::PRESENCE_LEFT);
    assert_eq!(left.count(), 1);
}

//! Presence: who is here is what everybody sees, whatever the network and the servers do.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use mainstay_client::{
    Activity, ClientError, Code, Config as ClientConfig, Departure, Doing, Kind, LiveView, Membership, Payload,
    PresenceLeft, PresenceUpdated, Update,
};
use mainstay_protocol::registry::MAX_FRAME;
use mainstay_protocol::session::{Instance, Operation};
use mainstay_protocol::wire::{self, Attach, AttachMode, Frame, Hello, Join, Leave, Left};
use mainstay_server::Config;
use mainstay_store::MemoryStore;
use mainstay_tests::harness::{MemoryServer, claims};
use mainstay_tests::live::follow;
use mainstay_tests::process::{self, Server};
use mainstay_tests::proxy::{Faults, Proxy};
use mainstay_transport::{Connection, Connector, FrameReader, SendStream};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

const PATIENCE: Duration = Duration::from_secs(30);

fn activity(status: &str) -> Activity {
    Activity { status: status.parse().expect("a status"), progress: None, data: Default::default() }
}

fn doing(status: &str) -> Doing {
    Doing::new(status).expect("a status")
}

/// Spec PRES-1 to PRES-3: in one order with everything else, and by whom the token says.
#[tokio::test]
async fn a_member_joins_says_what_it_does_and_leaves() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let client = server.client();
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let mut live = session.live().await.expect("live");
    let producer = session.producer("p").await.expect("a producer");
    let status = session.main().record(&PresenceUpdated { activity: activity("thinking") });
    let refused = producer.append_record(status.clone()).await.expect("append").await.expect_err("not here");
    assert!(matches!(refused.error, ClientError::Refused { code: Code::NOT_A_MEMBER, .. }), "{refused}");
    let member = session.join("Agent", Duration::from_secs(10), doing("idle")).await.expect("join");
    // With data, as one.
    let batch = [session.main().data("result"), status];
    let first = producer.append_batch(&batch).await.expect("append").await.expect("stored");
    follow(&mut live, "the status", |live| live.view().next() > first + 1).await;
    let (author, seen) = live.view().members().iter().next().map(|(a, m)| (a.clone(), m.clone())).expect("a member");
    assert_eq!((author.subject.as_str(), seen.name.as_str()), ("tester", "Agent"));
    assert_eq!((seen.generation, seen.updated), (member.generation(), first + 1));
    assert_eq!(seen.activity, activity("thinking"));
    member.update(doing("tool:search").progress(40).data("{}")).await.expect("update");
    follow(&mut live, "the update", |live| {
        live.view().members().iter().all(|(_, member)| member.activity.progress == Some(40))
    })
    .await;
    member.leave().await.expect("leave");
    follow(&mut live, "the departure", |live| live.view().members().is_empty()).await;
    // Who may only read is not seen.
    let reader = claims("reader", "", [Operation::Read]);
    let session = server.client_as(&reader, ClientConfig::default()).session("s").expect("a name").attach().await;
    let refused = session.expect("attach").join("Reader", Duration::from_secs(10), doing("idle")).await;
    assert!(matches!(refused, Err(ClientError::Refused { code: Code::FORBIDDEN, .. })), "{refused:?}");
    // A grace that nobody could keep, or that nobody would wait for.
    let session = client.session("s").expect("a name").attach().await.expect("attach");
    for grace in [Duration::from_millis(999), Duration::from_secs(121)] {
        let refused = session.join("Agent", grace, doing("idle")).await;
        assert!(matches!(refused, Err(ClientError::Invalid(_))), "{refused:?}");
    }
    server.stop().await;
}

/// What a watcher saw of members, and when.
#[derive(Default)]
struct Seen {
    joined: u64,
    left: BTreeMap<&'static str, u64>,
    /// When the last one was lost.
    last_lost: Option<Instant>,
}

impl Seen {
    /// Notifications what comes until `enough` holds.
    async fn watch(&mut self, live: &mut LiveView, what: &str, mut enough: impl FnMut(&Self, &LiveView) -> bool) {
        while !enough(self, live) {
            let update = timeout(PATIENCE, live.next()).await.unwrap_or_else(|_| panic!("{what} does not come"));
            let Update::Record(folded) = update.expect("an update").expect("no error") else { continue };
            match folded.record.kind {
                Kind::PRESENCE_JOINED => self.joined += 1,
                Kind::PRESENCE_LEFT => {
                    let reason = PresenceLeft::of(&folded.record).expect("a departure").reason;
                    *self.left.entry(reason.as_str()).or_default() += 1;
                    if reason == Departure::Lost {
                        self.last_lost = Some(Instant::now());
                    }
                }
                _ => {}
            }
        }
    }

    fn left(&self, reason: Departure) -> u64 {
        self.left.get(reason.as_str()).copied().unwrap_or(0)
    }
}

async fn signal(children: &mut [Child], name: &str) {
    for child in children {
        let pid = child.id().expect("it runs").to_string();
        assert!(Command::new("kill").args([name, &pid]).status().await.expect("kill").success());
    }
}

/// Scenario A14, a little smaller: 50 members, of which 10 leave, 10 are killed, 10 change their network, 10 say what they do five times a
/// second, and 10 do nothing; the server is killed and started again in the middle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn presence_is_true_whatever_members_networks_and_servers_do() {
    const EACH: usize = 10;
    const GRACE: Duration = Duration::from_secs(3);
    let mut server = Server::start().await;
    let watcher = server.client(ClientConfig::default());
    let session = watcher.session("s1").expect("a name").create().attach().await.expect("attach");
    let mut live = session.live().await.expect("live");
    let other = server.client(ClientConfig::default());
    let mut second = other.session("s1").expect("a name").live().await.expect("live");

    let processes = |count: usize| {
        let mut children = Vec::new();
        for number in 0..count {
            let grace = GRACE.as_secs().to_string();
            let name = format!("process {number}");
            let mut command = server.command(&["join", "s1", "--as", &name, "--grace", &grace]);
            children.push(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("join"));
        }
        children
    };
    let mut leaving = processes(EACH);
    let mut dying = processes(EACH);
    let (here, free) = (IpAddr::from([127, 0, 0, 1]), SocketAddr::from(([127, 0, 0, 1], 0)));
    let (mut roaming, mut proxies, mut busy, mut stable): (Vec<Membership>, Vec<Proxy>, _, Vec<_>) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for number in 0..3 * EACH {
        let client = match number / EACH {
            0 => {
                let proxy = Proxy::start(free, server.addr(), Faults::default(), number as u64).expect("a proxy");
                let file = server.connect_file_at(proxy.addr(), &format!("roaming-{number}.json"));
                let file = mainstay_client::ConnectFile::read(&file).expect("a connection file");
                proxies.push(proxy);
                mainstay_client::Client::connect_quic(&file, ClientConfig::default()).expect("a client")
            }
            _ => server.client(ClientConfig::default()),
        };
        let session = client.session("s1").expect("a name").attach().await.expect("attach");
        let member = session.join(&format!("client {number}"), GRACE, doing("idle")).await.expect("join");
        match number / EACH {
            0 => roaming.push(member),
            1 => busy.push(tokio::spawn(async move {
                for n in 0u8.. {
                    // Five times a second, as the scenario says.
                    member.update(doing("streaming").progress(n % 100)).await.expect("update");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                member
            })),
            _ => stable.push(member),
        }
    }
    let mut seen = Seen::default();
    seen.watch(&mut live, "everybody", |_, live| live.view().members().len() == 5 * EACH).await;
    assert_eq!((seen.joined, seen.left.len()), (5 * EACH as u64, 0));

    // Nobody has gone: the server was.
    server.kill().await;
    server.restart().await;
    let begun = Instant::now();
    let mut rounds = 0;
    while begun.elapsed() < GRACE + Duration::from_secs(2) {
        // Each network changes under its member, one after the other.
        proxies[rounds % EACH].rebind(here);
        rounds += 1;
        // The pace of the changes: what is waited for is that nobody comes or goes meanwhile.
        let pause = tokio::time::sleep(Duration::from_millis(100));
        tokio::pin!(pause);
        tokio::select! {
            () = &mut pause => {}
            () = seen.watch(&mut live, "nothing", |seen, _| !seen.left.is_empty()) => {}
        }
        assert_eq!((seen.joined, seen.left(Departure::Lost), seen.left(Departure::Left)), (5 * EACH as u64, 0, 0));
    }
    assert!(rounds > 3 * EACH, "each roamed a few times");

    signal(&mut leaving, "-TERM").await;
    signal(&mut dying, "-KILL").await;
    let killed = Instant::now();
    seen.watch(&mut live, "the departures", |seen, _| {
        seen.left(Departure::Left) == EACH as u64 && seen.left(Departure::Lost) == EACH as u64
    })
    .await;
    let took = seen.last_lost.expect("somebody was lost") - killed;
    println!("lost within {took:?} of a grace of {GRACE:?}; {rounds} changes of network, 1 restart");
    assert!(took <= GRACE + Duration::from_secs(1), "lost after {took:?}");
    for child in leaving.iter_mut().chain(&mut dying) {
        timeout(PATIENCE, child.wait()).await.expect("it ends").expect("a status");
    }
    // And nobody else, for as long as anyone could take.
    let quiet = timeout(
        GRACE + Duration::from_secs(1),
        seen.watch(&mut live, "nothing", |seen, _| {
            seen.left.values().sum::<u64>() > 2 * EACH as u64 || seen.joined > 5 * EACH as u64
        }),
    );
    assert!(quiet.await.is_err(), "somebody came or went who did not: {:?}", seen.left);
    busy.iter().for_each(tokio::task::JoinHandle::abort);
    let names: Vec<&str> = live.view().members().iter().map(|(_, member)| member.name.as_str()).collect();
    assert_eq!(names.len(), 3 * EACH, "{names:?}");

    // Everybody sees the same at the same seq, `verify` too.
    let session = server.client(ClientConfig::default()).session("s1").expect("a name").attach().await.expect("attach");
    let closed = session.close().await.expect("close") + 1;
    for reader in [&mut live, &mut second] {
        follow(reader, "the end", |live| live.view().next() == closed).await;
    }
    assert_eq!(live.view().hash(), second.view().hash());
    let expected = live.view().hash().to_string();
    server.terminate().await;
    let verified = process::run(server.command(&["verify", "--data", server.dir().to_str().expect("text"), "--json"]));
    let verified = process::events(&verified.await.stdout);
    assert_eq!(process::named(&verified, "session")[0]["view_hash"], expected);
}

/// Spec PRES-4: whoever was here when the server died and does not come back is not a ghost.
#[tokio::test]
async fn members_that_do_not_come_back_after_a_restart_are_lost_after_their_grace() {
    let mut server = Server::start().await;
    let mut command = server.command(&["join", "s1", "--as", "ghost", "--grace", "2", "--json"]);
    let mut member = command.stdout(Stdio::piped()).spawn().expect("join");
    process::Rows::of(member.stdout.take().expect("output")).until("joined").await;
    member.kill().await.expect("kill");
    server.kill().await;
    server.restart().await;
    let client = server.client(ClientConfig::default());
    let mut live = client.session("s1").expect("a name").live().await.expect("live");
    let mut seen = Seen::default();
    follow(&mut live, "the view", |live| live.view().next() > 0).await;
    assert_eq!(live.view().members().len(), 1, "nobody knows yet");
    let begun = Instant::now();
    seen.watch(&mut live, "the departure", |seen, _| seen.left(Departure::Lost) == 1).await;
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    assert!(live.view().members().is_empty());
}

/// Spec PRES-1 to PRES-4, as a client made by hand finds them.
#[tokio::test]
async fn presence_frames_are_refused_by_name() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let connection = server.network().connect(true).await.expect("a connection");
    let token = server.key.mint(&claims("mallory", "", Operation::ALL)).expect("a token");
    let hello = Hello { instance: Some(Instance([3; 16])), token: Some(token.into()), ..Hello::default() };
    let (mut control, _control) = connection.open_bi().await.expect("control");
    control.write(&mut [Frame::from(hello).to_bytes()]).await.expect("write");
    let (mut send, recv) = connection.open_bi().await.expect("an attachment");
    let mut frames = FrameReader::new(recv, MAX_FRAME);
    let attach = Attach {
        mode: AttachMode::Create,
        session: "s".parse().expect("a name"),
        incarnation: None,
        next: None,
        expire_after: None,
    };
    let join = |grace, data: usize| -> Frame {
        let activity = Activity { data: vec![0; data].into(), ..activity("idle") };
        Join { name: "m".parse().expect("a name"), grace, activity }.into()
    };
    let update = |data: usize| -> Frame {
        wire::Update { activity: Activity { data: vec![0; data].into(), ..activity("idle") } }.into()
    };
    let mut ask = async |frame: Frame| {
        send.write(&mut [frame.to_bytes()]).await.expect("write");
        match timeout(PATIENCE, frames.next()).await.expect("in time") {
            Ok(Some(Frame::Error(error))) => Err(error.code),
            Ok(Some(frame)) => Ok(frame.name()),
            other => panic!("no answer: {other:?}"),
        }
    };
    assert_eq!(ask(attach.into()).await, Ok("ATTACHED"));
    for (frame, answer) in [
        (join(999, 0), Err(Code::LIMIT_EXCEEDED)),
        (join(120_001, 0), Err(Code::LIMIT_EXCEEDED)),
        (join(1000, 513), Err(Code::LIMIT_EXCEEDED)),
        (update(0), Err(Code::NOT_A_MEMBER)),
        (Leave {}.into(), Ok("LEFT")),
        (join(120_000, 512), Ok("JOINED")),
        (update(513), Err(Code::LIMIT_EXCEEDED)),
        (Leave {}.into(), Ok("LEFT")),
        // The one before it was not a member's either.
        (update(1), Err(Code::NOT_A_MEMBER)),
        // Nothing is heard on control from here on.
        (join(1000, 0), Ok("JOINED")),
    ] {
        let what = format!("{frame:?}");
        assert_eq!(ask(frame).await, answer, "{what}");
    }
    let unasked = timeout(PATIENCE, frames.next()).await.expect("in time").expect("a frame");
    assert_eq!(unasked, Some(Left {}.into()), "who is lost is told");
    server.stop().await;
}

/// A member's handle that was replaced took the member with it.
#[tokio::test]
async fn joining_again_takes_the_membership_over() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let session = server.client().session("s").expect("a name").create().attach().await.expect("attach");
    let mut live = session.live().await.expect("live");
    let first = session.join("Agent", Duration::from_secs(10), doing("idle")).await.expect("join");
    let second = session.join("Agent", Duration::from_secs(10), doing("idle")).await.expect("join");
    assert_eq!(first.generation(), second.generation());
    drop(first);
    second.update(doing("thinking")).await.expect("update");
    let status = |live: &LiveView| -> Vec<String> {
        live.view().members().iter().map(|(_, member)| member.activity.status.to_string()).collect()
    };
    follow(&mut live, "the update", |live| status(live) == ["thinking".to_owned()].to_vec()).await;
    // Under another name it is a new membership.
    let third = session.join("Renamed", Duration::from_secs(10), doing("idle")).await.expect("join");
    assert!(third.generation() > second.generation());
    drop(second);
    // A refused one changes nothing.
    let refused = session.join("Agent", Duration::from_secs(10), doing("idle").data(vec![0; 513])).await;
    assert!(matches!(refused, Err(ClientError::Refused { code: Code::LIMIT_EXCEEDED, .. })), "{refused:?}");
    third.update(doing("waiting")).await.expect("update");
    follow(&mut live, "the update", |live| status(live) == ["waiting".to_owned()].to_vec()).await;
    // One whose answer nobody waited for does not stay.
    tokio::select! {
        biased;
        joined = session.join("Agent", Duration::from_secs(1), doing("gone")) => panic!("at once: {joined:?}"),
        () = core::future::ready(()) => {}
    }
    follow(&mut live, "the one that was given up", |live| status(live) == ["gone".to_owned()].to_vec()).await;
    follow(&mut live, "its departure", |live| live.view().members().is_empty()).await;
    server.stop().await;
}

/// Spec PRES-4: the end of a connection is no departure. Some were lost as soon as their lease was looked at.
#[tokio::test]
async fn a_member_whose_connection_ends_has_its_grace_from_when_it_was_heard_last() {
    const GRACE: Duration = Duration::from_secs(2);
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let watcher = server.client().session("s").expect("a name").create().attach().await.expect("attach");
    let mut live = watcher.live().await.expect("live");
    let mut members = Vec::new();
    for number in 0..20 {
        let client = server.client();
        let session = client.session("s").expect("a name").attach().await.expect("attach");
        members.push((client, session.join(&format!("{number}"), GRACE, doing("idle")).await.expect("join")));
    }
    // Every member shows at least twice that it is alive.
    tokio::time::sleep(GRACE * 3 / 4).await;
    let closed = Instant::now();
    members.iter().for_each(|(client, _)| client.close());
    let mut seen = Seen::default();
    seen.watch(&mut live, "the first loss", |seen, _| seen.left(Departure::Lost) > 0).await;
    // A quarter of the grace lies between two signs of life.
    assert!(closed.elapsed() >= GRACE * 3 / 4 - Duration::from_millis(50), "lost after {:?}", closed.elapsed());
    seen.watch(&mut live, "all of them", |_, live| live.view().members().is_empty()).await;
    assert!(closed.elapsed() <= GRACE + Duration::from_secs(1), "lost after {:?}", closed.elapsed());
    server.stop().await;
}

/// Whoever was lost while its connection stayed never came back.
#[tokio::test]
async fn a_process_that_stood_still_for_longer_than_its_grace_joins_again() {
    let server = Server::start().await;
    let mut watch = server.command(&["presence", "s1", "--watch", "--json"]);
    let mut watching = watch.stdout(Stdio::piped()).spawn().expect("presence");
    let mut rows = process::Rows::of(watching.stdout.take().expect("output"));
    let mut join = server.command(&["join", "s1", "--as", "sleeper", "--grace", "1"]);
    let mut member = vec![join.stdout(Stdio::null()).spawn().expect("join")];
    let first = rows.until("member").await.pop().expect("a row");
    signal(&mut member, "-STOP").await;
    assert_eq!(rows.until("left").await.pop().expect("a row")["reason"], "lost");
    signal(&mut member, "-CONT").await;
    let again = rows.until("member").await.pop().expect("a row");
    assert!(again["generation"].as_u64() > first["generation"].as_u64(), "{again}");
    watching.kill().await.expect("kill");
}

/// The commands.
#[tokio::test]
async fn the_command_line_joins_shows_and_watches() {
    let server = Server::start().await;
    let mut watch = server.command(&["presence", "s1", "--watch", "--json"]);
    let mut watching = watch.stdout(Stdio::piped()).spawn().expect("presence");
    let mut rows = process::Rows::of(watching.stdout.take().expect("output"));
    let mut join = server.command(&["join", "s1", "--as", "Alice", "--status", "waiting"]);
    let mut joined = vec![join.stdout(Stdio::null()).spawn().expect("join")];
    let member = rows.until("member").await.pop().expect("a row");
    assert_eq!((&member["name"], &member["status"]), (&"Alice".into(), &"waiting".into()));
    let shown = process::run(server.command(&["presence", "s1"])).await;
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.starts_with("Alice (dev/") && shown.ends_with("): waiting\n"), "{shown}");
    signal(&mut joined, "-INT").await;
    let left = rows.until("left").await.pop().expect("a row");
    assert_eq!((&left["reason"], &left["author"]), (&"left".into(), &member["author"]));
    assert!(timeout(PATIENCE, joined[0].wait()).await.expect("it ends").expect("a status").success());
    let nobody = process::run(server.command(&["presence", "s1"])).await;
    assert_eq!(nobody.stdout, b"nobody is here\n");
    watching.kill().await.expect("kill");
}

/// Who is told to stop before he was told that he is there leaves all the same, and is not there until his grace is over.
#[tokio::test]
async fn a_join_that_is_interrupted_before_it_is_answered_leaves() {
    let server = Server::start().await;
    let slow = Faults { delay: Duration::from_millis(300), ..Faults::default() };
    let proxy = Proxy::start(([127, 0, 0, 1], 0).into(), server.addr(), slow, 1).expect("a proxy");
    let client = server.client(ClientConfig::default());
    let session = client.session("s1").expect("a name").create().attach().await.expect("attach");
    let mut live = session.live().await.expect("a live view");
    let mut command = Command::new(process::binary());
    command.args(["join", "s1", "--as", "phone", "--grace", "120", "--connect"]);
    command.arg(server.connect_file_at(proxy.addr(), "slow.json")).stdout(Stdio::null()).kill_on_drop(true);
    let mut joining = command.spawn().expect("join");
    let members = async |live: &mut LiveView, count: usize| {
        follow(live, "the members", |live| live.view().members().len() == count).await;
    };
    members(&mut live, 1).await;
    let pid = joining.id().expect("it runs").to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().await.expect("kill").success());
    members(&mut live, 0).await;
    assert!(timeout(PATIENCE, joining.wait()).await.expect("in time").expect("a status").success());
}

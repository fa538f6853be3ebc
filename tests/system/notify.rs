//! Notifications: who is away is told, once, and who has come is not told.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use mainstay_client::{
    ClientError, Code, Config as ClientConfig, Doing, Intent, JobEvent, JobKey, JobOutcome, Jobs, Kind, LiveView,
    MessageWriter, NotifyRule, RequestId, Session, Status, Triggers,
};
use mainstay_protocol::session::{FOR_WORKERS, Incarnation, Operation};
use mainstay_server::Config;
use mainstay_store::{MemoryStore, Store};
use mainstay_tests::harness::{MemoryServer, claims};
use mainstay_tests::live::{attach, current, follow};
use mainstay_tests::process::{PATIENCE, Rows, Server, run};
use mainstay_tests::until;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

/// A rule that tells `principal` of requests at once.
fn rule(name: &str, principal: &str) -> NotifyRule {
    NotifyRule {
        name: name.parse().expect("a name"),
        principal: principal.parse().expect("a subject"),
        triggers: Triggers::new([Kind::REQUEST_OPENED]).expect("triggers"),
        delay: 0,
        collapse: None,
    }
}

/// Asks people something, in a run that lasts.
async fn ask(session: &Session, lasts: Duration) -> (RequestId, u64) {
    let producer = session.producer("agent").await.expect("a producer");
    let run = session.start_run(Duration::from_secs(60), None).await.expect("a run");
    let (request, ticket) = run.request(&producer, "approval", lasts, "may I").await.expect("append");
    (request, ticket.await.expect("stored"))
}

async fn next(jobs: &mut Jobs) -> JobEvent {
    timeout(PATIENCE, jobs.next()).await.expect("in time").expect("an event").expect("no error")
}

async fn job(jobs: &mut Jobs) -> JobKey {
    match next(jobs).await {
        JobEvent::Job(job) => job.key,
        other => panic!("{other:?}"),
    }
}

async fn refused(jobs: &mut Jobs) -> Code {
    match timeout(PATIENCE, jobs.next()).await.expect("in time") {
        Some(Err(ClientError::Refused { code, .. })) => code,
        other => panic!("{other:?}"),
    }
}

/// What a webhook was sent.
struct Post {
    key: String,
    authorization: String,
    body: Value,
    at: Instant,
}

/// Seconds for which a webhook that answers 503 wants to be left alone.
const RETRY_AFTER: u64 = 5;

/// A webhook that answers with these statuses in turn, and then with 204.
async fn webhook(statuses: &'static [u16]) -> (SocketAddr, mpsc::UnboundedReceiver<Post>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a socket");
    let addr = listener.local_addr().expect("an address");
    let (posts, received) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let mut statuses = statuses.iter().copied();
        // One request a connection is enough.
        while let Ok((stream, _)) = listener.accept().await {
            let mut stream = BufReader::new(stream);
            let (mut line, mut length) = (String::new(), 0);
            let mut post =
                Post { key: String::new(), authorization: String::new(), body: Value::Null, at: Instant::now() };
            while stream.read_line(&mut line).await.is_ok() && !line.trim().is_empty() {
                match line.trim().split_once(": ").map(|(name, value)| (name.to_lowercase(), value)) {
                    Some((name, value)) if name == "idempotency-key" => post.key = value.into(),
                    Some((name, value)) if name == "authorization" => post.authorization = value.into(),
                    Some((name, value)) if name == "content-length" => length = value.parse().expect("a length"),
                    _ => {}
                }
                line.clear();
            }
            let mut body = vec![0; length];
            if stream.read_exact(&mut body).await.is_err() {
                continue;
            }
            post.body = serde_json::from_slice(&body).expect("JSON");
            let status = statuses.next().unwrap_or(204);
            let after = if status == 503 { format!("retry-after: {RETRY_AFTER}\r\n") } else { String::new() };
            let answer = format!("HTTP/1.1 {status} x\r\n{after}content-length: 0\r\nconnection: close\r\n\r\n");
            let _ = stream.write_all(answer.as_bytes()).await;
            let _ = posts.send(post);
        }
    });
    (addr, received)
}

/// `mainstay notify work`, to this webhook.
fn work(server: &Server, hook: SocketAddr) -> (Child, Rows) {
    let url = format!("http://{hook}/told");
    let mut command = server.command(&["notify", "work", "--json", "--webhook", &url, "--authorization", "Bearer x"]);
    let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("start a worker");
    let rows = Rows::of(child.stdout.take().expect("output"));
    (child, rows)
}

async fn tell(server: &Server, options: &[&str]) {
    let arguments = [&["notify", "rule", "s1", "phone", "--principal", "dev", "--on", "request"], options].concat();
    let output = run(server.command(&arguments)).await;
    assert!(output.status.success(), "{output:?}");
}

/// Scenario A16, first part: everybody is away, the webhook fails three times, one job is delivered once; at the deadline the request
/// expires and the run goes on.
#[tokio::test]
async fn who_is_away_is_told_once_however_often_the_webhook_fails() {
    let server = Server::start().await;
    tell(&server, &[]).await;
    let (hook, mut posts) = webhook(&[500, 500, 503]).await;
    let (_worker, mut rows) = work(&server, hook);
    let agent = server.client(ClientConfig::default());
    let session = attach(&agent, "s1").await;
    let producer = session.producer("agent").await.expect("a producer");
    let run = session.start_run(Duration::from_secs(60), None).await.expect("a run");
    let mut signals = session.signals().await.expect("signals");
    let lasts = Duration::from_secs(12);
    let (request, ticket) = run.request(&producer, "approval", lasts, "may I").await.expect("append");
    let seq = ticket.await.expect("stored");
    let asked = Instant::now();
    let told = rows.until("delivered").await;
    let delivered = asked.elapsed();
    let key = format!("{}:{seq}:phone", session.info().incarnation);
    let (mut first, mut at) = (None, Vec::new());
    for _ in 0..4 {
        let post = timeout(PATIENCE, posts.recv()).await.expect("in time").expect("a post");
        assert_eq!((post.key.as_str(), post.authorization.as_str()), (key.as_str(), "Bearer x"));
        assert_eq!(post.body["request"], request.to_string());
        assert_eq!(
            (post.body["cause"].as_str(), post.body["principal"].as_str()),
            (Some("request.opened"), Some("dev"))
        );
        first.get_or_insert(post.at);
        at.push(post.at);
    }
    assert!(at[3] - at[2] >= Duration::from_secs(RETRY_AFTER), "it was asked to wait");
    assert_eq!(told.iter().filter(|row| row["event"] == "job").count(), 1);
    assert_eq!(told.iter().filter(|row| row["event"] == "retry").count(), 3);
    let expired = timeout(PATIENCE, signals.next()).await.expect("in time").expect("the expiry");
    let waited = asked.elapsed();
    assert_eq!(expired.record.kind, Kind::REQUEST_EXPIRED);
    assert!(waited > lasts - Duration::from_millis(250) && waited < lasts + Duration::from_secs(2), "{waited:?}");
    // The run goes on, and nothing more is sent.
    let producer = producer.of_run(&run);
    let writer = MessageWriter::begin(&producer, session.main(), "assistant", "text/plain").await.expect("begin");
    writer.end(Status::Complete, "").await.expect("end").await.expect("stored");
    let live = current(session.live().await).await;
    assert!(live.view().notifications().jobs().is_empty() && !live.view().notifications().rules().is_empty());
    assert!(posts.try_recv().is_err());
    let first = first.expect("a post") - asked;
    println!("first attempt after {first:?}, delivered after {delivered:?}, expired after {waited:?}");
}

/// Scenario A16, second part: who comes in time is not told, whether the job still waits for its delay or is in a worker's hand.
#[tokio::test]
async fn who_comes_in_time_is_not_told() {
    let server = Server::start().await;
    tell(&server, &["--delay", "30"]).await;
    let (hook, mut posts) = webhook(&[500; 64]).await;
    let (_worker, mut rows) = work(&server, hook);
    let agent = server.client(ClientConfig::default());
    let session = attach(&agent, "s1").await;
    let mut live = current(session.live().await).await;
    let waiting = ask(&session, Duration::from_secs(3600)).await;
    let has = async |live: &mut LiveView, jobs: usize| {
        follow(live, "the jobs", |live| live.view().notifications().jobs().len() == jobs).await;
    };
    has(&mut live, 1).await;
    let phone = server.client(ClientConfig::default());
    let there = attach(&phone, "s1").await;
    let member = there.join("phone", Duration::from_secs(10), Doing::new("idle").expect("a word")).await.expect("join");
    has(&mut live, 0).await;
    // One that is here is not told of what comes, either.
    let second = attach(&agent, "s2").await;
    second.set_rule(rule("phone", "dev")).await.expect("a rule");
    let in_second = attach(&phone, "s2").await;
    let doing = Doing::new("idle").expect("a word");
    let here = in_second.join("phone", Duration::from_secs(10), doing.clone()).await.expect("join");
    ask(&second, Duration::from_secs(3600)).await;
    let view = current(second.live().await).await;
    assert!(view.view().notifications().jobs().is_empty() && view.view().signals().requests().len() == 1);
    here.leave().await.expect("leave");
    // In a worker's hand, and failing.
    let third = attach(&agent, "s3").await;
    third.set_rule(rule("phone", "dev")).await.expect("a rule");
    let (_, seq) = ask(&third, Duration::from_secs(3600)).await;
    rows.until("retry").await;
    let post = timeout(PATIENCE, posts.recv()).await.expect("in time").expect("a post");
    assert_eq!(post.body["seq"], seq);
    let in_third = attach(&phone, "s3").await;
    in_third.join("phone", Duration::from_secs(10), doing).await.expect("join");
    let told = rows.until("withdrawn").await;
    assert!(told.iter().all(|row| row["event"] == "retry" || row["event"] == "withdrawn"), "{told:?}");
    // The request is still to be answered: two do, and one is told that the other was first.
    let laptop = attach(&server.client(ClientConfig::default()), "s1").await;
    let (one, other) = tokio::join!(
        there.signal(Intent::Approve).request(waiting.0).send(),
        laptop.signal(Intent::Approve).request(waiting.0).send()
    );
    assert_ne!(one.is_ok(), other.is_ok(), "{one:?} {other:?}");
    let late = one.and(other);
    assert!(matches!(late, Err(ClientError::Refused { code: Code::ALREADY_RESOLVED, .. })), "{late:?}");
    member.leave().await.expect("leave");
    // Nothing but attempts of the one that was withdrawn.
    while let Ok(post) = posts.try_recv() {
        assert_eq!(post.body["session"], "s3");
    }
}

/// Spec NOTE-5: a job whose worker leaves, or whose server dies, is given again under the same key; one that was done is not.
#[tokio::test]
async fn a_job_outlives_its_worker_and_its_server() {
    let mut server = Server::start().await;
    let agent = server.client(ClientConfig::default());
    let session = attach(&agent, "s1").await;
    session.set_rule(rule("phone", "dev")).await.expect("a rule");
    let producer = session.producer("agent").await.expect("a producer");
    let run = session.start_run(Duration::from_secs(60), None).await.expect("a run");
    let lasts = Duration::from_secs(3600);
    let (_, asked) = run.request(&producer, "approval", lasts, "may I").await.expect("append");
    let seq = asked.await.expect("stored");
    let first = server.client(ClientConfig::default());
    let mut jobs = first.jobs("", 4);
    let key = job(&mut jobs).await;
    assert_eq!((key.seq, key.incarnation), (seq, session.info().incarnation));
    drop(jobs);
    let second = server.client(ClientConfig::default());
    let mut jobs = second.jobs("s", 4);
    assert_eq!(job(&mut jobs).await, key);
    // Still in hand over the restart: it does not come twice, and is done with over the next connection.
    server.kill().await;
    server.restart().await;
    jobs.done(key.clone(), JobOutcome::Delivered, "").await;
    let mut live = current(session.live().await).await;
    follow(&mut live, "that it is done", |live| live.view().notifications().jobs().is_empty()).await;
    // The next thing that anybody hears of is another job.
    let (_, again) = run.request(&producer, "approval", lasts, "and this").await.expect("append");
    let next = again.await.expect("stored");
    assert_eq!(job(&mut jobs).await.seq, next);
}

/// Who was lost may not have seen what was asked in its grace: it is told then. Who left has seen it.
#[tokio::test]
async fn what_was_asked_in_the_grace_of_who_is_lost_is_told_then() {
    let server = Server::start().await;
    let agent = server.client(ClientConfig::default());
    let session = attach(&agent, "s1").await;
    session.set_rule(rule("phone", "dev")).await.expect("a rule");
    let mut live = current(session.live().await).await;
    let phone = |grace: &str| {
        let mut command = server.command(&["join", "s1", "--as", "phone", "--grace", grace]);
        command.stdout(Stdio::null()).kill_on_drop(true).spawn().expect("join")
    };
    let members = async |live: &mut LiveView, count: usize| {
        follow(live, "the members", |live| live.view().members().len() == count).await;
    };
    let mut lost = phone("2");
    members(&mut live, 1).await;
    lost.kill().await.expect("kill");
    let (_, seq) = ask(&session, Duration::from_secs(3600)).await;
    follow(&mut live, "the request", |live| live.view().next() > seq).await;
    assert!(live.view().notifications().jobs().is_empty(), "it is in its grace");
    members(&mut live, 0).await;
    assert_eq!(live.view().notifications().jobs().iter().map(|job| job.id).collect::<Vec<_>>(), [seq]);
    let mut jobs = agent.jobs("", 1);
    let key = job(&mut jobs).await;
    assert_eq!(key.seq, seq);
    jobs.done(key, JobOutcome::Delivered, "").await;
    follow(&mut live, "that it is done", |live| live.view().notifications().jobs().is_empty()).await;
    // Another one comes, and goes by itself.
    // For longer than it may take to leave: else it would be lost.
    let mut left = phone("60");
    members(&mut live, 1).await;
    let pid = left.id().expect("it runs").to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().await.expect("kill").success());
    assert!(timeout(PATIENCE, left.wait()).await.expect("in time").expect("a status").success(), "it has left");
    members(&mut live, 0).await;
    assert!(live.view().notifications().jobs().is_empty(), "it was told");
}

/// Spec NOTE-5: what a worker has in hand that was killed is given to another one long before its connection is known to be lost; and a
/// worker that was stopped for a while, while jobs came and went, goes on.
#[tokio::test]
async fn a_worker_that_is_killed_holds_nothing_up_for_long() {
    let server = Server::start().await;
    tell(&server, &[]).await;
    let agent = server.client(ClientConfig::default());
    let session = attach(&agent, "s1").await;
    let (hook, mut posts) = webhook(&[500; 64]).await;
    let (mut worker, mut rows) = work(&server, hook);
    let (_, seq) = ask(&session, Duration::from_secs(3600)).await;
    rows.until("retry").await;
    worker.kill().await.expect("kill");
    let killed = Instant::now();
    let mut jobs = agent.jobs("", 1);
    assert_eq!(job(&mut jobs).await.seq, seq);
    let took = killed.elapsed();
    println!("given to another worker after {took:?}");
    assert!(took > Duration::from_secs(5) && took < Duration::from_secs(25), "{took:?}");
    while posts.try_recv().is_ok() {}
}

/// Jobs that come and go while a worker takes none do not gather, and it goes on with those that are left.
#[tokio::test]
async fn a_worker_that_falls_behind_hears_of_what_is_left() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let author = server.client();
    let session = attach(&author, "s1").await;
    session
        .set_rule(NotifyRule { collapse: Some("one".parse().expect("a key")), ..rule("phone", "boss") })
        .await
        .expect("a rule");
    let producer = session.producer("agent").await.expect("a producer");
    let run = session.start_run(Duration::from_secs(60), None).await.expect("a run");
    let worker = server.client();
    let mut jobs = worker.jobs("", 1);
    let mut last = 0;
    let mut live = current(session.live().await).await;
    for _ in 0..60 {
        let lasts = Duration::from_secs(60);
        let (_, asked) = run.request(&producer, "approval", lasts, "may I").await.expect("append");
        last = asked.await.expect("stored");
        follow(&mut live, "the job", |live| {
            live.view().notifications().jobs().iter().any(|job| job.id == last && job.emitted)
        })
        .await;
    }
    // The first may have been on its way to the application before it was withdrawn.
    let mut heard = Vec::new();
    while heard.last().is_none_or(|seq| *seq != last) {
        if let JobEvent::Job(job) = next(&mut jobs).await {
            heard.push(job.key.seq);
        }
    }
    assert!(heard.len() <= 3, "{heard:?}");
    server.stop().await;
}

/// A session that nobody uses goes out of memory with its job, and a worker that comes later gets it.
#[tokio::test]
async fn a_job_of_a_session_that_is_not_in_memory_finds_its_worker() {
    let store = Arc::new(MemoryStore::new());
    let mut config = Config::default();
    config.idle = Duration::from_millis(50);
    config.due_pause = Duration::from_millis(20);
    let server = MemoryServer::start(store.clone(), config);
    let author = server.client();
    let session = attach(&author, "s1").await;
    let mut ended = rule("ended", "boss");
    ended.triggers = Triggers::new([Kind::RUN_END]).expect("triggers");
    session.set_rule(ended).await.expect("a rule");
    let producer = session.producer("agent").await.expect("a producer");
    let run = session.start_run(Duration::from_secs(60), None).await.expect("a run");
    let end = run.end(&producer, Status::Complete, "").await.expect("append").await.expect("stored");
    let incarnation = session.info().incarnation;
    drop((producer, session));
    author.finish().await;
    let before = Some((FOR_WORKERS - 1, Incarnation([0xff; 16])));
    until("the session leaves memory", async || {
        store.waking(FOR_WORKERS, before, 8).await.expect("sessions").len() == 1
    })
    .await;
    let worker = server.client();
    let mut jobs = worker.jobs("", 4);
    let key = job(&mut jobs).await;
    assert_eq!((key.incarnation, key.seq), (incarnation, end));
    jobs.done(key, JobOutcome::Failed, "no such phone").await;
    until("it is done with", async || store.waking(FOR_WORKERS, before, 8).await.expect("sessions").is_empty()).await;
    server.stop().await;
}

/// A worker gets what its token and its prefix are for, as many at once as it wants, and everything in the end.
#[tokio::test]
async fn a_worker_gets_what_it_may_and_no_more_than_it_wants() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let author = server.client();
    let mut asked = BTreeSet::new();
    for name in ["a/1", "a/2", "a/3", "b/1", "ab"] {
        let session = attach(&author, name).await;
        session.set_rule(rule("phone", "boss")).await.expect("a rule");
        let (_, seq) = ask(&session, Duration::from_secs(3600)).await;
        if name.starts_with("a/") {
            asked.insert((session.info().incarnation, seq));
        }
    }
    let worker = server.client_as(&claims("worker", "a", [Operation::Notify]), ClientConfig::default());
    let mut jobs = worker.jobs("", 2);
    let (one, other) = (job(&mut jobs).await, job(&mut jobs).await);
    // Two are in hand: the third comes once one of them is done, and nothing comes behind it but what is asked now.
    jobs.done(one.clone(), JobOutcome::Delivered, "").await;
    let third = job(&mut jobs).await;
    jobs.done(third.clone(), JobOutcome::Delivered, "").await;
    let found = [&one, &other, &third].map(|key| (key.incarnation, key.seq));
    assert_eq!(BTreeSet::from(found), asked);
    let session = attach(&author, "a/4").await;
    session.set_rule(rule("phone", "boss")).await.expect("a rule");
    let (_, seq) = ask(&session, Duration::from_secs(3600)).await;
    assert_eq!(job(&mut jobs).await.seq, seq);
    // Who may not is told.
    let reader = server.client_as(&claims("reader", "", [Operation::Read, Operation::Append]), ClientConfig::default());
    assert_eq!(refused(&mut reader.jobs("", 1)).await, Code::FORBIDDEN);
    let session = attach(&reader, "a/1").await;
    let ruled = session.set_rule(rule("mine", "reader")).await;
    assert!(matches!(ruled, Err(ClientError::Refused { code: Code::FORBIDDEN, .. })), "{ruled:?}");
    server.stop().await;
}

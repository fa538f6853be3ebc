//! The authorization matrix: every operation of the protocol, with every grant but the one that it needs, and with that one alone.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::Code;
use mainstay_protocol::session::{
    Activity, Grant, Grants, InputPolicy, Intent, MessageId, Operation, RunId, RunMode, SignalId, Target, Triggers,
};
use mainstay_protocol::wire::*;
use mainstay_server::Config;
use mainstay_store::MemoryStore;
use mainstay_tests::harness::{QuicServer, claims};
use mainstay_tests::raw::{PATIENCE, Raw, Recv, Send, append};
use mainstay_transport::{Connection, FrameReader, SendStream};
use tokio::time::timeout;

/// What came back to a request.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// It was not refused for want of a grant.
    Allowed,
    Forbidden,
}

async fn first(frames: &mut FrameReader<Recv>) -> Answer {
    match timeout(PATIENCE, frames.next()).await.expect("an answer") {
        Ok(Some(Frame::Error(error))) if error.code == Code::FORBIDDEN => Answer::Forbidden,
        Ok(Some(Frame::Refused(refused))) if refused.code == Code::FORBIDDEN => Answer::Forbidden,
        Ok(Some(_)) => Answer::Allowed,
        other => panic!("no answer: {other:?}"),
    }
}

fn label(text: &str) -> Label {
    text.parse().expect("a label")
}

fn activity() -> Activity {
    Activity { status: label("idle"), progress: None, data: Bytes::new() }
}

fn attach(name: &str, mode: AttachMode) -> Frame {
    let session = name.parse().expect("a name");
    Attach { mode, session, incarnation: None, next: None, expire_after: None }.into()
}

/// Every request on an attachment, what it needs (any of them), and what says that it was done where the answer comes elsewhere.
fn requests() -> Vec<(Frame, Vec<Operation>)> {
    use Operation::{Append, Join, Manage, Read, Run, Signal};
    let subscribe = |start| -> Frame {
        let (streams, kinds) = (vec![], vec![]);
        Subscribe { id: 1, start, streams, kinds, window: None, folded: false }.into()
    };
    let run = RunId([1; 16]);
    vec![
        (OpenProducer { id: 1, name: label("p"), epoch: 0 }.into(), vec![Append]),
        (DefineStream { name: label("more") }.into(), vec![Append]),
        (subscribe(Start::Earliest), vec![Read]),
        (Listen { from: 0 }.into(), vec![Read]),
        (CloseSession {}.into(), vec![Manage]),
        (Trim { before: 0 }.into(), vec![Manage]),
        (Configure { runs: RunMode::Single, inputs: InputPolicy::Enqueue }.into(), vec![Manage]),
        (
            SetRule {
                name: label("r"),
                principal: "alice".parse().expect("a subject"),
                triggers: Triggers::default(),
                delay: 0,
                collapse: None,
            }
            .into(),
            vec![Manage],
        ),
        (mainstay_protocol::wire::Join { name: label("me"), grace: 5000, activity: activity() }.into(), vec![Join]),
        (Update { activity: activity() }.into(), vec![Join]),
        (StartRun { run, lease: 5000, input: None }.into(), vec![Run]),
        (TakeRun { id: 1, run: Some(run), lease: 5000, since: 0 }.into(), vec![Run]),
        (Renew { epoch: 1 }.into(), vec![Run]),
        (Release { epoch: Some(1) }.into(), vec![Run]),
        (
            mainstay_protocol::wire::Signal {
                id: SignalId([1; 16]),
                intent: Intent::Steer,
                target: Some(Target::Input(MessageId([1; 16]))),
                lasts: 1000,
                text: Bytes::new(),
            }
            .into(),
            // With `signal-own` it depends on whose that is: `runs` has more of it.
            vec![Signal],
        ),
        (
            Resume { key: mainstay_protocol::session::ClientKey([1; 32]), signature: [0; 64], token: Bytes::new() }
                .into(),
            vec![Append, Join, Run],
        ),
        (DeleteSession {}.into(), vec![Manage]),
    ]
}

async fn connect(server: &QuicServer, operations: &[Operation]) -> Raw {
    connect_with(server, operations, &[]).await
}

/// Connects with a token that allows this with everything, and that with sessions elsewhere.
async fn connect_with(server: &QuicServer, operations: &[Operation], elsewhere: &[Operation]) -> Raw {
    let mut claims = claims("mallory", "", operations.iter().copied());
    if !elsewhere.is_empty() {
        claims.grants.0.push(Grant { prefix: "elsewhere".into(), operations: elsewhere.iter().copied().collect() });
    }
    let token = server.key.mint(&claims).expect("a token");
    Raw::hello_with(server, token, [5; 16]).await
}

/// Attaches with grants that always allow that, and sends a request.
async fn ask(server: &QuicServer, grants: &[Operation], request: &Frame) -> Option<Answer> {
    ask_over(connect(server, grants).await, request).await
}

async fn ask_over(raw: Raw, request: &Frame) -> Option<Answer> {
    let (mut send, mut frames): (Send, _) = raw.open(&attach("s", AttachMode::Attach).to_bytes()).await;
    match timeout(PATIENCE, frames.next()).await.expect("an answer") {
        Ok(Some(Frame::Attached(_))) => {}
        // It needs `read` or `append` to be there at all.
        Ok(Some(Frame::Error(error))) => {
            assert_eq!(error.code, Code::FORBIDDEN);
            return None;
        }
        other => panic!("{other:?}"),
    }
    send.write(&mut [request.to_bytes()]).await.expect("write");
    // Behind it comes what has an answer of its own and needs no grant but those of the attach: LEAVE is refused as being no member.
    send.write(&mut [Frame::from(Leave {}).to_bytes()]).await.expect("write");
    Some(first(&mut frames).await)
}

async fn prepared() -> QuicServer {
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    let owner = Raw::hello(&server).await;
    let _attached = owner.attach("s").await;
    server
}

/// What a client may ask for on an attachment is looked at here, all of it.
#[test]
fn every_request_of_an_attachment_is_in_the_matrix() {
    // The one with which it begins, and what ends something of the asking one's own.
    let needs_nothing_more = ["ATTACH", "UNSUBSCRIBE", "LEAVE"];
    let registry: toml::Table = toml::from_str(include_str!("../../spec/registry.toml")).expect("the registry");
    let frames = registry["frames"].as_table().expect("frames");
    let asked = frames.iter().filter(|(_, frame)| {
        let text = |name: &str| frame[name].as_str().expect("a word");
        text("on").contains("attachment") && text("from") != "server"
    });
    let asked: Vec<&str> = asked.map(|(name, _)| name.as_str()).collect();
    assert!(asked.len() > 15, "{asked:?}");
    let known: Vec<_> = requests().into_iter().map(|(request, _)| request.name().to_owned()).collect();
    for name in asked.into_iter().filter(|name| !needs_nothing_more.contains(name)) {
        assert!(known.iter().any(|known| known == name), "{name} is not in the matrix");
    }
    // What is asked elsewhere is looked at by the tests below; the others of these need no grant.
    let elsewhere: BTreeSet<&str> = frames
        .iter()
        .filter(|(_, frame)| {
            let text = |name: &str| frame[name].as_str().expect("a word");
            !text("on").contains("attachment") && text("from") != "server"
        })
        .map(|(name, _)| name.as_str())
        .collect();
    let looked_at = ["APPEND", "DONE", "LIST", "MINT", "PULL"];
    let of_the_connection = ["CREDIT", "HELLO", "PING", "PONG", "PRODUCE", "TOKEN"];
    assert_eq!(elsewhere, looked_at.into_iter().chain(of_the_connection).collect());
}

#[tokio::test]
async fn every_request_is_refused_without_its_grant_and_allowed_with_it() {
    let mut looked_at = 0;
    for (request, needs) in requests() {
        // With everything else.
        let server = prepared().await;
        let others: Vec<Operation> = Operation::ALL.into_iter().filter(|one| !needs.contains(one)).collect();
        let answer = ask(&server, &others, &request).await;
        let expected = match others.contains(&Operation::Read) || others.contains(&Operation::Append) {
            true => Some(Answer::Forbidden),
            false => None,
        };
        assert_eq!(answer, expected, "{} with everything but {needs:?}", request.name());
        // Nor is it enough to have that for other sessions.
        let raw = connect_with(&server, &others, &needs).await;
        let answer = ask_over(raw, &request).await;
        assert_eq!(answer, expected, "{} with {needs:?} elsewhere", request.name());
        // With each single one that is not it, and what an attach needs.
        for one in &others {
            let attaches = [Operation::Read, Operation::Append].into_iter().find(|by| !needs.contains(by));
            let attaches = attaches.expect("one of them is not needed");
            let answer = ask(&server, &[*one, attaches], &request).await;
            assert_eq!(answer, Some(Answer::Forbidden), "{} with {one:?} and {attaches:?} alone", request.name());
            looked_at += 1;
        }
        // With what it needs, and what an attach needs.
        for one in &needs {
            let server = prepared().await;
            let enough = [*one, if needs.contains(&Operation::Append) { Operation::Append } else { Operation::Read }];
            let answer = ask(&server, &enough, &request).await;
            assert_eq!(answer, Some(Answer::Allowed), "{} with {one:?}", request.name());
            looked_at += 1;
        }
    }
    assert!(looked_at > 100, "{looked_at}");
}

#[tokio::test]
async fn what_is_asked_beside_attachments_needs_its_grants_too() {
    let server = prepared().await;
    let without = |operations: &[Operation]| -> Vec<Operation> {
        Operation::ALL.into_iter().filter(|one| !operations.contains(one)).collect()
    };
    // Attach: read or append.
    for (grants, expected) in [
        (vec![Operation::Read], Answer::Allowed),
        (vec![Operation::Append], Answer::Allowed),
        (without(&[Operation::Read, Operation::Append]), Answer::Forbidden),
    ] {
        let raw = connect(&server, &grants).await;
        let (_send, mut frames) = raw.open(&attach("s", AttachMode::Attach).to_bytes()).await;
        assert_eq!(first(&mut frames).await, expected, "{grants:?}");
    }
    // Create, in both ways.
    for mode in [AttachMode::Create, AttachMode::CreateNew] {
        for (grants, elsewhere, expected) in [
            (vec![Operation::Read, Operation::Create], vec![], Answer::Allowed),
            (without(&[Operation::Create]), vec![], Answer::Forbidden),
            (without(&[Operation::Create]), vec![Operation::Create], Answer::Forbidden),
            (without(&[Operation::Read, Operation::Append]), vec![], Answer::Forbidden),
        ] {
            let raw = connect_with(&server, &grants, &elsewhere).await;
            let name = format!("new-{mode:?}-{}", expected == Answer::Allowed);
            let (_send, mut frames) = raw.open(&attach(&name, mode).to_bytes()).await;
            assert_eq!(first(&mut frames).await, expected, "{mode:?} with {grants:?}, elsewhere {elsewhere:?}");
        }
    }
    // A list names what may be read, and nothing else.
    for (grants, expected) in [(vec![Operation::Read], true), (without(&[Operation::Read]), false)] {
        let raw = connect(&server, &grants).await;
        let list = Frame::from(List { prefix: Bytes::new(), after: Bytes::new(), limit: 10 }).to_bytes();
        let (_send, mut frames) = raw.open(&list).await;
        match timeout(PATIENCE, frames.next()).await.expect("an answer") {
            Ok(Some(Frame::Listed(listed))) => assert_eq!(!listed.sessions.is_empty(), expected, "{grants:?}"),
            other => panic!("{other:?}"),
        }
    }
    // Nor does it say where the names of others are: not by the end of a page either.
    let client = server.client();
    for name in ["a/1", "b/1", "b:2", "b", "bc", "c/1"] {
        client.session(name).expect("a name").create().attach().await.expect("attach");
    }
    let token = server.key.mint(&claims("reader", "b", [Operation::Read])).expect("a token");
    let raw = Raw::hello_with(&server, token, [5; 16]).await;
    let (mut after, mut found) = (Bytes::new(), Vec::new());
    for _ in 0..10 {
        let list = Frame::from(List { prefix: Bytes::new(), after: after.clone(), limit: 1 }).to_bytes();
        let (_send, mut frames) = raw.open(&list).await;
        let Ok(Some(Frame::Listed(listed))) = timeout(PATIENCE, frames.next()).await.expect("an answer") else {
            panic!("no list");
        };
        assert!(listed.sessions.len() <= 1);
        found.extend(listed.sessions.iter().map(|session| session.name.to_string()));
        after = listed.next;
        if after.is_empty() {
            break;
        }
        assert!(found.iter().any(|name| name.as_bytes() == after), "{after:?} is the name of one that may be read");
    }
    assert!(after.is_empty(), "it comes to an end");
    assert_eq!(found, ["b", "b/1", "b:2"]);
    // Jobs: notify.
    let pull = Frame::from(Pull { prefix: Bytes::new(), limit: 1 }).to_bytes();
    let raw = connect(&server, &without(&[Operation::Notify])).await;
    let (_send, mut frames) = raw.open(&pull).await;
    assert_eq!(first(&mut frames).await, Answer::Forbidden);
    let raw = connect(&server, &[Operation::Notify]).await;
    let (_send, mut frames) = raw.open(&pull).await;
    let nothing = timeout(std::time::Duration::from_millis(200), frames.next()).await;
    assert!(nothing.is_err(), "it waits for jobs: {nothing:?}");
    // Tokens: mint.
    let mint = |grants: Grants| Frame::from(Mint { name: label("x"), lasts: 10, device: None, grants }).to_bytes();
    let wanted = claims("x", "s", [Operation::Read]).grants;
    for (grants, expected) in [
        (vec![Operation::Read, Operation::Mint], Answer::Allowed),
        (without(&[Operation::Mint]), Answer::Forbidden),
        (without(&[Operation::Read]), Answer::Forbidden),
    ] {
        let raw = connect(&server, &grants).await;
        let (_send, mut frames) = raw.open(&mint(wanted.clone())).await;
        assert_eq!(first(&mut frames).await, expected, "{grants:?}");
    }
}

/// A producer that is open goes on only as long as the token grants it.
#[tokio::test]
async fn batches_need_append_when_they_come() {
    let server = prepared().await;
    let mut raw = connect(&server, &Operation::ALL).await;
    let mut attachment = raw.attach("s").await;
    let mut batches = raw.producer(&mut attachment, 1).await;
    batches.write(&mut [append(0, 10)]).await.expect("write");
    assert_eq!(first(&mut attachment.1).await, Answer::Allowed);
    let without: Vec<Operation> =
        Operation::ALL.into_iter().filter(|one| !matches!(one, Operation::Append | Operation::Create)).collect();
    let narrower = server.key.mint(&claims("mallory", "", without)).expect("a token");
    raw.control.0.write(&mut [Frame::from(Token { token: narrower.into() }).to_bytes()]).await.expect("write");
    loop {
        // The first AUTHENTICATED is that of HELLO.
        let frame = timeout(PATIENCE, raw.control.1.next()).await.expect("an answer").expect("no error");
        if matches!(frame, Some(Frame::Authenticated(_))) {
            break;
        }
    }
    mainstay_tests::until("the narrower token is in force", async || {
        let (_send, mut frames) = raw.open(&attach("other", AttachMode::Create).to_bytes()).await;
        first(&mut frames).await == Answer::Forbidden
    })
    .await;
    batches.write(&mut [append(1, 10)]).await.expect("write");
    assert_eq!(first(&mut attachment.1).await, Answer::Forbidden);
    raw.connection.close(0, "done");
}

/// A job that was given is finished only by whoever may still be told of it (spec NOTE-5).
#[tokio::test]
async fn a_job_is_done_as_long_as_the_token_grants_it() {
    let server = prepared().await;
    let client = server.client();
    let session = client.session("s").expect("a name").attach().await.expect("attach");
    let triggers = Triggers::new([mainstay_client::Kind::REQUEST_OPENED]).expect("triggers");
    let (name, principal) = (label("phone"), "dev".parse().expect("a subject"));
    let rule = mainstay_client::NotifyRule { name, principal, triggers, delay: 0, collapse: None };
    session.set_rule(rule).await.expect("a rule");
    let producer = session.producer("agent").await.expect("a producer");
    let run = session.start_run(PATIENCE, None).await.expect("a run");
    let (_, asked) = run.request(&producer, "approval", PATIENCE, "may I").await.expect("append");
    let seq = asked.await.expect("stored");

    let mut raw = connect(&server, &Operation::ALL).await;
    let (mut send, mut frames) = raw.open(&Frame::from(Pull { prefix: Bytes::new(), limit: 1 }).to_bytes()).await;
    let Ok(Some(Frame::Job(job))) = timeout(PATIENCE, frames.next()).await.expect("in time") else { panic!("no job") };
    assert_eq!(job.job, seq);
    let without: Vec<Operation> = Operation::ALL.into_iter().filter(|one| *one != Operation::Notify).collect();
    let narrower = server.key.mint(&claims("mallory", "", without)).expect("a token");
    raw.control.0.write(&mut [Frame::from(Token { token: narrower.into() }).to_bytes()]).await.expect("write");
    let mut believed = 0;
    while believed < 2 {
        let frame = timeout(PATIENCE, raw.control.1.next()).await.expect("an answer").expect("no error");
        believed += u32::from(matches!(frame, Some(Frame::Authenticated(_))));
    }
    let (number, outcome) = (job.number, mainstay_client::JobOutcome::Delivered);
    let _ = send.write(&mut [Frame::from(Done { number, outcome, detail: Detail::new("") }).to_bytes()]).await;
    assert_eq!(first(&mut frames).await, Answer::Forbidden);
    // Another one gets it: it was not done.
    let mut jobs = client.jobs("", 1);
    match timeout(PATIENCE, jobs.next()).await.expect("in time") {
        Some(Ok(mainstay_client::JobEvent::Job(again))) => assert_eq!(again.key.seq, seq),
        other => panic!("{other:?}"),
    }
}
